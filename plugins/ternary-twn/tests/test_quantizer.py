import copy
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from qpipe_ternary_twn import TernaryOptions, TernaryTwn, TernaryTwnOptions, TernaryWeight
from safetensors.torch import load_file
from torch import nn

from qpipe import QuantContext
from qpipe.builtin.modules import HOSTS

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "twn.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "twn.safetensors")


def golden(case, name):
    return TENSORS[f"c{case['case']:02d}.{name}"]


def groups_of(case):
    """The reference's granularity as ours, or None where groups are neither the tensor nor its rows."""
    params = case["params"]
    if "layerwise" in params:
        return "tensor" if params["layerwise"] else "channel"
    return {1: "tensor", golden(case, "w").shape[0]: "channel"}.get(params["num_groups"])


EXPRESSIBLE = [c for c in CASES if groups_of(c)]


def make(**options):
    return TernaryWeight(TernaryOptions(**options))


def weights(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def reference(row, threshold=0.7):
    """One group in float64, straight from the definition."""
    row = row.double()
    keep = row.abs() > threshold * row.abs().mean()
    return torch.where(keep, row.sign() * row.abs()[keep].mean(), 0.0)


@pytest.mark.parametrize("case", EXPRESSIBLE, ids=lambda c: f"case{c['case']}")
def test_reference_forward_and_gradient(case):
    clip = 2.5 if "clip_val" in case["params"] else None
    quantizer = make(granularity=groups_of(case), clip=clip)
    weight = golden(case, "w").clone().requires_grad_()
    out = quantizer(weight)
    # The reference divides 0 by 0 where a group holds only zeros; the right answer is 0.
    torch.testing.assert_close(out.detach(), golden(case, "out").nan_to_num(0.0), rtol=1e-6, atol=1e-7)
    (grad,) = torch.autograd.grad(out, weight, golden(case, "g"))
    assert torch.equal(grad, golden(case, "grad_w"))


@pytest.mark.parametrize("case", [c for c in CASES if not groups_of(c)], ids=lambda c: f"case{c['case']}")
def test_reference_in_groups_across_rows(case):
    """The reference cuts the flattened weight into equal parts; as rows they are groups of ours."""
    weight = golden(case, "w").reshape(case["params"]["num_groups"], -1).requires_grad_()
    out = make(granularity="channel")(weight)
    torch.testing.assert_close(out.detach(), golden(case, "out").view_as(out), rtol=1e-6, atol=1e-7)
    (grad,) = torch.autograd.grad(out, weight, golden(case, "g").view_as(out))
    assert torch.equal(grad, golden(case, "grad_w").view_as(grad))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(33, 47), (1, 9), (9, 1), (4, 3, 3, 3), (13,)])
def test_quantize_is_bitwise_encode_decode(granularity, dtype, shape):
    weight = weights(*shape, dtype=dtype)
    quantizer = make(granularity=granularity)
    record = quantizer.encode(weight)
    decoded = record.decode(dtype)
    assert torch.equal(quantizer.quantize(weight), decoded)
    out = torch.full_like(weight, 7.0)
    assert quantizer.quantize(weight, out=out) is out
    assert torch.equal(out, decoded)
    assert torch.equal(record.integers().float(), record.codes)
    assert set(record.codes.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert record.bits == 2 and record.granularity == ("channel" if record.scale.numel() > 1 else "tensor")
    assert not torch.signbit(decoded[decoded == 0]).any()


def test_scales_have_the_shape_of_their_granularity():
    weight = weights(6, 4, 3, 3)
    assert make(granularity="tensor").encode(weight).scale.shape == (1, 1, 1, 1)
    assert make(granularity="channel").encode(weight).scale.shape == (6, 1, 1, 1)


def test_rows_equal_the_definition():
    weight = weights(12, 25)
    per_row = make(granularity="channel").quantize(weight)
    torch.testing.assert_close(per_row.double(), torch.stack([reference(r) for r in weight]), rtol=1e-6, atol=1e-9)
    per_tensor = make(granularity="tensor").quantize(weight)
    torch.testing.assert_close(per_tensor.double(), reference(weight.flatten()).view_as(weight), rtol=1e-6, atol=1e-9)


def test_groups_equal_the_definition():
    weight = weights(6, 4, 2, 2)
    quantizer = make(granularity="group", group_size=8)
    expected = torch.stack([reference(part) for part in weight.view(-1, 8)]).view_as(weight)
    torch.testing.assert_close(quantizer.quantize(weight).double(), expected, rtol=1e-6, atol=1e-9)
    assert quantizer.encode(weight).scale.shape == (6, 2, 1)


@pytest.mark.parametrize(
    "options", [{}, {"granularity": "channel"}, {"granularity": "group", "group_size": 4}], ids=str
)
@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)),
        (nn.Embedding(9, 8), torch.tensor([[1, 5, 1]])),
        (nn.Linear(8, 3), torch.randn(2, 8)),
    ],
    ids=["convolution", "embedding", "linear"],
)
def test_every_kind_of_module_computes_with_it_and_its_weight_gets_the_whole_gradient(module, x, options):
    plain, module, quantizer = module, copy.deepcopy(module), make(**options)
    quantizer.attach(QuantContext(), "m:weight")
    HOSTS[type(module)].adopt(module, "m", quantizer.context)
    module.host("weight", quantizer)
    plain = copy.deepcopy(plain)
    with torch.no_grad():
        plain.weight.copy_(quantizer.quantize(plain.weight))
    output, expected = module(x), plain(x)
    torch.testing.assert_close(output, expected)
    upstream = torch.randn(expected.shape)
    (found,) = torch.autograd.grad(output, module.weight, upstream)
    (whole,) = torch.autograd.grad(expected, plain.weight, upstream)
    torch.testing.assert_close(found, whole)


def test_non_contiguous_weights():
    weight = weights(10, 6).t()
    assert torch.equal(make(granularity="channel").quantize(weight), make(granularity="channel")(weight.contiguous()))


def test_zero_rows_stay_zero():
    weight = weights(3, 8)
    weight[1] = 0
    out = make(granularity="channel").quantize(weight)
    assert torch.equal(out[1], torch.zeros(8)) and bool(out[0].abs().sum() > 0)
    assert torch.equal(make().quantize(torch.zeros(4, 4)), torch.zeros(4, 4))


def test_equal_magnitudes_are_all_kept():
    weight = torch.tensor([[0.5, -0.5, 0.5, -0.5]])
    assert torch.equal(make().quantize(weight), weight)


def test_a_nan_is_not_hidden():
    weight = weights(3, 8)
    weight[1, 2] = torch.nan
    out = make(granularity="channel").quantize(weight)
    assert out[1].isnan().all() and not out[0].isnan().any()


def test_scales_that_the_export_type_rounds_to_zero_give_zeros():
    weight = torch.full((2, 4), 1e-9)
    weight[1] = 0.5
    quantizer = make(granularity="channel")
    quantizer.context.scale_dtype = torch.float16
    assert torch.equal(quantizer.quantize(weight), torch.tensor([[0.0] * 4, [0.5] * 4]))


def test_scales_are_snapped_to_the_export_type():
    quantizer = make(granularity="channel")
    quantizer.context.scale_dtype = torch.bfloat16
    scale = quantizer.encode(weights(5, 40)).scale
    assert torch.equal(scale, scale.bfloat16().float())


def test_clip_blocks_the_gradient_and_bounds_the_scale():
    weight = torch.tensor([[3.0, -2.5, 1.0, 0.1]], requires_grad=True)
    out = make(clip=2.5)(weight)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    # Mean magnitude of the clipped weights 6.1 / 4, limit 1.0675: two are kept at 2.5.
    torch.testing.assert_close(out.detach(), torch.tensor([[2.5, -2.5, 0.0, 0.0]]))


def test_without_clip_the_gradient_passes_unchanged():
    weight = (weights(4, 5) * 100).requires_grad_()
    grad = torch.randn(4, 5)
    make()(weight).backward(grad)
    assert torch.equal(weight.grad, grad)


@pytest.mark.parametrize("options", [{}, {"granularity": "channel"}, {"clip": 0.1}], ids=str)
def test_a_part_of_the_weight_is_quantized_under_noise(options):
    """The rest is the weight itself, with its whole gradient, beyond the clip too."""
    quantizer, weight, grad = make(**options), weights(40, 100).requires_grad_(), torch.randn(40, 100)
    quantizer.attach(QuantContext(noise=0.5), "m:weight")
    out = quantizer(weight)
    drawn = out == quantizer.encode(weight).decode()
    assert torch.equal(out[~drawn], weight[~drawn]) and 0.4 < float(drawn.float().mean()) < 0.6
    (found,) = torch.autograd.grad(out, weight, grad)
    passes = weight.abs() < options.get("clip", torch.inf)
    assert torch.equal(found, torch.where(drawn & ~passes, 0.0, grad))


def test_threshold():
    weight = weights(4, 50)
    zeros = [int((make(threshold=t).quantize(weight) == 0).sum()) for t in (0.0, 0.5, 0.9)]
    assert zeros[0] == 0 < zeros[1] < zeros[2]
    with pytest.raises(ValidationError, match="threshold"):
        TernaryOptions(threshold=1.0)


def test_rules():
    plugin = TernaryTwn(TernaryTwnOptions(embedding=True, clip=2.5))
    blocks, embedding = plugin.qpipe_quant_rules()
    assert (blocks.site, blocks.quantizer) == ("{block}.*:weight", "ternary-twn")
    assert blocks.options == {"granularity": "tensor", "threshold": 0.7, "clip": 2.5}
    assert (embedding.site, embedding.options["granularity"]) == ("{embedding}:weight", "channel")
    grouped = TernaryTwnOptions(granularity="group", group_size=8, embedding=True)
    rules = list(TernaryTwn(grouped).qpipe_quant_rules())  # all are there before the first is used
    assert [rule.options.get("group_size") for rule in rules] == [8, None]
    assert list(TernaryTwn(TernaryTwnOptions(rules=False, embedding=True)).qpipe_quant_rules()) == []


def test_rule_options_build_the_offered_quantizer():
    plugin = TernaryTwn()
    (kind,) = plugin.qpipe_quantizers()
    (rule,) = plugin.qpipe_quant_rules()
    assert kind.name == rule.quantizer and kind.slots == {"weight"}
    assert isinstance(kind.build(kind.options(**rule.options)), TernaryWeight)
    with pytest.raises(ValidationError):
        kind.options(bits=3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_reaches_the_output(value):
    weight = weights(3, 8)
    weight[1, 2] = value
    quantizer = make(granularity="channel")
    quantizer.attach(QuantContext(), "m:weight")
    assert quantizer.quantize(weight)[1].isnan().any() and not quantizer.quantize(weight)[0].isnan().any()
