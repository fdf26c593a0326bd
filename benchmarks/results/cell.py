"""A cell: one row of a table in one setting with one seed, and the commands that fill it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.results.table import PLACEHOLDER, Sweep, Table
from qpipe.config import read_yaml


@dataclass(frozen=True)
class Cell:
    """One trained or quantized model."""

    table: Table
    row: str
    setting: str
    seed: int

    def __str__(self) -> str:
        """Its row, setting and seed, for messages."""
        return f"{self.table.name}: {self.row}, {self.setting}, seed {self.seed}"

    @property
    def start(self) -> Cell | None:
        """The cell whose model this one starts from."""
        name = self.table.rows[self.row].start
        return None if name is None else Cell(self.table, name, self.setting, self.seed)

    @property
    def sweep(self) -> Sweep | None:
        """The variants of its model that are evaluated too."""
        return self.table.sweep if self.table.rows[self.row].sweep else None

    @property
    def overrides(self) -> tuple[str, ...]:
        """What the setting changes in the recipe, with placeholders in place of folders."""
        setting = self.table.settings[self.setting]
        return (*setting.overrides, *setting.overrides_for.get(self.row, ()), f"seed={self.seed}")

    @cached_property
    def digest(self) -> str:
        """Hash of all that decides the cell's numbers, but for code, machine and what placeholders stand for."""
        row = self.table.rows[self.row]
        recipe = read_yaml(self.table.recipe(self.row).read_text(), self.row)
        parts: list[object] = [recipe, self.overrides, row.command, self.sweep and self.sweep.arguments()]
        parts.append(self.start.digest if self.start else None)
        if self.start is not None and self.start.transform is not None:
            parts.append(self.start.transform.read_text())
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def folder(self, runs: Path) -> Path:
        """Its run directory; settings that differ in nothing but what becomes of it share it."""
        return runs / f"{self.table.name}-{self.row}-s{self.seed}-{self.digest}"

    @property
    def transform(self) -> Path | None:
        """The script that changes its model before others start from it."""
        return self.table.transform(self.row, self.setting)

    def model(self, runs: Path) -> Path:
        """The model that others start from."""
        if self.transform is None:
            return self.folder(runs) / "model"
        return self.folder(runs) / f"transformed-{hashlib.sha256(self.transform.read_bytes()).hexdigest()[:12]}"

    def command(self, runs: Path, folders: Mapping[str, Path]) -> list[str]:
        """The command that makes the run.

        Args:
            runs: folder of all runs.
            folders: what placeholders stand for.
        """
        row, start, out = self.table.rows[self.row], self.start, self.folder(runs)
        recipe = str(self.table.recipe(self.row))
        values = [filled(text, folders) for text in self.overrides]
        if row.command == "quantize":
            assert start is not None, f"{self.row} quantizes no model: give it `start`"
            values = [value for value in values if not value.startswith("model.name=")]  # it is the one quantized
            words = ["quantize", str(start.model(runs)), recipe, "--out", str(out)]
        else:
            words = ["launch", recipe, "--out", str(out)]
            values += [f"teacher.name={start.model(runs)}"] if start else []
            words += ["--resume"] if (out / "config.yaml").is_file() else []
        return [sys.executable, "-m", "qpipe.cli", *words, *(word for value in values for word in ("--set", value))]

    def transform_command(self, runs: Path) -> list[str] | None:
        """The command that changes its model, where there is one."""
        if self.transform is None:
            return None
        return [sys.executable, str(self.transform), str(self.folder(runs)), str(self.model(runs))]

    def sweep_command(self, runs: Path) -> list[str] | None:
        """The command that evaluates variants, where the row has any."""
        if self.sweep is None:
            return None
        words = ["evaluate", str(self.folder(runs)), *self.sweep.arguments(), "--json"]
        return [sys.executable, "-m", "qpipe.cli", *words]


def filled(text: str, folders: Mapping[str, Path]) -> str:
    """An override with folders in place of placeholders."""
    key, _, value = text.partition("=")
    return f"{key}={PLACEHOLDER.sub(lambda match: str(folders[match[1]]), value)}"
