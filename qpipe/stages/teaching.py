"""The teacher while the student trains: where it is kept, its one forward pass per batch, and its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpipe.engine.base import Placement, resolve_precision
from qpipe.errors import ConfigError
from qpipe.run import Run, Step
from qpipe.stages import checkpoint
from qpipe.stages.calibrate import inputs_of
from qpipe.stages.casting import own_buffers
from qpipe.stages.signal_cache import SignalCache, model_digest
from qpipe.types import SignalKind, Signals

FIXED_LENGTH = ("causal-lm", "image-classification")
"""Kinds of tasks whose examples have one size without padding."""


def hold_teacher(run: Run) -> None:
    """Hand the teacher to the engine, in its type and place, and open its cache. Collective.

    Raises:
        ConfigError: the training data are made anew in every epoch, and are to be cached.
        CheckpointError: the cache cannot be used.
    """
    assert run.teacher is not None
    configured = run.config.teacher.precision
    dtype = resolve_precision(run.config.engine, run.engine.device) if configured == "auto" else _dtype(configured)
    paths = () if run.teacher_instruments is None else run.teacher_instruments.map.blocks
    blocks = [run.teacher.get_submodule(path) for path in paths]
    with own_buffers(run.teacher, dtype):
        run.teacher.to(dtype)
        if run.config.teacher.cache is not None:
            run.teacher_cache = open_cache(run, run.config.teacher.cache)
        run.teacher_forward = run.engine.hold(run.teacher, placement(run), blocks)


def _dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def placement(run: Run) -> Placement:
    """Where the teacher's weights go: `teacher.placement`, or as the student's.

    Raises:
        ConfigError: one process alone is to keep them in CPU memory, and the engine cannot.
    """
    configured, engine = run.config.teacher.placement, run.config.engine
    if configured == "cpu" and run.engine.name == "accelerate" and run.engine.world_size == 1:
        raise ConfigError(
            "teacher.placement: cpu needs several processes with Accelerate, since FSDP shards among them; use "
            "engine.name: deepspeed, or teacher.placement: whole"
        )
    if configured != "auto":
        return configured
    if engine.offload == "all":
        return "cpu"
    return "sharded" if engine.zero == 3 or engine.fsdp else "whole"


def open_cache(run: Run, folder: str) -> SignalCache:
    """The cache of the run's teacher, in a folder of its own below the configured one. Collective.

    Raises:
        ConfigError: the training data are made anew in every epoch.
        CheckpointError: the folder cannot be used.
    """
    assert run.teacher is not None
    require_cacheable(run, frozenset())
    length = None if run.task.kind in FIXED_LENGTH else run.config.data.max_length
    extra = {"length": length if run.config.data.pad_to_max_length else None}
    digest = run.engine.broadcast_object(model_digest(run.teacher, extra) if run.engine.rank == 0 else None)
    examples = min(len(run.data.train), run.total_steps * run.config.train.batch_size)
    begun = bool(checkpoint.steps(run.out))
    return SignalCache(Path(folder).expanduser() / digest[:32], run.engine, examples, begun)


def require_cacheable(run: Run, kinds: frozenset[SignalKind]) -> None:
    """Refuse to cache what is not the same whenever an example comes up.

    Raises:
        ConfigError: the training data are made anew in every epoch, a plugin has put taps into the teacher, or a signal
            changes with the padding.
    """
    if run.data.train_collate is not None:
        raise ConfigError(
            f"teacher.cache: task {run.task.name!r} makes its training examples anew in every epoch, so what the "
            "teacher says of them cannot be used again; leave teacher.cache out"
        )
    if run.teacher_instruments is not None and run.teacher_instruments.tapped:
        raise ConfigError(
            f"teacher.cache keeps signals, and a plugin looks into the teacher at "
            f"{min(run.teacher_instruments.tapped)!r} by itself; leave teacher.cache out, or what makes it look there"
        )
    per_token = kinds if run.task.kind == "intent-slot" else kinds - {"logits"}
    if per_token and run.task.kind not in FIXED_LENGTH and not run.config.data.pad_to_max_length:
        raise ConfigError(
            f"teacher.cache cannot keep {', '.join(sorted(per_token))}: batches are padded to their longest example, "
            "so these change with the company an example is in; set data.pad_to_max_length: true, with data.max_length "
            "as short as the data allow, or leave teacher.cache out"
        )


def wanted_signals(run: Run) -> Signals:
    """What plugins want captured now, united."""
    wanted = Signals()
    for signals in run.host.hook.qpipe_signals(run=run):
        wanted |= signals if signals is not None else Signals()
    return wanted


def extra_inputs(kinds: frozenset[SignalKind]) -> dict[str, bool]:
    """Arguments that make a model return what is part of its output."""
    return {"output_hidden_states": True} if "hidden_states" in kinds else {}


def teacher_signals(run: Run, step: Step, wanted: Signals) -> None:
    """Put the teacher's signals into the step: from the cache, or by one forward pass for all plugins. Collective.

    Raises:
        ConfigError: there is no teacher, or what is wanted cannot be cached.
    """
    if not wanted.teacher:
        return
    if run.teacher is None or run.teacher_instruments is None:
        raise ConfigError("a plugin asks for teacher signals but declares no `needs_teacher = True`")
    inputs, cache = inputs_of(step.batch), run.teacher_cache
    if cache is None:
        capture(run, inputs, wanted.teacher, step.teacher)
        return
    require_cacheable(run, wanted.teacher)
    found = cache.load(inputs, wanted.teacher)
    if found is None:
        capture(run, inputs, wanted.teacher, step.teacher)
        found = cache.store(inputs, wanted.teacher, step.teacher)
    step.teacher.update(found)


def capture(run: Run, inputs: dict[str, Tensor], kinds: frozenset[SignalKind], store: dict[Any, Tensor]) -> None:
    """One forward pass of the teacher, without gradients."""
    assert run.teacher is not None and run.teacher_instruments is not None
    instruments, forward = run.teacher_instruments, run.teacher_forward or run.teacher
    instruments.want(kinds, store)
    instruments.context.taps_active = True
    dtype = next(run.teacher.parameters()).dtype
    typed = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    try:
        with torch.no_grad():
            output = forward(**typed, **extra_inputs(kinds))
    finally:
        instruments.context.taps_active = False
    instruments.take_outputs(output, kinds, store)
