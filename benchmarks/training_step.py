"""How much longer a training step takes with quantization: `python -m benchmarks.training_step`.

Both sides of a comparison live in one process and take turns, in alternating order, so that a change of the machine's
load meets both. A ratio is formed within each pair of neighbouring steps; the table gives the median of these ratios
and their quartiles, for elapsed time and for the processor time of this process, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.document import environment, markdown, plain_table, write_between_markers
from benchmarks.sides import BLOCK_INPUTS, BLOCK_WEIGHTS, Spec, make_side, missing_plugins

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
FULL = Spec()


def weights(quantizer: str = "uniform", **options: Any) -> tuple[dict[str, Any], ...]:
    """A rule for the weight of every linear map in the blocks."""
    return ({"site": BLOCK_WEIGHTS, "quantizer": quantizer, "options": options},)


def four_bits(**options: Any) -> tuple[dict[str, Any], ...]:
    """`uniform` at 4 bits."""
    return weights(bits=4, **options)


def activations(quantizer: str, site: str = BLOCK_INPUTS) -> tuple[dict[str, Any], ...]:
    """A rule for 8-bit activations."""
    return ({"site": site, "quantizer": quantizer, "options": {"bits": 8}},)


W4 = Spec(rules=four_bits())
KURE = replace(W4, plugins={"kure": {}})
A8 = activations("uniform-activation")
EMBEDDING = ({"site": "{embedding}:weight", "quantizer": "uniform", "options": {"bits": 8}},)
OUTPUTS = activations("affine-activation", "{outputs}")
WITH_TEACHER = replace(FULL, kind="train+teacher")
TERNARY_A8 = Spec(kind="train+teacher", rules=A8)


def learned(bits: int) -> Spec:
    """Every weight and every activation with a learned range for the tensor, as in `examples/activations`."""
    options = {"granularity": "tensor", "init": "min-max", "grad_scale": "none"}
    every = {"site": "*:weight", "quantizer": "lsq", "options": {"bits": bits, **options}}
    norms = {"site": "{norm}:weight", "quantizer": "lsq", "options": {"bits": 8, **options}}
    return Spec(rules=(every, norms, *OUTPUTS))


def ternary_with(name: str, **options: Any) -> Spec:
    """Ternary weights, 8-bit inputs, and a plugin that learns from the teacher."""
    return replace(TERNARY_A8, plugins={"ternary-twn": {}, name: options})


@dataclass(frozen=True)
class Case:
    """A comparison: what is measured, against what."""

    key: str
    title: str
    side: Spec
    against: Spec = FULL
    baseline: str = "full precision"


CASES = (
    Case("channel", "4-bit weights per channel, compiled", W4),
    Case("channel-eager", "4-bit weights per channel, eager", replace(W4, compile="off")),
    Case("group", "4-bit weights in groups of 64", replace(W4, rules=four_bits(granularity="group", group_size=64))),
    Case("tensor", "4-bit weights per tensor", replace(W4, rules=four_bits(granularity="tensor"))),
    Case("asymmetric", "4-bit weights per channel, asymmetric", replace(W4, rules=four_bits(symmetric=False))),
    Case("static", "4-bit weights per channel on a fixed grid (`uniform-static`)",
         Spec(rules=weights("uniform-static", bits=4))),
    Case("w4a8", "4-bit weights, 8-bit inputs per token", replace(W4, rules=four_bits() + A8)),
    Case("w8a8", "8-bit weights and outputs, static (`w8a8-outputs`: 57 activations)", Spec(preset="w8a8-outputs")),
    Case("w4a8-outputs", "4-bit weights, 8-bit outputs, static (57 activations)",
         Spec(preset="a8-outputs", rules=four_bits())),
    Case("w8a8-learned", "8-bit weights and outputs, learned ranges (57 activations)", learned(8)),
    Case("w4a8-learned", "4-bit weights and 8-bit outputs, learned ranges (57 activations)", learned(4)),
    *(Case(name, f"8-bit inputs of all linear maps, learned (`{name}`)", Spec(rules=activations(name)))
      for name in ("lsq-activation", "lsq+-activation", "affine-activation")),
    *(Case(name, f"8-bit outputs of activation functions (`{name}`)", Spec(rules=activations(name, "{ffn_activation}")))
      for name in ("pact", "dorefa-activation")),
    Case("embedding", "4-bit weights, 8-bit embedding per row", replace(W4, rules=four_bits() + EMBEDDING)),
    Case("lsq", "4-bit weights per channel with learned steps (`lsq`)", Spec(rules=weights("lsq", bits=4))),
    Case("lsq+", "4-bit weights per channel, `lsq+`", Spec(rules=weights("lsq+", bits=4))),
    Case("lsq-eager", "`lsq`, eager", Spec(rules=weights("lsq", bits=4), compile="off")),
    Case("dorefa", "4-bit weights per tensor (`dorefa`)", Spec(rules=weights("dorefa", bits=4))),
    Case("binary", "1-bit weights per channel (`binary`)", Spec(rules=weights("binary"))),
    Case("laq", "2-bit weights per channel (`laq`)", Spec(rules=weights("laq", bits=2))),
    Case("ternary", "ternary weights (`ternary-twn`)", Spec(plugins={"ternary-twn": {}})),
    Case("sqwq", "4-bit squashed weights (`sqwq`)", Spec(plugins={"sqwq": {}})),
    Case("accumulation", "4-bit weights per channel, 4 micro-batches of 2", replace(W4, micro_batches=4),
         replace(FULL, micro_batches=4), "full precision, 4 micro-batches of 2"),
    Case("kure", "4-bit weights per channel with `kure`", KURE, W4, "4-bit weights per channel"),
    Case("kure-32", "4-bit weights per channel with `kure`, batch of 32", replace(KURE, batch=32),
         replace(W4, batch=32), "4-bit weights per channel, batch of 32"),
    Case("ti-g", "4-bit weights and `ti-g`, first phase", replace(W4, kind="train+teacher", plugins={"ti-g": {}}),
         WITH_TEACHER, "full precision and a teacher's forward pass"),
    Case("ternary-a8", "ternary weights, 8-bit inputs per token", Spec(rules=A8, plugins={"ternary-twn": {}})),
    Case("ti-g-ternary", "ternary weights, 8-bit inputs and `ti-g`, first phase", ternary_with("ti-g"),
         WITH_TEACHER, "full precision and a teacher's forward pass"),
    Case("ternarybert", "ternary weights, 8-bit inputs and `distillation`, preset `ternarybert`",
         ternary_with("distillation", preset="ternarybert"),
         WITH_TEACHER, "full precision and a teacher's forward pass"),
    Case("ti-m-ternary", "ternary weights, 8-bit inputs and `ti-m`", ternary_with("ti-m"),
         WITH_TEACHER, "full precision and a teacher's forward pass"),
    *(Case(f"{key}-recipe", f"ternary weights, 8-bit operands of all products (`a8-inputs`) and {title}",
           replace(ternary_with(plugin, **options), rules=(), preset="a8-inputs"),
           WITH_TEACHER, "full precision and a teacher's forward pass")
      for key, title, plugin, options in (
          ("ti-g", "`ti-g`, first phase", "ti-g", {}),
          ("ti-m", "`ti-m`", "ti-m", {}),
          ("ternarybert", "`distillation`, preset `ternarybert`", "distillation", {"preset": "ternarybert"}),
      )),
    Case("evaluate", "evaluation forward, 4-bit weights per channel", replace(W4, kind="evaluate"),
         replace(FULL, kind="evaluate"), "full precision, evaluation forward"),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Times of one comparison.

    Attributes:
        key, title, baseline: of the case.
        dtype: of parameters and activations.
        seconds: of each step of the measured side.
        baseline_seconds: of each step of the other side, pair by pair.
        cpu_seconds, baseline_cpu_seconds: processor time of the same steps, over all threads.
    """

    key: str
    title: str
    baseline: str
    dtype: str
    seconds: tuple[float, ...]
    baseline_seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    baseline_cpu_seconds: tuple[float, ...]

    def summary(self) -> dict[str, Any]:
        """Median and quartiles of the ratios, and median times in milliseconds."""
        low, middle, high = ratio_quartiles(self.seconds, self.baseline_seconds)
        cpu = ratio_quartiles(self.cpu_seconds, self.baseline_cpu_seconds)
        times = {"ms": self.seconds, "baseline_ms": self.baseline_seconds}
        return {
            "ratio": middle,
            "quartiles": [low, high],
            "cpu_ratio": cpu[1],
            "cpu_quartiles": [cpu[0], cpu[2]],
            "pairs": len(self.seconds),
            **{name: 1e3 * statistics.median(values) for name, values in times.items()},
        }


def ratio_quartiles(measured: Sequence[float], baseline: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratios, pair by pair."""
    ratios = [a / b for a, b in zip(measured, baseline, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def timed(step: Callable[[], None]) -> tuple[float, float]:
    """Elapsed seconds and processor seconds of one step."""
    started, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - started, time.process_time() - cpu


def compare(case: Case, dtype: str, pairs: int, warm_up: int, layers: int) -> Result:
    """Build both sides, warm them up, and let them take turns."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        measured = make_side(case.side, DTYPES[dtype], layers, out / "measured")
        other = make_side(case.against, DTYPES[dtype], layers, out / "baseline")
        for _ in range(warm_up):
            measured(), other()
        gc.collect()
        gc.disable()  # A collection within one of two steps would be counted against it.
        try:
            times: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
            for number in range(pairs):
                turns = (measured, 0), (other, 1)
                for step, slot in turns if number % 2 == 0 else reversed(turns):
                    times[slot].append(timed(step))
        finally:
            gc.enable()
    (wall, cpu), (other_wall, other_cpu) = (tuple(zip(*side, strict=True)) for side in times)
    return Result(case.key, case.title, case.baseline, dtype, wall, other_wall, cpu, other_cpu)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--cases", nargs="+", choices=[c.key for c in CASES], default=[c.key for c in CASES])
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps, at least 2")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each side before the first pair")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write every time measured to this file")
    parser.add_argument("--reuse", type=Path, nargs="+", default=[], help="measure nothing; take these --json files")
    parser.add_argument("--markdown", action="store_true", help=f"write the table into docs/{DOCUMENT.name}")
    options = parser.parse_args(arguments)
    if options.pairs < 2 or options.warm_up < 1 or options.threads < 1 or options.layers < 1:
        parser.error("--pairs must be 2 or more; --warm-up, --threads and --layers 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    torch.set_num_threads(options.threads)
    if options.reuse:
        measured = [json.loads(path.read_text()) for path in options.reuse]
    else:
        rows = measure(options)
        measured = [{"environment": environment(given, options.threads), "results": rows}]
    if options.json:
        options.json.write_text(json.dumps(measured[0], indent=1))
    if options.markdown:
        texts = [markdown(part["results"], part["environment"]) for part in measured]
        write_between_markers(DOCUMENT, "\n\n".join(texts))
        print(f"written: {DOCUMENT}")
    return 0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case asked for whose plugins are installed, each printed when it is done."""
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        for case in (case for case in CASES if case.key in options.cases):
            missing = missing_plugins((case.side, case.against))
            if missing:
                print(f"left out: {case.title}: plugin {', '.join(sorted(missing))} is not installed", file=sys.stderr)
                continue
            result = compare(case, dtype, options.pairs, options.warm_up, options.layers)
            rows.append({**asdict(result), **result.summary()})
            print(plain_table(rows[-1:], heading=len(rows) == 1), flush=True)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
