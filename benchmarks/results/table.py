"""What a table consists of: `table.yaml`, and a recipe in each row's folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qpipe.config import read_yaml

ROOT = Path(__file__).resolve().parents[2]
TABLE_FILE, RECIPE_FILE, EXPECTED_FILE = "table.yaml", "recipe.yaml", "expected.yaml"
PLACEHOLDER = re.compile(r"\{([a-z_]+)\}(?=/|$)")
"""`{data}` at the start of a path: a folder that `--path data=DIR` names. `{block}.0` of a site pattern is none."""


class Part(BaseModel):
    """Base of what `table.yaml` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(Part):
    """One line of a table: a recipe, and how to run it."""

    title: str
    start: str | None = Field(None, description="row whose model of the same seed it starts from")
    section: str | None = Field(None, description="heading above it, and above the rows after it")
    command: Literal["launch", "quantize"] = "launch"
    sweep: bool = Field(True, description="whether its variants are evaluated, where the table has any")
    evaluation: Literal["result", "last-logged"] = Field(
        "result",
        description="`last-logged`: the last one during training, in which other modules may stand in for the model's "
        "own; a run's result never has them",
    )


class Setting(Part):
    """One column of a table: a model and data, on which every row (or some) is run."""

    title: str
    overrides: tuple[str, ...] = Field((), description="overrides, as of `qpipe launch --set`")
    overrides_for: dict[str, tuple[str, ...]] = Field({}, description="further overrides of single rows")
    seeds: int = Field(3, gt=0)
    rows: tuple[str, ...] | None = Field(None, description="default: all")
    skip: tuple[str, ...] = ()
    full: bool = Field(False, description="too long for two CPU cores: run with `--full` only")
    transform: str | None = Field(
        None,
        description="script of the table's folder, called with a run and a folder, that makes of each model what "
        "other rows start from",
    )

    def placeholders(self) -> set[str]:
        """Names of the folders that it needs."""
        texts = [*self.overrides, *(text for more in self.overrides_for.values() for text in more)]
        return {name for text in texts for name in PLACEHOLDER.findall(text.partition("=")[2])}


class Sweep(Part):
    """Variants of each trained model that are evaluated too: arguments of `qpipe evaluate --variants`."""

    bits: str
    ratios: str
    sites: tuple[str, ...] = ()
    shown: tuple[str, ...] = Field(description="points in the table: `bits=3`, `step=0.9`, `pow2`")

    def arguments(self) -> list[str]:
        """Of `qpipe evaluate`."""
        words = ["--variants", "bits,step,pow2", "--bits", self.bits, "--ratios", self.ratios]
        return [*words, *(word for site in self.sites for word in ("--sites", site))]


class Table(Part):
    """A whole table."""

    name: str
    folder: Path
    metrics: tuple[str, ...] = Field((), description="default: the first metric of the task")
    lower_is_better: bool = False
    averages: dict[str, tuple[str, ...]] = Field(
        {}, description="title of a column, and the settings over which it averages the first metric"
    )
    relative_to: str | None = Field(None, description="row that the first metric is also given relative to")
    tolerance: float = Field(gt=0, description="how far the mean over the seeds may lie from the recorded one")
    sweep: Sweep | None = None
    settings: dict[str, Setting]
    rows: dict[str, Row]

    @model_validator(mode="after")
    def _names_exist(self) -> Table:
        named = [row.start for row in self.rows.values()] + [self.relative_to]
        for setting in self.settings.values():
            named += [*(setting.rows or ()), *setting.skip, *setting.overrides_for]
        missing = sorted({name for name in named if name is not None} - self.rows.keys())
        if missing:
            raise ValueError(f"{missing[0]!r} is no row; there are {', '.join(self.rows)}")
        if self.averages and (self.sweep is not None or not all(self.averages.values())):
            raise ValueError("averages need settings to average over, and a table without a sweep")
        averaged = {name for names in self.averages.values() for name in names}
        if averaged - self.settings.keys():
            unknown = min(averaged - self.settings.keys())
            raise ValueError(f"{unknown!r} under averages is no setting; there are {', '.join(self.settings)}")
        return self

    def rows_of(self, setting: str) -> list[str]:
        """The rows that a setting has, in order, each after the one it starts from.

        Raises:
            ValueError: a row comes before the one it starts from, or without it.
        """
        chosen = self.settings[setting]
        names = [n for n in self.rows if n in (chosen.rows or self.rows) and n not in chosen.skip]
        for position, name in enumerate(names):
            start = self.rows[name].start
            if start is not None and start not in names[:position]:
                raise ValueError(f"{self.name}: row {name!r} comes before {start!r}, which it starts from")
        return names

    def transform(self, row: str, setting: str) -> Path | None:
        """The script that changes a row's model before others start from it; None where there is none."""
        name = self.settings[setting].transform
        started = any(other.start == row for other in self.rows.values())
        return self.folder / name if name is not None and started else None

    def recipe(self, row: str) -> Path:
        """The recipe of a row."""
        return self.folder / row / RECIPE_FILE

    def expected(self, row: str) -> Path:
        """Where the measured numbers of a row are kept."""
        return self.folder / row / EXPECTED_FILE


def read_table(folder: Path) -> Table:
    """The table in a folder.

    Raises:
        ConfigError: `table.yaml` is no mapping.
        ValueError: a key or value in it is not allowed, a row has no recipe or a recipe no row, or a script is missing.
    """
    document: Mapping[str, Any] = read_yaml((folder / TABLE_FILE).read_text(), str(folder / TABLE_FILE))
    table = Table(name=folder.name, folder=folder, **document)
    found = {path.parent.name for path in folder.glob(f"*/{RECIPE_FILE}")}
    if found != table.rows.keys():
        raise ValueError(f"{folder}: rows and recipes differ in {', '.join(sorted(found ^ table.rows.keys()))}")
    for setting in table.settings.values():
        if setting.transform is not None and not (folder / setting.transform).is_file():
            raise ValueError(f"{folder} has no script {setting.transform!r}, which a setting names under `transform`")
    return table


def tables(root: Path = ROOT / "examples") -> list[Table]:
    """Every table, by name."""
    return [read_table(path.parent) for path in sorted(root.glob(f"*/{TABLE_FILE}"))]
