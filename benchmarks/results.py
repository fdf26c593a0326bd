"""Fill docs/results.md: GLUE tasks in full precision, W4A8 and ternary, on a small and on the default encoder.

Each cell is one `qpipe launch` in a folder named after the hash of its configuration, so that a second run trains only
what is missing, and one that was interrupted goes on. `--jobs N` trains N cells at a time, each in one CPU process.

    python -m benchmarks.results --data ../shared/data --small ../shared/models/bert_tiny
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qpipe.launching.topology import cpu_cores

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "results.md"
START, END = "<!-- results:start -->", "<!-- results:end -->"
TASKS = ("rte", "stsb", "sst2")
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "full precision": ("", ["quantization.preset=null"]),
    "W4A8": ("", ["quantization.preset=w4a8"]),
    "W4A8 + ti-g": ("ti-g", ["quantization.preset=w4a8"]),
    "ternary, A8": ("ternary-twn", ["quantization.preset=a8"]),
    "ternary, A8 + ti-g": ("ternary-twn,ti-g", ["quantization.preset=a8"]),
    "W4A8 + kure": ("kure", ["quantization.preset=w4a8"]),
}
TEACHER = "full precision"
METHODS = {"min-max": "uniform", "LSQ": "lsq", "LSQ+": "lsq+", "DoReFa": "dorefa", "LAQ": "laq"}


def only_weights(quantizer: str, **options: object) -> list[str]:
    """Overrides that put a quantizer on every weight of the blocks, with an 8-bit embedding and full activations."""
    rule = {"site": "{block}.*:weight", "quantizer": quantizer, "options": options}
    return ["quantization.preset=w8", f"quantization.rules={json.dumps([rule])}"]


for bits in (4, 3, 2):
    for label, kind in METHODS.items():
        VARIANTS[f"W{bits} {label}"] = ("", only_weights(kind, bits=bits))
    VARIANTS[f"W{bits} SqWQ"] = ("sqwq", ["quantization.preset=w8", f"sqwq.bits={bits}"])
VARIANTS["ternary TWN, per channel"] = ("ternary-twn", ["quantization.preset=w8", "ternary-twn.granularity=channel"])
VARIANTS["W1 binary"] = ("", only_weights("binary"))
VARIANTS["W1 SqWQ"] = ("sqwq", ["quantization.preset=w8", "sqwq.bits=1"])


@dataclass(frozen=True)
class Cell:
    """One trained model."""

    task: str
    encoder: str
    variant: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def plugins(self) -> str:
        """Comma-separated plugin names."""
        return VARIANTS[self.variant][0]

    def folder(self, root: Path) -> Path:
        """Where the run lies; another configuration gets another folder."""
        text = json.dumps([recipe(self.task).read_text(), self.plugins, self.overrides, self.seed])
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        words = f"{self.task}-{self.encoder}-{self.variant}-s{self.seed}".replace(" ", "").replace(",", "-").lower()
        return root / f"{words}-{digest}"

    def arguments(self, root: Path) -> list[str]:
        """Arguments of `qpipe` that train the cell."""
        words = ["launch", str(recipe(self.task).relative_to(ROOT)), "--out", str(self.folder(root))]
        words += ["--plugins", self.plugins] if self.plugins else []
        for override in (*self.overrides, f"seed={self.seed}"):
            words += ["--set", override]
        return words


def recipe(task: str) -> Path:
    """The configuration file of a task."""
    return ROOT / "examples" / "glue" / f"{task}.yaml"


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Every cell, teachers before the students that learn from them."""
    encoders = {"small": options.small_seeds, "default": options.default_seeds}
    for encoder in options.encoders:
        for task in options.tasks:
            for seed in range(encoders[encoder]):
                common = common_overrides(options, task, encoder)
                teacher = Cell(task, encoder, TEACHER, seed, (*common, *VARIANTS[TEACHER][1]))
                yield teacher
                for variant in options.variants:
                    if variant == TEACHER:
                        continue
                    name = f"teacher.name={teacher.folder(options.runs) / 'model'}"
                    yield Cell(task, encoder, variant, seed, (*common, *VARIANTS[variant][1], name))


def common_overrides(options: argparse.Namespace, task: str, encoder: str) -> tuple[str, ...]:
    """What all cells of a task and encoder share."""
    found = []
    if options.data:
        columns = {"sst2": "[sentence]"}.get(task, "[sentence1, sentence2]")
        found += [f"data.train={options.data / task / 'train.parquet'}"]
        found += [f"data.validation={options.data / task / 'validation.parquet'}", f"data.text_columns={columns}"]
    if encoder == "small":
        found += [f"model.name={options.small}", "train.learning_rate=2e-4", "train.epochs=3"]
        found += ["train.epochs=1"] if task == "sst2" else []
    if encoder == "default":
        # RTE stays near chance however long it trains.
        found += {"rte": ["train.epochs=1"], "stsb": ["train.epochs=2"]}.get(task, [])
    if task == "sst2" and encoder == "default" and options.sst2_examples:
        found += [f"data.max_train_examples={options.sst2_examples}"]
    return tuple(found)


def run_cell(cell: Cell, options: argparse.Namespace) -> None:
    """Train a cell, unless it has been."""
    folder = cell.folder(options.runs)
    if (folder / "results.json").is_file():
        return
    words = cell.arguments(options.runs)
    words += ["--resume"] if (folder / "config.yaml").is_file() else []
    words += ["--cpus", "1"] if options.jobs > 1 else []
    print(f"training {folder.name}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "qpipe.cli", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(cpu_cores() // options.jobs or 1)} if options.jobs > 1 else None,
        )
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(words)} failed; see {log.name}")


def train_all(wanted: list[Cell], options: argparse.Namespace) -> None:
    """Train every cell, each after its teacher, and write the table after each."""
    with ThreadPoolExecutor(options.jobs) as pool:
        for teachers in (True, False):
            batch = [cell for cell in wanted if (cell.variant == TEACHER) == teachers]
            for _ in pool.map(lambda cell: run_cell(cell, options), batch):
                write(render(options))


def read(cell: Cell, root: Path) -> dict[str, object] | None:
    """The results of a cell, None if it has not been trained."""
    path = cell.folder(root) / "results.json"
    return json.loads(path.read_text()) if path.is_file() else None


def render(options: argparse.Namespace) -> str:
    """The table, from whatever cells there are."""
    lines = [
        "| task | encoder | scheme | metric | mean ± s.d. (seeds) | packed reload | file, MB | bits per weight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[dict[str, object]]] = {}
    for cell in cells(options):
        found = read(cell, options.runs)
        if found is not None:
            groups.setdefault((cell.encoder, cell.task, cell.variant), []).append(found)
    for (encoder, task, variant), found in groups.items():
        lines.append(row(encoder, task, variant, found))
    return "\n".join(lines)


def row(encoder: str, task: str, variant: str, found: list[dict[str, object]]) -> str:
    """One line of the table."""
    metric = next(iter(found[0]["evaluation"]))
    values = [r["evaluation"][metric] for r in found]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    reloaded = [r["reloaded"].get(metric) for r in found if r.get("reloaded")]
    packed = f"{statistics.mean(reloaded):.3f}" if reloaded else "-"
    size = found[0].get("size")
    megabytes = f"{size['file_bytes'] / 1e6:.2f} of {size['full_precision_bytes'] / 1e6:.2f}" if size else "-"
    bits = f"{size['bits_per_weight']:.2f}" if size else "-"
    mean = f"{statistics.mean(values):.3f}{spread} ({len(values)})"
    return f"| {task} | {encoder} | {variant} | {metric} | {mean} | {packed} | {megabytes} | {bits} |"


def write(table: str) -> None:
    """Put the table between the markers of the document."""
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{START}\n{table}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with TASK/train.parquet; default: the hub")
    parser.add_argument("--small", type=Path, help="folder of the small encoder")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--encoders", nargs="+", choices=("small", "default"), default=["small", "default"])
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, each in one CPU process")
    parser.add_argument("--small-seeds", type=int, default=3)
    parser.add_argument("--default-seeds", type=int, default=1)
    parser.add_argument("--sst2-examples", type=int, help="cap on SST-2 training examples of the default encoder")
    parser.add_argument("--render-only", action="store_true", help="write the table from what is there")
    options = parser.parse_args()
    if "small" in options.encoders and options.small is None:
        parser.error("--encoders small needs --small FOLDER")
    for path in ("data", "small", "runs"):
        if getattr(options, path) is not None:
            setattr(options, path, Path(getattr(options, path)))
    if not options.render_only:
        train_all(list(cells(options)), options)
    write(render(options))


if __name__ == "__main__":
    main()
