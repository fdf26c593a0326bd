"""Ranges that are given, for the tensor or for groups of features."""

import json

import pytest
import torch

from qpipe import ActivationRange, FixedActivation, FormatError, by_feature, quantize_activations
from qpipe.export.activations import quantizer_of
from qpipe.quant.activation import ActivationOptions, UniformActivation

GROUPED = ActivationRange(8, False, "group", False, (0.5, 0.01), (3.0, -7.0), (2, 0, 3, 1))


def test_by_feature():
    values = by_feature(torch.tensor([10.0, 20.0]), torch.tensor([5, 0, 2, 4, 1, 3]))
    assert values.tolist() == [10.0, 20.0, 10.0, 20.0, 20.0, 10.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_feature_has_the_range_of_its_group(dtype):
    """Features 2 and 0 are the first group, 3 and 1 the second; each is quantized as a tensor of its own would be."""
    x = (torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    out = FixedActivation(GROUPED)(x)
    for group, members in enumerate(([2, 0], [3, 1])):
        scale, zero = GROUPED.scale[group], GROUPED.zero_point[group]
        alone = FixedActivation(ActivationRange(8, False, "tensor", False, scale, zero))
        assert torch.equal(out[..., members], alone(x[..., members]))
        if dtype == torch.float32:
            expected = torch.fake_quantize_per_tensor_affine(x[..., members], scale, int(zero), -128, 127)
            torch.testing.assert_close(out[..., members], expected, rtol=1e-6, atol=1e-6)


def test_a_record_survives_json():
    record = {"module": "m", "slot": "output", **GROUPED._asdict()}
    read = quantizer_of(json.loads(json.dumps(record)))
    x = torch.randn(2, 4)
    assert torch.equal(read(x), FixedActivation(GROUPED)(x))
    assert read.describe().order == [2, 0, 3, 1]


def test_narrow_ranges_survive_json_and_are_not_needed_in_records():
    quantizer = UniformActivation(ActivationOptions(narrow=True, clip=1.5))
    record = {"module": "m", "slot": "output", **quantizer.describe()._asdict()}
    x = torch.randn(2, 3, 4)
    read = quantizer_of(json.loads(json.dumps(record)))
    assert torch.equal(read(x), quantizer(x)) and read.describe() == quantizer.describe()
    plain = quantizer_of({name: value for name, value in record.items() if name not in ("narrow", "clip")})
    assert torch.equal(plain(x), UniformActivation(ActivationOptions())(x)) and not torch.equal(plain(x), read(x))


def test_symmetric_ranges_need_no_zero_point():
    found = FixedActivation(ActivationRange(8, False, "tensor", True, 0.25))
    assert found(torch.tensor([0.3, -9.0, 100.0])).tolist() == [0.25, -9.0, 31.75]


@pytest.mark.parametrize(
    "wrong", [{"order": (0, 1, 2)}, {"order": (0, 1, 1, 3)}, {"scale": None}, {"dynamic": True}, {"scale": ()}]
)
def test_incomplete_ranges_are_refused(wrong):
    with pytest.raises(FormatError, match="groups do not fit an order of|needs a scale"):
        FixedActivation(GROUPED._replace(**wrong))


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ({"module": "m", "slot": "output"}, "Linear has no module 'm'"),
        ({"module": "", "slot": "weight"}, ":weight: there is no such slot; it is one of sum, stream, input, output"),
        ({"module": "", "slot": "sum"}, ":sum is no sum of embeddings that is known: Linear adds none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_places_that_a_model_lacks(site, words):
    record = {**ActivationRange(8, True, "tensor", False)._asdict(), **site}
    with pytest.raises(FormatError, match=words):
        quantize_activations(torch.nn.Linear(2, 2), [record])
