"""Weights: which ones a result belongs to, so that numbers of other weights are not taken for theirs.

A result carries the hash of the weights it was measured on. Computing one means loading the model, so it also carries
the size and modification time of every file of that model: while these stay, so has the hash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from torch import nn

from qpipe.analysis.request import NEEDS_TEACHER
from qpipe.stages.signal_cache import model_digest
from qpipe.types import Json

Role = Literal["student", "teacher"]
Where = Callable[[Role], str | None]
"""A model's folder, or its name on the hub; None for one that is only in memory."""


def roles(part: str) -> tuple[Role, ...]:
    """The models that the numbers of a part depend on."""
    if part == "curves":
        return ()
    return ("student", "teacher") if part in NEEDS_TEACHER else ("student",)


def place(name: str | None) -> dict[str, Json]:
    """Where a model is, and what is there.

    Returns:
        `model`: its folder, or the name as given; `files`: of each file in the folder size in bytes and modification
        time in nanoseconds, None where there is no folder.
    """
    folder = None if name is None else _folder(name)
    if folder is None:
        return {"model": name, "files": None}
    stats = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
    return {"model": str(folder), "files": {file: [s.st_size, s.st_mtime_ns] for file, s in stats.items()}}


def _folder(name: str) -> Path | None:
    """The folder of a name: itself, or the copy of a hub's model on this disk."""
    if Path(name).is_dir():
        return Path(name).resolve()
    if Path(name).is_absolute():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path that is gone
        return None
    return Path(found).parent if isinstance(found, str) else None


class Weights:
    """The models of one analysis, as they are now.

    Args:
        where: where each is, without loading it.
        load: loads one.
    """

    def __init__(self, where: Where, load: Callable[[Role], nn.Module]) -> None:
        self._where, self._load = where, load
        self._places: dict[Role, dict[str, Json]] = {}
        self._digests: dict[Role, str] = {}

    def place(self, role: Role) -> dict[str, Json]:
        """Where a model was when it was first asked for; see the function `place`."""
        if role not in self._places:
            self._places[role] = place(self._where(role))
        return self._places[role]

    def digest(self, role: Role) -> str:
        """Hash of a model's weights; loads it."""
        if role not in self._digests:
            self.place(role)  # before it is read: what changes from here on is noticed next time
            self._digests[role] = model_digest(self._load(role), {})
        return self._digests[role]

    def digests(self, part: str) -> dict[str, Json]:
        """Hashes of the models that a part depends on."""
        return {role: self.digest(role) for role in roles(part)}

    def mark(self, role: Role) -> dict[str, Json]:
        """What a result carries of a model: `model`, `files` and `digest`."""
        return {**self.place(role), "digest": self.digest(role)}

    def marks(self, part: str) -> dict[str, Json]:
        """The marks of the models that a part depends on."""
        return {role: self.mark(role) for role in roles(part)}

    def matching(self, role: Role, before: Mapping[str, Json] | None) -> dict[str, Json] | None:
        """The mark that a result keeps if a model has the weights of `before`, else None.

        The model is loaded only if its files are others. One that is gone has no other weights.
        """
        if before is None:
            return None
        now = self.place(role)
        same = (now["model"], now["files"]) == (before["model"], before["files"])
        # A relative name was kept as the folder that it was then.
        named = (None, before["model"]) if now["model"] is None else (now["model"], str(Path(now["model"]).resolve()))
        gone = now["files"] is None and (now["model"] is None or before["model"] in named)
        if before["files"] is not None and (same or (gone and not Path(before["model"]).exists())):
            return dict(before)
        return self.mark(role) if self.digest(role) == before["digest"] else None
