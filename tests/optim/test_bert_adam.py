"""BertAdam, its schedule and clipping tensor by tensor, against the reference's weights and in closed form."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from qpipe.builtin.bert_adam import BertAdam, warmup_linear
from qpipe.config import resolve
from qpipe.engine.clipping import Fragment, clip_each, plain_fragments
from qpipe.testing import tiny_config
from qpipe.testing.contract import check_run

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "bertadam.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "bertadam.safetensors")


@pytest.mark.parametrize("case", CASES, ids=[f"case{case['case']}" for case in CASES])
def test_reference(case):
    """Eight steps, with the clip, the decay and the schedule of the reference; `-1` turns the last two of them off."""
    given, name = case["params"], f"c{case['case']:02d}"
    module = nn.Module()
    module.weight = nn.Parameter(TENSORS[f"{name}.w0"].clone())
    optimizer = BertAdam(
        module.parameters(),
        lr=given["lr"],
        betas=(given["b1"], given["b2"]),
        eps=given["e"],
        weight_decay=given["weight_decay"],
    )
    total, warmup = given["t_total"], given["warmup"]
    schedule = LambdaLR(optimizer, lambda step: 1.0 if total == -1 else warmup_linear(step, total, warmup))
    for gradient, expected in zip(TENSORS[f"{name}.grads"], TENSORS[f"{name}.weights_after_each_step"], strict=True):
        module.weight.grad = gradient.clone()
        clip_each(plain_fragments(module, sharded=False), max(given["max_grad_norm"], 0.0), shared=False)
        optimizer.step()
        schedule.step()
        torch.testing.assert_close(module.weight.detach(), expected, rtol=1e-6, atol=1e-8)


def test_each_tensor_by_itself():
    """Norms 5 and 0.5 with limit 1: the first is scaled to 1, the second is left; the norm of all is returned."""
    large, small, written = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]), []
    norm = clip_each([Fragment(large), Fragment(small, written.append)], 1.0, shared=False)
    torch.testing.assert_close(large, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(small, torch.tensor([0.3, 0.4]))
    assert written[0] is small
    assert norm == pytest.approx(25.25**0.5)


def test_schedules_differ_by_a_rounded_warm_up():
    """A tenth of 25 steps is 2.5: halfway up after 1.25 of them, at its end after 25, and not below 0 after it."""
    assert [warmup_linear(step, 25, 0.1) for step in (0, 1, 25, 30)] == pytest.approx([0, 0.4, 0, 0])
    assert warmup_linear(14, 25, 0.1) == pytest.approx(11 / 22.5)
    assert warmup_linear(5, 20, 0.0) == 0.75


@pytest.mark.parametrize(
    ("settings", "tensors"),
    [
        ([], False),
        (["train.optimizer=bert-adam"], True),
        (["train.optimizer=bert-adam", "train.clip_by=model"], False),
        (["train.optimizer=bert-adam", "train.clip=0"], False),
        (["train.clip_by=tensor"], True),
    ],
)
def test_whose_norm_is_limited(settings, tensors):
    assert resolve(None, settings).train.clips_tensors is tensors


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="not lr=-1"):
        BertAdam([nn.Parameter(torch.zeros(1))], lr=-1)


def test_a_parameter_without_a_gradient_is_left_alone():
    parameter = nn.Parameter(torch.ones(2))
    BertAdam([parameter], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(parameter.detach(), torch.ones(2))


def test_a_run(tmp_path):
    """It trains, exports and verifies, and resumes to the same bits."""
    config = tiny_config(tmp_path, train__optimizer="bert-adam", train__schedule="bert-linear", train__clip=0.05)
    check_run(tmp_path, config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["lr"] > 0 and all(row["grad_norm"] > 0.05 for row in rows if row["kind"] == "train")
