"""Runs with the plugin: the contract, fixed and learned, what resuming and finished runs carry, and other families."""

import importlib
import json
import shutil

import pytest
import torch
from qpipe_peg import Peg, PegActivation

import qpipe
from qpipe.stages import evaluate_run
from qpipe.stages.quantize import quantize
from qpipe.stages.trained import restore
from qpipe.testing import check_plugin, check_rules, tiny_config

NATIVE = {"export__format": "native", "quantization__calibration_batches": 2}


def test_contract():
    check_plugin(Peg, "peg", {"groups": 4}, **NATIVE)


def test_learned_ranges_and_other_statistics_keep_the_contract():
    """Ranges under ZeRO-3 on two processes are those of one, bit for bit; so are the orders.

    Learned from a moving average everywhere but at the sums, where they stay those of the last batch, which comes in
    parts.
    """
    options = {"groups": 8, "learned": True, "statistics": "ema", "range": "ema", "everywhere": True, "shared": False}
    last = {"groups": 8, "statistics": "last", "range": "last", "shared": False}
    rules = [{"site": "{ffn_sum}", "quantizer": "peg", "options": last}]
    check_rules(rules, plugins__peg=options, train__eval_batch_size=6, **NATIVE)


def described(run):
    return {s: q.describe() for s, q in run.instruments.quantizers().items() if isinstance(q, PegActivation)}


def resumed(run, out, monkeypatch):
    """The run again from its first checkpoint, where calibration is not allowed to set ranges anew."""
    first = min((run.out / "checkpoints").glob("step-*"))
    assert first.name == "step-00000001"
    shutil.copytree(first, out / "checkpoints" / first.name)
    stages = importlib.import_module("qpipe.stages.execute")
    monkeypatch.setattr(stages, "initialize_ranges", lambda run: pytest.fail("a resumed run must not calibrate again"))
    again = qpipe.execute(run.config.model_copy(update={"out": str(out)}), resume=True)
    assert again.results["resumed_step"] == 1
    return again


@pytest.mark.parametrize("learned", [False, True])
def test_resumed_finished_and_exported_runs_carry_order_and_ranges(learned, tmp_path, monkeypatch):
    options = {"peg": {"groups": None if learned else 2, "learned": learned}}
    shared = {**NATIVE, "quantization__preset": None, "train__max_steps": 2, "train__save_every": 1}
    run = qpipe.execute(tiny_config(tmp_path, options, **shared))
    assert run.results["verified"]
    expected = described(run)
    again = resumed(run, tmp_path / "again", monkeypatch)
    assert described(again) == expected
    assert again.results["evaluation"] == run.results["evaluation"]
    assert len(expected) == 6 and len({tuple(r.order) for r in expected.values()}) == 2  # one for each block
    assert all(r.order != sorted(r.order) for r in expected.values())
    assert described(restore(run.out)) == expected
    assert evaluate_run(run.out) == run.results["evaluation"]
    layout = json.loads((run.out / "export" / "quantization.json").read_text())
    found = {f"{a.pop('module')}:{a.pop('slot')}": qpipe.ActivationRange(**a) for a in layout["activations"]}
    assert found == expected


def test_post_training_quantization(tmp_path):
    settings = {**NATIVE, "quantization__preset": "w8a8-outputs", "quantization__calibration_batches": 1}
    run = quantize(tiny_config(tmp_path, {"peg": {"groups": 4, "statistics": "last"}}, **settings))
    assert run.results["verified"] and run.results["steps"] == 0
    assert {len(r.scale) for r in described(run).values()} == {4}


def test_learning_moves_ranges_and_not_orders(tmp_path):
    options = {"groups": 4, "learned": True, "lr_scale": 0.01}  # a step of 5e-6 beside scales of 2e-4 and more
    run = qpipe.execute(tiny_config(tmp_path, {"peg": options}, train__max_steps=2, **NATIVE))
    still = tiny_config(tmp_path, {"peg": {"groups": 4}}, train__max_steps=2, **NATIVE)
    fixed = qpipe.execute(still.model_copy(update={"out": str(tmp_path / "fixed")}))
    moved, kept = described(run), described(fixed)
    for site, found in moved.items():
        assert found.order == kept[site].order
        assert all(a != b for a, b in zip(found.scale, kept[site].scale, strict=True))
        torch.testing.assert_close(torch.tensor(found.scale), torch.tensor(kept[site].scale), rtol=0.1, atol=0)
