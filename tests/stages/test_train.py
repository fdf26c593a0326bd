"""The training loop: terms of the loss, accumulation, groups, failures, and which weights it ends with."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import qpipe
from qpipe import (
    ConfigError,
    Loss,
    ParamGroup,
    Plugin,
    PluginError,
    SiteError,
    TrainingError,
    WeightLoss,
    hookimpl,
)
from qpipe.stages import checkpoint
from qpipe.stages.param_groups import parameter_groups
from qpipe.stages.train import collect_losses, total_steps
from qpipe.testing import tiny_config
from qpipe.testing.gradients import trace

TRAIN = importlib.import_module("qpipe.stages.train")


def squares(w):
    return w.float().square().mean()


class Offer(Plugin):
    """Contributes what it is given."""

    def __init__(self, losses=(), weight_losses=(), groups=()):
        super().__init__()
        self.losses, self.weight_losses, self.groups = losses, weight_losses, groups

    @hookimpl
    def qpipe_losses(self):
        return self.losses

    @hookimpl
    def qpipe_weight_losses(self):
        return self.weight_losses

    @hookimpl
    def qpipe_param_groups(self):
        return self.groups


class Recorder(Plugin):
    def __init__(self):
        super().__init__()
        self.steps, self.micro_batches, self.errors = [], [], []

    @hookimpl
    def qpipe_step_start(self, step):
        self.micro_batches.append((step.index, step.is_last_micro_batch, len(step.batch["labels"])))

    @hookimpl
    def qpipe_step_end(self, step, metrics):
        self.steps.append(dict(metrics))

    @hookimpl
    def qpipe_run_error(self, error):
        self.errors.append(error)


def zero(step):
    return step.output.logits.float().sum() * 0


# --- terms of the loss ------------------------------------------------------------------------------------------------


def losses_of(*plugins):
    host = qpipe.host.load_plugins({}, extra=[(f"p{i}", p) for i, p in enumerate(plugins)])
    return collect_losses(SimpleNamespace(host=host, task=SimpleNamespace(kind="classification")))


def test_a_term_stands_in_for_another():
    assert {loss.name for loss in losses_of(Offer([Loss("extra", zero)]))} == {"task", "extra"}
    assert {loss.name for loss in losses_of(Offer([Loss("mine", zero, replaces=("task",))]))} == {"mine"}


def test_a_term_that_replaces_an_unknown_one():
    with pytest.raises(ConfigError, match="loss 'mine' replaces 'tsak', which no plugin offers; did you mean 'task'"):
        losses_of(Offer([Loss("mine", zero, replaces=("tsak",))]))


def test_no_term_is_left():
    with pytest.raises(ConfigError, match="no loss is left to train with"):
        losses_of(Offer([Loss("mine", zero, replaces=("task", "mine"))]))


def test_factors_of_terms_and_their_sum(tmp_path, use, fast):
    recorder = Recorder()
    use(recorder, Offer([
        Loss("half", lambda step: step.output.logits.float().sum() * 0 + 3.0, weight=0.5),
        Loss("later", lambda step: step.output.logits.float().sum() * 0 + 1.0, weight=lambda index: index * 10.0),
    ]))  # fmt: skip
    qpipe.execute(tiny_config(tmp_path, train__max_steps=3))
    assert [m["half"] for m in recorder.steps] == [1.5] * 3
    assert [m["later"] for m in recorder.steps] == [0.0, 10.0, 20.0]
    for metrics in recorder.steps:
        assert metrics["loss"] == pytest.approx(metrics["task"] + metrics["half"] + metrics["later"])
        assert metrics["grad_norm"] > 0 and metrics["samples_per_second"] > 0
    assert recorder.steps[0]["lr"] > recorder.steps[1]["lr"] > recorder.steps[2]["lr"]


# --- weight losses and accumulation -----------------------------------------------------------------------------------


def squares_of_moments(m):
    """`squares` of each weight."""
    return m.second + m.mean.square()


def penalty(reduction="sum", weight=7.0, every=1, moments=False):
    fn = squares_of_moments if moments else squares
    applies = lambda path: path.endswith("intermediate.dense")  # noqa: E731
    return WeightLoss("squares", fn, weight, applies, reduction, every, moments=moments)


CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.mark.parametrize("moments", [False, True])
def test_micro_batches_have_the_gradients_of_one_batch(moments, tmp_path, use):
    """Weight penalties act once per optimizer step, whatever the number of micro-batches."""
    use(Offer(weight_losses=[penalty(moments=moments)]))
    common = {"quantization__preset": "w4", "train__batch_size": 16, "train__clip": 0}
    (one, two), _ = trace(tiny_config(tmp_path, **common), 2)
    (one_again, two_again), _ = trace(tiny_config(tmp_path, train__accumulation=2, **common), 2)
    for expected, found in ((one, one_again), (two, two_again)):
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("reduction", "moments"), [("sum", False), ("mean", False), ("sum", True), ("mean", True)])
def test_weight_loss_adds_its_own_gradient(reduction, moments, accumulation, tmp_path, use):
    changes = {"quantization__preset": "w4", "train__accumulation": accumulation}
    use()
    ((without,), _) = trace(tiny_config(tmp_path, **changes), 1)
    use(Offer(weight_losses=[penalty(reduction, moments=moments)]))
    ((with_penalty,), _) = trace(tiny_config(tmp_path, **changes), 1)
    model = qpipe.stages.plan_run(tiny_config(tmp_path)).student
    share = 2 if reduction == "mean" else 1  # two blocks
    for name, gradient in with_penalty.items():
        weight = model.get_parameter(name).detach()
        expected = without[name]
        if name.endswith("intermediate.dense.weight"):
            expected = expected + 7.0 / share * 2 * weight / weight.numel()
            assert not torch.allclose(gradient, without[name], **CLOSE)
        torch.testing.assert_close(gradient, expected, **CLOSE)


def test_a_weight_loss_of_every_second_step_counts_twice(tmp_path, use):
    changes = {"quantization__preset": "w4", "train__learning_rate": 1e-12}  # so that all steps see equal weights
    gradients = []
    for offer in (Offer(), Offer(weight_losses=[penalty(weight=14.0)]), Offer(weight_losses=[penalty(every=2)])):
        use(offer)
        gradients.append(trace(tiny_config(tmp_path, **changes), 2)[0])
    without, double, lazy = gradients
    for name, gradient in lazy[0].items():
        torch.testing.assert_close(gradient, without[0][name], **CLOSE)
        torch.testing.assert_close(lazy[1][name], double[1][name], **CLOSE)


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_logged_weight_loss_is_that_of_the_step(accumulation, moments, tmp_path, use, fast):
    recorder = Recorder()
    use(recorder, Offer(weight_losses=[penalty(moments=moments)]))
    config = tiny_config(tmp_path, train__max_steps=1, train__accumulation=accumulation)
    model = qpipe.stages.plan_run(config).student
    expected = sum(
        7.0 * squares(p).item() for n, p in model.named_parameters() if n.endswith("intermediate.dense.weight")
    )
    qpipe.execute(config)
    assert recorder.micro_batches == [(0, i == accumulation - 1, 16 // accumulation) for i in range(accumulation)]
    assert recorder.steps[0]["squares"] == pytest.approx(expected, rel=1e-4)


def test_a_weight_loss_that_applies_to_nothing(tmp_path, assembled):
    idle = WeightLoss("idle", squares, 1.0, lambda path: path == "no.such.module")
    with pytest.raises(SiteError, match="weight loss 'idle' applies to no weight of this model"):
        assembled(tiny_config(tmp_path), Offer(weight_losses=[idle]))


@pytest.mark.parametrize("moments", [False, True])
def test_activation_checkpointing_has_the_same_gradients(moments, tmp_path, use):
    use(Offer(weight_losses=[penalty(moments=moments)]))
    ((plain,), _) = trace(tiny_config(tmp_path), 1)
    calls = []
    original = torch.utils.checkpoint.checkpoint
    patch = pytest.MonkeyPatch()
    for module in ("torch.utils.checkpoint", "transformers.modeling_utils"):
        patch.setattr(f"{module}.checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    ((again,), _) = trace(tiny_config(tmp_path, train__activation_checkpointing=True), 1)
    patch.undo()
    assert calls, "nothing was checkpointed"
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name


# --- parameter groups -------------------------------------------------------------------------------------------------


def is_head(name, parameter):
    return name.startswith("classifier")


def test_groups_have_their_own_settings_and_built_ins_give_way(tmp_path, assembled):
    head = ParamGroup("head", is_head, lr_scale=10.0)
    run = assembled(tiny_config(tmp_path, train__weight_decay=0.25), Offer(groups=[head]))
    groups = {group["name"]: group for group in parameter_groups(run)}
    assert {name: (g["weight_decay"], g.get("lr")) for name, g in groups.items()} == {
        "default": (0.25, None),
        "no_decay": (0.0, pytest.approx(1e-3)),
        "head": (0.25, pytest.approx(1e-2)),
    }
    named = dict(run.student.named_parameters())
    assert groups["head"]["params"] == [p for n, p in named.items() if is_head(n, p)]
    assert all(p.ndim == 1 for p in groups["no_decay"]["params"])
    assert sum(len(g["params"]) for g in groups.values()) == len(named)


def test_two_groups_for_one_parameter(tmp_path, assembled):
    one, two = ParamGroup("one", is_head), ParamGroup("two", lambda name, p: name == "classifier.bias")
    with pytest.raises(
        PluginError, match="'classifier.bias' is claimed by group '(one|two)' of 'test-.' and group '(one|two)' of"
    ):
        assembled(tiny_config(tmp_path), Offer(groups=[one]), Offer(groups=[two]))


# --- failures ---------------------------------------------------------------------------------------------------------


class Poison(Plugin):
    """Plants a NaN in a weight before a step."""

    def __init__(self, step, path):
        super().__init__()
        self.step, self.path = step, path

    @hookimpl
    def qpipe_step_start(self, run, step):
        if step.index == self.step:
            with torch.no_grad():
                run.student.get_submodule(self.path).weight[0, 0] = torch.nan


def test_a_non_finite_loss_names_the_module_and_keeps_the_checkpoint(tmp_path, use, fast):
    recorder, path = Recorder(), "bert.encoder.layer.1.intermediate.dense"
    use(Poison(4, path), recorder)
    config = tiny_config(tmp_path)
    with pytest.raises(TrainingError, match="the loss is not finite at step 4") as caught:
        qpipe.execute(config)
    message = str(caught.value)
    assert f"the first module whose output is not finite is {path}" in message
    assert "parts: task" in message and "the checkpoint of step 3 is kept" in message and "learning_rate" in message
    assert recorder.errors == [caught.value]
    assert checkpoint.steps(tmp_path / "run") == [3]
    checkpoint.verify_files(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "export").exists()
    use()
    assert qpipe.execute(config, resume=True).results["resumed_step"] == 3


class Cusp(Plugin):
    """A term of value 0 without a derivative there, from a step on."""

    @hookimpl
    def qpipe_losses(self):
        def term(step):
            zero = step.output.logits.sum() * 0
            return zero.abs().sqrt() if step.index >= 4 else zero

        yield Loss("cusp", term)


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_weights_are_saved(tmp_path, use, fast):
    use(Cusp())
    config = tiny_config(tmp_path, train__save_every=1, train__eval_every=100)
    with pytest.raises(
        TrainingError, match="the gradient is not finite at step 4, though.*checkpoint of step 4 is kept"
    ):
        qpipe.execute(config)
    assert checkpoint.steps(tmp_path / "run")[-1] == 4
    use()
    assert qpipe.execute(config, resume=True).results["resumed_step"] == 4


class Fragile(Plugin):
    """Fails too when it is told of a failure."""

    @hookimpl
    def qpipe_run_error(self, error):
        raise OSError(f"no disk for {type(error).__name__}")


def test_a_plugin_that_fails_at_the_error_is_noted_on_it(tmp_path, use, fast):
    """The run's own error is what is raised, and the plugins before and behind it are told as well."""
    before, behind = Recorder(), Recorder()
    use(Poison(0, "classifier"), before, Fragile(), behind)
    with pytest.raises(TrainingError, match="the loss is not finite at step 0") as caught:
        qpipe.execute(tiny_config(tmp_path))
    assert caught.value.__notes__ == ["qpipe_run_error of plugin 'test-2' failed too: no disk for TrainingError"]
    assert before.errors == behind.errors == [caught.value]


def test_a_non_finite_term_is_named_where_the_model_is_finite(tmp_path, use, fast):
    use(Offer([Loss("broken", lambda step: step.output.logits.sum() * math.nan)]))
    with pytest.raises(TrainingError, match="parts: broken.*every module's output is finite; no checkpoint had been"):
        qpipe.execute(tiny_config(tmp_path))


@pytest.mark.parametrize("accumulation", [1, 3, 5])
def test_batch_size_must_be_divisible(accumulation, tmp_path, assembled):
    config = tiny_config(tmp_path, train__accumulation=accumulation)
    if accumulation == 1:
        assembled(config)
        return
    with pytest.raises(ConfigError, match=f"16 is not divisible by 1 processes x {accumulation} micro-batches"):
        assembled(config)


@pytest.mark.parametrize("steps", [None, 6])
def test_batch_larger_than_the_data(steps, tmp_path, assembled):
    with pytest.raises(
        ConfigError, match="batch_size 512 exceeds the 128 training examples; lower it, or give more data"
    ):
        assembled(tiny_config(tmp_path, train__batch_size=512, train__max_steps=steps))


# --- length and result ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "steps"), [(1, 8), (2.5, 20), (0.01, 1), (4.375000000000001, 35)])
def test_epochs_count_full_batches(epochs, steps, tmp_path, assembled):
    run = assembled(tiny_config(tmp_path, train__max_steps=None, train__epochs=epochs))
    assert total_steps(run) == run.total_steps == steps


def test_it_ends_with_the_weights_of_the_best_evaluation(tmp_path, monkeypatch, fast):
    """Scripted metrics: the best one is in the middle, and a NaN is never the best."""
    script = iter([0.5, 0.9, math.nan, 0.7, 0.6, 0.8, 0.123])
    monkeypatch.setattr(TRAIN, "evaluate", lambda run, last=None: {"accuracy": next(script)})
    config = tiny_config(
        tmp_path, train__eval_every=1, train__save_every=1, train__keep_best=True, train__keep_checkpoints=1
    )
    run = qpipe.execute(config)
    assert run.results["best_step"] == 2 and run.results["steps"] == 6
    assert run.results["evaluation"] == {"accuracy": 0.123}, "what is exported is evaluated again"
    assert checkpoint.steps(run.out) == [2, 6], "the best and the newest are kept"
    best = torch.load(run.out / "checkpoints" / "step-00000002" / "engine" / "state.pt", weights_only=True)["model"]
    for name, parameter in type(run.student).from_pretrained(run.out / "model").named_parameters():
        assert torch.equal(parameter, best[name]), name


def test_without_keep_best_it_ends_with_the_last_weights(tmp_path, monkeypatch, fast):
    script = iter([0.9, 0.5])
    monkeypatch.setattr(TRAIN, "evaluate", lambda run, last=None: {"accuracy": next(script)})
    run = qpipe.execute(tiny_config(tmp_path, train__eval_every=3))
    last = torch.load(run.out / "checkpoints" / "step-00000006" / "engine" / "state.pt", weights_only=True)["model"]
    for name, parameter in type(run.student).from_pretrained(run.out / "model").named_parameters():
        assert torch.equal(parameter, last[name]), name


def test_two_runs_of_one_seed_are_equal_and_another_seed_is_not(tmp_path, use):
    use()
    ((first,), _), ((second,), _) = (trace(tiny_config(tmp_path, train__dropout=0.1), 1) for _ in range(2))
    ((other,), _) = trace(tiny_config(tmp_path, train__dropout=0.1, seed=5), 1)
    assert all(torch.equal(first[name], g) for name, g in second.items())
    assert any(not torch.equal(first[name], g) for name, g in other.items())


def test_dropout_override_reaches_modules_and_configuration(tmp_path, assembled):
    run = assembled(tiny_config(tmp_path, train__dropout=0.3))
    assert {m.p for m in run.student.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert run.student.config.attention_probs_dropout_prob == run.student.config.hidden_dropout_prob == 0.3
