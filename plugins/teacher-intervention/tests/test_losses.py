"""The losses on given signals against those of the authors' code, values and gradients."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from qpipe_teacher_intervention import InterventionOptions
from qpipe_teacher_intervention.losses import distillation_losses
from safetensors.torch import load_file

from qpipe import Step

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "kd_loss.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "kd_loss.safetensors")
KINDS = {"att": "scores", "rep": "hidden_states", "out": "attention_output"}
TERMS = {"ti/logits": "cls", "ti/hidden": "rep", "ti/scores": "att", "ti/output": "output"}


def terms(layers, kind="classification", **options):
    """The loss terms by name."""
    run = SimpleNamespace(task=SimpleNamespace(kind=kind), total_steps=10)
    return {loss.name: loss for loss in distillation_losses(run, InterventionOptions(**options), layers)}


def losses(layers, kind="classification", **options):
    """The loss functions by name."""
    return {name: loss.fn for name, loss in terms(layers, kind, **options).items()}


def signals(case, side):
    """Of one side, by `(kind, layer)`. Scores there carry the mask; ours come before it, so anything may be there."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in case["tensors"]:
        if not name.startswith(f"{side}_"):
            continue
        value = TENSORS[f"c{case['case']:02d}.{name}"].clone()
        if name[2:5] == "att":
            value = torch.where(value > -5000, value, torch.randn(value.shape, generator=generator))
        kind, layer = ("logits", 0) if "logits" in name else (KINDS[name[2:5]], int(name[5:]))
        found[kind, layer] = value
    return found


@pytest.mark.parametrize("case", CASES, ids=[f"case{case['case']}" for case in CASES])
def test_losses_equal_the_reference(case):
    masked = TENSORS[f"c{case['case']:02d}.s_att0"][:, 0, 0] <= -5000
    step = Step(0, True, {"attention_mask": (~masked).long()}, student=signals(case, "s"), teacher=signals(case, "t"))
    for value in step.student.values():
        value.requires_grad_()
    tokens = masked.shape[-1]
    for layer in range(case["params"]["layers"]):
        step.student["visible", layer] = (~masked)[:, None, None].expand(-1, 1, tokens, -1)
    regression = case["params"]["output_mode"] == "regression"
    found = losses(range(case["params"]["layers"]), "regression" if regression else "classification")
    parts = {name: fn(step) for name, fn in found.items()}
    for name, part in parts.items():
        assert part.item() == pytest.approx(case["scalars"]["ti"][TERMS[name]], rel=1e-5), name
    torch.stack(list(parts.values())).sum().backward()
    checked = 0
    for name in case["tensors"]:
        # The reference stores gradients of scores and states with its other recipe, whose terms are the same.
        recipe, _, rest = name.partition("_grad_s_")
        if rest and (recipe == "ti" or rest[:3] in ("att", "rep")):
            key = ("logits", 0) if rest == "logits" else (KINDS[rest[:3]], int(rest[3:]))
            expected = TENSORS[f"c{case['case']:02d}.{name}"]
            torch.testing.assert_close(step.student[key].grad, expected, rtol=1e-5, atol=1e-7)
            checked += 1
    assert checked > case["params"]["layers"]


def test_the_golden_cases_have_padding_and_extreme_scores():
    scores = [TENSORS[f"c{case['case']:02d}.s_att0"] for case in CASES]
    assert any((s < -5000).any() for s in scores)
    assert any(((s <= -100) & (s > -5000)).any() for s in scores)


def test_scores_that_the_attention_does_not_see_count_as_equal():
    """By the student's mask of each layer: those of later keys, say, or outside a sliding window."""
    later = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    student = {("scores", i): torch.zeros(1, 1, 3, 3) for i in range(2)}
    student |= {("visible", 0): later, ("visible", 1): later & later.triu(-1)}
    teacher = {("scores", i): torch.ones(1, 1, 3, 3) for i in range(2)}
    fn = losses([0, 1])["ti/scores"]
    assert float(fn(Step(0, True, {}, student=student, teacher=teacher))) == pytest.approx(6 / 9 + 5 / 9)


def test_layers_are_compared_by_the_map():
    """Layer i of the student with layer `layers[i]` of the teacher; states with the state after that."""
    generator = torch.Generator().manual_seed(0)

    def tensors(kind, count):
        return {(kind, i): torch.randn(2, 4, 8, generator=generator) for i in range(count)}

    student = tensors("hidden_states", 3) | tensors("attention_output", 2)
    teacher = tensors("hidden_states", 5) | tensors("attention_output", 4)
    step, found = Step(0, True, {}, student=student, teacher=teacher), losses([1, 3])
    for name, kind, map_ in (("hidden", "hidden_states", [0, 2, 4]), ("output", "attention_output", [1, 3])):
        squares = [(student[kind, i] - teacher[kind, j]).square().mean() for i, j in enumerate(map_)]
        torch.testing.assert_close(found[f"ti/{name}"](step), sum(squares))


def test_logits_of_tokens_leave_padding_out():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    step = Step(0, True, batch, student={("logits", 0): student}, teacher={("logits", 0): teacher})

    def cost(b, t):
        return -(teacher[b, t].softmax(-1) * student[b, t].log_softmax(-1)).sum()

    expected = ((cost(0, 0) + cost(0, 1)) / 2 + cost(1, 0)) / 2
    torch.testing.assert_close(losses([0], "causal-lm")["ti/logits"](step), expected)


def test_weights_over_the_training():
    """A number, a schedule, and 0, which leaves the term out; the first term stands in for the task's loss."""
    rising = {"schedule": "linear", "initial": 0, "final": 2, "start": 0.2}
    found = terms([0], logits_loss=rising, hidden_loss=3, score_loss=0, output_loss={**rising, "schedule": "step"})
    assert list(found) == ["ti/logits", "ti/hidden", "ti/output"]
    assert found["ti/logits"].replaces == ("task",)
    assert [found["ti/logits"].weight(step) for step in (0, 2, 6, 10)] == pytest.approx([0, 0, 1, 2])
    assert found["ti/hidden"].weight == 3
    assert [found["ti/output"].weight(step) for step in (1, 2)] == [0, 2]


def test_weights_that_are_none():
    with pytest.raises(ValidationError, match="always 0"):
        InterventionOptions(hidden_loss={"schedule": "linear", "initial": 0, "final": 0})
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        InterventionOptions(hidden_loss=-1)
