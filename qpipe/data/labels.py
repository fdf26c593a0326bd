"""Label values of a data set to class ids, with errors that name the row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from qpipe.data.sources import Split
from qpipe.errors import ConfigError, DataError
from qpipe.types import Task

Label = str | int


def is_missing(value: Any) -> bool:
    """True for None and NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _spellings(value: Any, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The texts by which a configuration may call a value; a column of whole floats counts as integers."""
    if isinstance(value, bool | np.bool_):
        return (str(bool(value)), str(bool(value)).lower(), str(int(value)))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and 0 <= value < len(names):
        return (names[value],) if _are_numbers(names) else (str(value), names[value])
    return (str(value),)


def _are_numbers(names: Sequence[str]) -> bool:
    """True if a class has a number for a name, so that a number means the name and never the position."""
    return any(_is_number(name) for name in names)


def _class_names(split: Split, column: str) -> tuple[str, ...]:
    feature = split.data.features[column]
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()


def _values(split: Split, column: str) -> list[Any]:
    return list(split.data[column])


def keep_rows(split: Split, column: str, keep: Sequence[Label] | None) -> Split:
    """The rows whose label is one of `keep`; all rows if that is None. A missing label is not dropped here.

    Raises:
        DataError: no row is left.
    """
    if keep is None:
        return split
    wanted, names = {str(label) for label in keep}, _class_names(split, column)
    values = _values(split, column)
    positions = [i for i, v in enumerate(values) if is_missing(v) or wanted.intersection(_spellings(v, names))]
    if not positions:
        present = sorted({_spellings(v, names)[-1] for v in values})[:10]
        raise DataError(
            f"{split.source} is empty: no row has a label of data.keep_labels {sorted(wanted)}; "
            f"values of column {column!r}: {', '.join(present)}"
        )
    return split.select(positions)


def name_integers(split: Split, column: str, names: Sequence[str]) -> Split:
    """The split with an integer column as a `ClassLabel` of these names; as it is if it is of another type already.

    Raises:
        DataError: an integer is outside the range of the names; names its row (from 0).
    """
    feature = split.data.features[column]
    integers = isinstance(feature, datasets.Value) and feature.dtype.removeprefix("u").startswith("int")
    if not names or not integers:
        return split
    for position, value in enumerate(_values(split, column)):
        if value is not None and not 0 <= value < len(names):
            raise DataError(_not_allowed(split, column, int(split.rows[position]), value, f"0..{len(names) - 1}"))
    named = split.data.cast_column(column, datasets.ClassLabel(names=list(names)))
    return Split(named, split.source, split.rows)


def class_table(train: Split, column: str, labels: Sequence[Label] | None, task: Task) -> tuple[str, ...]:
    """The names of the classes in the order of their ids.

    They come from `labels`; else from a `ClassLabel` column (see `name_integers`); else, for integers 0..n-1, they are
    `LABEL_0`, ... as in transformers; else they are the values of the training split, in the order of the task's own
    names if they are among these, else sorted.

    Raises:
        ConfigError: `labels` repeats itself or does not fit the task.
        DataError: there are fewer than two classes, or they do not fit the task.
    """
    if labels is not None:
        names = tuple(str(label) for label in labels)
        if len(set(names)) != len(names):
            raise ConfigError(f"data.labels repeats a value: {', '.join(names)}")
        if task.num_labels and len(names) != task.num_labels:
            raise ConfigError(f"data.labels has {len(names)} values, but task {task.name!r} has {task.num_labels}")
    else:
        names = _class_names(train, column) or _found_classes(train, column, task)
    if len(names) < 2:
        raise DataError(
            f"{train.source}: column {column!r} has only one class ({', '.join(names)}); classification needs two or "
            "more. Check data.label_column, data.labels and data.keep_labels"
        )
    if task.num_labels and len(names) != task.num_labels:
        raise DataError(
            f"{train.source}: column {column!r} has {len(names)} classes ({', '.join(names[:10])}), but task "
            f"{task.name!r} has {task.num_labels}; drop rows with data.keep_labels, or use task: classification"
        )
    return names


def _found_classes(train: Split, column: str, task: Task) -> tuple[str, ...]:
    values = [v for v in _values(train, column) if not is_missing(v)]
    if all(_is_whole(v) for v in values):
        return _integer_classes({int(v) for v in values}, train, column, task)
    if all(isinstance(v, bool) for v in values):
        return ("False", "True")
    if any(isinstance(v, float) for v in values):
        raise DataError(
            f"{train.source}: column {column!r} holds numbers such as {next(v for v in values if not _is_whole(v))}, "
            "which are no classes; use task: regression, or data.label_column"
        )
    return _ordered({str(v) for v in values}, task.label_names)


def _is_whole(value: Any) -> bool:
    """True for an integer, or a float that is one; not for booleans, infinity or text."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def _ordered(found: set[str], known: Sequence[str]) -> tuple[str, ...]:
    """Class names as the data spell them: in the order of the task's, if they are some of these, else sorted.

    A metric such as F1 is that of one class, which the order tells.
    """
    spelled = {name.casefold(): name for name in found}
    if len(spelled) < len(found) or not spelled.keys() <= {name.casefold() for name in known}:
        return tuple(sorted(found))
    return tuple(spelled.get(name.casefold(), name) for name in known)


def _integer_classes(present: set[int], train: Split, column: str, task: Task) -> tuple[str, ...]:
    if task.num_labels:  # values outside its range are reported with their row when they are encoded
        return tuple(f"LABEL_{i}" for i in range(task.num_labels))
    if present != set(range(len(present))):
        shown = ", ".join(map(str, sorted(present)[:10]))
        raise DataError(
            f"{train.source}: the integer labels of column {column!r} are not 0..n-1 but {shown}; "
            f"set data.labels: [{shown}] to say which value is which class"
        )
    return tuple(f"LABEL_{i}" for i in range(len(present)))


def encode_classes(split: Split, column: str, names: Sequence[str]) -> np.ndarray[Any, Any]:
    """Class ids `[rows]`, int64.

    Raises:
        DataError: a label is missing or is none of the classes; names value, row (from 0) and what is allowed.
    """
    ids: Mapping[str, int] = {name: i for i, name in enumerate(names)}
    own = _class_names(split, column)
    if (own == tuple(names) and not _are_numbers(own)) or all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        ids = {**ids, **{str(i): i for i in range(len(names))}}
    result = np.empty(len(split.data), dtype=np.int64)
    for position, value in enumerate(_values(split, column)):
        row = int(split.rows[position])
        if is_missing(value):
            raise DataError(_missing(split, column, row))
        found = next((ids[text] for text in _spellings(value, own) if text in ids), None)
        if found is None:
            raise DataError(_not_allowed(split, column, row, value, _allowed(names)))
        result[position] = found
    return result


def _allowed(names: Sequence[str]) -> str:
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        return f"0..{len(names) - 1}"
    return ", ".join(names[:20])


def _not_allowed(split: Split, column: str, row: int, value: Any, allowed: str) -> str:
    return (
        f"{split.source}, row {row} (from 0): label {value!r} in column {column!r} is not allowed; allowed: "
        f"{allowed}. Correct the row, or set data.labels or data.keep_labels"
    )


def _missing(split: Split, column: str, row: int) -> str:
    return (
        f"{split.source}, row {row} (from 0): the label in column {column!r} is missing; fill it in, or remove the row"
    )


def require_two_classes(split: Split, column: str, ids: np.ndarray[Any, Any], names: Sequence[str]) -> None:
    """Raise `DataError` if all training rows have the same class: there would be nothing to learn."""
    if len(np.unique(ids)) < 2:
        raise DataError(
            f"{split.source}: every row has the same class {names[int(ids[0])]!r} in column {column!r}; "
            "classification needs rows of two classes or more. Check data.label_column and data.keep_labels"
        )


def encode_numbers(split: Split, column: str) -> np.ndarray[Any, Any]:
    """Regression targets `[rows]`, float32.

    Raises:
        DataError: a label is missing, not finite, or not a number; names value and row (from 0).
    """
    result = np.empty(len(split.data), dtype=np.float32)
    # A CSV column with one word in it is read as text throughout, so the rows that really are text come first.
    values = _values(split, column)
    words = [i for i, v in enumerate(values) if isinstance(v, str)]
    words = [i for i in words if not _is_number(values[i])] or words
    for position, value in enumerate(values):
        row = int(split.rows[position])
        if is_missing(value):
            raise DataError(_missing(split, column, row))
        with np.errstate(over="ignore"):  # refused just below
            number = np.float32(value if isinstance(value, int | float) else math.nan)
        if words or not np.isfinite(number):
            position = words[0] if words else position
            raise DataError(
                f"{split.source}, row {int(split.rows[position])} (from 0): label {values[position]!r} in column "
                f"{column!r} is not a finite number in float32, which regression needs; set data.label_column, or use "
                "a classification task"
            )
        result[position] = number
    return result


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
