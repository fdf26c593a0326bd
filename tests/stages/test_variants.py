"""Variants of a finished run against weights that are quantized here by hand, and what sweeps leave behind."""

import json
from contextlib import contextmanager

import pytest
import torch

from qpipe import ConfigError, Quantizer, QuantizerKind, Site, SiteError
from qpipe.plugin import Options, Plugin, hookimpl
from qpipe.quant.plan import PlannedSite
from qpipe.quant.step_error import power_of_two, times
from qpipe.quant.tensor import QTensor
from qpipe.stages.quantize import quantize
from qpipe.stages.sensitivity import load
from qpipe.stages.sizes import stored_sizes
from qpipe.stages.sweep import Sweep, evaluate_points, sweep_run
from qpipe.stages.trained import restore
from qpipe.stages.variants import (
    activation_sites,
    rebuilt,
    rescaled,
    rule_with_bits,
    switched_off,
    weight_sites,
    with_bits,
)
from qpipe.testing import tiny_config

SITE = "bert.encoder.layer.1.intermediate.dense:weight"
EMBEDDING = "bert.embeddings.word_embeddings:weight"


@pytest.fixture
def run(finished):
    return restore(finished.out)


def batch(run):
    found = run.data.collate([run.data.validation[i] for i in range(16)])
    return {name: value for name, value in found.items() if name != "labels"}


def logits(run):
    run.student.eval()
    with torch.no_grad():
        return run.student(**batch(run)).logits.clone()


def uniform(weight, bits, ratio=1.0, change=lambda scale: scale):
    """Symmetric min-max codes per channel."""
    top = 2 ** (bits - 1) - 1
    scale = change(weight.abs().amax(1, keepdim=True) / top * ratio)
    return (weight / scale).round().clamp(-top - 1, top) * scale


@contextmanager
def by_hand(run, names, quantize):
    """The weights themselves replaced, and their quantizers taken out of the modules."""
    modules = [run.student.get_submodule(name.removesuffix(":weight")) for name in names]
    kept = [module._modules.pop("weight_quantizer") for module in modules]
    weights = [module.weight.detach().clone() for module in modules]
    with torch.no_grad():
        for module in modules:
            module.weight.copy_(quantize(module.weight))
    yield
    with torch.no_grad():
        for module, quantizer, weight in zip(modules, kept, weights, strict=True):
            module.weight.copy_(weight)
            module.add_module("weight_quantizer", quantizer)


def equal(run, variant, names, quantize):
    trained, quantizers, context = logits(run), run.instruments.quantizers(), run.instruments.context
    with variant:
        found = logits(run)
    with by_hand(run, names, quantize):
        expected = logits(run)
    assert torch.equal(found, expected) and not torch.equal(found, trained)
    assert torch.equal(logits(run), trained)
    again = run.instruments.quantizers()
    assert again.keys() == quantizers.keys() and all(again[n] is q for n, q in quantizers.items())
    assert all(q.context is context for q in again.values())


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_from_the_master_copy(run, bits):
    names = weight_sites(run)
    equal(run, rebuilt(run, names, bits), names, lambda weight: uniform(weight, bits))


@pytest.mark.parametrize("ratio", [0.7, 1.1])
def test_other_steps(run, ratio):
    names = weight_sites(run)
    equal(run, rescaled(run, names, times(ratio)), names, lambda weight: uniform(weight, 4, ratio))


def test_compiled_code_is_not_used_with_other_steps(run):
    context = run.instruments.context
    logits(run)
    context.compiled = True
    quantizer = run.instruments.quantizers()[SITE]
    with rescaled(run, [SITE], times(1.1)):
        assert not quantizer.context.compiled
        logits(run)
    assert quantizer.context is context and context.compiled


def test_power_of_two_steps(run):
    def nearest(scale):
        return torch.tensor([2.0 ** round(float(s.log2())) for s in scale.flatten()]).view_as(scale)

    names = weight_sites(run)
    equal(run, rescaled(run, names, power_of_two), names, lambda weight: uniform(weight, 4, change=nearest))


def test_full_precision_of_some(run):
    equal(run, switched_off(run, [SITE]), [SITE], lambda weight: weight)


def squashed(weight):
    """What DoReFa quantizes: `tanh(w) / max|tanh(w)|`."""
    return weight.tanh() / weight.tanh().abs().max()


def test_full_precision_of_a_network_that_was_trained_with_a_function_of_its_weights(tmp_path, fast):
    """A finished run computes with that function, not rounded; a model that is only loaded with its weights."""
    import qpipe

    rules = [{"site": SITE, "quantizer": "dorefa", "options": {"bits": 2, "output": "unit"}}]
    config = tiny_config(tmp_path, quantization__rules=rules, quantization__preset=None, train__max_steps=2)
    trained, loaded = restore(qpipe.execute(config).out), load(config)
    for run, function in ((trained, squashed), (loaded, lambda weight: weight)):
        with switched_off(run, [SITE]):
            found = logits(run)
        with by_hand(run, [SITE], function):
            torch.testing.assert_close(found, logits(run), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, logits(run), atol=1e-4)
    with rebuilt(trained, [SITE], 8), switched_off(trained, [SITE]):
        unrounded = logits(trained)
    with switched_off(trained, [SITE]):
        torch.testing.assert_close(unrounded, logits(trained))


def test_activations_too(run):
    names = [*weight_sites(run), *activation_sites(run)]
    weights_only = []
    with rebuilt(run, weight_sites(run), 3):
        weights_only.append(logits(run))
    with rebuilt(run, names, 3):
        inner = run.student.get_submodule(SITE.removesuffix(":weight"))
        assert (inner.hosted("input").options.bits, inner.hosted("weight").options.bits) == (3, 3)
        assert not torch.equal(logits(run), weights_only[0])
    with rescaled(run, names, times(0.5)):
        halved = logits(run)
    with rescaled(run, weight_sites(run), times(0.5)):
        assert not torch.equal(logits(run), halved)


class Grouped(Options):
    bits: int = 8
    groups: int | None = 6
    spare: int | None = None


def test_a_rule_keeps_a_null_that_is_not_the_default():
    entry = PlannedSite(Site("m", "output", "Linear"), "grouped", Grouped(groups=None), "test")
    assert rule_with_bits(entry, 16) == {
        "site": "m:output", "quantizer": "grouped", "options": {"bits": 16, "groups": None},
    }  # fmt: skip


def test_default_sites_leave_out_embeddings(run):
    assert EMBEDDING not in weight_sites(run) and len(weight_sites(run)) == 12
    assert weight_sites(run, ["{embedding}"]) == [EMBEDDING]
    assert weight_sites(run, ["{block}.attention.self.*", "*.query:weight"]) == [
        n for n in weight_sites(run) if ".self." in n
    ]
    with pytest.raises(SiteError, match=r"'\*\.querry' matches no quantized weight"):
        weight_sites(run, ["*.querry"])


def test_widths_that_a_quantizer_does_not_allow(run):
    with pytest.raises(SiteError, match="bits = 9: Input should be less than or equal to 8"):
        evaluate_points(run, Sweep(("bits",), bits=(3, 9)))


class Stubborn(Quantizer):
    """Halves its values, whatever the step."""

    def encode(self, value):
        codes = (value.float() / 0.01).round().clamp(-8, 7)
        return QTensor(codes, torch.full((1, 1), 0.01), torch.zeros(1), 4)


class Fixed(Plugin):
    @hookimpl
    def qpipe_quantizers(self):
        yield QuantizerKind("stubborn", lambda options: Stubborn(), Options, frozenset({"weight"}))


def test_quantizers_without_width_or_step(tmp_path, use, fast):
    import qpipe

    use(Fixed())
    rules = [{"site": SITE, "quantizer": "stubborn"}]
    config = tiny_config(tmp_path, quantization__rules=rules, quantization__preset="w4", train__max_steps=1)
    run = restore(qpipe.execute(config).out)
    assert with_bits(run, [SITE, EMBEDDING], 3) == [EMBEDDING]
    document = evaluate_points(run, Sweep(("bits",), bits=(3,)))
    assert document["fixed"] == [SITE] and SITE in document["sites"]
    with pytest.raises(ConfigError, match=r"no quantizer of .* has an option `bits` \('stubborn' at "):
        evaluate_points(run, Sweep(("bits",), sites=(SITE,)))
    with pytest.raises(
        SiteError, match=r"intermediate.dense:weight and 0 more kept their scales: Stubborn does not pass"
    ):
        evaluate_points(run, Sweep(("step",), ratios=(0.9,)))
    with pytest.raises(SiteError, match="quantizer 'stubborn' has no option `bits`"), rebuilt(run, [SITE], 3):
        pass
    with pytest.raises(ConfigError, match="quantizes no activation, so only its weights can be varied"):
        evaluate_points(run, Sweep(("step",), activations=True))


WEIGHTS = {
    "lsq": {"bits": 4},
    "lsq+": {"bits": 3, "levels": "mid-rise", "granularity": "tensor"},
    "dorefa": {"bits": 4},
    "binary": {},
    "laq": {},
    "uniform": {"bits": 4, "symmetric": False, "granularity": "group", "group_size": 16},
}


@pytest.mark.parametrize("quantizer", WEIGHTS)
def test_every_built_in_weight_quantizer_can_be_varied(tmp_path, fast, quantizer):
    import qpipe

    rules = [{"site": "{block}.*:weight", "quantizer": quantizer, "options": WEIGHTS[quantizer]}]
    config = tiny_config(tmp_path, quantization__rules=rules, quantization__preset=None, train__max_steps=2)
    run = restore(qpipe.execute(config).out)
    names, trained, bits = weight_sites(run), logits(run), run.plan.sites[SITE].bits
    with rescaled(run, names, times(1.0)):
        assert torch.equal(logits(run), trained)
    with rescaled(run, names, times(0.8)):
        assert not torch.equal(logits(run), trained)
    able = with_bits(run, names, bits)
    assert able == ([] if quantizer == "binary" else names)
    for width in (bits, 2) if able else ():
        with rebuilt(run, names, width):
            assert torch.allclose(logits(run), trained, atol=1e-6) == (width == bits)
    assert torch.equal(logits(run), trained)


@pytest.mark.parametrize("source", ["configuration", "qpipe quantize"])
def test_without_training_a_width_has_the_grid_that_training_would_begin_with(tmp_path, fast, source):
    """The step of the planned width, divided anew, is another one."""
    rules = [{"site": "{block}.*:weight", "quantizer": "lsq", "options": {"bits": 8}}]
    config = tiny_config(tmp_path, quantization__rules=rules, quantization__preset=None)
    run = load(config) if source == "configuration" else restore(quantize(config).out)
    weight = run.student.get_parameter(SITE.replace(":", ".")).detach()
    with rebuilt(run, [SITE], 3):
        quantizer = run.instruments.quantizers()[SITE]
        torch.testing.assert_close(quantizer.step, 2 * weight.abs().mean(1, keepdim=True) / 3**0.5)


def test_patterns_select_as_in_rules(tmp_path, assembled):
    """Gains of normalisations are left to patterns that spell their names."""
    whole = {"quantizer": "uniform", "options": {"granularity": "tensor"}}
    rules = [{"site": site, **whole} for site in ("{block}.*:weight", "*.LayerNorm:weight")]
    changes = {"quantization__rules": rules, "quantization__preset": None, "export__format": "native"}
    run = load(tiny_config(tmp_path, **changes))
    names = [name for name in run.plan.sites if name.endswith(":weight")]
    gains = [name for name in names if "LayerNorm" in name]
    assert len(gains) == 5 and weight_sites(run, ["*.LayerNorm"]) == gains
    assert weight_sites(run, ["{block}.*"]) == [name for name in names if name not in gains]
    assert sorted(stored_sizes(run, (4,))) == sorted(names)


@pytest.mark.parametrize("quantizer", ["lsq", "dorefa", "uniform"])
def test_steps_counted_from_the_lowest_level(tmp_path, fast, quantizer):
    import qpipe

    rules = [{"site": "{block}.*:weight", "quantizer": quantizer, "options": WEIGHTS[quantizer]}]
    config = tiny_config(tmp_path, quantization__rules=rules, quantization__preset=None, train__max_steps=2)
    run = restore(qpipe.execute(config).out)
    names, trained = weight_sites(run), logits(run)
    with rescaled(run, names, times(1.0), open_ended=True):
        torch.testing.assert_close(logits(run), trained, rtol=0, atol=1e-5)
    with rescaled(run, names, times(1.2), open_ended=True):
        counted = logits(run)
    with rescaled(run, names, times(1.2)):
        assert not torch.equal(logits(run), counted) and not torch.equal(counted, trained)
    assert torch.equal(logits(run), trained)


def test_steps_of_activations_are_not_counted(run):
    with pytest.raises(SiteError, match="UniformActivation does not round weights to the nearest level of a grid"):
        evaluate_points(run, Sweep(("step",), activations=True, open_ended=True))
    document = evaluate_points(run, Sweep(("step",), ratios=(1.0,), open_ended=True))
    assert document["open_ended"] and document["points"][1]["metrics"] == document["points"][0]["metrics"]


def test_a_sweep_is_checked_when_it_is_made():
    with pytest.raises(ConfigError, match="open-ended grids belong to the variant `step`"):
        Sweep(("bits",), open_ended=True)
    with pytest.raises(
        ConfigError, match="variant 'stepp' is unknown; did you mean 'step'.*there are bits, step, pow2"
    ):
        Sweep(("stepp",))
    with pytest.raises(ConfigError, match="name at least one variant"):
        Sweep(())
    with pytest.raises(ConfigError, match="ratios must be positive, not -1"):
        Sweep(ratios=(1.0, -1.0))


def test_a_sweep_writes_its_points(finished):
    told = []
    sweep = Sweep(bits=(2, 4), ratios=(0.9, 1.0), activations=True)
    document = sweep_run(finished.out, sweep, [finished.out / "other"], told.append)
    assert json.loads((finished.out / "variants.json").read_text()) == document
    (finished.out / "variants.json").unlink()
    assert document["metric"] == "accuracy" and document["bits"] == 4 and document["fixed"] == []
    assert document["examples"] == 32 and document["compared"] == [str((finished.out / "other").resolve())]
    keys = [(p["variant"], p["value"], p["activations"]) for p in document["points"]]
    scope = [("bits", 2), ("bits", 4), ("bits", None), ("step", 0.9), ("step", 1.0), ("pow2", None)]
    assert keys == [("trained", None, False), *((*point, together) for together in (False, True) for point in scope)]
    metrics = {key: p["metrics"] for key, p in zip(keys, document["points"], strict=True)}
    trained = finished.results["evaluation"]
    for same in [("trained", None, False), ("bits", 4, False), ("step", 1.0, False), ("step", 1.0, True)]:
        assert metrics[same] == trained
    assert len(told) == len(keys)
