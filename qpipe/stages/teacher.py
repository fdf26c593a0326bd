"""Teacher: the full-precision model that plugins learn from, named or fine-tuned first."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qpipe.config import INDIFFERENT, QuantizationConfig, RunConfig
from qpipe.data.loading import TaskData
from qpipe.data.locate import locate
from qpipe.engine import connect
from qpipe.errors import ConfigError
from qpipe.files import sha256, write_json
from qpipe.host import Host, load_plugins
from qpipe.run import Run
from qpipe.stages import checkpoint
from qpipe.stages.build import build
from qpipe.stages.prepare import prepare, wrap
from qpipe.stages.teacher_fit import require_same_architecture, require_same_language
from qpipe.stages.train import total_steps, train
from qpipe.stages.trained import save_float

LEFT_OUT = ("model.keep_layers", "teacher.precision")
"""Keys that do not decide the teacher's weights: it keeps all layers, and is fine-tuned in the run's type."""


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


def teacher_config(config: RunConfig) -> RunConfig:
    """The run that fine-tunes the teacher: the same model, task and data, without quantization and plugins."""
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
            "plugins": {},
            "quantization": QuantizationConfig(),
            "train": train_config,
            "out": str(Path(config.out) / "teacher"),
        }
    )


def fingerprint(config: RunConfig) -> str:
    """Hash of everything that decides the teacher's weights: the configuration, and the files that it names."""
    decisive = config.model_dump(mode="json", exclude={"out", "plugins", "quantization", "export"})
    for key in (*INDIFFERENT, *LEFT_OUT):
        section, _, name = key.partition(".")
        decisive.get(section, {}).pop(name, None)
    named = (config.model.name, config.model.tokenizer, config.data.train, config.data.validation)
    contents = {name: content_hash(Path(locate(name))) for name in named if name is not None}
    return hashlib.sha256(json.dumps([decisive, contents], sort_keys=True).encode()).hexdigest()


def content_hash(path: Path) -> str | None:
    """Hash of a file, or of the files directly in a folder; None for what is not here, such as a name on the hub."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        return None
    return hashlib.sha256("".join(f"{p.name}:{sha256(p)};" for p in files).encode()).hexdigest()


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
        ConfigError: the student would start from a named teacher of another architecture.
    """
    if not is_needed(config, host):
        return None, {}
    if config.teacher.name is not None:
        named = locate(config.teacher.name)
        if data is not None:
            require_same_language(config, named, data)
        require_same_architecture(config, named)
        return named, {}
    sub = teacher_config(config)
    folder = Path(sub.out)
    mark = {"fingerprint": fingerprint(sub)}
    model, results = folder / "model", folder / "results.json"
    unchanged = _read(folder / "inputs.json") == mark
    if unchanged and model.is_dir() and results.is_file():
        return str(model), json.loads(results.read_text())["evaluation"]
    rehearse()
    run = _fine_tune(sub, mark, unchanged, data)
    metrics: dict[str, float] = run.results["evaluation"]
    run.engine.close()
    return str(model), metrics


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _fine_tune(config: RunConfig, mark: dict[str, str], resume: bool, data: TaskData | None) -> Run:
    if resume:
        config = checkpoint.as_begun(config)
    engine = connect(config.engine)
    folder = Path(config.out)
    # Every rank has read the mark by now; only then may it change.
    engine.barrier()
    if engine.rank == 0:
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "inputs.json", mark)
    engine.barrier()
    run = build(config, load_plugins({}), engine, data=data)
    run.total_steps = total_steps(run)
    prepare(run)
    wrap(run)
    train(run, resume=bool(checkpoint.steps(folder)))
    save_float(run, folder / "model")
    if engine.rank == 0:
        write_json(folder / "results.json", {"evaluation": run.results["evaluation"]})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    engine.barrier()
    return run
