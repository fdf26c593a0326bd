"""The configuration of `qpipe quantize`: which model, and where its task and data are described."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qpipe.config import RunConfig, default_recipe, read_yaml_file, resolve
from qpipe.errors import ConfigError
from qpipe.rundir import CONFIG_NAME

DEFAULT_OUT = "runs/quantized"
NOT_TAKEN = ("plugins", "teacher", "out")
"""Sections of the run that made a model which say nothing about the model."""


def configuration(
    model: str,
    source: Path | None,
    overrides: Iterable[str],
    plugins: Iterable[str],
    out: Path | None,
    default_out: str = DEFAULT_OUT,
) -> RunConfig:
    """Resolve what to quantize, and how.

    Task, data and plan come from `source`; without one from the run that `model` belongs to, if it lies in a run
    directory, else from the built-in recipe.

    Args:
        model: a fine-tuned model: folder, hub name, `package:NAME/PATH`, or a run directory (or its `teacher`).
        source: a YAML file.
        overrides: `key=value`.
        plugins: names, in calling order.
        out: run directory to write; None: `out` of the overrides or of the file, else `default_out`.
        default_out: where nothing says where.

    Raises:
        ConfigError: a file is missing, a key or value is not allowed, an override names another model, or the result
            would lie in the model's own run.
    """
    overrides = list(overrides)
    set_keys = [text.partition("=")[0].strip() for text in overrides]
    folder = model_folder(Path(model))
    recipe = _mapping(source, folder)
    given = recipe.get("model") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"configuration: model is a section; in place of {given!r} write {{name: {given}}}")
    section = {**given, "name": str(folder) if folder else model}
    if folder is not None or given.get("name") != model:
        section.pop("revision", None)  # of another model
    for key in ("weights", "keep_layers"):  # of the training that made the model: it is quantized as it is
        section.pop(key, None)
    recipe["model"] = section
    config = resolve(recipe, overrides, plugins)
    if config.model.name != section["name"]:
        raise ConfigError(
            f"--set names the model {config.model.name!r}, and the one to quantize is {model!r}, the first argument; "
            "leave the name out of the options"
        )
    says_where = "out" in set_keys or (source is not None and "out" in recipe)
    target = out or Path(config.out if says_where else default_out)
    if folder is not None and target.resolve() in folder.resolve().parents:
        raise ConfigError(f"run directory {target} holds the model that is to be quantized; choose another --out")
    return config.model_copy(update={"out": str(target)})


def model_folder(path: Path) -> Path | None:
    """The folder of the model that a path stands for: the path itself, or `model` in it; None if it is no folder."""
    if not path.is_dir():
        return None
    return path / "model" if (path / "model" / "config.json").is_file() else path


def _mapping(source: Path | None, folder: Path | None) -> dict[str, Any]:
    if source is not None:
        if not source.is_file():
            raise ConfigError(f"configuration {str(source)!r} does not exist; give a YAML file, or none")
        return read_yaml_file(source)
    own = _own_configuration(folder) if folder is not None else None
    if own is None:
        return default_recipe()
    return {key: value for key, value in read_yaml_file(own).items() if key not in NOT_TAKEN}


def _own_configuration(folder: Path) -> Path | None:
    """The configuration of the run that made a model: in RUN for `RUN/model` and for `RUN/teacher/model`."""
    if folder.name != "model":
        return None
    candidates = (folder.parent / CONFIG_NAME, folder.parent.parent / CONFIG_NAME)
    return next((path for path in candidates[: 2 if folder.parent.name == "teacher" else 1] if path.is_file()), None)
