"""Vectors and lexicons: what is read, and what is refused."""

import bz2
import gzip
import lzma

import numpy as np
import pytest
from qpipe_data_augmentation import AugmentationOptions
from qpipe_data_augmentation.lexicons import read_pairs, read_wordnet
from qpipe_data_augmentation.loading import load_neighbours
from qpipe_data_augmentation.vectors import Vectors, read_vectors

from qpipe import ConfigError, DataError

TABLE = "good 1 0\nfine 0.9 0.1\nbad -1 0.2\nParis 0 1\n"


@pytest.fixture
def write(tmp_path):
    def make(text, name="file.txt"):
        path = tmp_path / name
        opened = {"gz": gzip.open, "xz": lzma.open}.get(path.suffix[1:], open)
        with opened(path, "wt") as handle:
            handle.write(text)
        return str(path)

    return make


@pytest.mark.parametrize("name", ["v.txt", "v.txt.gz", "v.txt.xz"])
def test_neighbours_by_cosine(write, name):
    vectors = read_vectors(write(TABLE, name), 100)
    assert vectors("good", 2) == ["fine", "Paris"]
    assert vectors("unknown", 2) == [] and vectors("GOOD", 2) == [], "words are looked up as they are"
    assert vectors("Paris", 1) == ["Bad"], "title case stays title case"


def test_a_large_table_agrees_with_scipy(write):
    from scipy.spatial.distance import cdist

    rng = np.random.default_rng(0)
    table = rng.normal(size=(300, 8)).astype(np.float32)
    words = [f"w{i}" for i in range(300)]
    found = Vectors(words, table)("w7", 15)
    distance = cdist(table[7:8].astype(float), table.astype(float), "cosine")[0]
    assert found == [words[i] for i in np.argsort(distance)[1:16]], "nearest first, without the word itself"


def test_limit_header_and_words_with_spaces(write):
    assert read_vectors(write(TABLE), 2).words == ["good", "fine"]
    assert read_vectors(write("4 2\n" + TABLE), 100).words == ["good", "fine", "bad", "Paris"]
    assert read_vectors(write("a 1 2\n. . . 3 4\n<unk> 1 1\nnull 0 0\n"), 9).words == ["a", ". . ."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE + "late 0.5\n", "line 5: 1 numbers where 2 are expected; the file is damaged"),
        (TABLE + "late 0.5 0.", "line 5: the file ends within the line, so it is cut off; download it again"),
        ("9 2\n" + TABLE, "has 4 vectors, but 9 are announced in its first line: it is cut off"),
        ("", "has 0 vectors, but at least 2 are needed"),
        ("good one two\nbad 1 2\n", "line 1: could not convert string to float: .*expected a word and 2 numbers"),
        ("good 1 nan\nbad 1 2\n", "line 1: the vector of 'good' is not finite"),
        ("good\nbad\n", "line 1: 0 numbers where 1 are expected"),
        (TABLE + "late 0.5 0.9 1\n", "line 5: more than 2 numbers; the file is damaged, or several were joined"),
        ("2 2\ngood 1 0 1\nbad 1 2 1\n", "line 2: more than 2 numbers"),
    ],
)
def test_damaged_vectors_are_refused(write, text, message):
    with pytest.raises(DataError, match=message):
        read_vectors(write(text), 100)


def test_a_cut_off_archive_is_refused(write, tmp_path):
    whole = (tmp_path / write("".join(f"word{i} {i} 1.25\n" for i in range(1, 999)), "v.gz")).read_bytes()
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read to its end: .*download it again"):
        read_vectors(str(tmp_path / "cut.gz"), 10_000)


@pytest.mark.parametrize("read", [lambda name: read_vectors(name, 10_000), read_pairs], ids=["vectors", "pairs"])
@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_damaged_archive_is_refused(kind, read, tmp_path):
    opener = {"gz": gzip, "bz2": bz2, "xz": lzma}[kind]
    packed = bytearray(opener.compress("".join(f"word{i} {i}\n" for i in range(999)).encode()))
    packed[20:60] = b"\xff" * 40  # within the packed data: the header is whole
    (tmp_path / f"damaged.{kind}").write_bytes(packed)
    with pytest.raises(DataError, match=rf"damaged.{kind}' cannot be read to its end: .*download it again"):
        read(str(tmp_path / f"damaged.{kind}"))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package `augmentation_files` with a file of vectors in a folder."""
    folder = tmp_path / "site" / "augmentation_files"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "data" / "v.txt").write_text(TABLE)
    (folder / "data" / "pairs.txt").write_text("good fine\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


def test_files_of_packages(package):
    assert read_vectors("package:augmentation_files/data/v.txt", 100)("good", 2) == ["fine", "Paris"]
    assert read_pairs("package:augmentation_files/data/pairs.txt")("good", 2) == ["fine"]


def test_missing_and_packed_files(tmp_path):
    (tmp_path / "glove.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="is an archive; unpack it"):
        read_vectors(str(tmp_path / "glove.zip"), 9)
    with pytest.raises(DataError, match=r"'nowhere.txt' is no file"):
        read_vectors("nowhere.txt", 9)
    with pytest.raises(ConfigError, match="package 'no-such-package' is not installed"):
        read_vectors("package:no-such-package/v.txt", 9)


def test_no_file_named():
    with pytest.raises(ConfigError, match=r"neighbours is 'vectors', but data-augmentation.neighbours_from names no"):
        load_neighbours(AugmentationOptions())
    assert load_neighbours(AugmentationOptions(neighbours="none"))("good", 3) == []


@pytest.mark.parametrize(
    "text",
    [
        "good fine\nnice good\ngood good\n",
        "[JJ] ||| good ||| fine ||| Score=4 ||| 0-0\n[JJ] ||| good ||| very nice ||| Score=3 ||| 0-0\n"
        "[JJ] ||| nice ||| good ||| Score=3 ||| 0-0\n",
    ],
)
def test_pairs_and_ppdb(write, text):
    lexicon = read_pairs(write(text, "pairs.xz"))
    assert lexicon("good", 9) == ["fine", "nice"] and lexicon("good", 1) == ["fine"]
    assert lexicon("Fine", 9) == ["Good"] and lexicon("bad", 9) == []


@pytest.mark.parametrize(
    ("text", "message"), [("good fine\nonly\n", "line 2: 'only' is no pair of words"), ("\n", "has no pair of single")]
)
def test_damaged_pairs_are_refused(write, text, message):
    with pytest.raises(DataError, match=message):
        read_pairs(write(text))


@pytest.fixture
def wordnet(tmp_path):
    """A folder in WordNet's format: `dog` and `hound` share the first sense, `dog` and `cad` the second."""
    licence = "  1 licence\n"
    first = "00000012 05 n 02 dog 0 Hound(p) 1 000 | an animal\n"
    offset = len(licence) + len(first)
    second = f"{offset:08d} 18 n 03 dog 0 cad 0 bad_person 0 000 | someone\n"
    (tmp_path / "data.noun").write_text(licence + first + second)
    index = f"{licence}cad n 1 0 1 0 {offset:08d}\ndog n 2 1 @ 2 1 00000012 {offset:08d}\nhound n 1 0 1 0 00000012\n"
    (tmp_path / "index.noun").write_text(index)
    for part in ("verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text(licence)
        (tmp_path / f"index.{part}").write_text(licence)
    return tmp_path


def test_wordnet_in_the_order_of_senses(wordnet):
    assert len("  1 licence\n") == 12
    lexicon = read_wordnet(str(wordnet))
    assert lexicon("dog", 9) == ["hound", "cad"] and lexicon("Hound", 9) == ["Dog"]
    assert lexicon("cat", 9) == []


def test_damaged_wordnet_is_refused(wordnet):
    whole = (wordnet / "data.noun").read_text()
    (wordnet / "data.noun").write_text(whole[:40])
    with pytest.raises(DataError, match=r"data.noun and index.noun do not fit together: no synset begins at byte"):
        read_wordnet(str(wordnet))
    (wordnet / "data.noun").unlink()
    with pytest.raises(DataError, match=r"has no data.noun; name the folder of WordNet"):
        read_wordnet(str(wordnet))


def test_options_reach_the_files(write):
    options = {"neighbours_from": write(TABLE), "vectors_limit": 2}
    assert load_neighbours(AugmentationOptions(**options)).words == ["good", "fine"]
