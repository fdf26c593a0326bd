"""The CIFAR ResNet of examples/cifar10, of a few thousand random weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qpipe.testing.tiny import tiny_images

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "cifar10"
SIDE, WIDTH, LABELS = 8, 4, ("dark", "bright")


@pytest.fixture(scope="session")
def prepare() -> ModuleType:
    """`examples/cifar10/prepare.py` as a module."""
    spec = importlib.util.spec_from_file_location("cifar10_prepare", EXAMPLE / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_state(depth: int = 8, width: int = WIDTH, labels: int = len(LABELS)) -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes that such checkpoints have, and batch statistics far from 0 and 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / max(1, np.prod(shape[1:])) ** 0.5

    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        around_one = {key: 1 + normal(size).abs() / 2 for key in ("weight", "running_var")}
        values = {**around_one, "bias": normal(size) / 4, "running_mean": normal(size) / 4}
        return {f"{name}.{key}": value for key, value in values.items()}

    state = {"conv1.weight": normal(width, 3, 3, 3), **norm("bn1", width)}
    inputs = width
    for stage in (1, 2, 3):
        outputs = width * 2 ** (stage - 1)
        for block in range((depth - 2) // 6):
            path = f"layer{stage}.{block}"
            state[f"{path}.conv1.weight"] = normal(outputs, inputs, 3, 3)
            state[f"{path}.conv2.weight"] = normal(outputs, outputs, 3, 3)
            state |= norm(f"{path}.bn1", outputs) | norm(f"{path}.bn2", outputs)
            inputs = outputs
    return state | {"linear.weight": normal(labels, inputs), "linear.bias": normal(labels)}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as they are published."""
    path = tmp_path_factory.mktemp("checkpoint") / "resnet8.safetensors"
    save_file(random_state(), path)
    (path.parent / "LICENSE").write_text("Do as you like.\n")
    return path


@pytest.fixture(scope="session")
def model_folder(prepare: ModuleType, checkpoint: Path) -> Path:
    """What `prepare.py` makes of it."""
    folder: Path = prepare.prepare(checkpoint, checkpoint.parent / "model", LABELS)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 dark and bright images."""
    return tiny_images(tmp_path_factory.mktemp("images") / "images.parquet", 64, SIDE)


@pytest.fixture(scope="session")
def recipe(model_folder: Path, images: Path) -> dict[str, Any]:
    """`--set` overrides that make the example's recipe a run of seconds."""
    return {
        "model.name": str(model_folder),
        "data.train": str(images),
        "data.validation": str(images),
        "train.batch_size": 16,
        "train.learning_rate": 0.01,
        "train.log_every": 1,
    }
