"""Write the reference pages of `docs/` from the code, and the result block of the README from a run.

python docs/generate.py                  write hooks.md, config.md, plugins-and-quantizers.md and cli.md
python docs/generate.py --check          exit code 1 if one of them is stale; writes nothing
python docs/generate.py --demo runs/demo put the result of a finished run into the README
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import reference_cli
import reference_config
import reference_hooks
import reference_plugins

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for benchmarks, which are not installed
DOCS = ROOT / "docs"
NOTE = "<!-- Written by docs/generate.py; change the code it is made from, and run it again. -->\n\n"
START, END = "<!-- demo:start -->", "<!-- demo:end -->"

PAGES: Mapping[str, Callable[[Path], str]] = {
    "hooks.md": reference_hooks.page,
    "config.md": reference_config.page,
    "plugins-and-quantizers.md": reference_plugins.page,
    "cli.md": reference_cli.page,
}
"""Generated pages; each function takes the root of the repository and returns Markdown."""


def render() -> dict[Path, str]:
    """The text of every generated page by path."""
    return {DOCS / name: NOTE + page(ROOT) for name, page in PAGES.items()}


def stale() -> list[Path]:
    """Generated pages whose file is missing or differs from what the code says now."""
    return [path for path, text in render().items() if not path.is_file() or path.read_text() != text]


def demo_table(run_dir: Path) -> str:
    """The result table of a run as Markdown.

    Raises:
        QpipeError: `run_dir` holds no finished run.
    """
    from qpipe.report.table import COLUMNS, results_rows, show

    rows = [f"| | {' | '.join(COLUMNS.values())} |", "|---|" + "---:|" * len(COLUMNS)]
    for row in results_rows(run_dir):
        rows.append(f"| {row['quantity']} | {' | '.join(show(row, column) for column in COLUMNS)} |")
    return "\n".join([*rows, "", origin(run_dir)])


def origin(run_dir: Path) -> str:
    """The command that made a run of the default recipe, from what its configuration changes, and this machine."""
    from benchmarks.document import cpu_model
    from qpipe.config import resolve

    precision = json.loads((run_dir / "model" / "qpipe_model.json").read_text())["dtype"]
    config, recipe = resolve(run_dir / "config.yaml"), resolve()
    data, usual = config.data.model_dump(), recipe.data.model_dump()
    changed = [f"--set data.{key}={value}" for key, value in data.items() if value != usual[key]]
    command = " ".join(["qpipe launch --plugins", ",".join(config.plugins), *changed])
    return (
        f"Command: `{command}`, seed {config.seed}; metrics are of {config.data.max_eval_examples or 'all'} held-out "
        f"sentences, time is without installation, on {cpu_model()}, in {precision} (on another processor "
        "`engine.precision: auto` may choose another type, in which what is not quantized is stored, too). "
        "`make demo` runs the same (`DEMO` in the Makefile sets the number of sentences)."
    )


def with_demo(readme: str, table: str) -> str:
    """The README with `table` between its markers.

    Raises:
        ValueError: the markers are missing.
    """
    head, start, rest = readme.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the README has no block {START} ... {END}")
    return f"{head}{start}\n{table}\n{end}{tail}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit code 1 if a page is stale")
    parser.add_argument("--demo", type=Path, metavar="RUN", help="put the result of this run into README.md")
    options = parser.parse_args(arguments)
    if options.demo is not None:
        readme = ROOT / "README.md"
        readme.write_text(with_demo(readme.read_text(), demo_table(options.demo)))
        return 0
    if options.check:
        outdated = stale()
        for path in outdated:
            print(f"{path.relative_to(ROOT)} is stale; run: python docs/generate.py", file=sys.stderr)
        return 1 if outdated else 0
    for path, text in render().items():
        path.write_text(text)
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
