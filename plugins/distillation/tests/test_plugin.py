"""The plugin's pairing of layers and its checks, and whole runs with it."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from pydantic import ValidationError
from qpipe_distillation import Distillation, DistillationOptions
from qpipe_distillation.layers import attention_pairs, depth_ratio, hidden_pairs, mapped_pairs, require_one_map

import qpipe
from qpipe import ConfigError, ModelError, Step, TrainingPhase, WeightSchedule
from qpipe.analysis.analyze import Request, analyze
from qpipe.stages import evaluate_run, plan_run
from qpipe.stages.trained import restore
from qpipe.testing import tiny_config, tiny_model
from qpipe.testing.contract import weights_hash

EXECUTE = importlib.import_module("qpipe.stages.execute")
ROOT = Path(__file__).parents[3]
TERMS = {"distil-cosine": ("logits", "hidden"), "distil-mse": ("hidden", "attention")}
TEN_STEPS = SimpleNamespace(total_steps=10)


def test_uniform_pairs_end_at_the_last_layers():
    assert hidden_pairs(2, 3, "uniform") == [(0, 0), (1, 3), (2, 6)]
    assert hidden_pairs(2, 3, "last") == [(2, 6)]
    assert attention_pairs(2, 3, "uniform") == [(0, 2), (1, 5)]
    assert attention_pairs(2, 3, "last") == [(1, 5)]
    assert depth_ratio(4, 12, "hidden states") == 3


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [(4, 6, "4 layers and the teacher 6"), (6, 4, "multiple"), (0, 4, "layers of the student are not known")],
)
def test_layers_that_do_not_pair(student, teacher, message):
    with pytest.raises(ModelError, match=message):
        depth_ratio(student, teacher, "hidden states")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": "none"}, "nothing is distilled"),
        ({"logits": "none", "hidden": "mse", "task_loss": False}, "nothing trains the head"),
        ({"temperature": 0}, "greater than 0"),
        ({"hidden": "cos"}, "cosine"),
        ({"logits_weight": 0}, "greater than 0"),
        ({"score_floor": -100}, "padding: include"),
        ({"attention": "mse", "masked_keys": "compare"}, "masked_keys: compare belongs to padding: include"),
        ({"logits_weight": {"schedule": "linear", "initial": 0, "final": 0}}, "always 0"),
        ({"logits_weight": {"schedule": "linear", "initial": 0, "final": 1, "start": 1}}, "must come before stop"),
        ({"preset": "distilbert"}, "ternarybert"),
        ({"two_step": True, "hidden": "mse", "task_loss": False}, "how long the first step is"),
        ({"preset": "tinybert", "task_loss": True}, "two_step learns layers alone first"),
        (
            {"two_step": True, "fraction": 0.5, "hidden": "mse", "logits": "none"},
            "two_step learns layers first and logits then",
        ),
        ({"preset": "tinybert", "hidden": "none", "attention": "none"}, "two_step learns layers first and logits then"),
        ({"hidden": "mse", "steps": 3}, "steps belongs to two_step: true"),
        ({"hidden": "mse", "fraction": 0.5, "warmup": 0.1}, "fraction, warmup belong to two_step: true"),
        ({"layer_map": [2, 4]}, "layer_map .* nothing of layers is compared: set hidden, attention or output"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValidationError, match=message):
        DistillationOptions(**options)


def test_a_map_of_layers():
    """XTC's maps: every other layer; and from the third on, where the embeddings meet the teacher's first layer."""
    hidden, attention = mapped_pairs([2, 4, 6], 3, 6, "uniform")
    assert hidden == [(0, 0), (1, 2), (2, 4), (3, 6)]
    assert attention == [(0, 1), (1, 3), (2, 5)]
    assert mapped_pairs([1, 3, 5], 2, 6, "uniform") == ([(0, 1), (1, 3), (2, 5)], [(0, 2), (1, 4)])
    assert mapped_pairs([1, 3, 5], 2, 6, "last") == ([(2, 5)], [(1, 4)])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([1], "has 1 numbers; the student's 3"),
        ([1, 2, 7], "layers 1 to 6"),
        ([2, 1, 3], "must rise"),
        ([2, 2, 4], r"\[2, 2, 4\] must rise from each number to the next"),
        ([1, 1, 2, 3], "must rise"),
        ([0, 1, 2], "1 to 6"),
    ],
)
def test_maps_that_do_not_fit(layers, message):
    with pytest.raises(ModelError, match=message):
        mapped_pairs(layers, 3, 6, "uniform")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("linear", [1, 1, 2, 3, 3]), ("cosine", [1, 1, 2, 3, 3]), ("step", [1, 3, 3, 3, 3])],
)
def test_weights_over_the_training(kind, expected):
    """At 0, 0.2, 0.5, 0.8 and 0.9 of the training; the two ramps meet halfway, and a quarter of the way differ."""
    weight = WeightSchedule(schedule=kind, initial=1, final=3, start=0.2, stop=0.8)
    assert [weight.at(step, 10) for step in (0, 2, 5, 8, 9)] == pytest.approx(expected)
    if kind != "step":
        quarter = {"linear": 1.5, "cosine": 2 - 2**-0.5}[kind]
        assert weight.at(35, 100) == pytest.approx(quarter)


@pytest.mark.parametrize("start", [0, 1])
def test_a_step_lies_within_the_training(start):
    """At either end the weight would be one number, and 0 if that is what it steps to."""
    with pytest.raises(ValidationError, match=f"start {start}: a step lies within the training; give a start above 0"):
        WeightSchedule(schedule="step", initial=1, final=0, start=start)


def test_presets_give_way_to_what_is_set():
    options = DistillationOptions(preset="ternarybert", logits="mse", hidden_weight=2)
    assert (options.logits, options.attention, options.hidden_weight, options.score_floor) == ("mse", "mse", 2, -100)
    assert DistillationOptions.model_validate(options.model_dump(mode="json")) == options
    for preset in ("ternarybert", "xtc", "tinybert"):
        exact = DistillationOptions(preset=preset, padding="exclude")
        assert (exact.padding, exact.score_floor, exact.masked_keys) == ("exclude", None, "equal")


def test_every_other_layer_of_an_odd_number_is_not_evenly_spaced():
    """Of three layers the second is kept, and one layer learns from the last."""
    with pytest.raises(ModelError, match=r"from layers \[2\] of its model, and evenly spaced are \[3\] of the teacher"):
        require_one_map("every-other", 1, 3)
    require_one_map("every-other", 3, 2)
    require_one_map([1], 3, 2)


def test_tinybert_learns_layers_first():
    """For 20 of 23 epochs, whatever the weights; logits with theirs from then on."""
    half = {"schedule": "linear", "initial": 0, "final": 23}
    plugin = Distillation(DistillationOptions(preset="tinybert", logits_weight=half, attention_weight=3))
    run = SimpleNamespace(total_steps=23, phases=())
    (phase,) = plugin.qpipe_training_phases(run)
    assert (phase.steps, phase.learning_rate, phase.warmup) == (20, None, None)
    run.phases = (TrainingPhase("other", 1), replace(phase, start=1), TrainingPhase("train", 2, start=21))
    weights = {loss.name: loss.weight for loss in plugin.qpipe_losses(run=run)}
    for name, expected in (("logits", [0, 0, 21, 22]), ("hidden", [1, 1, 0, 0]), ("attention", [3, 3, 0, 0])):
        assert [weights[f"distillation/{name}"](step) for step in (0, 20, 21, 22)] == expected


@pytest.mark.parametrize(
    ("options", "total", "steps"),
    [({}, 2, 1), ({}, 230, 200), ({"steps": 7}, 23, 7), ({"fraction": 0.1}, 3, 1), ({"fraction": 0.99}, 3, 2)],
)
def test_the_first_step_leaves_room_for_both(options, total, steps):
    plugin = Distillation(DistillationOptions(preset="tinybert", **options))
    assert [phase.steps for phase in plugin.qpipe_training_phases(SimpleNamespace(total_steps=total))] == [steps]
    alone = Distillation(DistillationOptions(preset="tinybert", two_step=False))
    assert not list(alone.qpipe_training_phases(SimpleNamespace(total_steps=total)))


@pytest.mark.parametrize(("options", "total"), [({}, 1), ({"steps": 4}, 4)])
def test_a_first_step_without_a_second_is_refused(options, total):
    plugin = Distillation(DistillationOptions(preset="tinybert", **options))
    with pytest.raises(ConfigError, match=f"leaves none of {total} .* train longer"):
        list(plugin.qpipe_training_phases(SimpleNamespace(total_steps=total)))


def test_only_what_is_compared_is_captured():
    plugin = Distillation(DistillationOptions(logits="none", hidden="cosine"))
    signals = plugin.qpipe_signals()
    assert signals.student == signals.teacher == {"hidden_states"}
    assert [(loss.name, loss.replaces) for loss in plugin.qpipe_losses(run=TEN_STEPS)] == [("distillation/hidden", ())]
    alone = Distillation(DistillationOptions(attention="mse", task_loss=False, attention_weight=3))
    assert [(loss.name, loss.weight, loss.replaces) for loss in alone.qpipe_losses(run=TEN_STEPS)] == [
        ("distillation/logits", 1.0, ("task",)),
        ("distillation/attention", 3.0, ()),
    ]


def test_cosines_of_images_are_refused():
    """Their states may have no axis of features at the end."""
    plugin = Distillation(DistillationOptions(logits="none", hidden="cosine"))
    plugin._hidden = [(0, 0)]
    states = {("hidden_states", 0): torch.ones(2, 3, 4, 4)}
    (loss,) = plugin.qpipe_losses(run=TEN_STEPS)
    with pytest.raises(ModelError, match=r"cosine compares .* are \[2, 3, 4, 4\]; set distillation.hidden: mse"):
        loss.fn(Step(0, True, {}, student=states, teacher=states))


def logged(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def with_teacher(folder, options, teacher, **changes):
    tiny_config(folder)
    tiny_model(folder / "other", seed=1, **teacher)
    changes = {"train__max_steps": 2, "teacher__init_student": False, **changes}
    return tiny_config(folder, {"distillation": options}, teacher__name=str(folder / "other"), **changes)


def test_a_shallower_student(tmp_path):
    """The sum over layers has one term for the embeddings and one for each of the student's two layers."""
    options = {"hidden": "cosine", "attention": "mse"}
    config = with_teacher(tmp_path, options, {"num_hidden_layers": 4})
    assert qpipe.execute(config).results["verified"]
    first = logged(tmp_path)[0]
    assert first["loss"] == pytest.approx(
        sum(first[name] for name in ("task", "distillation/logits", "distillation/hidden", "distillation/attention"))
    )
    # Independent random models: every cosine is near 0, so each of the three terms is near 1.
    assert 2 < first["distillation/hidden"] < 4


def test_the_same_model_is_at_no_distance(tmp_path):
    tiny_config(tmp_path)
    options = {"logits": "kl", "hidden": "mse", "attention": "mse", "task_loss": False}
    config = tiny_config(
        tmp_path,
        {"distillation": options},
        teacher__name=str(tmp_path / "model"),
        quantization__preset="w8",
        train__max_steps=1,
    )
    assert set(plan_run(config).plan.sites), "a plan is made without a teacher"
    run = qpipe.execute(config)
    first = logged(tmp_path)[0]
    assert "task" not in first
    assert 0 < first["loss"] < 1e-2, "8 bits differ a little from full precision"
    assert evaluate_run(run.out) == run.results["evaluation"], "and so is a finished run loaded"


@pytest.mark.parametrize(
    ("options", "teacher", "message"),
    [
        ({"hidden": "mse"}, {"hidden_size": 64}, "32 hidden units and the teacher 64"),
        ({"attention": "mse"}, {"num_attention_heads": 2}, "4 attention heads and the teacher 2"),
        ({"hidden": "cosine"}, {"num_hidden_layers": 3}, "2 layers and the teacher 3"),
    ],
)
def test_teachers_that_do_not_fit(options, teacher, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        qpipe.execute(with_teacher(tmp_path, options, teacher))


def test_a_student_that_starts_from_other_layers_than_it_would_learn_from(tmp_path):
    """Which it is to be cannot be guessed, and an analysis would compare with the layers that were kept."""
    tiny_config(tmp_path)
    for name in ("deep", "other"):
        tiny_model(tmp_path / name, num_hidden_layers=4)
    changes = {"model__name": str(tmp_path / "deep"), "teacher__name": str(tmp_path / "other"), "train__max_steps": 1}
    options = {"hidden": "mse", "logits": "mse"}
    config = tiny_config(tmp_path, {"distillation": options}, model__keep_layers=[0, 2], **changes)
    with pytest.raises(
        ModelError, match=r"from layers \[1, 3\] of its model, .* set distillation.layer_map: \[1, 3\], or \[2, 4\]"
    ):
        qpipe.execute(config)
    with pytest.raises(ModelError, match=r"from layers \[4, 2\] .* set distillation.layer_map: \[2, 4\], if these are"):
        qpipe.execute(tiny_config(tmp_path, {"distillation": options}, model__keep_layers=[3, 1], **changes))
    for kept, learned in ([1, 3], None), ([0, 2], [2, 4]), ("every-other", None):
        plugin = {"distillation": {**options, "layer_map": learned}}
        out = str(tmp_path / f"run-{kept}")
        run = qpipe.execute(tiny_config(tmp_path, plugin, model__keep_layers=kept, out=out, **changes))
        found = analyze(restore(run.out), Request(("layers",), examples=2))["layers"]
        assert found["states"] == [0, 2, 4], "what it learned from"
    with pytest.raises(ModelError, match=r"teacher 4: .* set distillation.layer_map to 3 of the teacher's layers"):
        qpipe.execute(tiny_config(tmp_path, {"distillation": options}, model__keep_layers=[0, 1, 3], **changes))


@pytest.mark.parametrize("preset", ["ternarybert", "tinybert"])
def test_presets_run_with_a_map(preset, tmp_path):
    """The logged parts are weighted: those whose turn has not come are 0, and the task loss is replaced."""
    options = {"preset": preset, "layer_map": [1, 3], "output": "cosine"}
    run = qpipe.execute(with_teacher(tmp_path, options, {"num_hidden_layers": 4}))
    assert run.results["verified"]
    first, second = logged(tmp_path)
    assert first["distillation/hidden"] > 0 and first["distillation/attention"] > 0
    # Of two independent random layers each, cosines are near 0.
    assert 1 < first["distillation/output"] < 3
    assert "task" not in first and "task" not in second
    layers = [second[f"distillation/{name}"] > 0 for name in ("hidden", "attention", "output")]
    assert (first["distillation/logits"] > 0, any(layers), all(layers)) == (
        (True, True, True) if preset == "ternarybert" else (False, False, False)
    )
    assert second["distillation/logits"] > 0
    found = analyze(restore(run.out), Request(("layers",), examples=2))["layers"]
    assert found["states"] == [0, 1, 3], "an analysis compares the layers that were compared in the training"


def test_two_steps_are_two_trainings(tmp_path, monkeypatch):
    """Layers, then logits: each with its learning rates and a fresh optimizer; the best weights are of the second.

    A run that was interrupted before, at or after the border ends in the same weights.
    """
    monkeypatch.setattr(EXECUTE, "verify", lambda *_, **__: SimpleNamespace(passed=True, metrics={}, lines=list))
    options = {"preset": "tinybert", "steps": 4, "learning_rate": 4e-3, "warmup": 0.5}
    schedule = {"schedule": "linear", "warmup": 0.0, "learning_rate": 1e-3}
    every = {"max_steps": 7, "save_every": 1, "eval_every": 1, "keep_best": True}
    changes = {f"train__{key}": value for key, value in {**schedule, **every}.items()}
    config = with_teacher(tmp_path, options, {}, **changes)
    run = qpipe.execute(config)
    rows = logged(tmp_path)
    # As logged: the rate that the next step has, so the first of the second training stands beside the fourth step.
    assert [row["lr"] for row in rows[:4]] == pytest.approx([2e-3, 4e-3, 2e-3, 1e-3])
    for number, row in enumerate(rows):
        for name in ("logits", "hidden", "attention"):
            assert (row[f"distillation/{name}"] > 0) == ((name == "logits") == (number >= 4)), (number, name)
    assert [(phase.steps, phase.stop) for phase in run.phases] == [(4, 4), (3, 7)]
    assert run.results["best_step"] > 4
    whole = weights_hash(run.out)
    for step in (2, 4, 5):
        name, folder = f"checkpoints/step-{step:08d}", tmp_path / f"from-{step}"
        shutil.copytree(run.out / name, folder / name)
        qpipe.execute(config.model_copy(update={"out": str(folder)}), resume=True)
        assert weights_hash(folder) == whole, f"resumed after step {step}"


def test_regression_has_no_distribution(tmp_path):
    tiny_config(tmp_path)
    model = tiny_model(tmp_path / "other", seed=1, num_labels=1)
    config = tiny_config(
        tmp_path,
        {"distillation": {}},
        task="regression",
        data__text_columns=["sentence"],
        teacher__name=str(model),
    )
    for begin in (qpipe.execute, plan_run):
        with pytest.raises(ConfigError, match="distillation.logits: mse"):
            begin(config)


def test_a_masked_language_model_learns_from_its_fine_tuned_self(tmp_path):
    """The teacher is pre-trained first, on the same data, and both losses are logged."""
    config = tiny_config(
        tmp_path,
        {"distillation": {"hidden": "cosine", "layers": "last"}},
        task="masked-lm",
        data__text_columns=["sentence"],
        train__max_steps=2,
        teacher__epochs=1,
    )
    run = qpipe.execute(config)
    assert run.results["verified"]
    assert set(run.results["teacher"]) == {"perplexity", "masked_accuracy"}
    assert all(row["distillation/logits"] > 0 and row["task"] > 0 for row in logged(tmp_path))


@pytest.mark.parametrize("name", ["distil-cosine", "distil-mse"])
def test_masked_language_models_of_half_the_depth_learn_as_the_examples_say(name, tmp_path):
    """Recipes of `examples/mlm` on a tiny teacher: each of their losses falls, and the export verifies."""
    recipe = yaml.safe_load((ROOT / "examples" / "mlm" / f"{name}.yaml").read_text())
    masked = {"task": "masked-lm", "data__text_columns": ["sentence"]}
    taught = qpipe.execute(tiny_config(tmp_path / "taught", train__max_steps=20, train__learning_rate=1e-2, **masked))
    config = tiny_config(
        tmp_path,
        recipe["plugins"],
        model__config={"num_hidden_layers": 1},
        teacher__name=str(taught.out / "model"),
        teacher__init_student=False,
        train__max_steps=40,
        train__learning_rate=1e-2,
        train__eval_every=40,
        **masked,
    )
    run = qpipe.execute(config)
    assert run.results["verified"]
    rows = logged(tmp_path)
    terms = {key for key in rows[0] if key.startswith("distillation/")}
    assert terms == {f"distillation/{term}" for term in TERMS[name]}
    for term in terms:
        first, last = ([row[term] for row in part] for part in (rows[:5], rows[-5:]))
        assert sum(last) < 0.9 * sum(first), term


def test_options_reach_the_losses():
    """Temperature, the weight of each term, and padding, which is left out."""
    weights = {"logits": 2, "hidden": 3, "attention": 5, "output": 7}
    terms = {"hidden": "mse", "attention": "mse", "output": "mse"}
    options = {f"{name}_weight": weight for name, weight in weights.items()}
    plugin = Distillation(DistillationOptions(temperature=3, **terms, **options))
    plugin._hidden = plugin._output = [(0, 0)]
    losses = {loss.name.partition("/")[2]: loss for loss in plugin.qpipe_losses(run=TEN_STEPS)}
    assert {name: loss.weight for name, loss in losses.items()} == weights
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        {
            ("logits", 0): torch.randn(2, 3, generator=generator),
            ("hidden_states", 0): torch.randn(2, 4, 8, generator=generator),
            ("attention_output", 0): torch.randn(2, 4, 8, generator=generator),
        }
        for _ in range(2)
    )
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    step = Step(0, True, {"attention_mask": mask}, student=student, teacher=teacher)
    soft = [(model["logits", 0] / 3).log_softmax(-1) for model in (student, teacher)]
    expected = 9 * torch.nn.functional.kl_div(*soft, reduction="batchmean", log_target=True)
    torch.testing.assert_close(losses["logits"].fn(step), expected)
    for name, kind in (("hidden", "hidden_states"), ("output", "attention_output")):
        each = (student[kind, 0] - teacher[kind, 0]).square().mean(-1)
        torch.testing.assert_close(losses[name].fn(step), ((each * mask).sum(1) / mask.sum(1)).mean())
