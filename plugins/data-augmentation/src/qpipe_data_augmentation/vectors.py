"""Neighbours of a word by the cosine of word vectors."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from qpipe import DataError, locate

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DAMAGES = (EOFError, UnicodeDecodeError, OSError, lzma.LZMAError, zlib.error)
"""What reading such a file raises where it is damaged or cut off."""
UNKNOWN = "<unk>"
"""Stands for words without a vector; it is nobody's neighbour."""


def open_text(path: Path) -> IO[str]:
    """A text file, compressed or not."""
    handle: IO[str] = OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8", newline="\n")
    return handle


def find_file(name: str, what: str) -> Path:
    """The file of a name.

    Raises:
        DataError: there is none, or it is an archive.
    """
    path = Path(locate(name))
    if not path.is_file():
        raise DataError(
            f"{what} {name!r} is no file; data-augmentation.neighbours_from takes a path or a package: path"
        )
    if path.suffix == ".zip":
        raise DataError(f"{what} {name!r} is an archive; unpack it, and name the text file inside")
    return path


class Vectors:
    """A table of word vectors.

    Args:
        words: the words, most frequent first.
        table: their vectors `[words, size]`; rows of zeros are left out.
    """

    def __init__(self, words: list[str], table: np.ndarray[Any, Any]) -> None:
        norms = np.linalg.norm(table, axis=1)
        kept = [i for i, word in enumerate(words) if word != UNKNOWN and norms[i] > 0]
        self.words = [words[i] for i in kept]
        self._table = table[kept] / norms[kept, None]
        self._index = {word: i for i, word in enumerate(self.words)}
        self._found: dict[tuple[str, int], list[str]] = {}

    def __call__(self, word: str, count: int) -> list[str]:
        """At most `count` words with the largest cosine, the largest first; none if the word has no vector.

        The word itself comes last of all, so it is found only in tables of no more than `count` words, as in the
        reference. Neighbours of a word in title case are put into title case.
        """
        if (word, count) not in self._found:
            self._found[word, count] = self._search(word, count)
        return self._found[word, count]

    def _search(self, word: str, count: int) -> list[str]:
        index = self._index.get(word)
        if index is None:
            return []
        cosine = self._table @ self._table[index]
        cosine[index] = -np.inf
        order = np.argsort(-cosine, kind="stable")[:count]
        found = [self.words[i] for i in order]
        return [other.title() for other in found] if word.istitle() else found


def read_vectors(name: str, limit: int) -> Vectors:
    """Read `word number number ...` lines; a first line with two whole numbers (word2vec, fastText) is a header.

    Args:
        name: path or `package:` path; `.gz`, `.bz2` and `.xz` are unpacked.
        limit: lines to read.

    Raises:
        DataError: the file is missing, cut off, or no table of finite numbers; the message has the line's number.
    """
    path = find_file(name, "the vectors file")
    words: list[str] = []
    rows: list[np.ndarray[Any, Any]] = []
    announced, size = 0, None
    try:
        with open_text(path) as handle:
            for number, line in enumerate(handle, 1):
                if number == 1 and (fields := line.split()) and len(fields) == 2 and all(map(str.isdigit, fields)):
                    announced, size = int(fields[0]), int(fields[1])
                    continue
                if len(rows) == limit:
                    break
                word, row = _parse(line, number, name, size)
                size = len(row)
                words.append(word)
                rows.append(row)
    except DAMAGES as error:
        raise DataError(f"{name!r} cannot be read to its end: {error}; download it again") from error
    if len(rows) < min(announced, limit) or len(rows) < 2:
        expected = f"{announced} are announced in its first line" if announced else "at least 2 are needed"
        raise DataError(f"{name!r} has {len(rows)} vectors, but {expected}: it is cut off or no file of vectors")
    return Vectors(words, np.stack(rows))


def _parse(line: str, number: int, name: str, size: int | None) -> tuple[str, np.ndarray[Any, Any]]:
    """One line; words may hold spaces, so numbers are counted from the end."""
    where = f"{name!r}, line {number}"
    if not line.endswith("\n"):
        raise DataError(
            f"{where}: the file ends within the line, so it is cut off; download it again (or, if it is whole, "
            "end it with a line break)"
        )
    fields = line.rstrip().split(" ")
    size = len(fields) - 1 if size is None else size
    if size < 1 or len(fields) < size + 1:
        raise DataError(f"{where}: {len(fields) - 1} numbers where {max(size, 1)} are expected; the file is damaged")
    if len(fields) > size + 1 and _is_number(fields[-size - 1]):
        raise DataError(f"{where}: more than {size} numbers; the file is damaged, or several were joined")
    try:
        row = np.array(fields[-size:], dtype=np.float32)
    except ValueError as error:
        raise DataError(f"{where}: {error}; expected a word and {size} numbers, as in GloVe's text files") from error
    if not np.isfinite(row).all():
        raise DataError(f"{where}: the vector of {' '.join(fields[:-size])!r} is not finite; the file is damaged")
    return " ".join(fields[:-size]), row


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
