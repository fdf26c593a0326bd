"""Running cells: each after the one it starts from, several at a time, each only once."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from benchmarks.results.cell import Cell, filled
from benchmarks.results.record import is_done
from benchmarks.results.table import ROOT
from qpipe.files import sha256, write_json
from qpipe.launching.topology import cpu_cores
from qpipe.report.inputs import read_json
from qpipe.resuming import saved_processes


def run_cell(cell: Cell, runs: Path, folders: Mapping[str, Path], jobs: int) -> None:
    """Make the run of a cell unless it is finished.

    Raises:
        RuntimeError: its command failed; names the log.
    """
    folder = cell.folder(runs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "results.json").is_file():
        words = cell.command(runs, folders)
        if jobs > 1 and "launch" in words and saved_processes(folder, 1) is None:  # else it goes on with as many
            words += ["--cpus", "1"]
        _call(words, folder.with_suffix(".log"), jobs)
    transform = cell.transform_command(runs)
    if transform is not None and not cell.model(runs).is_dir():
        _call(transform, folder.with_suffix(".log"), jobs)
    sweep = cell.sweep_command(runs)
    if sweep is not None and not (folder / "variants.json").is_file():
        _call(sweep, folder.with_suffix(".log"), jobs)


def content_hash(path: Path) -> str:
    """Hash of a file, or of the names and contents of all files in a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    contents = [(str(file.relative_to(path)), sha256(file)) for file in files if file.is_file()]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def refuse_other_inputs(cells: Sequence[Cell], runs: Path, folders: Mapping[str, Path]) -> None:
    """Note what the placeholders of cells stand for beside their runs, and refuse runs that had something else.

    Raises:
        SystemExit: a model or a file is another than when a kept run was begun.
    """
    hashes: dict[str, str] = {}
    for cell in cells:
        now = {}
        for override in cell.overrides:
            key, _, value = filled(override, folders).partition("=")
            if value != override.partition("=")[2]:
                now[key] = hashes.get(value) or hashes.setdefault(value, content_hash(Path(value)))
        note = cell.folder(runs).with_suffix(".inputs.json")
        before = read_json(note)
        if before is None or not cell.folder(runs).exists():
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, now)
        elif before != now:
            changed = ", ".join(sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key)))
            raise SystemExit(
                f"{cell}: {cell.folder(runs)} was run with another {changed}; name another folder for runs (--runs), "
                "or remove that one to run it again"
            )


def _call(words: list[str], log: Path, jobs: int) -> None:
    one_thread = {"OMP_NUM_THREADS": str(max(1, cpu_cores() // jobs))}
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
