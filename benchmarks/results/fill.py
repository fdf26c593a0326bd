"""Running cells: each after the one it starts from, several at a time, each only once."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from benchmarks.results.cell import Cell
from benchmarks.results.record import is_done
from benchmarks.results.table import ROOT
from qpipe.launching.topology import cpu_cores


def run_cell(cell: Cell, runs: Path, folders: Mapping[str, Path], jobs: int) -> None:
    """Make the run of a cell unless it is finished.

    Raises:
        RuntimeError: its command failed; names the log.
    """
    folder = cell.folder(runs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "results.json").is_file():
        _call(cell.command(runs, folders), folder.with_suffix(".log"), jobs)
    transform = cell.transform_command(runs)
    if transform is not None and not cell.model(runs).is_dir():
        _call(transform, folder.with_suffix(".log"), jobs)
    sweep = cell.sweep_command(runs)
    if sweep is not None and not (folder / "variants.json").is_file():
        _call(sweep, folder.with_suffix(".log"), jobs)


def _call(words: list[str], log: Path, jobs: int) -> None:
    one_thread = {"OMP_NUM_THREADS": str(max(1, cpu_cores() // jobs))}
    if jobs > 1 and "launch" in words:
        words = [*words, "--cpus", "1"]
    with log.open("a") as file:
        done = subprocess.run(
            words,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
            cwd=ROOT,
            env={**os.environ, **(one_thread if jobs > 1 else {})},
        )
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(words)} failed; see {log}")


def fill(
    cells: Sequence[Cell], runs: Path, folders: Mapping[str, Path], jobs: int, told: Callable[[Cell], None]
) -> list[str]:
    """Run cells, in their order, as soon as what each starts from is there.

    Args:
        cells: which; those that others start from are among them.
        runs: folder of all runs.
        folders: what placeholders stand for.
        jobs: how many at a time.
        told: called after each finished cell.

    Returns:
        What failed, in words. Cells that start from a failed one are left out.
    """
    waiting = [cell for cell in cells if not is_done(cell, runs)]
    ready = {cell.model(runs) for cell in cells if cell not in waiting}
    running: dict[Future[None], Cell] = {}
    failures: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for cell in list(waiting):
                busy = {other.folder(runs) for other in running.values()}
                startable = cell.start is None or cell.start.model(runs) in ready
                if len(running) < jobs and startable and cell.folder(runs) not in busy:
                    waiting.remove(cell)
                    print(f"running {cell}", flush=True)
                    running[pool.submit(run_cell, cell, runs, folders, jobs)] = cell
            if not running:
                return [*failures, *(f"{cell}: what it starts from is missing" for cell in waiting)]
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                cell = running.pop(future)
                if future.exception() is None:
                    ready.add(cell.model(runs))
                    told(cell)
                else:
                    failures.append(str(future.exception()))
                    print(failures[-1], flush=True)
    return failures
