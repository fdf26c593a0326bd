"""Masked language models and joint slot labelling go through whole runs; their exports verify without qpipe."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification

import qpipe
from qpipe.data.slots import semer
from qpipe.export.verify import verify_all
from qpipe.stages import evaluate_run
from qpipe.testing import tiny_config
from qpipe.testing.contract import weights_hash
from qpipe.testing.tiny import tiny_slot_data

from .conftest import EXECUTE, no_verification

KINDS = ("masked-lm", "intent-slot")
METRICS = {
    "masked-lm": {"perplexity", "masked_accuracy"},
    "intent-slot": {"semer", "slot_f1", "intent_accuracy", "exact_match"},
}


def config_of(kind, folder, **changes):
    if kind == "masked-lm":
        data = {"data__text_columns": ["sentence"]}
    else:
        data = {"data__train": str(tiny_slot_data(folder / "slots.jsonl")), "data__max_length": 24}
    # Batches differ in length, and the last one in its number of examples.
    usual = {"data__pad_to_max_length": False, "train__dropout": 0.1, "train__eval_batch_size": 7}
    return tiny_config(folder, task=kind, **{**data, **usual, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(EXECUTE, "verify", no_verification)
    found = {kind: qpipe.execute(config_of(kind, tmp_path_factory.mktemp(kind))) for kind in KINDS}
    patch.undo()
    return found


@pytest.fixture(scope="module")
def verified(runs):
    return dict(zip(KINDS, verify_all([runs[kind].out / "export" for kind in KINDS]), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_verifies_without_qpipe_metric_included(kind, runs, verified):
    result, expected = verified[kind], runs[kind].results["evaluation"]
    assert result.passed, "\n".join(result.lines())
    assert {check.status for check in result.checks} == {"pass"}
    assert {"files", "weights", "logits", "metric"} <= {check.name for check in result.checks}
    assert expected.keys() == METRICS[kind]
    assert result.metrics == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_restored_run_has_the_metrics_of_training(kind, runs):
    assert evaluate_run(runs[kind].out) == runs[kind].results["evaluation"]


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_bit_for_bit(kind, runs, fast, tmp_path):
    """Masking (of another epoch, too) and dropout go on where they stopped."""
    run = runs[kind]
    resumed = tmp_path / "resumed"
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copytree(run.out / "checkpoints" / "step-00000003", resumed / "checkpoints" / "step-00000003")
    qpipe.execute(run.config.model_copy(update={"out": str(resumed)}), resume=True)
    assert weights_hash(resumed) == weights_hash(run.out)


def test_the_perplexity_is_that_of_the_exported_model(runs):
    """By a loop over examples and the model's own loss."""
    run = runs["masked-lm"]
    model = AutoModelForMaskedLM.from_pretrained(run.out / "export").eval()
    total = count = right = 0
    for row in run.data.validation:
        batch = run.data.collate([row])
        labels = batch.pop("labels")
        with torch.no_grad():
            output = model(**batch, labels=labels)
        number = int((labels != -100).sum())
        if number:
            total, count = total + float(output.loss) * number, count + number
            right += int((output.logits.argmax(-1) == labels).sum())
    metrics = run.results["evaluation"]
    assert metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert metrics["masked_accuracy"] == pytest.approx(right / count)


def test_a_stock_program_labels_slots_with_the_export(runs):
    """As the guide shows it: intents at the first token, tags elsewhere."""
    run = runs["intent-slot"]
    model = AutoModelForTokenClassification.from_pretrained(run.out / "export").eval()
    names = model.config.id2label
    tags = [i for i, name in names.items() if not name.startswith("intent:")]
    assert tags == list(range(len(tags))) and names[0] == "O"
    assert [names[i] for i in range(len(tags), len(names))] == ["intent:blame", "intent:praise"]
    predicted, expected = [], []
    for row in run.data.validation:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        words = [i for i, label in enumerate(row["labels"]) if label != -100][1:]
        intent = names[len(tags) + int(logits[0, len(tags) :].argmax())]
        predicted.append([intent, *(names[int(logits[i, : len(tags)].argmax())] for i in words)])
        expected.append([names[row["labels"][0]], *(names[row["labels"][i]] for i in words)])
    width = max(map(len, expected))
    filled = [np.array([row + [""] * (width - len(row)) for row in part]) for part in (predicted, expected)]
    assert semer(*filled) == pytest.approx(run.results["evaluation"]["semer"])


def test_slots_are_learned(fast, tmp_path):
    """Half of the slots have one word. Without a look at its neighbours a word is best tagged `B-`, which finds those
    and breaks the others in two: precision 1/3, recall 1/2, F1 0.4. The intent is that of the last slot."""
    changes = {"train__max_steps": 200, "train__learning_rate": 5e-3, "train__eval_every": 200, "train__dropout": 0.0}
    data = tiny_slot_data(tmp_path / "more.jsonl", 800)
    run = qpipe.execute(config_of("intent-slot", tmp_path, data__train=str(data), quantization__preset="w8", **changes))
    assert run.results["evaluation"]["slot_f1"] > 0.6
    assert run.results["evaluation"]["intent_accuracy"] > 0.9


def test_the_best_checkpoint_is_the_one_of_lowest_error(fast, tmp_path):
    config = config_of("masked-lm", tmp_path, train__eval_every=1, train__keep_best=True, train__max_steps=4)
    run = qpipe.execute(config)
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["perplexity"] for row in rows if row["kind"] == "eval"}
    assert run.results["best_step"] == min(found, key=found.get)
    assert run.results["evaluation"]["perplexity"] == min(found.values())
