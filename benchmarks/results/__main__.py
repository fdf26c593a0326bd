"""`python -m benchmarks.results`: fill the tables of docs/results.md."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.results.cell import Cell
from benchmarks.results.figures import draw
from benchmarks.results.fill import fill, refuse_other_inputs
from benchmarks.results.record import differences, measure, read_expected, write_expected
from benchmarks.results.render import write
from benchmarks.results.table import Table, tables


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    made.add_argument("--tables", nargs="+", default=["*"], help="patterns of folders in examples/")
    made.add_argument("--settings", nargs="+", default=["*"], help="patterns of a table's settings")
    made.add_argument("--rows", nargs="+", default=["*"], help="patterns; what they start from is added")
    made.add_argument("--path", action="append", default=[], metavar="NAME=DIR", help="what {NAME} stands for")
    made.add_argument("--runs", type=Path, default=Path("runs/results"), help="where runs are kept")
    made.add_argument("--jobs", type=int, default=1, help="cells at a time; more than one: a CPU process each")
    made.add_argument("--full", action="store_true", help="also the settings that are too long for two CPU cores")
    made.add_argument("--measured", action="store_true", help="run rows again whose numbers are recorded already")
    made.add_argument("--record", action="store_true", help="replace recorded numbers that runs differ from")
    made.add_argument("--render-only", action="store_true", help="write the document from what is recorded")
    return made


def matches(name: str, patterns: list[str]) -> bool:
    """Whether any pattern matches."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def folders_of(pairs: list[str]) -> dict[str, Path]:
    """`NAME=DIR` as a mapping of absolute folders.

    Raises:
        SystemExit: a pair has no `=`, or its folder does not exist.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not Path(value).is_dir():
            raise SystemExit(f"--path {pair}: write NAME=DIR with a folder that exists")
        found[name] = Path(value).resolve()
    return found


def chosen(options: argparse.Namespace, folders: Mapping[str, Path]) -> Iterator[tuple[Table, str, str]]:
    """Table, row and setting of what is asked for and can be run here; says what cannot."""
    for table in tables():
        if not matches(table.name, options.tables):
            continue
        for name, setting in table.settings.items():
            lacking: list[str] = sorted(setting.placeholders() - folders.keys())
            if not matches(name, options.settings) or (setting.full and not options.full):
                continue
            if lacking:
                print(f"left out: {table.name}, {name} needs --path {lacking[0]}=DIR", file=sys.stderr)
                continue
            yield from ((table, row, name) for row in table.rows_of(name) if matches(row, options.rows))


def wanted(options: argparse.Namespace, folders: Mapping[str, Path]) -> list[tuple[Table, str, str]]:
    """What is asked for and not recorded yet for this recipe, or all of it with `--measured`."""
    found = []
    for table, row, setting in chosen(options, folders):
        recorded = read_expected(table.expected(row)).get(setting)
        now = [cell.digest for cell in cells_of(table, row, setting)]
        if options.measured or recorded is None or recorded.cells != now:
            found.append((table, row, setting))
    return found


def cells_of(table: Table, row: str, setting: str) -> list[Cell]:
    """The cells of a row in a setting, one per seed."""
    return [Cell(table, row, setting, seed) for seed in range(table.settings[setting].seeds)]


def with_starts(cells: list[Cell]) -> list[Cell]:
    """Cells after those that they start from, each once, unless something else is made of its model."""
    ordered: dict[tuple[str, str, Path | None], Cell] = {}

    def add(cell: Cell) -> None:
        if cell.start is not None:
            add(cell.start)
        ordered.setdefault((cell.table.name, cell.digest, cell.transform), cell)

    for cell in cells:
        add(cell)
    return list(ordered.values())


def take(table: Table, row: str, setting: str, options: argparse.Namespace) -> list[str]:
    """Record a finished row; return in words what differs from what was recorded for the same recipe."""
    measured = measure(table, row, setting, options.runs)
    if measured is None:
        return []
    recorded = read_expected(table.expected(row))
    before = recorded.get(setting)
    differs = differences(measured, before) if before is not None and before.cells == measured.cells else []
    if before is None or before.cells != measured.cells or options.record:
        write_expected(table.expected(row), {**recorded, setting: measured})
    return [f"{table.name}/{row}, {setting}: {text}" for text in differs]


def main() -> None:
    """Run, compare, record, write."""
    options = parser().parse_args()
    options.runs = options.runs.resolve()
    folders = folders_of(options.path)
    failures: list[str] = []
    differs: dict[str, None] = {}
    if not options.render_only:
        asked = wanted(options, folders)

        def told(cell: Cell) -> None:
            for text in take(cell.table, cell.row, cell.setting, options):
                differs[text] = None
            write([cell.table])

        cells = with_starts([cell for entry in asked for cell in cells_of(*entry)])
        refuse_other_inputs(cells, options.runs, folders)
        failures = fill(cells, options.runs, folders, options.jobs, told)
        for entry in asked:
            differs |= dict.fromkeys(take(*entry, options))
    write(tables())
    for table in tables():
        draw(table)
    for text in [*failures, *differs]:
        print(text, file=sys.stderr)
    raise SystemExit(1 if failures or differs else 0)


if __name__ == "__main__":
    main()
