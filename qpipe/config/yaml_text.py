"""YAML as configurations are read and written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qpipe.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML that reads `1e-4` as a number, as YAML 1.2 does; the library follows YAML 1.1, where it is text.

    A key that a mapping has twice is an error, where the library takes the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping each of whose keys is written once."""
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        repeated = next((key for key in written if written.count(key) > 1), None)
        if repeated is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {repeated!r} is written twice; put what belongs to it into one place", node.start_mark
            )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def yaml_text(document: Mapping[str, Any], **options: Any) -> str:
    """A mapping as YAML that `read_yaml` reads as it was; keys stay in order.

    Args:
        document: plain mappings, lists, strings and numbers.
        options: of `yaml.dump`.
    """
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, **options)


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """Parse a YAML mapping.

    Raises:
        ConfigError: it is not YAML, or not a mapping.
    """
    try:
        value = yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{source} must hold a mapping of sections, not a {type(value).__name__}")
    odd = next((key for key in value if not isinstance(key, str)), None)
    if odd is not None:
        raise ConfigError(
            f"{source}: key {odd!r} is no text; YAML reads on, off, yes, no and numbers so: put it in quotes"
        )
    return value


def read_yaml_file(path: Path) -> dict[str, Any]:
    """Parse a YAML file in UTF-8.

    Raises:
        ConfigError: it cannot be read, is not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text in UTF-8: {error}") from error
    return read_yaml(text, str(path))


def parse_value(text: str) -> Any:
    """A `--set` value, read as YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set value {text!r} is not valid YAML: {error}") from error
