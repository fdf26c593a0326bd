"""Runs with the plugin: the contract, every width through export and verification, groups, and what is saved."""

import pytest
import torch
from qpipe_sqwq import Sqwq, SqwqWeight
from safetensors.torch import load_file

import qpipe
from qpipe.stages import plan_run
from qpipe.stages.prepare import parameter_groups
from qpipe.testing import check_plugin, check_rules, tiny_config


def test_contract():
    check_plugin(Sqwq, "sqwq")


@pytest.mark.parametrize("bits", [1, 3])
def test_embeddings_and_other_widths(bits):
    options = {"bits": bits, "embedding": True, "rules": True}
    check_rules([], zero3=False, plugins__sqwq=options)


@pytest.mark.parametrize("init", ["lossless", "scratch"])
def test_other_starts(init):
    check_rules([], zero3=False, plugins__sqwq={"bits": 2, "init": init}, quantization__noise=0.5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_width_is_exported_as_trained(bits, tmp_path):
    """`execute` verifies: the packed weights equal the trained ones in every bit, in a process without qpipe."""
    config = tiny_config(tmp_path, {"sqwq": {"bits": bits}}, quantization__preset=None, train__max_steps=2)
    run = qpipe.execute(config)
    assert run.results["verified"]
    assert {entry.bits for entry in run.plan.sites.values()} == {bits}


def test_learning_rate_decay_and_regulariser(tmp_path):
    config = tiny_config(tmp_path, {"sqwq": {}}, quantization__preset=None, train__weight_decay=0.1)
    run = plan_run(config)
    groups = {group["name"]: group for group in parameter_groups(run)}
    squashed = groups["sqwq-10"]
    assert squashed["lr"] == pytest.approx(10 * config.train.learning_rate) and squashed["weight_decay"] == 0
    sites = [q for q in run.instruments.quantizers().values() if isinstance(q, SqwqWeight)]
    assert len(squashed["params"]) == 2 * len(sites) == 24
    (term,) = run.weight_losses
    assert term.name == "sqwq" and term.reduction == "sum"


def test_the_model_folder_holds_ordinary_weights(tmp_path):
    config = tiny_config(tmp_path, {"sqwq": {"init": "lossless"}}, train__learning_rate=1e-12, train__max_steps=1)
    qpipe.execute(config)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("model", "run/model"))
    name = "bert.encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-7)
