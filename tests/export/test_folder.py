"""All of an export or nothing, and every later change is noticed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qpipe import files
from qpipe.errors import CheckpointError, ConfigError, FormatError
from qpipe.export import compressed, folder, native
from qpipe.export.inspect import describe
from qpipe.export.verify import verify


@pytest.fixture
def copy(exported, tmp_path):
    def make(name):
        return shutil.copytree(exported[name], tmp_path / name)

    return make


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: ... (os error 28)")]
)
@pytest.mark.parametrize("writer", [compressed, native])
def test_full_disk_leaves_nothing(records, tmp_path, monkeypatch, error, writer):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(folder, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"filled up.*needed.*free"):
        writer.write(records["vit"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_small_disk_is_refused_before_writing(records, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage(10, 5, 5))
    with pytest.raises(CheckpointError, match="make room"):
        compressed.write(records["vit"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_earlier_export(records, tmp_path, monkeypatch):
    target = tmp_path / "out"
    compressed.write(records["vit"], target)
    before = (target / "SHA256SUMS").read_text()
    monkeypatch.setattr(folder, "write_sums", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compressed.write(records["vit"], target)
    assert (target / "SHA256SUMS").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    native.write(records["vit"], target)
    assert (target / "quantization.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_remains_of_a_killed_export_are_cleared(records, tmp_path):
    target = tmp_path / "out"
    (tmp_path / ".out.partial-1").mkdir()
    (tmp_path / ".out.partial-1/model.safetensors").write_text("half")
    compressed.write(records["vit"], target)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    target.rename(tmp_path / ".out.old-1")  # killed between the two renames: the earlier export is found again
    with pytest.raises(ZeroDivisionError), folder.whole_folder(target, 0):
        1 / 0  # noqa: B018
    assert (target / "SHA256SUMS").is_file()


def test_other_files_are_left_alone(records, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FormatError, match="no qpipe export"):
        compressed.write(records["vit"], tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_files_beside_an_earlier_export_are_left_alone(records, tmp_path):
    """The whole folder would be replaced."""
    target = tmp_path / "out"
    compressed.write(records["vit"], target)
    (target / ".git").mkdir()
    (target / ".git" / "HEAD").write_text("ref")
    with pytest.raises(FormatError, match=r"earlier export.*beside it 1 other files, such as .git/HEAD"):
        compressed.write(records["vit"], target)
    assert (target / ".git" / "HEAD").read_text() == "ref"
    shutil.rmtree(target / ".git")
    (target / "SHA256SUMS").unlink()
    with pytest.raises(FormatError, match="other files"):
        compressed.write(records["vit"], target)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_a_link(records, tmp_path, there):
    """What it points to is filled, more than once, on the disk where that lies."""
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "link"
    if there:
        elsewhere.mkdir()
    link.symlink_to(elsewhere)
    for _ in range(2):
        compressed.write(records["vit"], link)
        assert link.is_symlink() and (elsewhere / "qpipe.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "link"}


def test_a_path_in_a_folder_that_one_may_not_enter(tmp_path, monkeypatch):
    """pathlib raises there on some versions of Python."""
    closed = tmp_path / "closed"
    closed.mkdir()
    real = os.stat

    def stat(path, **more):
        if Path(path).parent == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, **more)

    def refuse(**where):
        raise PermissionError(errno.EACCES, "Permission denied", str(where["dir"]))

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    for call in (folder.refuse_foreign, lambda path: files.require_writable(path, "--out")):
        with pytest.raises(ConfigError, match=r"cannot be written: .*Permission denied: .*closed"):
            call(closed / "deep" / "out.yaml")


def test_a_folder_that_cannot_be_written_is_refused_at_once(records, tmp_path, monkeypatch):
    def refuse(**where):
        raise OSError(errno.EROFS, "Read-only file system", str(where["dir"]))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"export folder .* cannot be written: .*Read-only file system"):
        compressed.write(records["vit"], tmp_path / "deep" / "out")
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file is a file, not a folder"):
        folder.refuse_foreign(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["vit", "native-vit", "llama"])
def test_a_flipped_byte_in_any_file_fails(copy, name):
    directory = copy(name)
    for path in sorted(directory.iterdir()):
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        result = verify(directory)
        assert not result.passed
        if path.name != "SHA256SUMS":  # there the damage shows at the file whose sum or name changed
            assert path.name in "\n".join(result.lines())
        path.write_bytes(original)


def test_missing_and_extra_files_fail(copy):
    directory = copy("vit")
    (directory / "extra.py").write_text("print()")
    (directory / "config.json").unlink()
    text = "\n".join(verify(directory).lines())
    assert "config.json is listed in SHA256SUMS but missing" in text
    assert "extra.py is not listed" in text


def test_no_export_at_all(tmp_path):
    result = verify(tmp_path)
    assert not result.passed
    assert "no SHA256SUMS" in result.lines()[0]


@pytest.mark.parametrize("name", ["vit", "native-vit"])
def test_truncated_weights_name_the_file(copy, name):
    directory = copy(name)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FormatError, match=r"model\.safetensors is truncated"):
        describe(directory)
    if name == "native-vit":
        with pytest.raises(FormatError, match=r"model\.safetensors is truncated"):
            native.read_native(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(bits=7), "does not fit"),
        (lambda w: w.update(packer="zip"), "unknown packer"),
        (lambda w: w.update(shape=[1, 2]), "does not fit"),
        (lambda w: w.pop("bits"), "does not fit"),
    ],
)
def test_tampered_layout_is_refused(copy, change, message):
    directory = copy("native-vit")
    path = directory / "quantization.json"
    layout = json.loads(path.read_text())
    change(next(iter(layout["weights"].values())))
    path.write_text(json.dumps(layout))
    with pytest.raises(FormatError, match=message):
        native.read_native(directory)


def test_newer_layout_says_to_update(copy):
    directory = copy("native-vit")
    path = directory / "quantization.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(FormatError, match="install a newer qpipe"):
        native.read_native(directory)


def test_sums_cannot_point_outside(copy):
    directory = copy("vit")
    (directory / "SHA256SUMS").write_text("0" * 64 + "  ../../etc/passwd\n")
    assert "damaged" in verify(directory).lines()[0]
