"""Checkpoint: everything needed to go on bit for bit, published by one rename."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from qpipe.config import RunConfig
from qpipe.engine.base import resolve_precision
from qpipe.errors import CheckpointError, PluginError
from qpipe.files import disk_errors, sha256, sync_folder, write_json
from qpipe.resuming import as_run
from qpipe.run import Run
from qpipe.stages.gather import share_buffers
from qpipe.stages.input_files import input_files

NAME = re.compile(r"step-(\d{8})")
KEPT = ("ptq",)
"""Results of what a resumed run does not do again."""


def folder(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies in a run folder."""
    return out / "checkpoints" / f"step-{step:08d}"


def random_state(device: torch.device) -> dict[str, Any]:
    """State of every random generator that this process draws from, on the CPU and on its device."""
    # numpy's stub also allows the dict that only legacy=False gives.
    numpy = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state(legacy=True))
    state = {
        "python": random.getstate(),
        "numpy": (str(numpy[0]), torch.from_numpy(numpy[1].astype(np.int64)), *map(float, numpy[2:])),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo of `random_state`; the process may have got a device of another number."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def quantizer_buffers(run: Run) -> dict[str, torch.Tensor]:
    """State of the quantizers that is not in parameters: calibrated ranges and the like."""
    return {
        f"{site}/{name}": buffer.detach().cpu().clone()
        for site, quantizer in run.instruments.quantizers().items()
        for name, buffer in quantizer.named_buffers()
    }


def save(run: Run, progress: dict[str, Any]) -> Path:
    """Write a checkpoint under a temporary name, then rename it; called by all processes.

    Args:
        run: the run, after an optimizer step.
        progress: JSON-able: `step`, `best_step`, `best_metric`, `seconds`.

    Raises:
        CheckpointError: the disk is full or not writable. Earlier checkpoints are untouched.
    """
    final = folder(run.out, progress["step"])
    temporary = final.with_name(f".{final.name}.tmp")
    share_buffers(run)
    try:
        # A process that fails here raises at once: the launcher ends the others, who may be waiting for it.
        with disk_errors(run.out):
            _write(run, temporary, progress)
            run.engine.barrier()
            if run.engine.rank == 0:
                _publish(temporary, final)
    except CheckpointError:
        if run.engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if run.engine.rank == 0:
        prune(run)
    run.engine.barrier()
    return final


def _write(run: Run, temporary: Path, progress: dict[str, Any]) -> None:
    if run.engine.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    run.engine.barrier()
    plugins = dict(run.host.collect_mappings("qpipe_state", run=run))
    if not steps(run.out):
        require_readable(plugins)
    run.engine.save(temporary)
    state = {
        "random": random_state(run.engine.device),
        "plugins": plugins,
        "buffers": quantizer_buffers(run),
    }
    torch.save(state, temporary / f"rank-{run.engine.rank:05d}.pt")
    if run.engine.rank == 0:
        precision = str(resolve_precision(run.config.engine, run.engine.device)).removeprefix("torch.")
        kept = {name: run.results[name] for name in KEPT if name in run.results}
        record = {**progress, "world_size": run.engine.world_size, "precision": precision, "results": kept}
        record["config"] = as_run(run.config, run.engine.device.type, precision)
        run.input_files = run.input_files or input_files(run.config)  # a hash of them all takes a while
        record["inputs"] = run.input_files
        write_json(temporary / "progress.json", record)


def require_readable(states: Mapping[str, Any]) -> None:
    """Refuse what plugins want kept if it could be written and not be read again, before a training relies on it.

    Args:
        states: by plugin, as checkpoints hold them.

    Raises:
        PluginError: a state holds objects that checkpoints are not read with.
    """
    for name, state in states.items():
        buffer = io.BytesIO()
        try:
            torch.save(state, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True, map_location="cpu")
        except Exception as error:  # pickle and torch raise what they like
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"it holds a {named[1]}" if named else str(error)
            raise PluginError(
                f"plugin {name!r}: what qpipe_state returned cannot be read back from a checkpoint: {reason}; return "
                "tensors, numbers, strings, None, and dicts, lists and tuples of these"
            ) from error


def _publish(temporary: Path, final: Path) -> None:
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    write_json(temporary / "manifest.json", manifest)
    sync_folder(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_folder_entry(final.parent)


def sync_folder_entry(parent: Path) -> None:
    """Make a rename within `parent` durable."""
    import os

    descriptor = os.open(parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(run: Run) -> None:
    """Keep the newest checkpoints, and of each the best one it knows, so that training can end from any of them."""
    found = steps(run.out)
    newest = found[-run.config.train.keep_checkpoints :]
    keep = {*newest, *(best_known(folder(run.out, step)) for step in newest)}
    for step in found:
        if step not in keep:
            shutil.rmtree(folder(run.out, step), ignore_errors=True)
    for leftover in (run.out / "checkpoints").glob(".step-*.tmp"):  # of a killed save
        shutil.rmtree(leftover, ignore_errors=True)


def best_known(path: Path) -> int | None:
    """The best step when a checkpoint was written; None without one, or where the checkpoint is damaged."""
    try:
        found: int | None = read_progress(path)["best_step"]
    except (OSError, ValueError, KeyError):
        return None
    return found


def read_progress(path: Path) -> dict[str, Any]:
    """Where training stood when a checkpoint was written.

    `step`, `best_step`, `best_metric`, `seconds` (spent so far, by stage), `world_size`, `precision`, `config` (see
    `resuming.as_run`), `inputs` (see `input_files`), `results` (those of `KEPT`).
    """
    progress: dict[str, Any] = json.loads((path / "progress.json").read_text())
    return progress


def as_begun(config: RunConfig) -> RunConfig:
    """The configuration with the precision that `auto` meant where the newest checkpoint was written.

    A run that is resumed on other hardware goes on as it began.
    """
    found = steps(Path(config.out))
    if config.engine.precision != "auto" or not found:
        return config
    try:
        precision = read_progress(folder(Path(config.out), found[-1]))["precision"]
    except (OSError, ValueError, KeyError):
        return config  # damaged, as loading it will tell, or of an earlier version
    return config.model_copy(update={"engine": config.engine.model_copy(update={"precision": precision})})


def steps(out: Path) -> list[int]:
    """Optimizer steps of the complete checkpoints in a run folder, ascending."""
    root = out / "checkpoints"
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for p in root.iterdir() if (m := NAME.fullmatch(p.name)))


def verify_files(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: a file is missing, truncated or changed; says which, and how to go on.
    """
    advice = f"remove {path} to go on from an earlier checkpoint, or start again without --resume"
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {path} has no readable manifest ({error}); {advice}") from error
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} lacks {name}; {advice}")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint file {file} has {file.stat().st_size} bytes, {expected['bytes']} were written; {advice}"
            )
        if sha256(file) != expected["sha256"]:
            raise CheckpointError(f"checkpoint file {file} was changed after it was written; {advice}")


def load(run: Run, step: int) -> dict[str, Any]:
    """Restore a checkpoint into a prepared and wrapped run; returns its progress.

    Raises:
        CheckpointError: it is damaged, or was written by another number of processes.
    """
    path = folder(run.out, step)
    problem = None
    if run.engine.rank == 0:
        try:
            verify_files(path)
        except CheckpointError as error:
            problem = str(error)
    problem = run.engine.broadcast_object(problem)
    if problem:
        raise CheckpointError(problem)
    progress = read_progress(path)
    if progress["world_size"] != run.engine.world_size:
        raise CheckpointError(
            f"checkpoint {path} was written by {progress['world_size']} processes, this run has "
            f"{run.engine.world_size}; resume with the same number"
        )
    run.engine.load(path)
    state = torch.load(path / f"rank-{run.engine.rank:05d}.pt", weights_only=True, map_location="cpu")
    _restore_buffers(run, state["buffers"])
    for plugin, call in run.host.implementations("qpipe_restore"):
        if plugin in state["plugins"]:
            call(run=run, state=state["plugins"][plugin])
    restore_random_state(state["random"], run.engine.device)
    run.instruments.context.weights_changed()
    return progress


def _restore_buffers(run: Run, buffers: dict[str, torch.Tensor]) -> None:
    for site, quantizer in run.instruments.quantizers().items():
        for name, buffer in quantizer.named_buffers():
            buffer.copy_(buffers[f"{site}/{name}"])
