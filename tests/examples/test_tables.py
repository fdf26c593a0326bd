"""Every row of every table of results can be prepared: its rules, options, plugins and export format fit a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results.table import Table, tables
from qpipe.config import RunConfig, read_yaml, resolve
from qpipe.data.loading import TaskData, find_task, load_data
from qpipe.engine import connect
from qpipe.host import load_plugins
from qpipe.stages.execute import rehearse
from qpipe.testing.tiny import tiny_model, tiny_slot_data, tiny_text_data

TABLES = tables()
WIDTH = 48
"""Hidden size that every number of groups in the tables divides."""

Inputs = Callable[[Table, str], dict[str, Any]]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, images: Path, model_folder: Path) -> Inputs:
    """Gives the `model`, `task` and `data` sections that make a recipe of a table tiny."""
    folder = tmp_path_factory.mktemp("tables")
    texts = {"train": str(tiny_text_data(folder / "texts.jsonl", 40)), "max_length": 16, "validation_fraction": 0.2}
    slots = {"train": str(tiny_slot_data(folder / "slots.jsonl", 40)), "max_length": 16, "validation_fraction": 0.2}
    pictures = {"train": str(images), "validation": str(images)}
    bert, vit = tiny_model(folder / "bert", hidden_size=WIDTH), tiny_model(folder / "vit", "vit")

    def give(table: Table, task: str) -> dict[str, Any]:
        if task == "image-classification":
            model = {"name": str(vit)}
            if table.name.startswith("cifar10"):
                model = {"name": str(model_folder), "trust_remote_code": True}
            return {"model": model, "data": pictures}
        if task == "intent-slot":
            return {"model": {"name": str(bert)}, "data": slots}
        return {"model": {"name": str(bert)}, "data": texts, "task": "sst2"}

    return give


@pytest.fixture(scope="session")
def loaded() -> Callable[[RunConfig], TaskData]:
    """Loads the data of a configuration, once for each model and file."""
    kept: dict[str, TaskData] = {}

    def load(config: RunConfig) -> TaskData:
        key = f"{config.model.name} {config.data.train}"
        if key not in kept:
            kept[key] = load_data(config, find_task(load_plugins(config.plugins).collect("qpipe_tasks"), config.task))
        return kept[key]

    return load


@pytest.mark.parametrize(
    ("table", "row"), [pytest.param(t, row, id=f"{t.name}-{row}") for t in TABLES for row in t.rows]
)
def test_row_can_be_prepared(
    table: Table, row: str, inputs: Inputs, loaded: Callable[[RunConfig], TaskData], tmp_path: Path
) -> None:
    recipe = copy.deepcopy(read_yaml(table.recipe(row).read_text(), row))
    source = {**recipe, **inputs(table, recipe["task"]), "engine": {"name": "accelerate", "cpu": True}}
    source["train"] = {**recipe.get("train", {}), "max_steps": 100}
    if recipe["quantization"].get("ptq"):
        source["quantization"] = {**recipe["quantization"], "ptq": {**recipe["quantization"]["ptq"], "examples": 32}}
    config = resolve({**source, "out": str(tmp_path / "run")})
    rehearse(config, connect(config.engine), loaded(config))
