"""Augmented rows on disk: one parquet file for each block of examples, so that what is written is never lost."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from qpipe import DataError

EXAMPLE = "__example__"
"""Column with the number of the example that a row was made of, from 0; no text column is called so."""


@dataclass(frozen=True)
class Blocks:
    """The files of one augmentation.

    Attributes:
        folder: where they are.
        columns: names of the columns of text.
        examples: how many examples there are in all.
        size: examples per file.
    """

    folder: Path
    columns: tuple[str, ...]
    examples: int
    size: int

    @property
    def paths(self) -> list[Path]:
        """All files, in order, whether or not they are there yet."""
        count = -(-self.examples // self.size)
        return [self.folder / f"part-{number:05d}.parquet" for number in range(count)]

    def missing(self) -> list[int]:
        """Numbers of the files that are still to be written."""
        return [number for number, path in enumerate(self.paths) if not path.is_file()]

    def range(self, number: int) -> range:
        """The examples of a file."""
        return range(number * self.size, min((number + 1) * self.size, self.examples))

    def write(self, number: int, rows: Iterable[tuple[int, list[str]]]) -> None:
        """Write `(example, texts)` as a file that is there completely or not at all."""
        examples, texts = zip(*rows, strict=True)
        columns: dict[str, Any] = {EXAMPLE: pa.array(examples, pa.int64())}
        for name, values in zip(self.columns, zip(*texts, strict=True), strict=True):
            columns[name] = pa.array(values, pa.string())
        path = self.paths[number]
        with writing(path) as temporary:
            pq.write_table(pa.table(columns), temporary, compression="zstd")

    def describe(self, about: Any) -> None:
        """Keep what decided the rows beside them, for people."""
        with writing(self.folder / "about.json") as temporary:
            temporary.write_text(json.dumps(about, indent=1) + "\n")

    def read(self) -> datasets.Dataset:
        """Every row in order, mapped into memory from a copy that `datasets` keeps in the folder.

        Raises:
            DataError: a file is damaged, or the copy cannot be written.
        """
        was_disabled = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        files = [glob.escape(str(path)) for path in self.paths]
        try:
            found = datasets.load_dataset(
                "parquet", data_files=files, split="train", cache_dir=str(self.folder / "cache")
            )
        except Exception as error:  # the reader raises whatever its parser raises
            raise DataError(self._unreadable(error)) from error
        finally:
            if not was_disabled:
                datasets.enable_progress_bars()
        assert isinstance(found, datasets.Dataset)
        return found

    def _unreadable(self, error: BaseException) -> str:
        """What is wrong with the rows: a damaged file, or only the copy of them."""
        for path in self.paths:
            try:
                pq.read_metadata(path)
            except (OSError, pa.ArrowException) as damage:
                return f"{path} cannot be read ({damage}); delete it, and only its rows are made again"
        causes = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        why = next((cause for cause in causes if isinstance(cause, OSError)), error)
        return (
            f"the augmented rows in {self.folder} are whole, but no copy of them could be made in its folder `cache` "
            f"({why}); make room there, or delete that copy, and start again: no row is made anew"
        )

    def tables(self) -> Iterator[pa.Table]:
        """The files one after another."""
        for path in self.paths:
            yield pq.read_table(path)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Gives a temporary name; what was written there takes its place once it is on disk.

    Raises:
        DataError: the disk is full, or writing is not allowed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}; what was written before is kept") from error
    finally:
        temporary.unlink(missing_ok=True)


def share(numbers: Sequence[int], rank: int, processes: int) -> list[int]:
    """The part of the files that a process writes; every one is written by exactly one process."""
    return list(numbers[rank::processes])
