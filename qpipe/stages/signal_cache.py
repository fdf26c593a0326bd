"""Teacher signals on disk: what was captured of an example once is read in later epochs and runs.

An entry is found by what the teacher was given and by the teacher's weights, so it cannot belong to other data, another
tokenizer or another teacher. Files are safetensors, written whole under names of their own, so any number of processes
and runs may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qpipe.engine.base import Engine
from qpipe.errors import CheckpointError, ConfigError
from qpipe.files import disk_errors
from qpipe.types import SignalKind

logger = logging.getLogger("qpipe.stages")

FORMAT = 2
"""Of the files, of how entries are named, and of what a signal is: 1 had decoders' last hidden state normalised."""
FILE_BYTES = 64 * 2**20
"""A process writes a file when it holds this much."""
ADVICE = "name another folder in teacher.cache"
Store = dict[tuple[str, int], Tensor]


def model_digest(model: nn.Module, extra: Mapping[str, Any]) -> str:
    """Hash of a model's weights and configuration, and of `extra`; of whole weights, so before they are sharded."""
    config = getattr(model, "config", None)
    described = {} if config is None else config.to_dict()
    for key in ("_name_or_path", "transformers_version", "id2label", "label2id"):
        described.pop(key, None)
    about = [FORMAT, type(model).__name__, described, dict(extra)]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def row_keys(inputs: Mapping[str, Tensor]) -> list[str]:
    """A hash of each example in a batch of model inputs.

    Padding at the end does not count: it changes with the other examples of the batch.
    """
    tensors = {name: tensor.cpu() for name, tensor in sorted(inputs.items())}
    mask = tensors.get("attention_mask")
    keys = []
    for row in range(len(next(iter(tensors.values())))):
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in tensors.items():
            value = tensor[row]
            if mask is not None and value.shape == mask.shape[1:]:
                value = value[: _length(mask[row])]
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
        keys.append(digest.hexdigest())
    return keys


def _length(mask: Tensor) -> int:
    """Tokens up to the last real one."""
    real = mask.nonzero()
    return int(real.max()) + 1 if len(real) else 0


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def require_folder(folder: Path) -> None:
    """Make the folder of a cache, unless it is there, and see that it can be written to.

    Raises:
        CheckpointError: it cannot.
    """
    with disk_errors(folder, ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


class SignalCache:
    """Signals of one teacher by example. All processes call the methods together.

    Args:
        folder: of this teacher; made if missing.
        engine: the processes.
        examples: how many examples the training sees, for the estimate of what the cache will take.
        begun: whether the training has begun before; it goes on even where the disk may turn out too small.

    Raises:
        CheckpointError: the folder cannot be written, or a file in it is damaged.
    """

    def __init__(self, folder: Path, engine: Engine, examples: int, begun: bool = False) -> None:
        self._folder, self._engine, self._examples, self._begun = folder, engine, examples, begun
        self._files: dict[str, Any] = {}
        self._index: dict[str, str] = {}
        self._pending: dict[str, Tensor] = {}
        self._estimated: dict[SignalKind, int] = {}
        require_folder(folder)
        self._scan()

    def _scan(self) -> None:
        """Open files that were added, by this process or another, oldest first: what is known of an example stays."""
        new = [path for path in self._folder.glob("*.safetensors") if path.name not in self._files]
        for path in sorted(new, key=lambda path: (path.stat().st_mtime_ns, path.name)):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} of the teacher's cache cannot be read ({error}); delete it, and what it held is computed "
                    "again"
                ) from error
            self._files[path.name] = file
            self._index = dict.fromkeys(file.keys(), path.name) | self._index

    def _has(self, names: Sequence[str]) -> bool:
        return all(name in self._pending or name in self._index for name in names)

    def _get(self, name: str) -> Tensor:
        if name in self._pending:
            return self._pending[name]
        value: Tensor = self._files[self._index[name]].get_tensor(name)
        return value

    def load(self, inputs: Mapping[str, Tensor], kinds: frozenset[SignalKind]) -> Store | None:
        """The signals of a batch; None if any process lacks any of its own, since all run the teacher together then."""
        keys = row_keys(inputs)
        names = [f"{key}/{kind}" for kind in kinds for key in keys]
        if not self._has(names):
            self._scan()
        if self._engine.any(torch.tensor(not self._has(names), device=self._engine.device)):
            return None
        return self._read(keys, kinds)

    def _read(self, keys: Sequence[str], kinds: frozenset[SignalKind]) -> Store:
        found: Store = {}
        for kind in kinds:
            layers = torch.stack([self._get(f"{key}/{kind}") for key in keys], 1).to(self._engine.device)
            found |= {(kind, layer): value for layer, value in enumerate(layers)}
        return found

    def store(self, inputs: Mapping[str, Tensor], kinds: frozenset[SignalKind], signals: Store) -> Store:
        """Keep the signals of a batch that are not kept yet, and return those that are now kept of the batch.

        An example that was met before keeps what was captured first, though other neighbours may have changed its last
        bits: so a run that goes on, or is repeated, learns from the same numbers.

        Raises:
            ConfigError: the disk has no room for what the training asks for from its first step on.
            CheckpointError: a file cannot be written.
        """
        keys = row_keys(inputs)
        rows = {
            kind: torch.stack([signals[kind, layer] for layer in range(_layers(signals, kind))], 1).cpu()
            for kind in kinds
        }
        self._estimate({kind: values[0].nbytes for kind, values in rows.items() if kind not in self._estimated})
        met = any(self._has([f"{key}/{kind}"]) for kind in kinds for key in keys)
        for kind, values in rows.items():
            for key, value in zip(keys, values, strict=True):
                if not self._has([f"{key}/{kind}"]):
                    self._pending[f"{key}/{kind}"] = value.clone()
        if sum(value.nbytes for value in self._pending.values()) >= FILE_BYTES:
            self._write()
        return self._read(keys, kinds) if met else signals

    def _estimate(self, sizes: Mapping[SignalKind, int]) -> None:
        """Say for each new kind of signal how much there may come, and refuse what the disk cannot hold. Collective.

        Kinds that are asked for later in the training may be wanted for some steps only, and refuse nothing.
        """
        if not sizes:
            return
        first, self._estimated = not self._estimated, self._estimated | dict(sizes)
        needed = sum(
            size * max(0, self._examples - sum(name.endswith(f"/{kind}") for name in self._index))
            for kind, size in self._estimated.items()
        )
        free = shutil.disk_usage(self._folder).free
        what = f"{', '.join(sorted(self._estimated))} of {self._examples} examples"
        short = self._engine.any(torch.tensor(needed > free, device=self._engine.device))
        room = f"in {self._folder}, which has {free / 1e9:.3g} GB free"
        if short and first and not self._begun:
            raise ConfigError(
                f"teacher.cache: {what} need {needed / 1e9:.3g} GB more {room}; name another folder, or leave "
                "teacher.cache out"
            )
        if self._engine.rank == 0:
            level = logging.WARNING if short else logging.INFO
            logger.log(level, "teacher cache: %s take up to %.3g GB more %s", what, needed / 1e9, room)

    def flush(self) -> None:
        """Write what is held, and wait for the others, so that every process finds what any has captured."""
        self._write()
        self._engine.barrier()

    def _write(self) -> None:
        if not self._pending:
            return
        name = uuid.uuid4().hex  # of the operating system's randomness: the run's own is left alone
        temporary = self._folder / f".{name}.tmp"
        with disk_errors(self._folder, ADVICE):
            with temporary.open("wb") as handle:
                handle.write(save(self._pending))
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(self._folder / f"{name}.safetensors")
        # This process has learned from its own values, even where another's file with the same examples is older.
        self._index |= dict.fromkeys(self._pending, f"{name}.safetensors")
        self._pending = {}
        self._scan()


def _layers(signals: Store, kind: SignalKind) -> int:
    return sum(found == kind for found, _ in signals)
