"""Weights on a fixed grid: contract, gradient, kept means, and the state that is saved."""

import pytest
import torch
from golden_cases import Golden, case_name
from pydantic import ValidationError

from qpipe.quant.quantizer import QuantContext
from qpipe.quant.static import StaticOptions, StaticWeight
from qpipe.testing import check_quantizer

GOLDEN = Golden("lapq")
GRANULARITIES = [{"granularity": "tensor"}, {"granularity": "channel"}, {"granularity": "group", "group_size": 16}]
FORMS = [{}, {"symmetric": False}, {"mid_rise": True}, {"keep_mean": True}]
SETTINGS = [
    {**granularity, **form, "bits": bits}
    for granularity in GRANULARITIES
    for form in FORMS
    for bits in (2, 4, 8)
    if not (form.get("keep_mean") and granularity["granularity"] == "group")
]


def name(options):
    return "-".join(f"{key}={value}" for key, value in options.items())


def make(weight, context=None, **options):
    quantizer = StaticWeight(StaticOptions(**options))
    quantizer.attach(context or QuantContext(), "m:weight")
    quantizer.initialize(weight)
    return quantizer


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("options", SETTINGS, ids=name)
def test_contract(options):
    check_quantizer(lambda: StaticWeight(StaticOptions(**options)))


@pytest.mark.parametrize(
    "method", ["min-max", "mse-golden", "percentile", "lp", "aciq-normal", "aciq-laplace", "likelihood"]
)
def test_contract_of_other_ranges(method):
    check_quantizer(lambda: StaticWeight(StaticOptions(bits=3, range=method)))


@pytest.mark.parametrize("options", GRANULARITIES, ids=name)
def test_gradient_stops_where_the_code_is_clamped(options):
    value = weights(8, 64).requires_grad_()
    quantizer = make(value.detach(), bits=3, **options)
    quantizer(value).sum().backward()
    scale = quantizer.shaped(quantizer.scale, value)
    view = value.detach().reshape(8, -1, 16) if "group_size" in options else value.detach()
    wanted = ((view / scale).round().clamp(-4, 3) == (view / scale).round()).float().view(8, 64)
    assert 0 < int((wanted == 0).sum()) < 100, "some weights are clipped, few are"
    assert torch.equal(value.grad, wanted)


def test_a_min_max_range_clips_nothing():
    value = weights(8, 64).bfloat16().requires_grad_()
    make(value.detach(), QuantContext(scale_dtype=torch.bfloat16), range="min-max")(value).sum().backward()
    assert torch.equal(value.grad, torch.ones_like(value))


def test_the_grid_stays_when_the_weight_moves():
    value = weights(4, 32)
    quantizer = make(value, bits=4)
    before = quantizer.encode(value)
    after = quantizer.encode(value * 3)
    assert torch.equal(before.scale, after.scale)
    assert int(after.codes.max()) == 7 and int(after.codes.min()) == -8


@pytest.mark.parametrize("case", GOLDEN.of("ParameterModuleWrapperPost"), ids=case_name)
def test_kept_means_of_the_reference(case):
    weight, bits = GOLDEN.tensor(case, "W"), case["params"]["num_bits"]
    quantizer = make(weight, bits=bits, granularity="tensor", range="min-max", mid_rise=True, keep_mean=True)
    torch.testing.assert_close(quantizer.quantize(weight), GOLDEN.tensor(case, "wq_corrected"))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("shape", [(6, 40), (6, 4, 3, 3)])
def test_means_are_kept(shape, granularity):
    weight = weights(*shape) + 0.02
    for bits in (2, 4):
        plain = make(weight, bits=bits, granularity=granularity).quantize(weight).flatten(1).mean(1)
        kept = make(weight, bits=bits, granularity=granularity, keep_mean=True).quantize(weight).flatten(1).mean(1)
        torch.testing.assert_close(kept, weight.flatten(1).mean(1), rtol=0, atol=1e-7)
        assert float((plain - weight.flatten(1).mean(1)).abs().max()) > 1e-4


def test_state_is_restored_over_another_initialisation():
    value = weights(4, 32)
    first, second = make(value, bits=4, range="lp"), make(value * 2, bits=4)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.quantize(value), first.quantize(value))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mid_rise": True, "symmetric": False}, "mid_rise levels are symmetric"),
        ({"keep_mean": True, "granularity": "group", "group_size": 8}, "keep_mean works by channel"),
        ({"granularity": "group"}, "give group_size with granularity `group`"),
        ({"bits": 9}, "less than or equal to 8"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValidationError, match=message):
        StaticOptions(**options)
