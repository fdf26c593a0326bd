from collections import Counter
from itertools import pairwise

import pytest
from pydantic import ValidationError
from qpipe_teacher_intervention import InterventionOptions, Phase, make_schedule
from qpipe_teacher_intervention.options import MapOptions, OutputOptions
from qpipe_teacher_intervention.schedule import SCHEDULES, Part, intervention_steps

from qpipe import ConfigError


def lengths(preset, steps):
    return [(*p.kinds, p.stop - p.start) for p in make_schedule(SCHEDULES[preset], steps).phases]


@pytest.mark.parametrize(("steps", "expected"), [(60, (10, 10, 40)), (120, (20, 20, 80))])
def test_the_reference_code_divides_like_this(steps, expected):
    assert lengths("reference", steps) == list(zip(("output", "context", "map"), expected, strict=True))


@pytest.mark.parametrize("steps", range(3, 200))
def test_phase_of_every_step_equals_the_reference_rule(steps):
    schedule = make_schedule(SCHEDULES["reference"], steps)
    for k in range(steps):
        expected = "output" if k < steps / 6 else "context" if k < steps / 3 else "map"
        # Below one step per phase the rule leaves phases out; ours keeps each for one step.
        if steps >= 6:
            assert schedule.kind_at(k) == expected
    assert schedule.kind_at(steps) is None and schedule.kind_at(-1) is None
    assert [p.start for p in schedule.phases[1:]] == [p.stop for p in schedule.phases[:-1]]
    assert schedule.stop == steps


def test_short_interventions_keep_every_phase():
    assert lengths("reference", 3) == [("output", 1), ("context", 1), ("map", 1)]
    assert lengths("paper", 5) == [("output", 3), ("map", 2)]
    with pytest.raises(ConfigError, match=r"2 optimizer steps cannot hold 3 phases.*output, context, map"):
        make_schedule(SCHEDULES["reference"], 2)


def test_length():
    assert intervention_steps(60, 0.25, 3, 1000) == 60
    assert intervention_steps(None, 0.25, 3, 1000) == 250
    assert intervention_steps(None, 0.25, 3, 4) == 3
    assert intervention_steps(None, 1.0, 1, 7) == 7
    with pytest.raises(ConfigError, match=r"60 steps does not fit into a training of 50"):
        intervention_steps(60, 0.25, 3, 50)


def test_presets_of_the_three_plugins():
    assert InterventionOptions().schedule == "reference"
    assert [p.kind for p in OutputOptions().parts] == [("output",)]
    assert [p.kind for p in MapOptions().parts] == [("map",)]


@pytest.mark.parametrize("name", ["paper", "reference"])
def test_inverted_schedules_end_where_gradual_ones_begin(name):
    gradual, inverted = ([p.kind for p in SCHEDULES[f"{name}{suffix}"]] for suffix in ("", "-inverted"))
    assert inverted == gradual[::-1]


def test_the_reference_code_inverts_in_thirds():
    assert lengths("reference-inverted", 60) == [("map", 20), ("context", 20), ("output", 20)]


@pytest.mark.parametrize(("name", "kinds"), [("paper", 2), ("reference", 3)])
def test_stochastic_schedules_draw_evenly_and_again_the_same(name, kinds):
    parts, steps = SCHEDULES[f"{name}-stochastic"], 3000
    drawn = [make_schedule(parts, steps).kind_at(k) for k in range(steps)]
    assert drawn == [make_schedule(parts, steps).kind_at(k) for k in range(steps)]
    counts = Counter(drawn)
    assert len(counts) == kinds
    # Four standard deviations of a binomial count.
    assert all(abs(c - steps / kinds) < 4 * (steps / kinds * (1 - 1 / kinds)) ** 0.5 for c in counts.values())
    other = [make_schedule(parts, steps, seed=1).kind_at(k) for k in range(steps)]
    assert 0.2 < sum(a != b for a, b in zip(drawn, other, strict=True)) / steps < 0.8
    pairs = Counter(pairwise(drawn))
    assert len(pairs) == kinds**2, "every kind follows every kind"


def test_a_schedule_may_begin_later():
    schedule = make_schedule(SCHEDULES["paper"], 4, start=10)
    assert [schedule.kind_at(k) for k in range(9, 15)] == [None, "output", "output", "map", "map", None]


def test_presets():
    paper, reference = (InterventionOptions(preset=name) for name in ("paper", "reference"))
    assert (paper.schedule, paper.two_step, paper.steps, paper.output_loss_on) == ("paper", True, 60, "projection")
    assert (reference.schedule, reference.two_step, reference.steps) == ("reference", True, 60)
    assert reference.output_loss_on == "norm"
    assert OutputOptions(preset="reference").schedule == "output" and MapOptions(preset="paper").schedule == "map"
    changed = InterventionOptions(preset="reference", fraction=0.1, output_loss_on="projection")
    assert changed.steps is None and changed.output_loss_on == "projection"
    assert InterventionOptions(**reference.model_dump(mode="json")) == reference


def test_a_schedule_of_ones_own():
    options = InterventionOptions(schedule=[{"kind": "map", "fraction": "1/3"}, {"kind": "output", "fraction": "2/3"}])
    assert make_schedule(options.parts, 9).phases == (Phase(("map",), 0, 3), Phase(("output",), 3, 9))
    assert isinstance(options.parts[0], Part)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": [{"kind": "map", "fraction": 0.5}]}, "must sum to 1, not 0.5"),
        ({"schedule": []}, "must sum to 1"),
        ({"schedule": [{"kind": "score", "fraction": 1}]}, "output"),
        ({"schedule": "gradual"}, "paper"),
        ({"logits_loss": 0}, "nothing trains the head"),
        ({"steps": 0}, "greater than 0"),
        ({"fraction": 1.5}, "less than or equal to 1"),
        ({"lenght": 3}, "Extra inputs"),
        ({"schedule": [{"kind": "map", "fraction": "1/0"}]}, "'1/0' is no fraction"),
        ({"schedule": [{"kind": [], "fraction": 1}]}, "at least 1"),
        ({"schedule": [{"kind": ["map", "score"], "fraction": 1}]}, "'output', 'context' or 'map'"),
        ({"preset": "code"}, "'none', 'paper' or 'reference'"),
        ({"learning_rate": 1e-4}, "learning_rate and warmup belong to two_step: true"),
        ({"two_step": True, "warmup": 1}, "less than 1"),
        ({"layer_map": [0, 1]}, "greater than 0"),
        ({"output_loss_on": "post-ln"}, "'projection' or 'norm'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValidationError, match=message):
        InterventionOptions(**options)
