"""The contract of quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from qpipe.quant.quantizer import QuantContext, Quantizer
from qpipe.quant.tensor import code_range


def sample_weights(seed: int = 0) -> Iterable[Tensor]:
    """Weights that quantizers meet: ordinary, tiny, with an all-zero row, with an outlier, and one row."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.randn(24, 64, generator=generator) * 0.05
    yield ordinary
    yield ordinary * 1e-6
    zero_row = ordinary.clone()
    zero_row[3] = 0
    yield zero_row
    outlier = ordinary.clone()
    outlier[5, 7] = 40.0
    yield outlier
    yield ordinary[:1]


def check_quantizer(
    make: Callable[[], Quantizer], dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16)
) -> None:
    """Check a weight quantizer on `sample_weights`.

    Codes are integers in range; decoding equals the forward pass bit for bit; the fast path equals encode-decode; the
    lattice is stable when encoded again; a saved state gives the same after `allocate`; gradients are finite; switching
    quantization off gives the weight back, or what it stands for; without rounding it computes finite values of the
    same form, and QuantNoise mixes these with the quantized ones.

    Args:
        make: returns a new quantizer.
        dtypes: types of the weights; scales are snapped to the same type.

    Raises:
        AssertionError: the contract is broken; says where.
    """
    for dtype in dtypes:
        for number, sample in enumerate(sample_weights()):
            _check(make(), sample.to(dtype), f"{dtype}, sample {number}")
        _check_restored(make(), make(), next(iter(sample_weights())).to(dtype), str(dtype))


def _check(quantizer: Quantizer, weight: Tensor, where: str) -> None:
    context = QuantContext(scale_dtype=weight.dtype)
    quantizer.attach(context, "checked:weight")
    with torch.no_grad():
        replacement = quantizer.initialize(weight)
    value = (weight if replacement is None else replacement).clone().requires_grad_()
    with torch.no_grad():
        lattice = quantizer.encode(value.detach())
    low, high = code_range(lattice.bits)
    codes = lattice.integers()
    assert int(codes.min()) >= low and int(codes.max()) <= high, f"{where}: codes leave [{low}, {high}]"
    assert lattice.scale.dtype == torch.float32, f"{where}: scales must be float32"
    assert bool((lattice.scale > 0).all()), f"{where}: scales must be positive"
    assert torch.equal(lattice.scale, lattice.scale.to(weight.dtype).float()), f"{where}: scales are not snapped"
    out = quantizer(value)
    decoded = lattice.decode(weight.dtype)
    assert out.dtype == weight.dtype and out.shape == weight.shape, f"{where}: forward changed dtype or shape"
    assert torch.equal(out, decoded), f"{where}: forward differs from encode().decode()"
    assert bool(torch.isfinite(decoded).all()), f"{where}: decoded values are not finite"
    out.float().square().sum().backward()
    assert value.grad is not None and bool(torch.isfinite(value.grad).all()), f"{where}: gradient is not finite"
    _check_cache(quantizer, value, decoded, where)
    if quantizer.row_wise:
        with torch.no_grad():
            picked = torch.tensor([len(value) - 1, 0, 0])
            whole, rows = quantizer.encode(value).decode(value.dtype), quantizer.forward_rows(value[picked])
        assert torch.equal(rows, whole[picked]), f"{where}: rows are not quantized by themselves, as row_wise says"
    _check_unrounded(quantizer, value, where)
    context.enabled = False
    if replacement is None:
        assert quantizer(value) is value, f"{where}: a disabled quantizer must return its input"
    else:
        assert torch.equal(quantizer(value), quantizer.master(value)), f"{where}: disabled, it must return the master"


def _check_unrounded(quantizer: Quantizer, value: Tensor, where: str) -> None:
    context = quantizer.context
    context.rounding = False
    unrounded = quantizer(value)
    context.rounding = True
    assert unrounded.dtype == value.dtype and unrounded.shape == value.shape, (
        f"{where}: full_precision changed dtype or shape"
    )
    assert bool(torch.isfinite(unrounded).all()), f"{where}: full_precision is not finite"
    (grad,) = torch.autograd.grad(unrounded.float().square().sum(), value)
    assert bool(torch.isfinite(grad).all()), f"{where}: the gradient of full_precision is not finite"
    quantized = quantizer(value)
    context.noise = 0.5
    mixed = quantizer(value)
    context.noise = 1.0
    kept = (mixed == quantized) | (mixed == unrounded)
    assert bool(kept.all()), f"{where}: QuantNoise gives values that are neither quantized nor those of full_precision"


def _check_restored(trained: Quantizer, fresh: Quantizer, weight: Tensor, where: str) -> None:
    for quantizer in (trained, fresh):
        quantizer.attach(QuantContext(scale_dtype=weight.dtype), "checked:weight")
    with torch.no_grad():
        replacement = trained.initialize(weight)
        value = weight if replacement is None else replacement
        fresh.allocate(weight * 2)
        fresh.load_state_dict(trained.state_dict())
        same = torch.equal(fresh.quantize(value), trained.quantize(value))
    assert same, f"{where}: loading a saved state after allocate() gives other codes"


def _check_cache(quantizer: Quantizer, value: Tensor, decoded: Tensor, where: str) -> None:
    with torch.no_grad():
        value.mul_(1.5)
        stale = quantizer(value)
        assert torch.equal(stale, decoded), f"{where}: quantized again although the weights were not said to change"
        quantizer.context.weights_changed()
        fresh, expected = quantizer(value), quantizer.encode(value).decode(value.dtype)
    assert torch.equal(fresh, expected), f"{where}: after a change of the weight the old codes are still in use"
