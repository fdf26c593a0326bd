from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from qpipe.builtin.uniform import UniformOptions, UniformWeight
from qpipe.report import write_report
from qpipe.report.statistics import weight_statistics

PARTS = ("attention.self.query", "attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense")


def tensor_rows(layers: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for layer in range(layers):
        for part in PARTS:
            bits = 8 if part == "output.dense" else 4
            weight = torch.randn(48, 64, generator=generator) * 0.05
            weight[0, 0] = 0.3 * (layer + 1)
            quantized = UniformWeight(UniformOptions(bits=bits)).encode(weight)
            rows.append({"name": f"bert.encoder.layer.{layer}.{part}", **weight_statistics(weight, quantized)})
    return rows


def plan_rows(layers: int) -> list[dict]:
    rows = []
    for layer in range(layers):
        for part in PARTS:
            bits = 8 if part == "output.dense" else 4
            site = f"bert.encoder.layer.{layer}.{part}"
            options = {"bits": bits, "granularity": "channel"}
            rows.append(
                {
                    "site": f"{site}:weight",
                    "quantizer": "uniform",
                    "options": options,
                    "bits": bits,
                    "granularity": "channel",
                }
            )
            rows.append(
                {
                    "site": f"{site}:input",
                    "quantizer": "uniform-activation",
                    "options": {"bits": 8},
                    "bits": 8,
                    "granularity": "token",
                }
            )
    rows.append(
        {
            "site": "bert.embeddings.word_embeddings:weight",
            "quantizer": "uniform",
            "options": {"bits": 8},
            "bits": 8,
            "granularity": "channel",
        }
    )
    return rows


def metric_rows(steps: int) -> list[dict]:
    rows = []
    for step in range(10, steps + 1, 10):
        loss = 0.7 * math.exp(-step / 150) + 0.1
        rows.append(
            {
                "time": 1.7e9 + step,
                "step": step,
                "kind": "train",
                "loss": loss,
                "task": 0.8 * loss,
                "demo/penalty": 0.05,
            }
            | {"lr": 5e-5 * (1 - step / steps), "grad_norm": 1.0, "samples_per_second": 210.0}
        )
        if step % 50 == 0:
            rows.append(
                {
                    "time": 1.7e9 + step,
                    "step": step,
                    "kind": "eval",
                    "accuracy": 0.5 + step / 1000,
                    "f1": 0.4 + step / 900,
                }
            )
    return rows


RESULTS = {
    "teacher": {"accuracy": 0.8713, "f1": 0.8642},
    "evaluation": {"accuracy": 0.8531, "f1": 0.8457},
    "reloaded": {"accuracy": 0.8531, "f1": 0.8457},
    "size": {
        "file_bytes": 12_345_678,
        "full_precision_bytes": 90_900_000,
        "full_precision_dtype": "float32",
        "quantized_bits_per_weight": 4.13,
        "bits_per_weight": 4.28,
    },
    "seconds": {"teacher": 61.2, "train": 182.4, "export": 3.9},
}

CONFIG = {
    "model": {"name": "some/<b>encoder</b>"},
    "task": "classification",
    "engine": {"name": "deepspeed", "zero": 2},
    "plugins": {},
    "seed": 3,
}


def write_run(path: Path) -> Path:
    (path / "export").mkdir(parents=True)
    (path / "export" / "model.safetensors").write_bytes(b"x" * 4321)
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (path / "plan.json").write_text(json.dumps(plan_rows(3)))
    (path / "tensors.json").write_text(json.dumps(tensor_rows(3)))
    (path / "results.json").write_text(json.dumps(RESULTS))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metric_rows(300)))
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory as a finished run leaves it, to be changed at will."""
    return write_run(tmp_path / "finished")


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run directory with its report, shared because drawing takes seconds."""
    path = write_run(tmp_path_factory.mktemp("runs") / "finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qpipe.host.BUILTINS", ONLY_REPORT)
        assert write_report(path) == path / "report.html"
    return path


ONLY_REPORT = {"report": "qpipe.builtin.report:ReportSections"}


@pytest.fixture
def only_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load no other built-in: the report needs none, and some import transformers."""
    monkeypatch.setattr("qpipe.host.BUILTINS", ONLY_REPORT)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing, for tests of what is around it."""
    for name in ("loss_curves", "metric_curves", "tensor_errors", "histograms"):
        monkeypatch.setattr(f"qpipe.report.plots.{name}", lambda *args: "<svg></svg>")
