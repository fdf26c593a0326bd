"""Ledger: parts of a long measurement, kept as soon as they are there, so that an interrupted one goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qpipe.files import write_json
from qpipe.report.inputs import read_json
from qpipe.types import Json


class Ledger:
    """Values by name in a file that exists while the measurement is under way.

    Args:
        path: of the file.
        settings: what the values depend on; those of other settings are dropped.
    """

    def __init__(self, path: Path, settings: Mapping[str, Json]) -> None:
        self._path, self._settings = path, dict(settings)
        before = read_json(path)
        kept = before is not None and before["settings"] == self._settings
        self._values: dict[str, Json] = before["values"] if kept else {}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Json:
        return self._values[name]

    def put(self, name: str, value: Json) -> None:
        """Keep a value."""
        self._values[name] = value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"settings": self._settings, "values": self._values})

    def close(self) -> None:
        """Remove the file: the measurement has ended."""
        self._path.unlink(missing_ok=True)
