"""Phases: parts of the training with a schedule, an optimizer and a rule for the best weights of their own."""

import math
import shutil

import pytest

import qpipe
from qpipe import ConfigError, Plugin, TrainingPhase, hookimpl
from qpipe.builtin.optim import schedule_shape
from qpipe.stages import checkpoint
from qpipe.testing import tiny_config
from qpipe.testing.contract import weights_hash

CHANGES = {
    "train__max_steps": 8,
    "train__warmup": 0.25,
    "train__schedule": "linear",
    "train__eval_every": 2,
    "train__save_every": 1,
    "train__keep_best": True,
}


class Phased(Plugin):
    """Offers phases; records learning rates, and how often the optimizer has stepped since it was fresh."""

    def __init__(self, *phases):
        super().__init__()
        self.phases, self.rates, self.ages, self.evaluated = phases, [], [], []

    @hookimpl
    def qpipe_training_phases(self):
        return self.phases

    @hookimpl
    def qpipe_step_start(self, run, step):
        self.rates.append(run.scheduler.get_last_lr()[0])

    @hookimpl
    def qpipe_step_end(self, run, step):
        self.step = step.index + 1
        self.ages.append({int(state["step"]) for state in run.scheduler.optimizer.state.values()})

    @hookimpl
    def qpipe_evaluated(self, metrics):
        self.evaluated.append(self.step)


FIRST, SECOND = TrainingPhase("first", 2, learning_rate=4e-3, warmup=0.5), TrainingPhase("second", 1, warmup=0.0)


def test_each_has_its_schedule_and_a_fresh_optimizer(tmp_path, use, fast):
    plugin = Phased(FIRST, SECOND)
    use(plugin)
    run = qpipe.execute(tiny_config(tmp_path, **CHANGES))
    # Warm-up over half of two steps; one step at the configured rate; five, of which round(1.25) = 1 warms up.
    assert plugin.rates == pytest.approx([0, 4e-3, 1e-3, 0, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert plugin.ages == [{1}, {2}, {1}, {1}, {2}, {3}, {4}, {5}]
    assert [(p.name, p.start, p.stop) for p in run.phases] == [("first", 0, 2), ("second", 2, 3), ("train", 3, 8)]


def test_the_last_weights_of_a_phase_go_on_and_the_best_is_of_the_last_phase(tmp_path, use, fast):
    plugin = Phased(TrainingPhase("first", 3))
    use(plugin)
    run = qpipe.execute(tiny_config(tmp_path, **CHANGES, train__learning_rate=1e-9))
    assert plugin.evaluated == [2, 3, 4, 6, 8], "every second step, and where the phase ends"
    # With hardly a learning rate every evaluation is the same, so the first that counts is the best.
    assert run.results["best_step"] == 4
    assert {3, 4, 8} <= set(checkpoint.steps(run.out))


def test_a_run_resumes_within_each_phase_and_between_them(tmp_path, use, fast):
    config = tiny_config(tmp_path, **{**CHANGES, "train__keep_best": False})
    use(Phased(FIRST, SECOND))
    whole = weights_hash(qpipe.execute(config).out)
    for step in (1, 2, 3, 5):
        folder = tmp_path / f"from-{step}"
        name = f"checkpoints/step-{step:08d}"
        shutil.copytree(tmp_path / "run" / name, folder / name)
        use(plugin := Phased(FIRST, SECOND))
        resumed = qpipe.execute(config.model_copy(update={"out": str(folder)}), resume=True)
        assert len(plugin.rates) == 8 - step
        assert weights_hash(resumed.out) == whole, step


def test_phases_that_do_not_fit_are_refused_before_training(tmp_path, use):
    use(Phased(TrainingPhase("first", 7), TrainingPhase("second", 2)))
    with pytest.raises(ConfigError, match="phase 'second' asks for 2 optimizer steps, and 1 of 8 are left"):
        qpipe.execute(tiny_config(tmp_path, **CHANGES))
    use(Phased(TrainingPhase("none", 0)))
    with pytest.raises(ConfigError, match="phase 'none' asks for 0 optimizer steps"):
        qpipe.execute(tiny_config(tmp_path, **CHANGES))


def test_a_phase_may_be_the_whole_training(tmp_path, use, fast):
    use(Phased(TrainingPhase("all", 8)))
    run = qpipe.execute(tiny_config(tmp_path, **CHANGES))
    assert [p.name for p in run.phases] == ["all"] and run.results["best_step"] is not None


@pytest.mark.parametrize(
    ("name", "later"),
    [("linear", 6 / 8), ("cosine", (1 + math.cos(math.pi * 2 / 8)) / 2), ("constant", 1), ("bert-linear", 0.6 / 0.8)],
)
def test_shapes_between_their_ends(name, later):
    shape = schedule_shape(name, 10, 0.2)
    assert (shape(1), shape(4)) == pytest.approx((0.5, later))


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "bert-linear"])
def test_shapes_begin_at_0_and_reach_1(name):
    shape = schedule_shape(name, 10, 0.2)
    assert shape(0) == 0 and shape(2) == pytest.approx(1)
    assert shape(10) == pytest.approx(1 if name == "constant" else 0, abs=1e-9)
