"""What is wrong with options and configurations, in words."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from qpipe.discovery import installed
from qpipe.errors import suggest
from qpipe.problems import Problem, found


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per problem: which key, what was given, what is allowed."""
    return "; ".join(_line(problem, model) for problem in found(error, model))


def _line(problem: Problem, model: type[BaseModel]) -> str:
    place, given = problem.place, problem.given
    key = ".".join(str(part) for part in place)
    match problem.kind:
        case "extra_forbidden":
            return f"{key} is not an option{_hint(place, model, given)}"
        case "missing":
            section = _section_at(model, place)
            return f"{key} is missing" + (f"; write {key}: {{{_first(section)}: ...}}" if section else "")
        case "model_type":
            if given is None:
                return f"{key} is empty; give it keys, or leave it out"
            section = _section_at(model, place)
            return f"{key} is a section; in place of {given!r} write {{{_first(section)}: {_yaml(given)}}}"
        case "tuple_type" if (section := _section_at(model, place[:-1])) and place[-1] in section.model_fields:
            if given is None:
                return f"{key} is empty; give it a list, or leave it out"
            return f"{key} is a list; in place of {given!r} write [{_yaml(given)}]"
        case "value_error":  # raised by a check of several keys, whose message names them
            text = problem.message.removeprefix("Value error, ")
            return f"{key}: {text}" if key else text
    return f"{key} = {given!r}: {problem.message}"


def _yaml(value: Any) -> str:
    """A value as it can be written within a list or a mapping on one line: patterns need quotes there."""
    try:
        return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6).strip()[1:-1]
    except yaml.representer.RepresenterError:  # an object of Python, which no file can hold
        return repr(value)


def _hint(place: Sequence[str | int], model: type[BaseModel], given: Any) -> str:
    name, section = str(place[-1]), _section_at(model, place[:-1])
    fields = list(section.model_fields) if section else []
    if "plugins" in fields and name in installed():
        return f", but a plugin that is installed: add --plugins {name}"
    if {"options", "quantizer"} <= set(fields) and not get_close_matches(name, fields, 1, 0.7):  # not a slip of the pen
        return f"; options of a quantizer go into `options`: write options: {{{name}: {_yaml(given)}}}"
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
