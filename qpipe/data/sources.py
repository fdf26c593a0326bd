"""Reading splits from files, packages and the hub."""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from qpipe.config import DataConfig
from qpipe.data.locate import locate
from qpipe.errors import ConfigError, DataError
from qpipe.types import Task

CSV_OPTIONS: Mapping[str, Any] = {"keep_default_na": False, "na_values": [""]}
"""Only an empty cell is missing: pandas would also drop the words `None`, `null` and `NA`."""

FORMATS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", CSV_OPTIONS),
    # Tab-separated files have no quoting (IANA text/tab-separated-values), and GLUE's contain lone quotes.
    ".tsv": ("csv", {**CSV_OPTIONS, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".txt": ("text", {}),
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

SPLIT_SEED = 0
"""Held-out parts and samples do not depend on the seed of the run, so that runs with different seeds compare."""


@dataclass(frozen=True)
class Split:
    """Rows of a data set, with where they came from.

    Attributes:
        data: the rows.
        source: what messages call the data set.
        rows: row numbers in the source, counted from 0, `[len(data)]`.
    """

    data: datasets.Dataset
    source: str
    rows: np.ndarray[Any, Any]

    def select(self, positions: Any) -> Split:
        """The rows at these positions, in this order."""
        index = np.asarray(positions, dtype=np.int64)
        return Split(self.data.select(index), self.source, self.rows[index])

    def require(self, columns: Sequence[str], setting: str) -> None:
        """Raise `DataError` if a column is missing; `setting` says which key of the configuration names columns."""
        missing = [column for column in columns if column not in self.data.column_names]
        if missing:
            raise DataError(
                f"{self.source} has no column {', '.join(map(repr, missing))}; its columns are: "
                f"{', '.join(self.data.column_names) or 'none'}. Name the right ones with {setting}"
            )

    def require_rows(self) -> None:
        """Raise `DataError` if there are no rows."""
        if len(self.data) == 0:
            raise DataError(f"{self.source} is empty: it has no rows (after data.keep_labels, if that is set)")

    def sample(self, size: int | None) -> Split:
        """A random part of `size` rows in their original order; everything if there are no more than that."""
        if size is None or size >= len(self.data):
            return self
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self.data))
        return self.select(np.sort(order[:size]))

    def hold_out(self, fraction: float) -> tuple[Split, Split]:
        """Split at random into the larger part and `fraction` of the rows, at least one each.

        Raises:
            DataError: there is only one row.
        """
        size = len(self.data)
        if size < 2:
            raise DataError(f"{self.source} has {size} row(s), too few to hold some out: set data.validation")
        held = min(max(round(size * fraction), 1), size - 1)
        order = np.random.default_rng(SPLIT_SEED).permutation(size)
        return self.select(np.sort(order[held:])), self.select(np.sort(order[:held]))


def read_splits(config: DataConfig, task: Task) -> tuple[Split, Split | None]:
    """Read the training split, and the validation split if there is one.

    The validation split is `data.validation`; else the one that a hub data set or a folder has under the task's name
    for it, or as `validation`; else None, and the caller holds out a part of the training split.

    Raises:
        ConfigError: neither the configuration nor the task names data.
        DataError: a file is missing, has an unknown extension or cannot be read, or a split is missing.
    """
    train_split, validation_split = task.splits
    if config.train is None:
        if task.hub is None:
            raise ConfigError(f"task {task.name!r} has no data set of its own: set data.train (and data.validation)")
        train_name = ":".join(part for part in task.hub if part)
    else:
        train_name = config.train
    found = _read(train_name)
    train = _pick(found, (train_split, "train"), train_name)
    if config.validation is not None:
        named = _read(config.validation)
        return train, _pick(named, (validation_split, "validation", "dev", "test"), config.validation)
    own = next((split for split in (validation_split, "validation") if split in found), None)
    return train, None if own is None else _pick(found, (own,), train_name)


def _split_name(found: Mapping[str, Split], wanted: Sequence[str]) -> str | None:
    return "" if "" in found else next((name for name in wanted if name in found), None)


def _pick(found: Mapping[str, Split], wanted: Sequence[str], name: str) -> Split:
    key = _split_name(found, wanted)
    if key is None:
        raise DataError(f"{name!r} has no split {' or '.join(map(repr, wanted))}; it has: {', '.join(found) or 'none'}")
    found[key].require_rows()
    return found[key]


def _read(name: str) -> dict[str, Split]:
    """The splits of a source; a single file has one, named by the empty string."""
    path = Path(locate(name))
    if path.is_file():
        return {"": _split(_read_file(path), repr(name))}
    if path.is_dir():
        refuse_pattern(path.resolve())
        loaded = _load(name, str(path))
    else:
        refuse_missing_file(name)
        repository, _, configuration = name.partition(":")
        loaded = _load(name, repository, configuration or None)
    return {key: _split(data, f"{name!r}, split {key!r}") for key, data in loaded.items()}


def _split(data: datasets.Dataset, source: str) -> Split:
    return Split(data, source, np.arange(len(data)))


def file_format(path: Path) -> tuple[str, Mapping[str, Any]]:
    """The reader of `datasets` for a file name, and its options.

    Raises:
        DataError: the extension is not supported.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS and suffixes[-2] != ".parquet":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in FORMATS:
        raise DataError(
            f"{str(path)!r}: unsupported extension; allowed: {', '.join(FORMATS)}, "
            f"text formats also compressed ({', '.join(COMPRESSIONS)})"
        )
    return FORMATS[suffixes[-1]]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of `datasets`: every process of a run would draw its own."""
    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()


def _read_file(path: Path) -> datasets.Dataset:
    builder, options = file_format(path)
    # `datasets` converts a file once, under a lock, into its own cache folder, and maps it into memory from there.
    name = glob.escape(str(path.resolve()))  # it would read other files whose names match
    try:
        with quiet():
            loaded = datasets.load_dataset(builder, data_files=name, split="train", **options)
    except Exception as error:  # readers raise whatever their parsers raise
        if path.stat().st_size == 0 or "corresponds to no data" in str(error):  # or a header without rows
            raise DataError(f"{str(path)!r} is empty: it has no rows; give a file with examples") from error
        reason = error.__cause__ or error
        raise DataError(f"{str(path)!r} cannot be read as {builder}: {type(reason).__name__}: {reason}") from error
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def refuse_missing_file(name: str) -> None:
    """Refuse a name that can only be a file that is not there; the hub would be asked for it, slowly and in vain.

    Raises:
        DataError: it ends like a data file, or is an absolute path.
    """
    path = Path(name)
    if path.is_absolute() or any(suffix.lower() in FORMATS for suffix in path.suffixes):
        raise DataError(f"{name!r} does not exist; local paths are relative to {str(Path.cwd())!r}")


def refuse_pattern(folder: Path) -> None:
    """Refuse a folder that `datasets` would take for a pattern, and so read other folders whose names match.

    Raises:
        DataError: its path has one of `*?[`.
    """
    if glob.has_magic(str(folder)):
        raise DataError(
            f"the path of the folder {str(folder)!r} has one of the characters * ? [, which `datasets` takes for a "
            "pattern; rename the folder, or name its files with data.train and data.validation"
        )


def _load(name: str, repository: str, configuration: str | None = None) -> datasets.DatasetDict:
    try:
        with quiet():
            loaded = datasets.load_dataset(repository, configuration)
    except Exception as error:  # network, parser and hub errors have no common base
        raise DataError(
            f"{name!r} is neither an existing file or folder nor a data set that can be loaded from the hub "
            f"({type(error).__name__}: {error}). Local paths are relative to {str(Path.cwd())!r}; files may end in "
            f"{', '.join(FORMATS)}"
        ) from error
    assert isinstance(loaded, datasets.DatasetDict)
    return loaded
