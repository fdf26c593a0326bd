"""Ranges that are parameters: set before the engine takes over, trained, resumed, exported, varied."""

import importlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file

import qpipe
from qpipe import FormatError
from qpipe.stages import checkpoint
from qpipe.stages.calibrate import inputs_of, observed_batches
from qpipe.stages.param_groups import parameter_groups
from qpipe.stages.quantize import quantize
from qpipe.stages.trained import restore
from qpipe.stages.variants import activation_sites, rebuilt, switched_off
from qpipe.testing import tiny_config
from qpipe.testing.contract import weights_hash

INPUTS = "{block}.*query:input"
RULES = [
    {"site": "{block}.*:weight", "quantizer": "lsq", "options": {"bits": 4}},
    {"site": INPUTS, "quantizer": "lsq-activation", "options": {"bits": 4}},
    {"site": "{block}.*key:input", "quantizer": "lsq+-activation", "options": {"bits": 4, "lr_scale": 0.5}},
    {"site": "{block}.output.dense:input", "quantizer": "pact", "options": {"bits": 4, "weight_decay": 0.2}},
]


def config(folder, rules=RULES, **changes):
    return tiny_config(folder, quantization__preset=None, quantization__rules=rules, **changes)


def quantizers(run, kind=""):
    found = run.instruments.quantizers().items()
    return {site: q for site, q in found if not site.endswith(":weight") and kind in type(q).__name__}


def values(run):
    return {f"{s}/{n}": float(p.detach()) for s, q in quantizers(run).items() for n, p in q.named_parameters()}


@pytest.mark.parametrize("padding", [False, True])
def test_first_ranges_come_from_real_tokens_before_the_engine_wraps(tmp_path, assembled, padding):
    """Computed again with hooks on the same model: weights quantized, activations not, padding left out or not."""
    settings = {"quantization__calibration_batches": 3, "quantization__calibration_padding": padding}
    run = assembled(config(tmp_path, **settings))
    sites = quantizers(run)
    seen = {site: [] for site in sites}

    def keep(site, mask):
        return lambda module, args: seen[site].append(args[0][mask])

    padded = 0
    with switched_off(run, list(sites)), torch.no_grad():
        for _, batch in observed_batches(run, 3):
            mask = batch["attention_mask"].bool()
            padded += int((~mask).sum())
            mask = mask | padding
            modules = {site: run.student.get_submodule(site.removesuffix(":input")) for site in sites}
            handles = [m.register_forward_pre_hook(keep(site, mask)) for site, m in modules.items()]
            run.student.eval()(**inputs_of(batch))
            for handle in handles:
                handle.remove()
    assert padded > 0 and all(len(parts) == 3 for parts in seen.values())
    found = values(run)
    for site, parts in seen.items():
        x = torch.cat(parts).double()
        low, high, step = float(x.min()), float(x.max()), float(x.max() - x.min()) / 15
        expected = {
            "PactActivation": {"clip": high},
            "LsqActivation": {"learned_step": 2 * float(x.abs().mean()) / math.sqrt(7)},
            "LsqPlusActivation": {"learned_step": step, "offset": low + 8 * step},
        }[type(sites[site]).__name__]
        for name, value in expected.items():
            assert found.pop(f"{site}/{name}") == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert not found and len(seen) == 6


def test_the_size_of_evaluation_batches_changes_no_range(tmp_path, assembled):
    whole = values(assembled(config(tmp_path)))
    parts = values(assembled(config(tmp_path, train__eval_batch_size=5)))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5), name


def test_parameter_groups(tmp_path, assembled):
    run = assembled(config(tmp_path, train__learning_rate=1e-3))
    groups = {g["name"]: g for g in parameter_groups(run)}
    own = {
        kind: [p for q in quantizers(run, kind).values() for p in q.parameters()]
        for kind in ("LsqActivation", "LsqPlus", "Pact")
    }
    members = {name: {id(p) for p in group["params"]} for name, group in groups.items()}
    assert {id(p) for p in own["LsqActivation"]} < members["quantizers-1"]  # with the steps of the weights
    assert {id(p) for p in own["LsqPlus"]} == members["quantizers-0.5"]
    assert {id(p) for p in own["Pact"]} == members["quantizers-1-decay-0.2"]
    assert groups["quantizers-1"]["weight_decay"] == 0 and groups["quantizers-1-decay-0.2"]["weight_decay"] == 0.2
    assert groups["quantizers-0.5"]["lr"] == pytest.approx(5e-4)
    assert all(p.dtype == torch.float32 for group in own.values() for p in group)


def test_the_decay_of_a_clip_is_that_of_the_weights_unless_given(tmp_path, assembled):
    rules = [*RULES[:-1], {"site": "{block}.output.dense:input", "quantizer": "pact", "options": {"bits": 4}}]
    run = assembled(config(tmp_path, rules, train__weight_decay=0.07))
    (group,) = [g for g in parameter_groups(run) if g["name"] == "quantizers-1-decay"]
    assert group["weight_decay"] == 0.07 and len(group["params"]) == 2


def test_ranges_are_trained_resumed_restored_and_exported(tmp_path, monkeypatch, fast):
    settings = config(tmp_path)
    run = qpipe.execute(settings)
    trained = values(run)
    first = torch.load(checkpoint.folder(run.out, 3) / "engine" / "state.pt", weights_only=True)["model"]
    name = next(n for n in first if n.endswith("query.input_quantizer.learned_step"))
    site = f"{name.removesuffix('.input_quantizer.learned_step')}:input"
    assert float(first[name]) != trained[f"{site}/learned_step"], "training moves the step"

    out = tmp_path / "again"
    (out / "checkpoints").mkdir(parents=True)
    checkpoint.folder(run.out, 3).rename(out / "checkpoints" / "step-00000003")
    module = importlib.import_module("qpipe.stages.execute")
    monkeypatch.setattr(module, "initialize_ranges", lambda run: pytest.fail("a resumed run must not calibrate again"))
    again = qpipe.execute(settings.model_copy(update={"out": str(out)}), resume=True)
    assert values(again) == trained and weights_hash(out) == weights_hash(run.out)
    assert values(restore(out)) == trained

    tensors = load_file(run.out / "export" / "model.safetensors")
    for site, quantizer in quantizers(run).items():
        scale, zero = (float(v) for v in quantizer.grid())
        path = site.removesuffix(":input")
        assert float(tensors[f"{path}.input_scale"]) == scale
        if not quantizer.symmetric:
            stored = tensors[f"{path}.input_zero_point"]
            assert float(stored) == zero
            assert stored.dtype == (torch.float32 if quantizer.has_offset else torch.int8)
    groups = json.loads((run.out / "export" / "config.json").read_text())["quantization_config"]["config_groups"]
    inputs = [group["input_activations"] for group in groups.values() if group["input_activations"]]
    assert all(not i["dynamic"] and i["strategy"] == "tensor" and i["num_bits"] == 4 for i in inputs)


def test_post_training_quantization_uses_the_first_ranges(tmp_path):
    qpipe.execute(config(tmp_path, []))
    rules = [{"site": "{block}.*:weight", "quantizer": "uniform", "options": {"bits": 4}}, *RULES[1:]]
    settings = config(tmp_path, rules, model__name=str(tmp_path / "run" / "model"), out=str(tmp_path / "ptq"))
    run = quantize(settings)
    assert run.results["verified"]
    assert all(math.isfinite(v) for v in values(run).values()) and len(values(run)) == 8


def test_formats_say_what_they_cannot_hold(tmp_path, assembled):
    inside = {"site": "*.self:query", "quantizer": "lsq-activation", "options": {"bits": 8}}
    with pytest.raises(FormatError, match=r"cannot hold this plan: .*self:query: .*use export.format: native"):
        assembled(config(tmp_path, [*RULES, inside]))
    run = assembled(config(tmp_path, [*RULES, inside], export__format="native"))
    assert all(math.isfinite(v) for v in values(run).values())
    assert sum(site.endswith(":query") for site in quantizers(run)) == 2


def test_another_width_keeps_trained_ranges(tmp_path, fast):
    run = restore(qpipe.execute(config(tmp_path)).out)
    before = values(run)
    with rebuilt(run, activation_sites(run), 8):
        for site, quantizer in quantizers(run, "Pact").items():
            assert float(quantizer.clip.detach()) == before[f"{site}/clip"]
            assert float(quantizer.grid()[0]) == pytest.approx(before[f"{site}/clip"] / 255)
    assert values(run) == before
