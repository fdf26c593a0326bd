"""What the processes of tests/distributed run; called by name through `run_distributed`."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import qpipe
from qpipe import CheckpointError, ConfigError, Loss, Plugin, TrainingError, hookimpl
from qpipe.builtin.models import Models
from qpipe.config import resolve
from qpipe.engine import connect
from qpipe.engine.sharding import Shards
from qpipe.files import write_json
from qpipe.host import load_plugins
from qpipe.testing import gradients

EXECUTE: Any = importlib.import_module("qpipe.stages.execute")
RANK = int(os.environ.get("RANK", "0"))


class Poison(Plugin):
    """A loss term that is NaN on rank 1 in step 2."""

    @hookimpl
    def qpipe_losses(self):
        def term(step):
            return step.output.logits.float().sum() * (float("nan") if RANK == 1 and step.index == 2 else 0.0)

        return [Loss("poison", term)]


def nan_on_one_rank(config: dict[str, Any]) -> str:
    """The error that every rank has to raise."""
    return training_error(config, Poison())


def training_error(config: dict[str, Any], plugin: Plugin) -> str:
    """What ends a run with a plugin."""
    EXECUTE.load_plugins = lambda options, **more: load_plugins(options, extra=[("test", plugin)])
    try:
        qpipe.execute(resolve(config))
    except TrainingError as error:
        return str(error)
    return "no error"


class Reads(Plugin):
    """A model that also multiplies with the table of its embedding."""

    @hookimpl
    def qpipe_load_model(self, spec, task, num_labels, strict):
        model: Any = Models().qpipe_load_model(spec, task, num_labels, strict)
        words, forward = model.bert.embeddings.word_embeddings, model.forward

        def reading(**inputs):
            output = forward(**inputs)
            output.logits = output.logits + (output.logits @ words.weight.t()[:2]).sum(-1, keepdim=True)
            return output

        model.forward = reading
        return model


def weight_read_outside(config: dict[str, Any]) -> str:
    """The error that stops the training before its first step."""
    return training_error(config, Reads())


def another_directory_on_one_rank(config: dict[str, Any]) -> str:
    """The error where rank 1 is on a machine that has a run directory of its own."""
    EXECUTE.SEEN_WITHIN = 1.0
    given = resolve(config)
    try:
        qpipe.execute(given.model_copy(update={"out": f"{given.out}-of-rank-{RANK}"}))
    except ConfigError as error:
        return str(error)
    return "no error"


def full_disk_on_one_rank(config: dict[str, Any]) -> None:
    """Rank 0 cannot write the second checkpoint, and ends as a worker does."""
    original = torch.save

    def save(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if RANK == 0 and "step-00000006" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        original(value, file, *args, **kwargs)

    torch.save = save
    try:
        qpipe.execute(resolve(config))
    except CheckpointError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


def shards_round_trip(folder: str) -> list[float]:
    """Train a sharded model of which a part is unused, save, train on; load, and train on again: both results."""
    config = resolve(None, ["engine.name=accelerate", "engine.fsdp=true", "engine.cpu=true"])
    engine = connect(config.engine)

    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    def fresh() -> tuple[Part, torch.optim.Optimizer, Shards]:
        torch.manual_seed(0)
        model = Part()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, Shards(model, [], optimizer, engine.device)

    def step(model: Part, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    results = []
    model, optimizer, shards = fresh()
    step(model, optimizer)
    shards.save(Path(folder))
    for again in (False, True):
        if again:
            model, optimizer, shards = fresh()
            shards.load(Path(folder))
        step(model, optimizer)
        with shards.gathered(list(model.parameters())) as whole:
            results.append(float(torch.cat([w.flatten() for w in whole]).double().square().sum()))
    return results


def running_statistics(config: dict[str, Any], folder: str) -> None:
    """Write the float buffers with which this rank evaluated last."""
    run = qpipe.execute(resolve(config))
    sums = {n: float(b.double().sum()) for n, b in run.student.named_buffers() if n.endswith("running_mean")}
    write_json(Path(folder) / f"rank-{RANK}.json", sums)


def traces(cases: dict[str, dict[str, Any]], steps: int, folder: str) -> dict[str, tuple[int, int]]:
    """Write traces; how many numbers of the teacher's weights rank 0 held in each.

    And how many files there were before it in the teacher's cache that two processes fill.
    """
    original: Any = gradients.assemble
    held = []

    def assemble(*arguments: Any) -> Any:
        run = original(*arguments)
        cached = len(list(Path(folder).glob("cache-of-two/*/*.safetensors")))
        held.append((sum(local_size(parameter) for parameter in run.teacher.parameters()), cached))
        return run

    gradients.assemble = assemble
    return dict(zip(gradients.write_traces(cases, steps, folder), held, strict=True))


def local_size(parameter: nn.Parameter) -> int:
    """Elements that this process holds of a parameter."""
    if hasattr(parameter, "ds_tensor"):
        return int(parameter.ds_tensor.numel()) + parameter.numel()
    return int(parameter.to_local().numel()) if isinstance(parameter, DTensor) else parameter.numel()
