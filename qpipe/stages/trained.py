"""The trained model on disk, in full precision and independent of how many processes made it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qpipe.config import RunConfig, resolve
from qpipe.data.loading import find_task, load_in_order
from qpipe.engine.accelerate import AccelerateEngine
from qpipe.errors import CheckpointError, ConfigError
from qpipe.export.companions import keep_labels
from qpipe.export.folder import share_files
from qpipe.files import disk_errors, write_json
from qpipe.host import load_plugins
from qpipe.run import Run
from qpipe.stages.build import build
from qpipe.stages.casting import cast
from qpipe.stages.gather import float_state, quantizer_state
from qpipe.stages.prepare import prepare
from qpipe.stages.teacher_fit import has_processor, has_tokenizer, label_names

QUANTIZERS = "quantizers.safetensors"
DETAILS = "qpipe_model.json"


def save_float(run: Run, folder: Path) -> None:
    """Write the full-precision student as an ordinary Hugging Face folder, with its quantizers' state. Collective.

    Raises:
        CheckpointError: the disk is full.
    """
    state, stored = float_state(run)
    quantizers = quantizer_state(run) | stored
    if run.engine.rank == 0:
        with disk_errors(folder.parent), replacing(folder) as temporary:
            run.student.save_pretrained(temporary, state_dict=state)  # type: ignore[operator]
            keep_labels(run.student.config, temporary)
            if run.data.tokenizer is not None:
                run.data.tokenizer.save_pretrained(temporary)
            if quantizers:
                save_file(quantizers, temporary / QUANTIZERS)
            share_files(temporary)
            write_json(temporary / DETAILS, {"dtype": str(run.engine.dtype).removeprefix("torch.")})
    run.engine.barrier()


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """The path of a folder to make, which takes the place of `folder` at the end, and vanishes if anything fails."""
    folder = folder.resolve()  # a link stays one
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


DEPTH = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "layer_types")
"""Keys of `model.config` that say how many layers there were before `model.keep_layers`."""


def restore(run_dir: Path) -> Run:
    """A trained run on one process, ready to evaluate and export.

    Raises:
        ConfigError: the folder is no run directory.
        CheckpointError: training has not ended there.
    """
    config = read_config(run_dir)
    require_trained(run_dir)
    folder = run_dir / "model"
    details = json.loads((folder / DETAILS).read_text())
    engine = AccelerateEngine(alone(config).engine)
    engine.dtype = getattr(torch, details["dtype"])
    changes: dict[str, Any] = {"name": str(folder), "revision": None, "keep_layers": None, "weights": "pretrained"}
    if config.model.keep_layers is not None:  # how many there are, the saved configuration knows
        changes["config"] = {key: value for key, value in config.model.config.items() if key not in DEPTH}
    if has_tokenizer(folder) or has_processor(folder):
        changes["tokenizer"] = None  # the run has kept the one that it was trained with
    trained = config.model_copy(update={"model": config.model.model_copy(update=changes)})
    host = load_plugins(config.plugins)
    names = label_names(str(folder), config.model.trust_remote_code)
    data = load_in_order(trained, find_task(host.collect("qpipe_tasks"), config.task), names)
    run = build(trained, host, engine, data=data)
    run.config = config.model_copy(update={"out": str(run_dir)})
    run.trained = True
    prepare(run, trained=load_file(folder / QUANTIZERS) if (folder / QUANTIZERS).is_file() else {})
    cast(run.student, run)
    engine.serve(run.student)
    return run


def require_trained(run_dir: Path) -> None:
    """Refuse a run directory without a trained model.

    Raises:
        CheckpointError: training has not ended there.
    """
    if not (run_dir / "model" / DETAILS).is_file():
        raise CheckpointError(
            f"{run_dir} has no trained model yet; finish the training: qpipe launch --resume --out {run_dir}"
        )


def read_results(run_dir: Path) -> dict[str, Any]:
    """`results.json` of a finished run; empty if there is none yet."""
    path = run_dir / "results.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def has_learned(run_dir: Path, trained: bool) -> bool:
    """True if training has set what quantizers hold: not in a model that was only loaded, nor by `qpipe quantize`."""
    return trained and read_results(run_dir).get("steps") != 0


def read_config(run_dir: Path) -> RunConfig:
    """The resolved configuration of a run directory.

    Raises:
        ConfigError: it has none.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} has no config.yaml: it is not a run directory that `qpipe launch` made")
    return resolve(path)


def alone(config: RunConfig) -> RunConfig:
    """The same run for one process without sharding."""
    update = {"name": "accelerate", "zero": 1, "offload": "none", "config_file": None}
    return config.model_copy(update={"engine": config.engine.model_copy(update=update)})
