"""Teacher: the full-precision model that plugins learn from, named or fine-tuned first."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from qpipe.config import INDIFFERENT, ModelConfig, QuantizationConfig, RunConfig
from qpipe.data.loading import TaskData
from qpipe.data.locate import locate
from qpipe.engine import connect
from qpipe.engine.base import choose_device, resolve_precision
from qpipe.errors import ConfigError
from qpipe.files import write_json
from qpipe.host import Host, describing, load_plugins, only_describing, report_error
from qpipe.run import Run
from qpipe.stages import checkpoint
from qpipe.stages.build import build
from qpipe.stages.input_files import content_hash
from qpipe.stages.prepare import prepare, wrap
from qpipe.stages.teacher_fit import require_same_architecture, require_same_language
from qpipe.stages.train import total_steps, train
from qpipe.stages.trained import save_float

logger = logging.getLogger(__name__)

LEFT_OUT = (
    "model.keep_layers",
    "teacher.precision",
    "teacher.init_student",
    "train.activation_checkpointing",
    "engine.name",
    "engine.zero",
    "engine.offload",
    "engine.fsdp",
    "engine.cpu",
    "engine.precision",
)
"""Keys that do not decide the teacher's weights: it keeps all layers. Its type is compared by itself: `auto` stands for
whatever it was fine-tuned in."""


def is_needed(config: RunConfig, host: Host) -> bool:
    """True if a teacher is named, or a plugin says it needs one."""
    return config.teacher.name is not None or any(p.needs_teacher for p in host.plugins.values())


def require_fine_tunable(config: RunConfig, host: Host, data: TaskData) -> None:
    """Refuse data on which no teacher can be fine-tuned, if the run has to fine-tune one.

    Args:
        config: resolved configuration.
        host: the plugins.
        data: what `load_data` gives for this configuration.

    Raises:
        ConfigError: they do not fill a single batch.
    """
    size = config.train.batch_size
    if is_needed(config, host) and config.teacher.name is None and len(data.train) < size:
        raise ConfigError(
            f"train.batch_size {size} exceeds the {len(data.train)} training examples that the teacher is fine-tuned "
            "on; lower it, give more data, or name a teacher with teacher.name"
        )


def teacher_config(config: RunConfig, plugins: Collection[str] = ()) -> RunConfig:
    """The run that fine-tunes the teacher: the same model, task and data, without quantization.

    Args:
        config: resolved configuration of the run that needs it.
        plugins: names of those that it cannot do without.
    """
    train_config = config.train.model_copy(
        update={
            "epochs": config.teacher.epochs,
            "max_steps": None,
            "learning_rate": config.teacher.learning_rate,
        }
    )
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"keep_layers": None}),
            "plugins": {name: options for name, options in config.plugins.items() if name in plugins},
            "quantization": QuantizationConfig(),
            "train": train_config,
            "out": str(Path(config.out) / "teacher"),
        }
    )


def mark_of(config: RunConfig) -> dict[str, Any]:
    """What decides the teacher's weights.

    Returns:
        `fingerprint`: a hash of the configuration and the files that it names; `files`: the hash of each of these;
        `precision`: the type that it is fine-tuned in; `engine`: what decides besides whether one interrupted half-way
        can go on.
    """
    left_out = {"out", "quantization", "export", *(() if config.plugins else ("plugins",))}
    decisive = config.model_dump(mode="json", exclude=left_out)
    for key in (*INDIFFERENT, *LEFT_OUT):
        section, _, name = key.partition(".")
        decisive.get(section, {}).pop(name, None)
    recomputed = config.train.activation_checkpointing
    precision = str(resolve_precision(config.engine, choose_device(config.engine)))
    models, data = (config.model.name, config.model.tokenizer), (config.data.train, config.data.validation)
    files = {name: content_hash(Path(locate(name))) for name in models if name is not None}
    files |= {name: content_hash(Path(locate(name)), below=True) for name in data if name is not None}
    text = json.dumps([decisive, files], sort_keys=True)
    engine = {**config.engine.model_dump(mode="json", exclude={"precision", "cpu"}), "checkpointing": recomputed}
    return {
        "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        "files": files,
        "precision": precision,
        "engine": engine,
    }


def stand_in(config: RunConfig, data: TaskData | None) -> str | ModelConfig:
    """The named teacher, checked as far as that goes without loading it; where none is named, the model it will be.

    Args:
        config: resolved configuration.
        data: what the run trains on; None compares no tokens and labels.

    Raises:
        ModelError: a named teacher reads other tokens, or numbers its labels in another way.
        ConfigError: the student would start from a named teacher of another architecture.
    """
    if config.teacher.name is None:
        return config.model
    named = locate(config.teacher.name)
    if data is not None:
        require_same_language(config, named, data)
    require_same_architecture(config, named)
    return named


def ensure_teacher(
    config: RunConfig, host: Host, data: TaskData | None = None, rehearse: Callable[[], None] = lambda: None
) -> tuple[str | None, dict[str, float]]:
    """Where the teacher is, and its metrics if this run measured them. Collective.

    A teacher fine-tuned before is used again if nothing that decides it has changed; one interrupted half-way goes on.

    Args:
        config: resolved configuration.
        host: the plugins.
        data: what `load_data` gives for this configuration; None loads them where they are needed.
        rehearse: called before a fine-tuning begins, to find errors that would otherwise show only after it.

    Raises:
        ModelError: a named teacher reads other tokens, or numbers its labels in another way.
        ConfigError: the student would start from a named teacher of another architecture; or its training has begun
            with a teacher that was fine-tuned on other files.
    """
    if not is_needed(config, host):
        return None, {}
    if config.teacher.name is not None:
        return str(stand_in(config, data)), {}
    sub = teacher_config(config, describing(host))
    folder = Path(sub.out)
    mark, before = mark_of(sub), _read(folder / "inputs.json") or {}
    model, results = folder / "model", folder / "results.json"
    fits = sub.engine.precision == "auto" or before.get("precision") == mark["precision"]
    unchanged = fits and before.get("fingerprint") == mark["fingerprint"]
    if model.is_dir() and results.is_file():
        if unchanged:
            return str(model), json.loads(results.read_text())["evaluation"]
        _refuse_another(config, before.get("files", {}), mark["files"])
    rehearse()
    if model.is_dir() and results.is_file() and not unchanged:
        logger.warning(
            "the teacher in %s was fine-tuned with other options or files: another takes its place, and it goes to %s",
            folder, _before(folder),
        )  # fmt: skip
    run = _fine_tune(sub, mark, unchanged and before.get("engine") == mark["engine"], data)
    metrics: dict[str, float] = run.results["evaluation"]
    run.engine.close()
    return str(model), metrics


def _refuse_another(config: RunConfig, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A student that has begun to learn from one teacher does not go on with another."""
    if not checkpoint.steps(Path(config.out)):
        return
    changed = [name for name in now if name in before and before[name] != now[name]]
    what = ", ".join(changed) or "a file or option that it was fine-tuned with"
    raise ConfigError(
        f"{what} has changed since the teacher in {config.out} was fine-tuned, and the student has learned from that "
        "teacher; put back what was there to go on, or start anew with another --out. To keep the teacher as it is, "
        f"start the new run with teacher.name: {config.out}/teacher/model"
    )


def _before(folder: Path) -> Path:
    """Where a finished teacher goes when another takes its place."""
    return folder.with_name(f"{folder.name}-before")


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _fine_tune(config: RunConfig, mark: dict[str, Any], resume: bool, data: TaskData | None) -> Run:
    if resume:
        config = checkpoint.as_begun(config)
    engine = connect(config.engine)
    folder = Path(config.out)
    # Every rank has read the mark by now; only then may it change.
    engine.barrier()
    if engine.rank == 0:
        if not resume and (folder / "results.json").is_file():  # hours of work, perhaps
            shutil.rmtree(_before(folder), ignore_errors=True)
            folder.rename(_before(folder))
        elif not resume:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "inputs.json", mark)
    engine.barrier()
    host = only_describing(load_plugins(config.plugins))
    run = build(config, host, engine, data=data)
    try:
        run.total_steps = total_steps(run)
        prepare(run)
        wrap(run)
        train(run, resume=bool(checkpoint.steps(folder)))
        save_float(run, folder / "model")
    except BaseException as error:
        report_error(host, run, error)
        raise
    if engine.rank == 0:
        write_json(folder / "results.json", {"evaluation": run.results["evaluation"]})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    engine.barrier()
    return run
