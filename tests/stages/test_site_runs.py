"""Runs whose activations are quantized at every site, from plan to verified export."""

import json

import pytest
import torch
from safetensors.torch import load_file

import qpipe
from qpipe import FixedActivation, FormatError
from qpipe.config import resolve
from qpipe.export.folder import METADATA, REFERENCE, read_json
from qpipe.export.metric import Prepared
from qpipe.export.verify import native_outputs
from qpipe.stages import evaluate_run, plan_run
from qpipe.stages.self_check import self_check
from qpipe.testing import tiny_config, tiny_model

from .test_families import config_of


def outputs(folder, family, preset="w8a8-outputs", **changes):
    config = config_of(family, folder).model_dump(mode="json")
    quantization = {"preset": preset, "calibration_batches": 2}
    return resolve({**config, "quantization": quantization, "export": {"format": "native"}, **changes})


# 13 sites (gated: 15) in each of two blocks, and those around them; weights of maps and normalisations.
@pytest.mark.parametrize(
    ("family", "activations", "weights"),
    [("bert", 2 * 13 + 5, 17 + 5), ("vit", 2 * 13 + 4, 14 + 5), ("llama-tied", 2 * 15 + 3, 15 + 5)],
)
def test_trains_exports_and_verifies(family, activations, weights, tmp_path):
    """In the tied model the embedding and the head are one weight."""
    run = qpipe.execute(outputs(tmp_path, family))
    slots = [entry.site.slot for entry in run.plan.sites.values()]
    assert (len(slots) - slots.count("weight"), slots.count("weight")) == (activations, weights)
    assert run.results["verified"] and run.results["self_check"]["max_logit_change"][0] > 0
    assert run.results["reloaded"] == run.results["evaluation"], "packed, loaded and quantized at every site again"
    assert evaluate_run(run.out) == run.results["evaluation"]
    layout = json.loads((run.out / "export" / "quantization.json").read_text())
    assert len(layout["activations"]) == activations and len(layout["weights"]) == weights + ("tied" in family)
    norms = [entry for name, entry in layout["weights"].items() if entry["shape"] == [32]]
    assert len(norms) == 5 and {entry["granularity"] for entry in norms} == {"tensor"}


def test_the_packed_checkpoint_computes_the_same(tmp_path, monkeypatch):
    """Every activation passes its quantizer; the tiny model's own logits hardly tell those of scores from none."""
    run = qpipe.execute(outputs(tmp_path, "bert", "w8a8-outputs"))
    export, passed, plain = run.out / "export", [], FixedActivation.quantize

    def quantize(quantizer, value, out=None):
        passed.append(quantizer.site)
        return plain(quantizer, value, out)

    monkeypatch.setattr(FixedActivation, "quantize", quantize)
    about = {**read_json(export / METADATA), **read_json(export / "quantization.json")}
    found = native_outputs(export, about, Prepared())["logits"]
    assert torch.equal(found, load_file(export / REFERENCE)["logits"])
    assert sorted(passed) == sorted(name for name in run.plan.sites if not name.endswith(":weight"))
    assert {name.rpartition(":")[2] for name in passed} == {"input", "output", "sum", "raw_scores", "probs"}


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_operands_of_products(family, tmp_path, fast):
    run = qpipe.execute(outputs(tmp_path, family, "a8-inputs" if family == "vit" else "w8a8-inputs"))
    slots = [entry.site.slot for entry in run.plan.sites.values()]
    assert {slot: slots.count(slot) for slot in set(slots) - {"weight"}} == {
        "input": 12,
        **dict.fromkeys(("query", "key", "value", "probs"), 2),
    }


def test_weights_in_full_precision(tmp_path):
    """A plan of activations alone goes the whole way too."""
    run = qpipe.execute(outputs(tmp_path, "bert", "a8-outputs"))
    assert run.results["verified"] and evaluate_run(run.out) == run.results["evaluation"]
    layout = json.loads((run.out / "export" / "quantization.json").read_text())
    assert len(layout["activations"]) == 31 and not layout["weights"]


def test_a_format_without_room_for_sums_says_so(tmp_path):
    config = tiny_config(tmp_path, quantization__preset="w8a8-outputs")
    with pytest.raises(FormatError, match=r"'compressed-tensors' cannot hold this plan: .*export.format: native"):
        plan_run(config)


def test_narrow_ranges_of_cut_values_reach_the_export(tmp_path):
    """The activations of TernaryBERT's code, verified as trained; where they do not fit, that is said first."""
    preset = {"quantization__preset": "a8-inputs-clipped"}
    rules = [{"site": "{block}.*:weight", "quantizer": "uniform", "options": {"bits": 4}}]
    inputs = [
        *rules,
        *({"site": f"{{block}}.*:{slot}", "quantizer": "none"} for slot in ("query", "key", "value", "probs")),
    ]
    config = tiny_config(tmp_path, **preset, quantization__rules=inputs)
    with pytest.raises(FormatError, match=r"'compressed-tensors' cannot hold this plan: .*narrow or clip do not fit"):
        plan_run(config)
    run = qpipe.execute(tiny_config(tmp_path, **preset, quantization__rules=rules, export__format="native"))
    assert run.results["verified"] and evaluate_run(run.out) == run.results["evaluation"]
    layout = json.loads((run.out / "export" / "quantization.json").read_text())
    assert {(site["narrow"], site["clip"]) for site in layout["activations"]} == {(True, 2.5)}


def test_post_training_quantization_of_every_weight(tmp_path, fast):
    config = tiny_config(tmp_path, quantization__preset="w8a8-outputs", export__format="native")
    changed = {**config.model_dump(mode="json"), "out": str(tmp_path / "ptq")}
    changed["quantization"]["ptq"] = {"examples": 32, "batch_size": 16, "weights": "adaround", "iterations": 2}
    changed["model"]["name"] = str(tiny_model(tmp_path / "whole"))
    run = qpipe.execute(resolve(changed))
    norms = [n for n in run.plan.sites if n.endswith("LayerNorm:weight")]
    assert len(norms) == 5 and {run.plan.sites[n].quantizer for n in norms} == {"uniform-static"}


def test_a_site_that_never_runs_is_an_error(tmp_path, assembled):
    """The pooler of a model whose forward pass goes around it."""
    rules = [{"site": "{pooler}", "quantizer": "uniform-activation", "options": {"granularity": "tensor"}}]
    config = tiny_config(tmp_path, quantization__rules=rules, export__format="native")
    run = assembled(config)
    self_check(run)
    run.student.bert.pooler.forward = lambda hidden: hidden[:, 0]
    with pytest.raises(qpipe.TrainingError, match="planned sites never ran.*bert.pooler.activation:output"):
        self_check(run)
