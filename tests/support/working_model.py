"""A tiny model that works, for tests in which a metric has to be lost and won back."""

from __future__ import annotations

from pathlib import Path

import qpipe
from qpipe.testing import tiny_config


def working_model(folder: Path) -> Path:
    """The folder of a model that gets every one of its 32 validation sentences right, trained in seconds."""
    steps = {"max_steps": 60, "eval_every": 60, "save_every": 60, "learning_rate": 3e-3}
    changes = {f"train__{key}": value for key, value in steps.items()}
    run = qpipe.execute(tiny_config(folder, quantization__preset="w8", **changes))
    assert run.results["evaluation"]["accuracy"] == 1, "it did not learn"
    return run.out / "model"


def outputs_at(bits: int, *rules: dict) -> list[dict]:
    """Rules that put every output of the model at a fixed range of least squared error, but for what rules change."""
    options = {"bits": bits, "granularity": "tensor", "dynamic": False, "range": "mse"}
    return [{"site": "{outputs}", "quantizer": "uniform-activation", "options": options}, *rules]
