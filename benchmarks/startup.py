"""How long a command takes that only answers: `python -m benchmarks.startup`.

Each command takes turns with a program that only imports `typer.testing`: the parts of typer that print help, and the
least that any command line of typer costs. A ratio of processor times is formed within each turn, since other programs
disturb elapsed time more; the table gives medians. What is imported is held by `tests/cli/test_startup.py`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

from benchmarks.document import cpu_model

COMMANDS = (["--help"], ["--version"], ["plugins", "list"], ["launch", "--help"])


def measured(*words: str) -> tuple[float, float]:
    """Elapsed time and processor time of one run of Python, in milliseconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *words], capture_output=True, check=True)
    elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * elapsed, 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def row(command: list[str], turns: int) -> str:
    """One row of the table."""
    pairs = [(measured("-m", "qpipe.cli", *command), measured("-c", "import typer.testing")) for _ in range(turns)]
    own, least = ([statistics.median(t) for t in zip(*side, strict=True)] for side in zip(*pairs, strict=True))
    ratio = statistics.median(mine[1] / other[1] for mine, other in pairs)
    return f"| `qpipe {' '.join(command)}` | {own[0]:.0f} | {least[0]:.0f} | **{ratio:.2f}** |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=11, help="runs of each side")
    turns = parser.parse_args().turns
    print(f"`python -m benchmarks.startup`, {cpu_model()}, {turns} turns.\n")
    print("| command | ms | ms of `import typer.testing` | ratio of processor time |\n|---|--:|--:|--:|")
    for command in COMMANDS:
        print(row(command, turns))


if __name__ == "__main__":
    main()
