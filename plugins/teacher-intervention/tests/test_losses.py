import json
from pathlib import Path

import pytest
import torch
from qpipe_teacher_intervention.losses import score_loss, soft_cross_entropy, summed_mse, visible_keys
from safetensors.torch import load_file
from torch.nn import functional as F

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "kd_loss.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "kd_loss.safetensors")
IDS = [f"case{c['case']}" for c in CASES]


def golden(case, name):
    return TENSORS[f"c{case['case']:02d}.{name}"]


def layers(case, name, count):
    return [golden(case, f"{name}{i}") for i in range(count)]


def leaves(tensors):
    return [t.clone().requires_grad_() for t in tensors]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_logits_loss_equals_the_reference(case):
    (student,) = leaves([golden(case, "s_logits")])
    teacher = golden(case, "t_logits")
    regression = case["params"]["output_mode"] == "regression"
    loss = F.mse_loss(student, teacher) if regression else soft_cross_entropy(student, teacher)
    assert float(loss.detach()) == pytest.approx(case["scalars"]["ti"]["cls"], rel=1e-5)
    close(torch.autograd.grad(loss, student)[0], golden(case, "ti_grad_s_logits"))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_hidden_and_output_losses_equal_the_reference(case):
    count = case["params"]["layers"]
    hidden = leaves(layers(case, "s_rep", count + 1))
    loss = summed_mse(hidden, layers(case, "t_rep", count + 1))
    assert float(loss.detach()) == pytest.approx(case["scalars"]["ti"]["rep"], rel=1e-5)
    close(torch.autograd.grad(loss, hidden)[0], golden(case, "ternarybert_grad_s_rep0"))
    outputs = leaves(layers(case, "s_out", count))
    loss = summed_mse(outputs, layers(case, "t_out", count))
    assert float(loss.detach()) == pytest.approx(case["scalars"]["ti"]["output"], rel=1e-5)
    for i, grad in enumerate(torch.autograd.grad(loss, outputs)):
        close(grad, golden(case, f"ti_grad_s_out{i}"))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_score_loss_equals_the_reference(case):
    count = case["params"]["layers"]
    stored = layers(case, "s_att", count), layers(case, "t_att", count)
    # The stored scores carry the mask as -10000; ours come before the mask, so any value may stand there.
    mask = (stored[0][0][:, 0, 0] > -5000).long()
    generator = torch.Generator().manual_seed(0)
    unmasked = [
        [torch.where(s > -5000, s, torch.randn(s.shape, generator=generator)) for s in scores] for scores in stored
    ]
    students = leaves(unmasked[0])
    loss = score_loss(students, unmasked[1], mask)
    assert float(loss.detach()) == pytest.approx(case["scalars"]["ti"]["att"], rel=1e-5)
    for i, grad in enumerate(torch.autograd.grad(loss, students)):
        close(grad, golden(case, f"ternarybert_grad_s_att{i}"))


def test_the_golden_cases_have_padding_and_extreme_scores():
    assert any((golden(c, "s_att0") < -5000).any() for c in CASES)
    assert any(((golden(c, "s_att0") <= -100) & (golden(c, "s_att0") > -5000)).any() for c in CASES)


def test_without_a_mask_every_score_counts():
    a, b = torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3)
    close(score_loss([a], [b], None), F.mse_loss(a, b))


def test_causal_scores_ignore_later_keys():
    a = torch.zeros(1, 1, 3, 3)
    b = torch.ones(1, 1, 3, 3)
    assert float(score_loss([a], [b], None, causal=True)) == pytest.approx(6 / 9)
    assert float(score_loss([a], [b], torch.tensor([[1, 1, 0]]), causal=True)) == pytest.approx(5 / 9)
    assert visible_keys(a, None, causal=False) is None


def test_token_logits_average_over_real_tokens():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = torch.stack([soft_cross_entropy(student[b, t], teacher[b, t]) for b, t in [(0, 0), (0, 1), (1, 0)]])
    close(soft_cross_entropy(student, teacher, mask), expected.mean())


def test_equal_logits_cost_the_entropy():
    logits = torch.randn(4, 6)
    close(soft_cross_entropy(logits, logits), torch.distributions.Categorical(logits=logits).entropy().mean())


def test_bfloat16_is_computed_in_float32():
    a, b = torch.randn(2, 8).bfloat16(), torch.randn(2, 8).bfloat16()
    assert summed_mse([a], [b]).dtype == torch.float32
    close(soft_cross_entropy(a, b), soft_cross_entropy(a.float(), b.float()))


def test_unequal_depths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        summed_mse([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)])
