"""`--set key=value`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qpipe.config.sections import RunConfig
from qpipe.config.yaml_text import parse_value
from qpipe.errors import ConfigError


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set `a.b=value` in a nested mapping; a list item is `rules.0.site`. `NAME.weight=1` reaches plugin `NAME`.

    Raises:
        ConfigError: an override has no `=`, or its path runs through something that is not a mapping.
    """
    result: dict[str, Any] = _deep_copy(data)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {override!r}: write key=value, such as train.learning_rate=1e-4")
        keys = path.strip().split(".")
        if keys[0] not in RunConfig.model_fields and keys[0] in (result.get("plugins") or {}):
            keys = ["plugins", *keys]
        _set(result, keys, parse_value(text), override)
    return result


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _deep_copy(v) for k, v in value.items()}
    return [_deep_copy(v) for v in value] if isinstance(value, list | tuple) else value


def _set(target: Any, keys: list[str], value: Any, override: str) -> None:
    for position, key in enumerate(keys[:-1]):
        if isinstance(target, list):
            target = _item(target, key, override)
        else:
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
        if not isinstance(target, dict | list):
            raise ConfigError(f"--set {override!r}: {'.'.join(keys[: position + 1])} is a value, not a section")
    if isinstance(target, list):
        _item(target, keys[-1], override)
        target[int(keys[-1])] = value
    else:
        target[keys[-1]] = value


def _item(items: list[Any], key: str, override: str) -> Any:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"--set {override!r}: {key!r} is no index of a list of {len(items)}")
    return items[int(key)]
