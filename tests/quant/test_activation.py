"""Activations, bit for bit as compressed-tensors computes them, and calibration."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from pydantic import ValidationError

from qpipe import TrainingError
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.quantizer import QuantContext
from qpipe.quant.tensor import code_range

DTYPES = [torch.float32, torch.bfloat16]
SHAPE = (3, 7, 64)


def make(dtype=torch.float32, **options):
    quantizer = UniformActivation(ActivationOptions(**options))
    quantizer.attach(QuantContext(scale_dtype=dtype), "m:input")
    return quantizer


def activation(dtype, seed=0, shape=SHAPE):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.3
    x[0, 0] = 0  # a token without range
    x[1, 2] = x[1, 2].abs() + 1  # a token without negative values
    x[2, 3, 4] = 70
    return x.to(dtype)


def calibrated(x, dtype, **options):
    quantizer = make(dtype, dynamic=False, granularity="tensor", **options)
    quantizer.observing = seen = quantizer.observer()
    for number, part in enumerate(x.split(1)):
        quantizer.context.calibration_batch = number
        assert quantizer(part) is part
    quantizer.observing = None
    quantizer.calibrated(seen)
    return quantizer


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_dynamic_ranges_equal_compressed_tensors(granularity, dtype, symmetric, bits):
    x = activation(dtype)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=granularity, dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    expected = fake_quantize(x, scale, zero, args)
    found = make(dtype, bits=bits, symmetric=symmetric, granularity=granularity)(x)
    assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_static_ranges_equal_compressed_tensors(dtype, symmetric):
    seen, x = activation(dtype), activation(dtype, seed=1) * 3
    quantizer = calibrated(seen, dtype, symmetric=symmetric)
    args = QuantizationArgs(num_bits=8, type="int", symmetric=symmetric, strategy="tensor", dynamic=False)
    low, high = torch.aminmax(seen.float())
    scale, zero = calculate_qparams(low, high, args)
    assert torch.equal(quantizer.scale, scale.to(dtype).float())
    assert torch.equal(quantizer.zero_point, zero.float())
    expected = fake_quantize(x, scale.to(dtype), zero, args)
    assert torch.equal(quantizer(x), expected)
    assert float((expected.float() - x.float()).abs().max()) > 10, "nothing is clipped, so the test shows little"


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"symmetric": False, "bits": 4}], ids=str)
def test_forward_is_encode_and_decode(options):
    x = activation(torch.float32)
    quantizer = make(**options)
    lattice = quantizer.encode(x)
    low, high = code_range(lattice.bits)
    assert int(lattice.integers().min()) >= low and int(lattice.integers().max()) <= high
    assert torch.equal(quantizer(x), lattice.decode())


def test_closed_form_of_a_symmetric_token():
    x = torch.tensor([[[127.5, -127.5, 63.7, 0.4]]])
    # Scale 1 reaches from -128 to 127, so the largest value is clipped and its negative is rounded.
    assert make()(x).tolist() == [[[127.0, -128.0, 64.0, 0.0]]]


def test_more_than_three_axes_share_a_range_per_token():
    x = activation(torch.float32).view(3, 7, 4, 16)
    assert torch.equal(make()(x).view(SHAPE), make()(x.view(SHAPE)))


@pytest.mark.parametrize("slot", ["query", "key", "value", "raw_scores", "scores", "probs"])
def test_a_token_has_one_range_over_its_heads(slot):
    x = activation(torch.float32).view(3, 7, 4, 16).transpose(1, 2)
    quantizer = make()
    quantizer.attach(QuantContext(), f"m:{slot}")
    assert torch.equal(quantizer(x).transpose(1, 2).reshape(SHAPE), make()(x.transpose(1, 2).reshape(SHAPE)))
    assert quantizer.parameters_of(x)[0].shape == (3, 1, 7, 1)


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"symmetric": False}], ids=str)
def test_dynamic_gradient_passes_unchanged(options):
    x = activation(torch.float32).requires_grad_()
    upstream = torch.randn(SHAPE)
    make(**options)(x).backward(upstream)
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_gradient_is_zero_where_the_value_is_clipped(symmetric):
    seen = activation(torch.float32)
    quantizer = calibrated(seen, torch.float32, symmetric=symmetric)
    x = (seen * 2).requires_grad_()
    upstream = torch.ones(SHAPE)
    quantized = quantizer(x)
    quantized.backward(upstream)
    low, high = quantized.min(), quantized.max()
    outside = (x < low - quantizer.scale) | (x > high + quantizer.scale)
    inside = (x > low) & (x < high)
    assert bool(outside.any()) and bool(inside.any())
    assert bool((x.grad[outside] == 0).all()) and bool((x.grad[inside] == 1).all())


@pytest.mark.parametrize("shape", [(4, 8), (8,)])
def test_per_token_ranges_need_a_token_axis(shape):
    with pytest.raises(
        TrainingError, match=r"m:input: per-token ranges need \[batch, tokens, features\].*granularity: tensor"
    ):
        make()(torch.ones(shape))


def test_per_tensor_takes_any_shape():
    assert make(granularity="tensor")(torch.ones(4, 8)).shape == (4, 8)


def test_static_ranges_must_be_calibrated():
    quantizer = make(dynamic=False, granularity="tensor")
    with pytest.raises(TrainingError, match="m:input has static ranges that were never calibrated"):
        quantizer(torch.ones(2, 2))
    with pytest.raises(TrainingError, match="m:input saw no data in calibration"):
        quantizer.calibrated(quantizer.observer())


def test_calibration_refuses_a_constant(caplog):
    with pytest.raises(TrainingError, match="m:input saw nothing but the value 3 in calibration.*quantizer: none"):
        calibrated(torch.full((2, 2), 3.0), torch.float32)
    with pytest.raises(TrainingError, match="m:input saw nothing but the value 0 in calibration"):
        calibrated(torch.zeros(1, 1), torch.float32)
    assert not caplog.records
    assert calibrated(torch.tensor([[3.0]]), torch.float32).high.item() == 3, "one logit of one example"
    assert "m:input: one value, 3, is all that calibration saw" in caplog.text


@pytest.mark.parametrize(("value", "name"), [(torch.nan, "NaN"), (-torch.inf, "infinity")])
def test_calibration_refuses_non_finite_values(value, name):
    quantizer = make(dynamic=False, granularity="tensor")
    quantizer.observing = quantizer.observer()
    with pytest.raises(TrainingError, match=f"calibration met {name} at m:input in batch 1; ranges need finite"):
        quantizer(torch.tensor([1.0, value]))


def test_calibration_covers_all_batches():
    quantizer = calibrated(torch.tensor([[1.0, -3.0], [5.0, 0.0]]), torch.float32, symmetric=False)
    assert quantizer.low.item() == -3 and quantizer.high.item() == 5
    torch.testing.assert_close(quantizer.scale, torch.tensor([8 / 255]))


def test_calibrated_ranges_are_state():
    quantizer = calibrated(activation(torch.float32), torch.float32)
    again = make(dynamic=False, granularity="tensor")
    again.load_state_dict(quantizer.state_dict())
    x = activation(torch.float32, seed=2)
    assert torch.equal(again(x), quantizer(x))


def test_disabled_is_the_identity_for_static_ranges_too():
    quantizer = calibrated(activation(torch.float32), torch.float32)
    quantizer.context.enabled = False
    x = torch.full((2, 2), 1e4, requires_grad=True)
    assert quantizer(x) is x


@pytest.mark.parametrize("values", ["around 0", "above 0", "below 0", "all 0"])
@pytest.mark.parametrize("bits", [4, 8, 12, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic_ranges_are_those_of_the_documented_format(values, bits, symmetric, dtype):
    """docs/format.md in plain operations."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 3
    x = {"around 0": x, "above 0": x.abs() + 1, "below 0": -x.abs() - 1, "all 0": x * 0}[values].to(dtype)
    given = x.float() if bits > 8 else x
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = given.min().clamp_max(0), given.max().clamp_min(0)
    if values == "all 0":
        scale, zero = given.new_tensor(torch.finfo(given.dtype).eps), given.new_zeros(())
    elif symmetric:
        scale, zero = torch.maximum(-low, high) / ((2**bits - 1) / 2), given.new_zeros(())
    else:
        scale = (high - low) / (2**bits - 1)
        zero = (bottom - low / scale).clamp(bottom, top).round()
    code = (given / scale + zero).clamp(bottom, top).round()
    options = ActivationOptions(bits=bits, symmetric=symmetric, granularity="tensor")
    assert torch.equal(UniformActivation(options)(x), ((code - zero) * scale).to(dtype))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sixteen_bits_are_formed_in_float32(dtype, symmetric):
    """Against float64: bfloat16 arithmetic would tell no more than 256 codes apart."""
    seen, x = activation(dtype), activation(dtype, seed=1)
    quantizer = calibrated(seen, dtype, symmetric=symmetric, bits=16)
    found = quantizer(x)
    scale, zero = quantizer.scale.double(), quantizer.zero_point.double()
    codes = (x.double() / scale + zero).round().clamp(-(2**15), 2**15 - 1)
    exact = quantizer(x.float())
    # A value next to the border of two codes may fall on either side.
    torch.testing.assert_close(exact.double(), (codes - zero) * scale, rtol=0, atol=1.001 * float(scale))
    assert found.dtype == dtype and torch.equal(found, exact.to(dtype))
    low, high = min(0.0, float(seen.min())), float(seen.max())
    width = 2 * max(high, -low) if symmetric else high - low
    assert float(scale) == pytest.approx(width / 65535, rel=1e-6), "not rounded to the type of the export"
    lattice = quantizer.encode(x)
    assert torch.equal(lattice.decode(dtype), found) and lattice.integers().dtype == torch.int16
    if dtype == torch.float32:
        assert len(lattice.codes.unique()) > 1000


@pytest.mark.parametrize(
    "options",
    [
        {"dynamic": False},
        {"bits": 17},
        {"granularity": "channel"},
        {"scale": 1},
        {"range": "mse"},
        {"range_options": {"momentum": 0.5}},
        {"dynamic": False, "granularity": "tensor", "narrow": True},
        {"dynamic": False, "granularity": "tensor", "clip": 2.5},
        {"clip": 0},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        ActivationOptions(**options)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_levels_end_where_the_cut_values_do(dtype, symmetric):
    """Also where compiled code does it, and for a token of zeros."""
    x = activation(dtype)
    quantizer = make(dtype, narrow=True, clip=2.5, symmetric=symmetric)
    out = quantizer(x)
    assert torch.isfinite(out).all() and not out[0, 0].any()
    cut = x.float().clamp(-2.5, 2.5)
    step = torch.finfo(dtype).eps * 2.5
    torch.testing.assert_close(out.float().amax(-1), cut.amax(-1), rtol=0, atol=cut.amax().item() / 64 + step)
    assert float(out.float().abs().max()) <= 2.5 + 3 * step
    learned = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(quantizer(learned).sum(), learned)
    assert torch.equal(grad != 0, x.abs() < 2.5) and (x == 70).any()
    quantizer.context.compiled = True
    assert torch.equal(quantizer(x), out)


@pytest.mark.parametrize("switch", ["enabled", "rounding"])
@pytest.mark.parametrize(
    "options", [{"clip": 1.0}, {"dynamic": False, "granularity": "tensor"}], ids=["clip", "static"]
)
def test_switched_off_the_value_passes_with_its_whole_gradient(options, switch):
    quantizer = make(**options)
    if not options.get("dynamic", True):
        quantizer.low.fill_(-1.0)
        quantizer.high.fill_(1.0)
        quantizer.freeze_range()
    x = activation(torch.float32).requires_grad_()
    assert not torch.equal(quantizer(x), x)
    setattr(quantizer.context, switch, False)
    out = quantizer(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, x) and bool((grad == 1).all())
