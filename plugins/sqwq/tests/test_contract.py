"""Runs with the plugin: the contract, every width through export and verification, groups, and what is saved."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from qpipe_sqwq import Sqwq, SqwqWeight
from safetensors.torch import load_file

import qpipe
from qpipe import ConfigError, SiteError, moments
from qpipe.export.verify import verify
from qpipe.stages import evaluate_run, export_run, plan_run
from qpipe.stages.param_groups import parameter_groups
from qpipe.testing import check_plugin, check_rules, tiny_config

ROOT = Path(__file__).parents[3]


def test_contract():
    check_plugin(Sqwq, "sqwq")


@pytest.mark.parametrize(("bits", "zero3"), [(1, False), (3, True)])
def test_embeddings_and_other_widths(bits, zero3):
    options = {"bits": bits, "embedding": True, "rules": True}
    check_rules([], zero3=zero3, plugins__sqwq=options)


@pytest.mark.parametrize("init", ["lossless", "scratch"])
def test_other_starts(init):
    check_rules([], zero3=False, plugins__sqwq={"bits": 2, "init": init}, quantization__noise=0.5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_width_is_exported_as_trained(bits, tmp_path):
    """`execute` verifies: the packed weights equal the trained ones in every bit, in a process without qpipe."""
    options = {"bits": bits, "embedding": True}
    config = tiny_config(tmp_path, {"sqwq": options}, quantization__preset=None, train__max_steps=2)
    run = qpipe.execute(config)
    assert run.results["verified"]
    assert {entry.bits for entry in run.plan.sites.values()} == {bits}
    native = export_run(run.out, "native", tmp_path / "native")
    checks = {check.name: check.status for check in verify(native).checks}
    assert checks["weights"] == checks["logits"] == "pass"
    packed = json.loads((native / "quantization.json").read_text())["weights"]
    assert {entry["bits"] for entry in packed.values()} == {bits}
    assert "bert.embeddings.word_embeddings.weight" in packed


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
    options = {"sqwq": {"weight": 0.25, "every": 3}}
    (term,) = plan_run(tiny_config(tmp_path, options, quantization__preset=None)).weight_losses
    assert (term.weight, term.every) == (0.25, 3)


def test_a_sigma_of_its_own_is_regularised_towards(tmp_path):
    rule = {"site": "{block}.*.query:weight", "quantizer": "sqwq", "options": {"sigma": 0.5}}
    run = plan_run(tiny_config(tmp_path, {"sqwq": {}}, quantization__rules=[rule]))
    p = torch.randn(64, 64, dtype=torch.float64)
    terms = {term.name: term for term in run.weight_losses}
    assert terms.keys() == {"sqwq-0.5", "sqwq-0.8"}
    for name, sigma in (("sqwq-0.5", 0.5), ("sqwq-0.8", 0.8)):
        expected = (p.std(correction=0) - sigma) ** 2 + p.mean() ** 2
        torch.testing.assert_close(terms[name].fn(moments([p])), expected[None], rtol=1e-9, atol=0)
        for path in ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.key"):
            assert terms[name].applies(path) == (path.endswith("query") == (sigma == 0.5))


def test_a_plugin_that_squashes_nothing_is_an_error(tmp_path):
    with pytest.raises(SiteError, match="no rule squashes a weight; set sqwq.rules=true"):
        plan_run(tiny_config(tmp_path, {"sqwq": {"rules": False}}))


def test_a_finished_run_is_evaluated_and_exported_from_p(tmp_path):
    run = qpipe.execute(tiny_config(tmp_path, {"sqwq": {"bits": 3}}, quantization__preset=None, train__max_steps=2))
    assert evaluate_run(run.out) == run.results["evaluation"]
    again = export_run(run.out, out=tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (run.out / "export", again))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def unrounded(tmp_path_factory):
    """A run that rounded nothing in training."""
    folder = tmp_path_factory.mktemp("unrounded")
    options = {"sqwq": {"bits": 8, "init": "lossless"}}
    config = tiny_config(
        folder,
        options,
        quantization__preset=None,
        quantization__noise=0.0,
        train__max_steps=2,
        train__learning_rate=1e-6,
    )
    qpipe.execute(config)
    return folder


def test_the_model_folder_holds_ordinary_weights(unrounded):
    before, after = (load_file(unrounded / f / "model.safetensors") for f in ("model", "run/model"))
    assert before.keys() == after.keys()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    # A learning rate of 1e-5 for P, two steps of Adam: nearly the weight that it was made of.
    torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-5)
    stored = load_file(unrounded / "run/model" / "quantizers.safetensors")
    site = "bert.encoder.layer.0.attention.self.query:weight"
    p, gain = stored[f"{site}/stored_weight"], stored[f"{site}/gain"]
    torch.testing.assert_close(p.tanh() * gain.exp(), after[name], rtol=1e-5, atol=1e-8)


def continued(unrounded, **options):
    changes = {"model__name": str(unrounded / "run/model"), "quantization__preset": None}
    return tiny_config(unrounded, {"sqwq": {"bits": 3, "init": "stored", **options}}, **changes)


def test_the_width_can_be_chosen_later(unrounded):
    """Another run goes on from the same P and gains, bit for bit, at another width."""
    run = plan_run(continued(unrounded))
    stored = load_file(unrounded / "run/model" / "quantizers.safetensors")
    assert {entry.bits for entry in run.plan.sites.values()} == {3}
    for site, quantizer in run.instruments.quantizers().items():
        weight = run.student.get_parameter(site.replace(":", "."))
        assert torch.equal(weight, stored[f"{site}/stored_weight"])
        assert torch.equal(quantizer.gain, stored[f"{site}/gain"])


def test_going_on_is_refused_where_the_other_weights_are_of_another_model(unrounded, tmp_path):
    """Before a teacher is fine-tuned. What was stored goes with its own model only."""
    options, changes = {"sqwq": {"init": "stored"}}, {"model__name": str(unrounded / "run/model")}
    changes |= {"quantization__preset": None, "train__max_steps": 3}
    with pytest.raises(ConfigError, match=r"all other weights are the teacher's; set teacher.init_student=false"):
        qpipe.execute(tiny_config(tmp_path, {**options, "ti-g": {}}, **changes))
    assert not (tmp_path / "run").exists(), "the teacher was fine-tuned first"
    with pytest.raises(ConfigError, match=r"model.keep_layers \[1\] gives the layers other numbers"):
        plan_run(tiny_config(tmp_path, options, **changes, model__keep_layers=[1]))
    with pytest.raises(ConfigError, match=r"model.weights is random, so that no other weight is read from there"):
        plan_run(tiny_config(tmp_path, options, **changes, model__weights="random"))


def test_pre_training_from_scratch_as_the_example_says(tmp_path):
    """`examples/mlm/pretrain.yaml` on a tiny model: its loss falls from that of guessing, and the export verifies."""
    recipe = yaml.safe_load((ROOT / "examples" / "mlm" / "pretrain.yaml").read_text())
    changes = {"model__weights": recipe["model"]["weights"], "task": recipe["task"], "data__text_columns": ["sentence"]}
    changes |= {"quantization__preset": recipe["quantization"]["preset"], "train__max_steps": 60}
    run = qpipe.execute(tiny_config(tmp_path, recipe["plugins"], **changes, train__learning_rate=1e-2))
    assert run.results["verified"]
    assert {entry.quantizer for site, entry in run.plan.sites.items() if ".layer." in site} == {"sqwq"}
    losses = [row["task"] for row in map(json.loads, (run.out / "metrics.jsonl").open()) if row["kind"] == "train"]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_going_on_with_a_teacher_of_its_own(unrounded, tmp_path):
    changes = {"teacher__name": str(tmp_path / "teacher"), "teacher__init_student": False, "quantization__preset": None}
    changes |= {"model__name": str(unrounded / "run/model"), "train__max_steps": 3, "train__learning_rate": 1e-9}
    run = qpipe.execute(tiny_config(tmp_path, {"sqwq": {"init": "stored", "bits": 8}, "ti-g": {}}, **changes))
    state, taken = (load_file(folder / "run/model/model.safetensors") for folder in (unrounded, tmp_path))
    assert run.teacher is not None and all(torch.allclose(taken[name], state[name], atol=1e-6) for name in state)


def test_going_on_needs_what_an_earlier_run_left(unrounded, tmp_path):
    with pytest.raises(ConfigError, match=r"quantizers.safetensors does not exist; set model.name"):
        plan_run(tiny_config(tmp_path, {"sqwq": {"init": "stored"}}))
    with pytest.raises(ConfigError, match=r"finds shape \(32, 1\), not \(1, 1\), under bert.*/gain"):
        plan_run(continued(unrounded, granularity="tensor"))
    with pytest.raises(ConfigError, match="finds nothing under bert.embeddings.word_embeddings:weight/stored_weight"):
        plan_run(continued(unrounded, embedding=True))
