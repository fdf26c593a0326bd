"""Build: configuration and plugins become models, data and a task."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from qpipe.config import ModelConfig, RunConfig
from qpipe.data.loading import TaskData, find_task, load_data
from qpipe.engine.base import Engine
from qpipe.errors import ModelError
from qpipe.host import Host
from qpipe.model.instrument import Instruments
from qpipe.model.reduce import keep_layers
from qpipe.run import Run
from qpipe.stages.texts import fit_to_texts
from qpipe.types import ModelMap, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, numpy and torch. Training seeds each rank differently, so that dropout differs between them."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def load_model(host: Host, spec: ModelConfig, task: Task, num_labels: int, strict: bool = False) -> nn.Module:
    """A model from the first plugin that can load it.

    Raises:
        ModelError: none can, or the checkpoint lacks weights although it has to be whole (`strict`).
    """
    error = ModelError(f"no plugin loads model {spec.name!r} for task {task.name!r}")
    return host.first("qpipe_load_model", error, spec=spec, task=task, num_labels=num_labels, strict=strict)


def override_dropout(model: nn.Module, rate: float | None) -> None:
    """Set every dropout rate of a model, in modules and in its configuration, if a rate is given."""
    if rate is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, rate)
    for name, value in vars(getattr(model, "config", object())).items() if hasattr(model, "config") else ():
        if "dropout" in name and isinstance(value, float):
            setattr(model.config, name, rate)


def instrument(host: Host, model: nn.Module) -> Instruments:
    """Find the sites of a model.

    Raises:
        ModelError: no plugin knows the model's map.
    """
    return Instruments(model, model_map(host, model), lambda m: host.hook.qpipe_quantize_module(module=m))


def model_map(host: Host, model: nn.Module) -> ModelMap:
    """Where the parts of a model are.

    Raises:
        ModelError: no plugin knows.
    """
    return host.first("qpipe_model_map", ModelError(f"no plugin maps {type(model).__name__}"), model=model)


def build(
    config: RunConfig,
    host: Host,
    engine: Engine,
    teacher: str | ModelConfig | None = None,
    data: TaskData | None = None,
    strict: bool = False,
) -> Run:
    """Load task, data, student and (where there is one) teacher.

    Args:
        config: resolved configuration.
        host: the plugins.
        engine: connected, not yet wrapped.
        teacher: where a fine-tuned full-precision model is, or a model that stands in for one not yet fine-tuned.
        data: what `load_data` gave for this configuration; None loads them.
        strict: refuse a student whose head is missing or of another size.

    Raises:
        QpipeError: something named in the configuration cannot be loaded.
    """
    task = find_task(host.collect("qpipe_tasks"), config.task)
    data = load_data(config, task) if data is None else data
    seed_everything(config.seed)
    start = config.model
    if isinstance(teacher, str) and config.teacher.init_student:
        start = config.model.model_copy(update={"name": teacher, "revision": None, "weights": "pretrained"})
    student = load_model(host, start, task, data.num_labels, strict)
    if start.keep_layers is not None:
        keep_layers(student, model_map(host, student).blocks, start.keep_layers)
    override_dropout(student, config.train.dropout)
    name_labels(student, data)
    fit_to_texts(student, task, data, config.data.max_length)
    run = Run(config, host, engine, task, data, student)
    run.instruments = instrument(host, student)
    if teacher is not None:
        run.teacher = load_teacher(run, teacher)
    return run


def load_teacher(run: Run, teacher: str | ModelConfig, strict: bool | None = None) -> nn.Module:
    """The teacher, frozen.

    Args:
        run: for which task, and on which data.
        teacher: its name, or all that decides what is loaded.
        strict: its checkpoint has to be whole; default: where it is named.

    Raises:
        ModelError: it is no model that was fine-tuned for this task.
    """
    remote = run.config.model.trust_remote_code
    spec = ModelConfig(name=teacher, trust_remote_code=remote) if isinstance(teacher, str) else teacher
    whole = isinstance(teacher, str) if strict is None else strict
    model = load_model(run.host, spec, run.task, run.data.num_labels, strict=whole)
    fit_to_texts(model, run.task, run.data, run.config.data.max_length)
    return model.eval().requires_grad_(False)


def name_labels(model: nn.Module, data: TaskData) -> None:
    """Write the label names into the model's configuration, so that the export carries them.

    Where the data hold plain integers, the names that the model has for them stay.
    """
    if data.label_names and hasattr(model, "config"):
        config = cast("PreTrainedModel", model).config
        unnamed = all(name == f"LABEL_{index}" for index, name in enumerate(data.label_names))
        if unnamed and len(config.id2label or {}) == len(data.label_names):
            return
        config.id2label = dict(enumerate(data.label_names))
        config.label2id = {name: index for index, name in enumerate(data.label_names)}
