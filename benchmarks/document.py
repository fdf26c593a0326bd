"""The table as text, and in docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

START, END = "<!-- benchmark: training step -->", "<!-- end of benchmark -->"


def cpu_model() -> str:
    """The processor's name, with its number of cores."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def environment(arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Command, date, versions, processor, threads and load average."""
    policy = os.environ.get("OMP_WAIT_POLICY")
    prefix = f"OMP_WAIT_POLICY={policy} " if policy else ""
    return {
        "command": prefix + shlex.join(["python", "-m", "benchmarks.training_step", *arguments]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {name: version(name) for name in ("qpipe", "torch", "transformers")},
        "cpu": cpu_model(),
        "threads": threads,
        "load": round(os.getloadavg()[1], 1),
    }


def plain_table(rows: Sequence[Mapping[str, Any]], heading: bool = True) -> str:
    """Rows in columns of fixed width."""
    lines = (
        [f"{'ratio':>7} {'quartiles':>13} {'CPU':>7} {'quartiles':>13} {'ms':>8} {'baseline':>9}  what"]
        if heading
        else []
    )
    for row in rows:
        low, high = row["quartiles"]
        what = f"{row['title']} ({row['dtype']}), against {row['baseline']}"
        cpu_low, cpu_high = row["cpu_quartiles"]
        ratios = f"{row['ratio']:7.3f}   {low:.3f}-{high:.3f} {row['cpu_ratio']:7.3f}   {cpu_low:.3f}-{cpu_high:.3f}"
        lines.append(f"{ratios} {row['ms']:8.1f} {row['baseline_ms']:9.1f}  {what}")
    return "\n".join(lines)


def markdown(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """The table for the document, and how it was measured."""
    lines = [
        f"`{about['command']}`, {about['date']}, {about['cpu']}, {about['threads']} threads, load average "
        f"{about['load']} (5 minutes), " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()) + ".",
        "",
        "| what | against | dtype | ratio | quartiles | CPU ratio | quartiles | ms | baseline ms | pairs |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        low, high = row["quartiles"]
        cpu_low, cpu_high = row["cpu_quartiles"]
        lines.append(
            f"| {row['title']} | {row['baseline']} | {row['dtype']} | **{row['ratio']:.3f}** | {low:.3f} to {high:.3f} "
            f"| {row['cpu_ratio']:.3f} | {cpu_low:.3f} to {cpu_high:.3f} "
            f"| {row['ms']:.0f} | {row['baseline_ms']:.0f} | {row['pairs']} |"
        )
    return "\n".join(lines)


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the markers of a document.

    Raises:
        SystemExit: the document or its markers are missing.
    """
    content = path.read_text() if path.is_file() else ""
    before, start, rest = content.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{path} must contain the lines {START!r} and {END!r}; the table goes between them")
    path.write_text(f"{before}{START}\n{text}\n{END}{after}")
