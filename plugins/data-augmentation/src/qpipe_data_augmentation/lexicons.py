"""Neighbours of a word by lexicons that people made: WordNet and the paraphrase database."""

from __future__ import annotations

from pathlib import Path

from qpipe import DataError, locate
from qpipe_data_augmentation.vectors import DAMAGES, find_file, open_text

PARTS = ("noun", "verb", "adj", "adv")


class Lexicon:
    """Synonyms by lower-case word, best first."""

    def __init__(self, synonyms: dict[str, list[str]]) -> None:
        self._synonyms = synonyms

    def __call__(self, word: str, count: int) -> list[str]:
        """At most `count` synonyms; in title case where the word is; none if there are none."""
        found = self._synonyms.get(word.lower(), [])[:count]
        return [other.title() for other in found] if word.istitle() else found


def _add(synonyms: dict[str, list[str]], word: str, other: str) -> None:
    known = synonyms.setdefault(word, [])
    if other != word and other not in known:
        known.append(other)


def read_wordnet(name: str) -> Lexicon:
    """Words that share a synset, in the order of senses (the most frequent first), of one word each.

    Args:
        name: the folder `dict` of Princeton WordNet, with `index.POS` and `data.POS` (format: manual page wndb(5WN)).

    Raises:
        DataError: a file is missing or damaged.
    """
    folder = Path(locate(name))
    synonyms: dict[str, list[str]] = {}
    for part in PARTS:
        data, index = folder / f"data.{part}", folder / f"index.{part}"
        for path in (data, index):
            if not path.is_file():
                raise DataError(
                    f"{name!r} has no {path.name}; name the folder of WordNet with data.POS and index.POS "
                    f"for {', '.join(PARTS)}"
                )
        try:
            _read_part(index, data.read_bytes(), synonyms)
        except (ValueError, IndexError) as error:
            raise DataError(f"{name!r}: {data.name} and {index.name} do not fit together: {error}") from error
    return Lexicon(synonyms)


def _read_part(index: Path, data: bytes, synonyms: dict[str, list[str]]) -> None:
    for line in index.read_text().splitlines():
        if line.startswith(" ") or not line:  # the licence
            continue
        fields = line.split()
        word, senses = fields[0], int(fields[2])
        for offset in fields[-senses:] if "_" not in word else ():
            for other in _synset(data, int(offset)):
                _add(synonyms, word, other)


def _synset(data: bytes, offset: int) -> list[str]:
    """The words of one synset, in lower case, without those of several words and markers such as `(p)`."""
    line = data[offset : data.find(b"\n", offset)].decode().split()
    if not line or int(line[0]) != offset:
        raise ValueError(f"no synset begins at byte {offset}")
    words = [line[4 + 2 * i].partition("(")[0].lower() for i in range(int(line[3], 16))]
    return [word for word in words if "_" not in word]


def read_pairs(name: str) -> Lexicon:
    """Pairs of synonyms, in both directions and in the order of the file; only those of one word each.

    Lines are `word word`, or PPDB's own `[label] ||| phrase ||| paraphrase ||| ...`.

    Raises:
        DataError: the file is missing, cannot be read, or has a line of another form.
    """
    path = find_file(name, "the file of synonyms")
    synonyms: dict[str, list[str]] = {}
    try:
        with open_text(path) as handle:
            for number, line in enumerate(handle, 1):
                fields = [f.strip() for f in line.split("|||")[1:3]] if "|||" in line else line.split()
                if line.strip() and len(fields) != 2:
                    raise DataError(
                        f"{name!r}, line {number}: {line.strip()[:60]!r} is no pair of words; expected `word word` or "
                        "PPDB's `[label] ||| phrase ||| paraphrase ||| ...`"
                    )
                if line.strip() and not any(" " in field for field in fields):
                    one, other = (field.lower() for field in fields)
                    _add(synonyms, one, other)
                    _add(synonyms, other, one)
    except DAMAGES as error:
        raise DataError(f"{name!r} cannot be read to its end: {error}; download it again") from error
    if not synonyms:
        raise DataError(f"{name!r} has no pair of single words")
    return Lexicon(synonyms)
