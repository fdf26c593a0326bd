"""docs/results.md: each table between its markers, from the numbers recorded beside the recipes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results.cell import Cell
from benchmarks.results.figures import figure_name
from benchmarks.results.record import Measured, read_expected
from benchmarks.results.table import ROOT, Table

DOCUMENT = ROOT / "docs" / "results.md"
END = "<!-- end of table -->"
STALE = " †"
"""Marks a number whose recipe has changed since."""
SIZES = ("bits per weight", "file, MB")
"""The last columns, for each model of a table."""


def start_marker(table: Table) -> str:
    """The line that a table comes after."""
    return f"<!-- table: {table.name} -->"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, standard deviation and number of seeds: `0.803 ± 0.004 (3)`, `0.803 (1)`."""
    mean = f"{statistics.mean(values):.{digits}f}"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean}{deviation} ({len(values)})"


def is_stale(table: Table, row: str, setting: str, measured: Measured) -> bool:
    """Whether the recipe, or what it starts from, is another than the one that was measured."""
    now = [Cell(table, row, setting, seed).digest for seed in range(len(measured.cells))]
    return now != measured.cells


def render(table: Table) -> str:
    """A table as Markdown; settings and rows that were never measured are left out."""
    recorded = {row: read_expected(table.expected(row)) for row in table.rows}
    settings = [name for name in table.settings if any(name in entry for entry in recorded.values())]
    if not settings:
        return "Not measured yet."
    if table.sweep is not None:
        return "\n\n".join(_sweep_part(table, setting, recorded) for setting in settings)
    return f"{_lines(_metric_rows(table, settings, recorded))}\n\n{_packed(table, recorded)}"


def _lines(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _metric_rows(table: Table, settings: list[str], recorded: dict[str, dict[str, Measured]]) -> list[list[str]]:
    columns = [(s, m) for s in settings for m in _metrics(table, s, recorded)]
    several = len(columns) > len(settings)
    heads = [f"{table.settings[s].title}{f', {m}' if several else ''}" for s, m in columns]
    relative = [f"{table.settings[s].title}, change" for s in settings] if table.relative_to else []
    averages = {title: names for title, names in table.averages.items() if set(names) <= set(settings)}
    models = _models(settings, recorded)
    sizes = [f"{what}{f', {model}' if len(models) > 1 else ''}" for model in models for what in SIZES]
    rows = [["", *heads, *averages, *relative, *sizes]]
    section = shown = None
    for row, entry in recorded.items():
        section = table.rows[row].section or section
        if not entry:
            continue
        if section != shown:
            rows.append([f"**{section}**", *[""] * (len(rows[0]) - 1)])
            shown = section
        cells = [_value(table, row, s, m, entry) for s, m in columns]
        cells += [_average(table, row, names, entry) for names in averages.values()]
        if table.relative_to:
            base = recorded[table.relative_to]
            cells += [_relative(entry.get(s), base.get(s), _metrics(table, s, recorded)[0]) for s in settings]
        rows.append([table.rows[row].title, *cells, *_sizes(entry, models)])
    return rows


def _metrics(table: Table, setting: str, recorded: dict[str, dict[str, Measured]]) -> tuple[str, ...]:
    first = next(entry[setting] for entry in recorded.values() if setting in entry)
    return table.metrics or tuple(first.metrics)


def _value(table: Table, row: str, setting: str, metric: str, entry: dict[str, Measured]) -> str:
    if setting not in entry:
        return "-"
    stale = STALE if is_stale(table, row, setting, entry[setting]) else ""
    return spread(entry[setting].metrics[metric]) + stale


def _average(table: Table, row: str, settings: Sequence[str], entry: dict[str, Measured]) -> str:
    """Mean over settings, seed by seed; nothing unless all were measured with as many seeds."""
    values = [next(iter(entry[name].metrics.values())) for name in settings if name in entry]
    if len(values) < len(settings) or len({len(seeds) for seeds in values}) > 1:
        return "-"
    stale = any(is_stale(table, row, name, entry[name]) for name in settings)
    return spread([statistics.mean(seeds) for seeds in zip(*values, strict=True)]) + (STALE if stale else "")


def _relative(measured: Measured | None, base: Measured | None, metric: str) -> str:
    if measured is None or base is None:
        return "-"
    return f"{100 * (measured.mean(metric) / base.mean(metric) - 1):+.1f} %"


def _models(settings: list[str], recorded: dict[str, dict[str, Measured]]) -> dict[str, list[str]]:
    """Settings by the parameters of their model (`22.7M parameters`), without those of which no file is recorded."""
    found: dict[str, list[str]] = {}
    for setting in settings:
        entries = [entry[setting] for entry in recorded.values() if setting in entry]
        for measured in entries:
            if measured.file_megabytes is not None and measured.bits_per_weight is not None:
                millions = 8 * measured.file_megabytes / measured.bits_per_weight
                found.setdefault(f"{millions:.1f}M parameters", []).append(setting)
                break
    return found


def _sizes(entry: dict[str, Measured], models: dict[str, list[str]]) -> list[str]:
    """Bits per weight and size of the file, for each model from the last of its settings that the row has."""
    cells = []
    for settings in models.values():
        found = next((entry[s] for s in reversed(settings) if s in entry), None)
        if found is None or found.file_megabytes is None or found.bits_per_weight is None:
            cells += ["-", "-"]
        else:
            size = f"{found.file_megabytes:.2f} of {found.full_precision_megabytes:.2f}"
            cells += [f"{found.bits_per_weight:.2f}", size]
    return cells


def _packed(table: Table, recorded: dict[str, dict[str, Measured]]) -> str:
    """How far metrics of packed checkpoints lie from those of the models that were trained."""
    exported = [
        measured
        for row, entry in recorded.items()
        if table.rows[row].evaluation == "result"  # else what was evaluated is not what is exported
        for measured in entry.values()
        if measured.bits_per_weight is not None
    ]
    pairs = [
        abs(trained - packed)
        for measured in exported
        for name, values in measured.reloaded.items()
        for trained, packed in zip(measured.metrics[name], values, strict=True)
    ]
    if not pairs:
        return "No packed checkpoint was measured."
    there = sum(len(values) for measured in exported for values in measured.metrics.values())
    return (
        f"Packed checkpoints, loaded again as `qpipe verify` does: {len(pairs)} of {there} values compared with those "
        f"above, largest difference {max(pairs):.5f}." + (" The others are not recorded." if len(pairs) < there else "")
    )


def _sweep_part(table: Table, setting: str, recorded: dict[str, dict[str, Measured]]) -> str:
    title = table.settings[setting].title
    figure = f"![{title}](figures/{figure_name(table, setting)})"
    return f"{title}:\n\n{_lines(_sweep_rows(table, setting, recorded))}\n\n{figure}"


def _sweep_rows(table: Table, setting: str, recorded: dict[str, dict[str, Measured]]) -> list[list[str]]:
    assert table.sweep is not None, "only tables with variants have points"
    rows = [["", "as trained", *table.sweep.shown]]
    for row, entry in recorded.items():
        if setting in entry:
            measured = entry[setting]
            points = [measured.points.get(name) for name in table.sweep.shown]
            trained = _value(table, row, setting, next(iter(measured.metrics)), entry)
            rows.append([table.rows[row].title, trained, *(spread(p) if p else "-" for p in points)])
    return rows


def write(tables: Sequence[Table], document: Path = DOCUMENT) -> None:
    """Put tables between their markers.

    Raises:
        ValueError: the document lacks a table's marker.
    """
    text = document.read_text()
    for table in tables:
        before, marker, rest = text.partition(start_marker(table))
        _, end, after = rest.partition(END)
        if not marker or not end:
            raise ValueError(f"{document} lacks {start_marker(table)!r} or {END!r} after it")
        text = f"{before}{marker}\n{render(table)}\n{end}{after}"
    document.write_text(text)
