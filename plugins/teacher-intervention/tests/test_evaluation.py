"""With `in_evaluation`, evaluations see the teacher's attention too; the run's result is of the student alone."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import qpipe
from qpipe.data.loader import eval_loader
from qpipe.testing import tiny_config, tiny_model

EVALUATE = importlib.import_module("qpipe.stages.evaluate")
EXECUTE = importlib.import_module("qpipe.stages.execute")
STILL = {"quantization__preset": None, "train__learning_rate": 1e-12, "train__eval_every": 3, "train__keep_best": True}


@pytest.fixture
def logits(monkeypatch):
    """Logits of every batch that is evaluated."""
    seen = []
    original = EVALUATE.predict

    def watch(kind, values, *rest):
        seen.append(values.clone())
        return original(kind, values, *rest)

    monkeypatch.setattr(EVALUATE, "predict", watch)
    monkeypatch.setattr(EXECUTE, "verify", lambda *_, **__: SimpleNamespace(passed=True, metrics={}, lines=list))
    return seen


def scrambled(folder):
    """A model whose attention computes something else than that of `folder/teacher`; all else is equal."""
    path = tiny_model(folder / "scrambled", seed=1) / "model.safetensors"
    state = load_file(path)
    for name in (name for name in state if "attention.output.dense.weight" in name or "attention.self" in name):
        state[name] = torch.randn(state[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(state, path, {"format": "pt"})
    return path.parent


def evaluated(run):
    """`(step, metrics)` of the evaluations that were logged."""
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any("accuracy" in key for key in line)]


def replaced(kind, student, teacher, batch):
    """The student's logits with the teacher's attention, by hooks of torch alone: what comes out of it, its context, or
    its maps, which weigh the student's own values."""
    said, values, handles = {}, {}, []
    theirs, ours = ([layer.attention for layer in model.bert.encoder.layer] for model in (teacher, student))
    for n, attention in enumerate(theirs):
        handle = attention.output.dense.register_forward_hook(lambda m, args, out, n=n: said.update({n: (*args, out)}))
        handles.append(handle)
    maps = teacher(**batch, output_attentions=True).attentions

    def context(n):
        heads = values[n].unflatten(-1, (4, -1)).transpose(1, 2)
        return (maps[n] @ heads).transpose(1, 2).flatten(2) if kind == "map" else said[n][0]

    for n, attention in enumerate(ours):
        dense = attention.output.dense
        handles.append(attention.self.value.register_forward_hook(lambda m, args, out, n=n: values.update({n: out})))
        if kind == "output":
            handles.append(dense.register_forward_hook(lambda m, args, out, n=n: said[n][1]))
        else:
            handles.append(dense.register_forward_pre_hook(lambda m, args, n=n: (context(n),)))
    logits = student(**batch).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("schedule", ["output", "context", "map"])
def test_evaluation_is_of_the_student_with_the_teachers_attention(schedule, logits, tmp_path):
    config = tiny_config(
        tmp_path,
        {"ti-g": {"schedule": [{"kind": schedule, "fraction": 1}], "steps": 3, "in_evaluation": True}},
        model__name=str(scrambled(tmp_path)),
        teacher__name=str(tmp_path / "teacher"),
        teacher__init_student=False,
        **STILL,
    )
    run = qpipe.execute(config)
    student, teacher = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name, attn_implementation="eager").eval()
        for name in ("scrambled", "teacher")
    )
    (batch, _), *rest = eval_loader(run.data, batch_size=config.train.eval_batch_size, rank=0, world_size=1)
    batch.pop("labels")
    assert not rest, "an evaluation is one batch"
    with torch.no_grad():
        alone, expected = student(**batch).logits, replaced(schedule, student, teacher, batch)
        others = [replaced(kind, student, teacher, batch) for kind in {"output", "context", "map"} - {schedule}]
    during, after, last = logits[0], logits[1], logits[-1]
    assert not any(torch.allclose(other, expected, atol=1e-3) for other in (alone, *others))
    torch.testing.assert_close(during, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, last, atol=1e-5, rtol=1e-5)
    assert run.results["best_step"] == 6, "the evaluation at step 3 must not count"
    assert len(evaluated(run)) == 2


def test_evaluation_is_of_the_student_alone_by_default(logits, tmp_path):
    """During the intervention, steps 1 to 4, as after it."""
    config = tiny_config(
        tmp_path,
        {"ti-o": {"steps": 4}},
        model__name=str(scrambled(tmp_path)),
        teacher__name=str(tmp_path / "teacher"),
        teacher__init_student=False,
        **STILL,
    )
    run = qpipe.execute(config)
    during, after = logits[0], logits[1]
    assert [row["step"] for row in evaluated(run)] == [3, 6]
    torch.testing.assert_close(during, after, atol=1e-5, rtol=1e-5)
    logits.clear()
    qpipe.execute(config.model_copy(update={"plugins": {}, "out": str(tmp_path / "alone")}))
    torch.testing.assert_close(during, logits[0], atol=1e-5, rtol=1e-5)


def test_result_is_of_the_student_alone_where_the_intervention_never_ends(logits, tmp_path):
    config = tiny_config(
        tmp_path,
        {"ti-o": {"fraction": 1, "in_evaluation": True}},
        model__name=str(scrambled(tmp_path)),
        teacher__name=str(tmp_path / "teacher"),
        teacher__init_student=False,
        **STILL,
    )
    run = qpipe.execute(config)
    during, ended, alone = logits[0], logits[1], logits[2]
    torch.testing.assert_close(ended, during, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone, ended, atol=1e-3)
    assert run.results["best_step"] is None
    assert "evaluation" in run.results
