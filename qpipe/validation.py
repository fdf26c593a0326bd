"""What is wrong with options and configurations, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from qpipe.discovery import installed
from qpipe.errors import suggest


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per problem: which key, what was given, what is allowed."""
    return "; ".join(_line(problem, model) for problem in error.errors())


def _line(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    place, given = problem["loc"], problem.get("input")
    key = ".".join(str(part) for part in place)
    match problem["type"]:
        case "extra_forbidden":
            return f"{key} is not an option{_hint(place, model, given)}"
        case "missing":
            section = _section_at(model, place)
            return f"{key} is missing" + (f"; write {key}: {{{_first(section)}: ...}}" if section else "")
        case "model_type":
            if given is None:
                return f"{key} is empty; give it keys, or leave it out"
            section = _section_at(model, place)
            return f"{key} is a section; in place of {given!r} write {{{_first(section)}: {given}}}"
        case "tuple_type" if (section := _section_at(model, place[:-1])) and place[-1] in section.model_fields:
            return f"{key} is a list; in place of {given!r} write [{given}]"
        case "value_error":  # raised by a check of several keys, whose message names them
            text = str(problem["msg"]).removeprefix("Value error, ")
            return f"{key}: {text}" if key else text
    return f"{key} = {given!r}: {problem['msg']}"


def _hint(place: Sequence[str | int], model: type[BaseModel], given: Any) -> str:
    name, section = str(place[-1]), _section_at(model, place[:-1])
    fields = list(section.model_fields) if section else []
    if "plugins" in fields and name in installed():
        return f", but a plugin that is installed: add --plugins {name}"
    if {"options", "quantizer"} <= set(fields) and not get_close_matches(name, fields, 1, 0.7):  # not a slip of the pen
        return f"; options of a quantizer go into `options`: write options: {{{name}: {given}}}"
    return suggest(name, fields) or f"; allowed: {', '.join(fields) or 'no options'}"


def _first(section: type[BaseModel] | None) -> str:
    return next(iter(section.model_fields)) if section else "key"


def _section_at(model: type[BaseModel] | None, place: Sequence[str | int]) -> type[BaseModel] | None:
    """The section that a path of keys leads to, elements of lists being passed over; None if it leads to none."""
    for part in place:
        if model is None:
            return None
        if isinstance(part, str):
            field = model.model_fields.get(part)
            model = None if field is None else _section(field.annotation)
    return model


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)
