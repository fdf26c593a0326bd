"""The result of a run as rows, and as a table for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe.errors import CheckpointError
from qpipe.report import format as fmt
from qpipe.report.inputs import Results, numbers, read_config, read_results

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "full_precision": "full precision",
    "quantized": "quantized, training form",
    "packed": "packed, reloaded",
}
"""Heading by key of the value columns."""


def result_rows(results: Results) -> list[dict[str, Any]]:
    """Rows of the result table; see `results_rows`."""
    stages = {
        "full_precision": numbers(results.teacher),
        "quantized": numbers(results.evaluation),
        "packed": numbers(results.reloaded),
    }
    names = list(dict.fromkeys(name for values in stages.values() for name in values))
    rows = [_row(name, "", **{stage: values.get(name) for stage, values in stages.items()}) for name in names]
    if results.size is not None:
        size = results.size
        rows.append(_row("bits per weight", "bits", packed=size.bits_per_weight))
        kind = f" (full precision: {size.full_precision_dtype})" if size.full_precision_dtype else ""
        rows.append(_row(f"file size{kind}", "bytes", full_precision=size.full_precision_bytes, packed=size.file_bytes))
    if results.seconds:
        rows.append(_row("time, all stages", "s", quantized=total_seconds(results.seconds)))
    return [row for row in rows if any(row[column] is not None for column in COLUMNS)]


def _row(
    quantity: str,
    unit: str,
    full_precision: float | None = None,
    quantized: float | None = None,
    packed: float | None = None,
) -> dict[str, Any]:
    return {
        "quantity": quantity,
        "unit": unit,
        "full_precision": full_precision,
        "quantized": quantized,
        "packed": packed,
    }


def total_seconds(seconds: dict[str, float]) -> float:
    """The stage named `total`, else the sum of all stages."""
    return seconds["total"] if "total" in seconds else sum(seconds.values())


def results_rows(run_dir: Path) -> list[dict[str, Any]]:
    """What a run measured, one mapping per row: `quantity`, `unit`, `full_precision`, `quantized`, `packed`.

    First every metric, then bits per weight, file size in bytes and the time of the whole run in seconds. A value is
    None where it was not measured; rows of which nothing was measured are left out.

    Raises:
        ConfigError: `run_dir` is not a run directory.
        CheckpointError: there is no `results.json` yet, or it is damaged.
    """
    return result_rows(_results(run_dir))


def _results(run_dir: Path) -> Results:
    read_config(run_dir)
    results = read_results(run_dir)
    if results is None:
        raise CheckpointError(
            f"{Path(run_dir) / 'results.json'} is missing: the run has not been evaluated yet; "
            "wait for it to end, or continue it with `qpipe launch --resume`"
        )
    return results


def show(row: dict[str, Any], column: str) -> str:
    """One cell as text."""
    value: float | None = row[column]
    formats = {"": fmt.decimal, "bits": fmt.plain, "bytes": fmt.size, "s": fmt.duration}
    text = formats[row["unit"]](value)
    full = row["full_precision"]
    if row["unit"] == "bytes" and column == "packed" and value and full:
        text += f" ({full / value:.1f}x smaller)" if full >= value else f" ({value / full:.1f}x larger)"
    return text


def results_table(run_dir: Path) -> Table:
    """The result of a run, to be printed with `rich`; raises what `results_rows` raises."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    results = _results(run_dir)
    table = Table(title=escape(f"Result of {run_dir}"), box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for row in result_rows(results):
        table.add_row(escape(row["quantity"]), *(show(row, column) for column in COLUMNS))
    stages = {k: v for k, v in (results.seconds or {}).items() if k != "total"}
    if stages:
        table.caption = escape("time: " + ", ".join(f"{k} {fmt.duration(v)}" for k, v in stages.items()))
        table.caption_justify = "left"
    return table
