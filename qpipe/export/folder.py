"""Writing a checkpoint folder: all of it or nothing, with checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from qpipe.errors import CheckpointError, FormatError
from qpipe.files import existing_folder, is_full, require_writable_folder

if TYPE_CHECKING:
    from torch import Tensor

SUMS = "SHA256SUMS"
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
METADATA = "qpipe.json"
REFERENCE = "qpipe_reference.safetensors"
PROGRAM = "program.pt2"
PROGRAM_LAYOUT = "program.json"
MAX_SHARD = 5 * 2**30
"""Bytes per weight file."""
SLACK = 4 * 2**20
"""Room asked for beside the weights: configuration, card and the like."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FormatError: the file is missing, not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(
            f"{path.parent} has no {path.name}: it is no qpipe export, or the file was removed"
        ) from error
    except (ValueError, OSError) as error:
        raise FormatError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, with a newline at the end."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_files(directory: Path) -> list[str]:
    """Every file below a folder except the checksums, relative, sorted."""
    files = (p for p in directory.rglob("*") if p.is_file() or p.is_symlink())
    return sorted(name for p in files if (name := p.relative_to(directory).as_posix()) != SUMS)


def write_sums(directory: Path) -> None:
    """Write `SHA256SUMS` over all files, in the form that `sha256sum -c` reads."""
    lines = [f"{file_sha256(directory / name)}  {name}\n" for name in model_files(directory)]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(directory: Path) -> list[str]:
    """Compare a folder with its `SHA256SUMS`.

    Returns:
        One line per file that is changed, missing or not listed; empty if all is well.

    Raises:
        FormatError: there is no `SHA256SUMS`, or it is damaged.
    """
    path = directory / SUMS
    if not path.is_file():
        raise FormatError(f"{directory} has no {SUMS}: it is no qpipe export, or the file was removed")
    listed: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        digest, gap, name = line.partition("  ")
        if not gap or len(digest) != 64 or Path(name).is_absolute() or ".." in Path(name).parts:
            raise FormatError(f"{path} is damaged: line {number} is not '<sha256>  <file>'")
        listed[name] = digest
    problems = []
    present = set(model_files(directory))
    for name, digest in listed.items():
        if name not in present:
            problems.append(f"{name} is listed in {SUMS} but missing")
        elif file_sha256(directory / name) != digest:
            problems.append(f"{name} differs from its checksum in {SUMS}: truncated or tampered with")
    problems += [f"{name} is not listed in {SUMS}" for name in sorted(present - set(listed))]
    return problems


def save_tensors(directory: Path, tensors: Mapping[str, Tensor], max_shard: int = MAX_SHARD) -> None:
    """Write `model.safetensors`, or several shards with an index file when larger than `max_shard` bytes."""
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard
    )
    for filename, names in split.filename_to_tensors.items():
        save_file({n: tensors[n].contiguous() for n in names}, directory / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write_json(directory / INDEX, index)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the model.

    Raises:
        FormatError: there are none, or the index names a file that is missing.
    """
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FormatError(f"{directory / INDEX} has no weight_map")
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        files = [directory / MODEL]
    for path in files:
        if not path.is_file():
            raise FormatError(f"{directory} lacks {path.name}")
    return files


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def refuse_foreign(target: Path) -> None:
    """Refuse to export into a folder that holds something else, or that cannot be written.

    Raises:
        FormatError: `target` is a file, or a folder with files that no export has written.
        ConfigError: writing is not allowed there.
    """
    target = target.resolve()
    require_writable_folder(target.parent, "export folder")
    if target.exists() and not target.is_dir():
        raise FormatError(f"{target} is a file; an export needs a folder")
    if target.is_dir() and any(target.iterdir()):
        if not (target / METADATA).is_file():
            raise FormatError(f"{target} holds files that are no qpipe export; name another folder, or empty this one")
        own = _listed(target)
        foreign = [name for name in model_files(target) if name not in own]
        if foreign:
            raise FormatError(
                f"{target} holds an earlier export, which would be replaced, and beside it {len(foreign)} other files, "
                f"such as {foreign[0]}; move these elsewhere, or choose another folder"
            )


def _listed(folder: Path) -> set[str]:
    """Names in the `SHA256SUMS` of a folder; none where it is missing or damaged."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return set()
    return {line.partition("  ")[2] for line in lines}


@contextmanager
def whole_folder(target: Path, needed: int) -> Iterator[Path]:
    """A folder to fill that becomes `target` at the end, and vanishes if anything fails before.

    The files are written beside `target` and renamed, so a killed export leaves no half export. An earlier export at
    `target` is replaced; a folder with anything else is refused. A link stays one: what it points to is filled.

    Args:
        target: the folder wanted; its parents are made.
        needed: bytes that will be written, weights only.

    Raises:
        FormatError: `target` holds something other than an export.
        ConfigError: writing is not allowed there.
        CheckpointError: the disk is too small or full; nothing is left behind.
    """
    target = target.resolve()
    refuse_foreign(target)
    free = shutil.disk_usage(existing_folder(target)).free
    if free < needed + SLACK:
        raise CheckpointError(
            f"exporting to {target} needs about {_size(needed + SLACK)}, and {_size(free)} are free there; "
            "make room, or export to another disk"
        )
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_remains(target)
        partial.mkdir()
        yield partial
        share_files(partial)
        write_sums(partial)
        _swap(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_full(error):
            free = shutil.disk_usage(existing_folder(target)).free
            raise CheckpointError(
                f"the disk filled up while exporting to {target}: about {_size(needed + SLACK)} are needed, "
                f"{_size(free)} are free now that the unfinished files are gone; make room, or export elsewhere"
            ) from error
        raise


def share_files(folder: Path) -> None:
    """Give every file the permissions of the umask: safetensors writes files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)


def _clear_remains(target: Path) -> None:
    """Remove what a killed export left; put back an earlier export that was set aside when it was killed."""
    for old in target.parent.glob(f".{target.name}.old-*"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for partial in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
