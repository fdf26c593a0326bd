"""One tiny model of each family, loaded once; tests get copies."""

from __future__ import annotations

import copy

import pytest
import torch

from qpipe.builtin.models import Models
from qpipe.builtin.modules import QuantModules
from qpipe.config import ModelConfig
from qpipe.model.instrument import Instruments
from qpipe.testing import tiny_model
from qpipe.types import Task

TASKS = {
    "vit": Task("images", "image-classification", ()),
    "resnet": Task("images", "image-classification", ()),
    "llama": Task("text", "causal-lm", ()),
    "qwen3": Task("text", "causal-lm", ()),
}
TEXT = Task("text", "classification", ())


@pytest.fixture(scope="session")
def family_model(tmp_path_factory):
    """`family_model("bert")` in evaluation mode, with weights large enough for attention to be far from uniform."""
    made = {}

    def load(family, **sizes):
        key = (family, *sorted(sizes.items()))
        if key not in made:
            folder = tiny_model(tmp_path_factory.mktemp(family), family, **sizes)
            model = Models().qpipe_load_model(ModelConfig(name=str(folder)), TASKS.get(family, TEXT), 2, strict=False)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.mul_(8)
            made[key] = model.eval()
        return copy.deepcopy(made[key])

    return load


@pytest.fixture(scope="session")
def instrumented():
    """`instrumented(model)`: its `Instruments`, from the built-in plugins."""

    def make(model):
        quantize = QuantModules().qpipe_quantize_module
        return Instruments(model, Models().qpipe_model_map(model), lambda module: quantize(module))

    return make


@pytest.fixture(scope="session")
def batch_of():
    """`batch_of(family, padded)`: inputs of a family; two rows, the second one shorter if padded."""

    def make(family, padded):
        generator = torch.Generator().manual_seed(7)
        if family in ("vit", "resnet"):
            return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
        batch = {"input_ids": torch.randint(5, 30, (2, 9), generator=generator)}
        if padded:
            batch["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
            batch["attention_mask"][1, 5:] = 0
        return batch

    return make
