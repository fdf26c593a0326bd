"""The metric is computed again from the data of the run, in the process without qpipe."""

from __future__ import annotations

import csv
import random
from dataclasses import replace

import export_builders as builders
import pytest
import torch
from safetensors import SafetensorError
from transformers import BertTokenizerFast

from qpipe.config import resolve
from qpipe.data.loading import load_data
from qpipe.data.metrics import accuracy
from qpipe.export import _fresh, compressed, metric
from qpipe.export.verify import verify_all
from qpipe.types import Metric, Task

WORDS = [f"w{i}" for i in range(50)]


def write_csv(path, rows):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (root / "model").mkdir()
    (root / "model/vocab.txt").write_text("\n".join(specials + WORDS))
    BertTokenizerFast(str(root / "model/vocab.txt"), model_max_length=32).save_pretrained(root / "model")
    builders.make("bert").config.save_pretrained(root / "model")
    source = random.Random(0)
    rows = [(" ".join(source.choices(WORDS, k=source.randint(2, 12))), i % 3) for i in range(70)]
    write_csv(root / "train.csv", rows[:20])
    write_csv(root / "dev.csv", rows[20:])
    return resolve(
        {
            "model": {"name": str(root / "model")},
            "task": "classification",
            "data": {"train": str(root / "train.csv"), "validation": str(root / "dev.csv"), "max_length": 16},
            "train": {"eval_batch_size": 16},
        }
    )


def measured(config, record):
    """Accuracy of the decoded weights, computed here."""
    model = builders.make("bert")
    for name, weight in record.weights.items():
        model.get_parameter(name).data.copy_(weight.tensor.decode())
    data = load_data(config, Task("classification", "classification", (Metric("accuracy", accuracy),), ("text",)))
    batch = data.collate([data.validation[i] for i in range(len(data.validation))])
    labels = batch.pop("labels")
    with torch.no_grad():
        return accuracy(model(**batch).logits.numpy(), labels.numpy())


def test_metric_is_checked(config, tmp_path):
    tensors = {n: builders.quantize(builders.make("bert").get_submodule(n).weight, bits=4) for n in ("classifier",)}
    record = builders.record_of("bert", tensors)
    expected = measured(config, record)
    about = {"config": config.model_dump(mode="json"), "task": "classification"}
    elsewhere = {**about, "config": {**about["config"], "data": {"train": str(tmp_path / "gone.csv")}}}
    cases = {
        "right": {**about, "metrics": {"accuracy": expected}},
        "wrong": {**about, "metrics": {"accuracy": expected + 0.1}},
        "other": {**about, "metrics": {"bleu": 1.0}},
        "gone": {**elsewhere, "metrics": {"accuracy": expected}},
    }
    for name, metadata in cases.items():
        compressed.write(replace(record, metadata=metadata), tmp_path / name)
    results = dict(zip(cases, verify_all([tmp_path / n for n in cases]), strict=True))
    assert results["right"].passed, results["right"].lines()
    assert any(f"50 examples: accuracy {expected:.6g}" in line for line in results["right"].lines())
    for name in ("wrong", "other"):
        assert [c.name for c in results[name].checks if c.status == "fail"] == ["metric"]
    assert results["gone"].passed
    assert any(
        "metric: not checked: the data of the run" in line and "gone.csv" in line for line in results["gone"].lines()
    )


def test_the_batches_are_written_in_parts(config, tmp_path, monkeypatch):
    """So that a whole split of images is never in memory; each file holds whole batches, in their order."""
    monkeypatch.setattr(metric, "PART", 1)
    prepared = metric.prepare({"config": config.model_dump(mode="json"), "metrics": {"accuracy": 1.0}}, tmp_path / "b")
    assert len(list((tmp_path / "b").iterdir())) == 4, "50 examples in batches of 16"
    found = torch.cat([batch["labels"] for batch in _fresh.prepared(str(prepared.batches))])
    assert found.tolist() == [i % 3 for i in range(20, 70)]


def test_no_room_for_the_batches(config, tmp_path, monkeypatch):
    """The other checks still count, and say why the metric is none of them."""

    def full(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(metric, "save_file", full)
    prepared = metric.prepare({"config": config.model_dump(mode="json"), "metrics": {"accuracy": 1.0}}, tmp_path / "b")
    assert prepared.batches is None and "set TMPDIR to a folder with more room" in prepared.reason
    assert not (tmp_path / "b").exists()
