"""From files, mappings and overrides to a validated configuration, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qpipe.config.overrides import apply_overrides
from qpipe.config.sections import RunConfig
from qpipe.config.yaml_text import read_yaml, read_yaml_file, yaml_text
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
        data = read_yaml_file(path)
    data["plugins"] = {**_plugins(data.get("plugins"))}
    for name in plugins:
        data["plugins"].setdefault(name, {})
    data = with_plan(apply_overrides(data, overrides))
    data["plugins"] = _plugins(data["plugins"])
    try:
        return RunConfig(**data)
    except ValidationError as error:
        raise ConfigError(f"configuration: {describe(error, RunConfig)}") from error


def _plugins(section: Any) -> Mapping[str, Any]:
    """The section `plugins` as a mapping from names to options.

    Raises:
        ConfigError: it is none, such as a list of names, or options are something else.
    """
    if section is None or isinstance(section, Mapping):
        found = {name: {} if options is None else options for name, options in (section or {}).items()}
        wrong = next((name for name, options in found.items() if not isinstance(options, Mapping)), None)
        if wrong is not None:
            raise ConfigError(
                f"configuration: plugins.{wrong} = {found[wrong]!r} is no mapping of options: leave {wrong} out to do "
                f"without it, or write {wrong}: {{}} for its defaults"
            )
        return found
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
    found = read_yaml_file(path)
    inner = found.get("quantization")
    if list(found) != ["quantization"] or not isinstance(inner, dict) or list(inner) != ["rules"]:
        raise ConfigError(f"{path} must hold `quantization: {{rules: [...]}}` and nothing else")
    more, own = inner["rules"] or (), section.get("rules") or ()
    for where, given in ((str(path), more), ("configuration", own)):
        if not isinstance(given, list | tuple):
            raise ConfigError(f"{where}: quantization.rules is a list of rules, such as [{{site: ...}}], not {given!r}")
    rules = [*own, *more]
    return {**data, "quantization": {**section, "rules": rules, "plan": None}}


def dump(config: RunConfig) -> str:
    """The configuration as YAML; `resolve` of it gives an equal configuration."""
    return yaml_text(config.model_dump(mode="json"))
