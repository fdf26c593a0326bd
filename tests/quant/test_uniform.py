"""The uniform weight quantizer against its contract and against closed forms."""

import pytest
import torch
from pydantic import ValidationError

from qpipe import SiteError
from qpipe.builtin.uniform import UniformOptions, UniformWeight
from qpipe.quant.quantizer import QuantContext
from qpipe.quant.rounding import block_rows
from qpipe.quant.tensor import code_range
from qpipe.testing import check_quantizer

GRANULARITIES = [{"granularity": "tensor"}, {"granularity": "channel"}, {"granularity": "group", "group_size": 16}]
GRIDS = [
    {"bits": bits, "symmetric": symmetric, **granularity}
    for bits in range(2, 9)
    for symmetric in (True, False)
    for granularity in GRANULARITIES
]
SHAPES = {"linear": (24, 64), "convolution": (6, 8, 3, 4), "depthwise": (16, 1, 4, 4), "embedding": (101, 48)}


def name(grid):
    return f"{grid['bits']}-{'sym' if grid['symmetric'] else 'asym'}-{grid['granularity']}"


def make(dtype=torch.float32, **options):
    quantizer = UniformWeight(UniformOptions(**options))
    quantizer.attach(QuantContext(scale_dtype=dtype), "m:weight")
    return quantizer


def weight(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.05 + 0.01).to(dtype)


@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_contract(grid):
    check_quantizer(lambda: UniformWeight(UniformOptions(**grid)))


def by_scale(value, lattice):
    """`value` with one row per scale."""
    if lattice.granularity == "tensor":
        return value.reshape(1, -1)
    return value.reshape(lattice.scale.numel(), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_closed_form(grid, shape, dtype):
    value = weight(shape, dtype)
    value.view(-1)[5] = 0.0
    lattice = make(dtype, **grid).encode(value)
    low, high = code_range(grid["bits"])
    rows, codes, decoded = (by_scale(t, lattice).float() for t in (value, lattice.codes, lattice.decode()))
    scale = lattice.scale.reshape(-1, 1)
    half_step = 0.5 * scale if dtype == torch.float32 else scale
    assert lattice.codes.shape == value.shape
    assert float(lattice.decode(dtype).view(-1)[5]) == 0.0
    if grid["symmetric"]:
        # The largest weight of every row lies on the largest code, whatever the sign, and -2**(bits-1) is unused.
        assert torch.equal(codes.abs().amax(1), torch.full((len(codes),), float(high)))
        peak = rows.abs().amax(1, keepdim=True)
        torch.testing.assert_close(scale, peak / high, rtol=2**-8 if dtype != torch.float32 else 1e-6, atol=0)
        assert lattice.zero_point.tolist() == [0.0]
    else:
        assert codes.amin() >= low and codes.amax() <= high
        zero = lattice.zero_point.reshape(-1)
        assert torch.equal(zero, zero.round()) and zero.amin() >= low and zero.amax() <= high
        for edge in (rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)):
            place = rows == edge
            errors = ((decoded - rows).abs() * place).amax(1, keepdim=True)
            assert bool((errors <= 1.001 * (half_step + half_step)).all())
        spread = rows.amax(1).clamp_min(0) - rows.amin(1).clamp_max(0)
        torch.testing.assert_close(scale[:, 0], spread / (high - low), rtol=2**-8, atol=0)
    inside = (decoded - rows).abs() <= (1.001 if grid["symmetric"] else 2.002) * half_step
    assert bool(inside.all())


def test_known_values():
    value = torch.tensor([[-0.7, 0.1, 0.24, 0.7], [0.0, 0.0, 0.0, 0.0]])
    lattice = make(bits=4).encode(value)
    assert lattice.codes.tolist() == [[-7, 1, 2, 7], [0, 0, 0, 0]]
    torch.testing.assert_close(lattice.scale, torch.tensor([[0.1], [1.0]]))
    asymmetric = make(bits=2, symmetric=False).encode(torch.tensor([[-1.0, 0.0, 0.9, 2.0], [1.0, 2.0, 3.0, 3.0]]))
    assert asymmetric.codes.tolist() == [[-2, -1, 0, 1], [-1, 0, 1, 1]]
    assert asymmetric.zero_point.tolist() == [[-1.0], [-2.0]]
    assert asymmetric.scale.tolist() == [[1.0], [1.0]]


def test_ties_go_to_even():
    value = torch.tensor([[0.5, 1.5, 2.5, -0.5, 7.0]])
    assert make(bits=4).encode(value).codes.tolist() == [[0, 2, 2, 0, 7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [g for g in GRIDS if g["bits"] in (3, 8)], ids=name)
def test_blockwise_quantize_is_bitwise_encode_and_decode(grid, dtype):
    """Several blocks with an incomplete last one, and an odd number of columns where groups allow it."""
    columns = 1328 if grid["granularity"] == "group" else 1333
    value = weight((307, columns), dtype)
    width = grid.get("group_size", columns)
    rows = value.numel() // width
    size = block_rows(value.view(rows, width))
    assert rows > 3 * size and rows % size, "there must be several blocks, and an incomplete one"
    quantizer = make(dtype, **grid)
    expected = quantizer.encode(value).decode(dtype)
    assert torch.equal(quantizer.quantize(value), expected)
    out = torch.full_like(value, torch.nan)
    assert quantizer.quantize(value, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g["bits"] == 4], ids=name)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_memory_layout_changes_nothing(shape, grid):
    value = weight(shape)
    other = value.to(memory_format=torch.channels_last) if value.ndim == 4 else value.t().contiguous().t()
    assert other.stride() != value.stride() or 1 in shape
    quantizer = make(**grid)
    expected = quantizer.encode(value).decode()
    assert torch.equal(quantizer.encode(other).decode(), expected)
    assert torch.equal(quantizer.quantize(other), expected)


def test_scales_are_rounded_to_the_exported_type():
    value = weight((8, 32))
    assert torch.equal(
        make(torch.bfloat16).encode(value).scale.bfloat16().float(), make(torch.bfloat16).encode(value).scale
    )
    assert not torch.equal(make().encode(value).scale, make(torch.bfloat16).encode(value).scale)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g["bits"] == 4], ids=name)
def test_gradient_passes_unchanged(grid):
    value = weight((24, 64)).requires_grad_()
    upstream = torch.randn(24, 64)
    make(**grid)(value).backward(upstream)
    assert torch.equal(value.grad, upstream)


@pytest.mark.parametrize("channels", [2, 7])
@pytest.mark.parametrize("method", ["encode", "quantize"])
def test_group_size_must_divide_a_channel(method, channels):
    """Also where it divides the whole tensor, so that no group spans two channels."""
    quantizer = make(granularity="group", group_size=7)
    with pytest.raises(SiteError, match="group size 7 does not divide the 64 elements of a channel.*choose a divisor"):
        getattr(quantizer, method)(weight((channels, 64)))


@pytest.mark.parametrize(
    "options",
    [{"bits": 1}, {"bits": 9}, {"granularity": "group"}, {"group_size": 8}, {"granularity": "row"}, {"bit": 4}],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        UniformOptions(**options)
