"""From files, mappings and overrides to a validated configuration, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qpipe.config.overrides import apply_overrides
from qpipe.config.sections import RunConfig
from qpipe.config.yaml_text import read_yaml, yaml_text
from qpipe.errors import ConfigError
from qpipe.validation import describe


def default_recipe() -> dict[str, Any]:
    """The recipe of `qpipe launch` without a configuration file, as a mapping."""
    return read_yaml(files("qpipe").joinpath("recipes/default.yaml").read_text(), "the default recipe")


def resolve(
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
    plugins: Iterable[str] = (),
) -> RunConfig:
    """Make a configuration from a file (or mapping, or the default recipe), plugin names and `--set` overrides.

    Raises:
        ConfigError: the file is missing or a key or value is not allowed; the message names each problem.
    """
    if source is None:
        data = default_recipe()
    elif isinstance(source, Mapping):
        data = dict(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"configuration {str(path)!r} does not exist; give a YAML file, or none for the default")
        data = read_yaml(path.read_text(), str(path))
    data["plugins"] = {**_plugins(data.get("plugins"))}
    for name in plugins:
        data["plugins"].setdefault(name, {})
    data["plugins"] = {k: v or {} for k, v in data["plugins"].items()}
    data = with_plan(apply_overrides(data, overrides))
    try:
        return RunConfig(**data)
    except ValidationError as error:
        raise ConfigError(f"configuration: {describe(error, RunConfig)}") from error


def _plugins(section: Any) -> Mapping[str, Any]:
    """The section `plugins` as a mapping.

    Raises:
        ConfigError: it is none, such as a list of names.
    """
    if section is None or isinstance(section, Mapping):
        return section or {}
    names = section if isinstance(section, list | tuple) else str(section).split(",")
    written = ", ".join(f"{name}: {{}}" for name in names)
    raise ConfigError(f"configuration: plugins maps names to options; in place of {section!r} write {{{written}}}")


def with_plan(data: dict[str, Any]) -> dict[str, Any]:
    """Put the rules of `quantization.plan` after `quantization.rules`, so that the configuration stands alone.

    Raises:
        ConfigError: the file is missing, or holds anything but `quantization.rules`.
    """
    section = data.get("quantization")
    if not isinstance(section, dict) or section.get("plan") is None:
        return data
    path = Path(str(section["plan"]))
    if not path.is_file():
        raise ConfigError(
            f"quantization.plan {str(path)!r} does not exist; `qpipe inspect sensitivity --out` writes one"
        )
    found = read_yaml(path.read_text(), str(path))
    inner = found.get("quantization")
    if list(found) != ["quantization"] or not isinstance(inner, dict) or list(inner) != ["rules"]:
        raise ConfigError(f"{path} must hold `quantization: {{rules: [...]}}` and nothing else")
    rules = [*(section.get("rules") or ()), *(inner["rules"] or ())]
    return {**data, "quantization": {**section, "rules": rules, "plan": None}}


def dump(config: RunConfig) -> str:
    """The configuration as YAML; `resolve` of it gives an equal configuration."""
    return yaml_text(config.model_dump(mode="json"))
