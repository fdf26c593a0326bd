"""A suggested plan keeps its promise: a model that is quantized by it has the metric that the suggestion measured."""

import importlib
import json
import re
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
import yaml
from typer.testing import CliRunner
from working_model import outputs_at, working_model

import qpipe
from qpipe.analysis.groups import quantized
from qpipe.analysis.load import load
from qpipe.analysis.suggest import at_bits
from qpipe.analysis.suggest import rules as rules_at
from qpipe.cli import app
from qpipe.host import load_plugins
from qpipe.launching.quantize import configuration
from qpipe.quant.activation import ActivationOptions, UniformActivation
from qpipe.quant.observed import Observed
from qpipe.stages import quantize
from qpipe.stages.calibrate import inference, inputs_of, observed_batches
from qpipe.stages.evaluate import evaluate
from qpipe.stages.recalibrate import recalibrated
from qpipe.stages.variants import rebuilt, switched_off
from qpipe.testing import tiny_config

EXECUTE = importlib.import_module("qpipe.stages.execute")
BLOCK = "bert.encoder.layer.0.output.LayerNorm:output"
LEARNED = ({"site": "{attention_sum}", "quantizer": "lsq-activation", "options": {"bits": 2}},)
DYNAMIC = ({"site": "{attention_sum}", "quantizer": "uniform-activation", "options": {"bits": 2}},)


@pytest.fixture(scope="module", autouse=True)
def unverified():
    """Reloading exports is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        passed = SimpleNamespace(passed=True, metrics={}, lines=list)
        patch.setattr(EXECUTE, "verify", lambda folder, **options: passed)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory, unverified):
    return working_model(tmp_path_factory.mktemp("working"))


def overrides(rules, plan=None):
    given = ["quantization.preset=w8", "quantization.calibration_batches=2", "export.format=native"]
    given.append(f"quantization.rules={json.dumps(rules)}")
    return given if plan is None else [*given, f"quantization.plan={plan}"]


def quantized_by(model, rules, out, plan=None):
    return quantize(configuration(str(model), None, overrides(rules, plan), [], out))


@pytest.mark.parametrize(
    ("rules", "group"),
    [(outputs_at(2), "probs"), (outputs_at(2, *LEARNED), "attention_sum")],
    ids=["fixed range", "first range"],
)
def test_quantized_by_the_plan_a_model_has_the_metric_that_the_plan_names(model, tmp_path, rules, group):
    """16 bits over the range that suits 2 would have lost 4 and 7 of the 32 sentences more."""
    plan = tmp_path / "plan.yaml"
    words = ["analyze", str(model), "--parts", "ablation", "--out", str(tmp_path / "a"), "--suggest", str(plan)]
    words += ["--sites", f"{{{group}}}", *(word for text in overrides(rules) for word in ("--set", text))]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "a" / "analysis" / "ablation.json").read_text())
    assert found["full_precision"] == 1 and found["quantized"] < 0.85
    first, second = plan.read_text().splitlines()[:2]
    promised = re.search(rf"--suggest: 16 bits at {group} (\d\.\d{{4}})", first)
    assert promised, first
    assert second == (
        "# accuracy on 32 validation examples; on these, `qpipe quantize` with this plan, and all else the same, gives "
        "the last number."
    )
    planned = yaml.safe_load(plan.read_text())["quantization"]["rules"]
    assert planned and all(rule["options"]["bits"] == 16 for rule in planned)
    run = quantized_by(model, rules, tmp_path / "q", plan)
    assert f"{run.results['evaluation']['accuracy']:.4f}" == promised[1]
    assert run.results["evaluation"]["accuracy"] > found["quantized"] + 0.1, "the plan helps"


def states(run):
    """What each quantizer of an activation holds, by site."""
    found = {site: q for site, q in run.instruments.quantizers().items() if not site.endswith(":weight")}
    return {site: {key: value.clone() for key, value in q.state_dict().items()} for site, q in found.items()}


def differing(one, other):
    """Sites whose quantizers do not hold the same."""
    assert one.keys() == other.keys()
    return {s for s in one if any(not torch.equal(one[s][k], other[s][k]) for k in one[s].keys() | other[s].keys())}


@pytest.mark.parametrize(
    ("rules", "changes_others"),
    [(outputs_at(2), False), (outputs_at(2, *LEARNED), True), (outputs_at(2, *DYNAMIC), True)],
    ids=["fixed", "first", "dynamic"],
)
def test_ranges_are_those_of_the_plan_while_it_is_measured(model, tmp_path, rules, changes_others):
    run = load(configuration(str(model), None, overrides(rules), [], tmp_path / "a"))
    before, changed = states(run), list(run.instruments.map.sites["attention_sum"])
    with rebuilt(run, changed, 16), recalibrated(run, changed):
        measured = states(run)
    assert not differing(before, states(run)), "all is as it was"
    plan = [{**rule_of(rules, "{attention_sum}"), "site": site} for site in changed]
    for rule in plan:
        rule["options"] = {**rule["options"], "bits": 16}
    planned = load(configuration(str(model), None, overrides([*rules, *plan]), [], tmp_path / "b"))
    assert not differing(measured, states(planned))
    others = {site: state for site, state in measured.items() if site not in changed}
    moved = differing(others, {site: before[site] for site in others})
    assert bool(moved) == changes_others, "what comes before a range that is fixed in the end decides what it holds"


def rule_of(rules, site):
    return next((rule for rule in rules if rule["site"] == site), rules[0])


def test_a_trained_run_keeps_its_ranges_but_fixed_ones_of_changed_sites(tmp_path):
    """Its weights were trained with those of other sites; learned ranges are divided anew."""
    learned = "bert.encoder.layer.1.output.LayerNorm:output"
    rule = {"site": learned, "quantizer": "lsq-activation", "options": {"bits": 2}}
    changes = {"export__format": "native", "quantization__calibration_batches": 2, "train__max_steps": 2}
    run = load(qpipe.execute(tiny_config(tmp_path, quantization__rules=outputs_at(2, rule), **changes)).out)
    changed, before = [BLOCK, learned], states(run)
    with rebuilt(run, changed, 16), recalibrated(run, changed):
        during = states(run)
    assert differing(before, during) == set(changed)
    assert not differing(before, states(run))
    assert float(during[learned]["learned_step"]) == pytest.approx(float(before[learned]["learned_step"]) * 4 / 2**16)
    largest = shown(run, BLOCK).largest
    assert float(during[BLOCK]["high"]) == pytest.approx(largest, rel=0.02), "nothing is clipped"
    assert float(before[BLOCK]["high"]) < 0.9 * largest, "2 bits had clipped"


def shown(run, site):
    """What calibration shows a site, by a hook of torch."""
    seen, masks = Observed(), []
    module = run.student.get_submodule(site.partition(":")[0])
    handle = module.register_forward_hook(lambda m, i, out: seen.add(out[masks[-1].bool()], site))
    try:
        with inference(run), switched_off(run, quantized(run)[1]):
            for _, batch in observed_batches(run, run.config.quantization.calibration_batches):
                masks.append(batch["attention_mask"])
                run.student(**inputs_of(batch))
    finally:
        handle.remove()
    return seen


class Narrow(qpipe.Plugin):
    """Offers what `uniform-activation` is, at 2 bits only."""

    class Options(ActivationOptions):
        bits: Literal[2] = 2

    @qpipe.hookimpl
    def qpipe_quantizers(self):
        yield qpipe.QuantizerKind("narrow", UniformActivation, self.Options, frozenset({"input"}), "")


def test_sites_whose_quantizer_has_no_such_width_are_left_in_full_precision(model, tmp_path, monkeypatch):
    def with_narrow(options, *args, **kwargs):
        return load_plugins(options, *args, extra=[("narrow", Narrow())], **kwargs)

    monkeypatch.setattr(importlib.import_module("qpipe.stages.quantize"), "load_plugins", with_narrow)
    rules = outputs_at(2)
    rules.append({**rules[0], "site": "{attention_sum}", "quantizer": "narrow"})
    run = load(configuration(str(model), None, overrides(rules), [], tmp_path / "a"))
    sites = list(run.instruments.map.sites["attention_sum"])
    without = [{"site": site, "quantizer": "none"} for site in sites]
    assert rules_at(run, sites, 16) == without
    planned = load(configuration(str(model), None, overrides([*rules, *without]), [], tmp_path / "b"))
    assert at_bits(run, sites, 16) == evaluate(planned)["accuracy"] > evaluate(run)["accuracy"]
