"""What pydantic finds wrong with a value, where it may have one of several forms: by the form that was meant."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

Place = tuple[str | int, ...]

OTHER_FORM = frozenset({"literal_error", "float_parsing", "int_parsing", "int_from_float", "bool_parsing"})
"""Kinds of problems, besides those that end in `_type`, of a value that is of another form altogether."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        place: keys and positions in lists that lead to the value.
        kind: as pydantic calls it.
        given: the value.
        message: pydantic's own.
        forms: place of the innermost value with several forms on the way, and pydantic's name of the one tried; None if
            there is none.
    """

    place: Place
    kind: str
    given: Any
    message: str
    forms: tuple[Place, str] | None = None

    @property
    def is_other_form(self) -> bool:
        """Whether the value does not have the form that was tried."""
        at_top = self.forms is not None and self.forms[0] == self.place
        return at_top and (self.kind.endswith("_type") or self.kind in OTHER_FORM)


def found(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """The problems of a value, without those of forms that it was not meant to have.

    pydantic tries every form, and tells what is wrong with each. Where the value has none of them there is one problem,
    which names them all.
    """
    problems = [_problem(entry, model) for entry in error.errors()]
    kept: list[Problem] = []
    for problem in problems:
        if problem.forms is None:
            kept.append(problem)
            continue
        place, form = problem.forms
        alike = [other for other in problems if other.forms and other.forms[0] == place]
        wrong = {other.forms[1] for other in alike if other.forms and other.is_other_form}
        if form not in wrong:
            kept.append(problem)
        elif {other.forms[1] for other in alike if other.forms} == wrong and problem is alike[0]:
            kept.append(Problem(place, "no_form", problem.given, f"allowed: {_alternatives(alike)}"))
    return kept


def _problem(entry: Mapping[str, Any], model: type[BaseModel]) -> Problem:
    place: list[str | int] = []
    forms = None
    annotation: Any = model
    for part in entry["loc"]:
        members = _members(annotation)
        if len(members) > 1:  # pydantic puts a name of the form it tried between the keys
            forms = (tuple(place), str(part))
            annotation = next((member for member in members if _is_named(member, str(part))), None)
            continue
        place.append(part)
        annotation = _inner(members[0], part)
    context = entry.get("ctx") or {}
    at_top = forms is not None and forms[0] == tuple(place)
    message = str(context["expected"]) if entry["type"] == "literal_error" and at_top else str(entry["msg"])
    return Problem(tuple(place), entry["type"], entry.get("input"), message, forms)


def _members(annotation: Any) -> Sequence[Any]:
    """The forms that a value may have, but for None; an annotation of one form itself."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, types.UnionType):
        return [annotation]
    return [member for part in get_args(annotation) if part is not type(None) for member in _members(part)]


def _is_named(member: Any, name: str) -> bool:
    kind = get_origin(member) or member
    title = getattr(kind, "__name__", str(kind)).lower()
    return title in name.lower()


def _inner(annotation: Any, part: str | int) -> Any:
    """The annotation of a field, of the elements of a list or of the values of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        return None if field is None else field.annotation
    inner = [argument for argument in get_args(annotation) if argument is not Ellipsis]
    if not inner:
        return None
    return inner[0] if isinstance(part, int) else inner[-1]


def _alternatives(problems: Iterable[Problem]) -> str:
    words = {"model_type": "a section", "tuple_type": "a list", "dict_type": "a mapping"}
    named = (
        words.get(p.kind) or p.message.removeprefix("Input should be ").removeprefix("a valid ").partition(",")[0]
        for p in problems
        if p.is_other_form
    )
    return ", or ".join(dict.fromkeys(named))
