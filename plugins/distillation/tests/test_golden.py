"""The loss terms against those of the code of TernaryBERT and of teacher intervention, values and gradients."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from qpipe_distillation import Distillation, DistillationOptions
from qpipe_distillation.layers import attention_pairs, hidden_pairs
from safetensors.torch import load_file

from qpipe import Step

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "kd_loss.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "kd_loss.safetensors")
KINDS = {"att": "scores", "rep": "hidden_states", "out": "attention_output"}
TERMS = {"cls": "logits", "att": "attention", "rep": "hidden", "output": "output"}


def signals(case, side, grad):
    """One side's captured signals, by kind and layer."""
    found = {}
    for name in case["tensors"]:
        if name.startswith(f"{side}_"):
            kind, layer = ("logits", 0) if "logits" in name else (KINDS[name[2:5]], int(name[5:]))
            found[kind, layer] = TENSORS[f"c{case['case']:02d}.{name}"].clone().requires_grad_(grad)
    return found


def terms(case, student, teacher, batch, **options):
    """Every term's value."""
    regression = case["params"]["output_mode"] == "regression"
    given = {"preset": "ternarybert", "output": "mse", **({"logits": "mse"} if regression else {}), **options}
    plugin = Distillation(DistillationOptions(**given))
    depth = case["params"]["layers"]
    plugin._hidden = hidden_pairs(depth, 1, "uniform")
    plugin._attention = plugin._output = attention_pairs(depth, 1, "uniform")
    tokens = student["scores", 0].shape[-1]
    keys = batch.get("attention_mask", torch.ones(len(student["scores", 0]), tokens)).bool()
    visible = {("visible", layer): keys[:, None, None].expand(-1, 1, tokens, -1) for layer in range(depth)}
    step = Step(0, True, batch, student={**student, **visible}, teacher=teacher)
    return {loss.name.split("/")[1]: loss.fn(step) for loss in plugin.qpipe_losses(run=SimpleNamespace(total_steps=1))}


def check_values(case, reference, found):
    """Values of the reference's terms."""
    for name, expected in case["scalars"][reference].items():
        if name != "total":
            assert found[TERMS[name]].item() == pytest.approx(expected, rel=1e-6), name


def check(case, reference, found, student):
    """Those values, and the gradients of their sum."""
    check_values(case, reference, found)
    sum(found[TERMS[name]] for name in case["scalars"][reference] if name != "total").backward()
    for name in case["tensors"]:
        if name.startswith(f"{reference}_grad_s_"):
            short = name.removeprefix(f"{reference}_grad_s_")
            key = ("logits", 0) if short == "logits" else (KINDS[short[:3]], int(short[3:]))
            expected = TENSORS[f"c{case['case']:02d}.{name}"]
            torch.testing.assert_close(student[key].grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", CASES, ids=[f"case{case['case']}" for case in CASES])
@pytest.mark.parametrize(("reference", "classes"), [("ternarybert", "mean"), ("ti", "sum")])
def test_reference(case, reference, classes):
    """Scores with a mask of -10000 added, as that code has them."""
    student, teacher = signals(case, "s", True), signals(case, "t", False)
    check(case, reference, terms(case, student, teacher, {}, classes=classes), student)


def before_the_mask(case):
    """Signals as qpipe captures them, and the batch: scores at masked keys are numbers like any other."""
    student, teacher = signals(case, "s", False), signals(case, "t", False)
    masked = teacher["scores", 0][:, 0, 0] <= -100
    assert masked.any() or case["params"]["batch"] == 1
    generator = torch.Generator().manual_seed(0)
    for side in (student, teacher):
        for layer in range(case["params"]["layers"]):
            scores = side["scores", layer]
            noise = torch.randn(scores.shape, generator=generator)
            side["scores", layer] = torch.where(masked[:, None, None], noise, scores)
    student = {key: value.requires_grad_() for key, value in student.items()}
    return student, teacher, {"attention_mask": (~masked).long()}


@pytest.mark.parametrize("case", CASES, ids=[f"case{case['case']}" for case in CASES])
def test_scores_before_the_mask(case):
    """Whatever masked keys score, they count as equal."""
    student, teacher, batch = before_the_mask(case)
    check(case, "ternarybert", terms(case, student, teacher, batch), student)


@pytest.mark.parametrize("case", CASES, ids=[f"case{case['case']}" for case in CASES])
def test_xtc_compares_every_score(case):
    """Its code adds -10000 to masked keys of both models and takes the mean over all elements; nothing is zeroed."""
    student, teacher, batch = before_the_mask(case)
    found = terms(case, student, teacher, batch, preset="xtc")
    layers = case["params"]["layers"]
    mask = -10000.0 * (1 - batch["attention_mask"][:, None, None].double())
    differences = [(student["scores", i] + mask) - (teacher["scores", i] + mask) for i in range(layers)]
    expected = torch.stack([difference.square().mean() for difference in differences]).sum()
    assert found["attention"].item() == pytest.approx(expected.item(), rel=1e-6)
    if mask.any():
        equal = terms(case, student, teacher, batch, preset="xtc", masked_keys="equal")["attention"]
        assert found["attention"].item() > equal.item() + 0.01
    found["attention"].backward()
    for layer, difference in enumerate(differences):
        gradient = 2 * difference.detach() / difference.numel()
        torch.testing.assert_close(student["scores", layer].grad.double(), gradient, rtol=1e-5, atol=1e-8)
    for name in ("cls", "rep"):  # the rest is as in TernaryBERT
        assert found[TERMS[name]].item() == pytest.approx(case["scalars"]["ternarybert"][name], rel=1e-6), name
