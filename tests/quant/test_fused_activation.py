"""Activations in compiled code: the same bits and gradients as in eager mode, whatever shape and memory layout."""

import logging

import pytest
import torch

from qpipe.quant import affine, fused
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.compiled import compiler
from qpipe.quant.quantizer import QuantContext

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
STATIC = {"granularity": "tensor", "dynamic": False}
OPTIONS = [
    {},
    {"symmetric": False},
    {"granularity": "tensor", "symmetric": False},
    {**STATIC, "symmetric": True},
    {**STATIC, "symmetric": False},
    {**STATIC, "symmetric": False, "bits": 16},
]


def made(compiled, **options):
    quantizer = UniformActivation(ActivationOptions(**options))
    quantizer.attach(QuantContext(compiled=compiled), "block:output")
    if not quantizer.options.dynamic:
        quantizer.low.fill_(-1.0)
        quantizer.high.fill_(1.5)
        quantizer.freeze_range()
    return quantizer


def values(dtype):
    """A plain activation, heads moved before tokens as attention has them, one without rows beside it, and a gap."""
    draws = torch.randn((2, 5, 4, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    yield draws.view(2, 5, 24)
    yield draws.transpose(1, 2)
    yield draws.view(1, 1, -1)
    yield draws.view(2, 5, 24)[..., 3:9]


def outcome(quantizer, value):
    """Quantized value and gradient, of an upstream gradient that nobody else holds."""
    leaf = value.detach().requires_grad_()
    result = quantizer(leaf * 1.0)
    result.mul(3.0).sum().backward()
    return result.detach(), leaf.grad


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_activations_are_the_eager_ones(options, dtype):
    fast, plain = made(True, **options), made(False, **options)
    for value in values(dtype):
        for found, expected in zip(outcome(fast, value), outcome(plain, value), strict=True):
            assert torch.equal(found, expected)
    assert fast.context.compiled, "fell back to eager mode"


@needs_compiler
def test_the_gradient_may_be_overwritten_where_nobody_holds_it():
    quantizer, value = made(True, **STATIC), torch.linspace(-3, 3, 48).view(2, 4, 6).requires_grad_()
    held = torch.full((2, 4, 6), 2.0)
    quantizer(value).backward(held)
    inside = (value >= quantizer.low) & (value <= quantizer.high)  # symmetric: the range is [-1.5, 1.5) and one step
    assert torch.equal(held, torch.full((2, 4, 6), 2.0))
    assert torch.equal(value.grad[inside], held[inside]) and not value.grad.abs()[value.abs() > 1.6].any()


@needs_compiler
def test_the_gradient_can_be_differentiated_again():
    quantizer, value = made(True, **STATIC), torch.linspace(-3, 3, 48).view(2, 4, 6).requires_grad_()
    (first,) = torch.autograd.grad(quantizer(value).square().sum(), value, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), value)
    inside = (value >= quantizer.low) & (value <= quantizer.high)
    assert torch.equal(second[inside], torch.full_like(second[inside], 2.0))
    assert not second[value.abs() > 1.6].any()


def test_rows_follow_memory():
    value = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(fused.memory_rows(value.transpose(0, 2)).flatten(), torch.arange(24.0))
    assert fused.memory_rows(value[:, :, 1:]) is None
    assert fused.memory_rows(torch.tensor(1.0)) is None


def test_scales_that_fit_no_row_are_left_to_eager_mode():
    value = torch.zeros(2, 3, 4)
    assert fused.matching_rows(value, torch.ones(4))[1] == (1, -1)
    assert fused.matching_rows(value, torch.ones(2, 3, 1))[1] == (-1, 1)
    assert fused.matching_rows(value, torch.ones(3)) is None
    assert fused.matching_rows(value, torch.ones(2, 1, 4)) is None


def test_compiled_code_that_differs_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(affine, "fused_quantize", lambda context, value, *rest: (torch.zeros_like(value), None))
    quantizer, value = made(True), torch.ones(1, 2, 3)
    with caplog.at_level(logging.WARNING, "qpipe.compile"):
        assert torch.equal(quantizer(value), made(False)(value))
    assert "differs from eager mode at block:output" in caplog.text and not quantizer.context.compiled
