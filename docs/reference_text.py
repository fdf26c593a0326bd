"""What the reference pages share: tables, types as text, options of pydantic models, plugins of this repository."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

SIGNS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; vertical bars in cells are escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def type_text(annotation: Any) -> str:
    """A type as a reader of YAML thinks of it: `float`, `linear | cosine`, `list of text`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = [bounds(part) for part in arguments[1:] if isinstance(part, FieldInfo)]
        return type_text(arguments[0]) + "".join(f" ({text})" for text in limits if text)
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(type_text(part) for part in arguments)
    if origin in (tuple, list, frozenset):
        return "list of " + type_text(arguments[0])
    if origin in (dict,):
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    names = {str: "text", bool: "true | false", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def bounds(field: FieldInfo) -> str:
    """Limits of a number, such as `≥ 2, ≤ 8`."""
    found = []
    for limit in field.metadata:
        sign = SIGNS.get(type(limit))
        if sign is not None:
            found.append(f"{sign} {next(iter(vars_of(limit)))}")
    return ", ".join(found)


def vars_of(limit: Any) -> Iterator[Any]:
    """Values of an annotated-types constraint."""
    for name in type(limit).__dataclass_fields__:
        yield getattr(limit, name)


def default_text(field: FieldInfo) -> str:
    """A default as in YAML, `required` if there is none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "`" + json.dumps(value if not isinstance(value, BaseModel) else value.model_dump(mode="json")) + "`"


def options_table(model: type[BaseModel], prefix: str = "") -> str:
    """Option, type, default and meaning of every field of a model; a sentence if it has none."""
    rows = []
    for name, field in model.model_fields.items():
        limits = bounds(field)
        kind = type_text(field.annotation) + (f" ({limits})" if limits else "")
        rows.append((f"`{prefix}{name}`", kind, default_text(field), field.description or ""))
    return table(("key", "type", "default", "meaning"), rows) if rows else "No options."


def anchor(heading: str) -> str:
    """The fragment that a Markdown viewer gives to a heading."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def repository_plugins(root: Path) -> dict[str, tuple[str, Any]]:
    """`(folder, class)` of each plugin in `plugins/`, by name, whatever else is installed."""
    found: dict[str, tuple[str, Any]] = {}
    for project in sorted(root.glob("plugins/*/pyproject.toml")):
        source = str(project.parent / "src")
        if source not in sys.path:
            sys.path.insert(0, source)
        points = tomllib.loads(project.read_text())["project"].get("entry-points", {}).get("qpipe", {})
        for name, target in points.items():
            module, _, attribute = target.partition(":")
            found[name] = (f"plugins/{project.parent.name}", getattr(importlib.import_module(module), attribute))
    return found
