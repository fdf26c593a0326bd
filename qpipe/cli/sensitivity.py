"""What `qpipe inspect sensitivity` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qpipe.cli.evaluate import parse_bits
from qpipe.cli.output import print_json, print_table

if TYPE_CHECKING:
    from qpipe.run import Run
    from qpipe.stages.budget import Budget
    from qpipe.stages.sensitivity import Choice, Sensitivity
    from qpipe.stages.sizes import FixedSize


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; see the options of `qpipe inspect sensitivity`."""

    source: Path
    bits: str
    examples: int
    sites: tuple[str, ...]
    budget: str | None
    out: Path | None
    format: str | None


def inspect_sensitivity(request: Request, plugins: Sequence[str], overrides: Sequence[str], as_json: bool) -> None:
    """Measure, choose where there is a budget, print, and write the plan where it is asked for."""
    from qpipe.files import require_writable
    from qpipe.launching.worker import quiet_libraries

    widths = parse_bits(request.bits)
    if request.out is not None:
        require_writable(request.out, "--out")
    quiet_libraries()
    from qpipe.config import resolve
    from qpipe.stages.budget import parse_budget, require_possible
    from qpipe.stages.sensitivity import load, measure
    from qpipe.stages.sizes import fixed_size, stored_sizes

    limit = parse_budget(request.budget) if request.budget else None
    source = request.source
    run = load(source if source.is_dir() else resolve(source, overrides, plugins))
    sizes = stored_sizes(run, widths, request.sites, request.format)
    fixed = fixed_size(run, sizes, request.format)
    if limit is not None:
        require_possible((at.values() for at in sizes.values()), limit, fixed)
    found = measure(run, sizes, request.examples, _tell)
    chosen: list[Choice] = []
    summary: dict[str, Any] = {"loss": found.loss, "examples": found.examples}
    if limit is not None:
        chosen, outcome = _choose(run, found, limit, fixed)
        summary |= outcome
    if request.out is not None:
        _write(run, chosen, request, summary)
    if as_json:
        choices = {site: [asdict(choice) for choice in row] for site, row in found.choices.items()}
        print_json({**summary, "sites": choices, "chosen": {choice.site: choice.bits for choice in chosen}})
        return
    _print(found, widths, chosen, summary)
    if request.out is not None:
        typer.echo(f"plan: {request.out}; use it with --set quantization.plan={request.out}")


def _tell(choice: Choice) -> None:
    typer.echo(f"{choice.site}, {choice.bits} bits: loss {choice.increase:+.5f}", err=True)


def _choose(run: Run, found: Sensitivity, limit: Budget, fixed: FixedSize) -> tuple[list[Choice], dict[str, Any]]:
    from qpipe.stages.budget import choose
    from qpipe.stages.sensitivity import together

    chosen = choose(found.choices, limit, fixed)
    stored = sum(choice.stored for choice in chosen)
    return chosen, {
        "budget": f"{limit.value:g} {limit.unit}",
        "size": limit.describe(stored, fixed),
        "bits_per_weight": 8 * (stored + fixed.quantized) / fixed.weights,
        "file_bytes": stored + fixed.total,
        "sum_of_increases": sum(choice.increase for choice in chosen),
        "increase_together": together(run, chosen, found.examples),
    }


def _print(found: Sensitivity, widths: Sequence[int], chosen: list[Choice], summary: dict[str, Any]) -> None:
    picked = {choice.site: choice.bits for choice in chosen}
    rows = []
    for site, choices in found.choices.items():
        rows.append([site, *(f"{choice.increase:+.5f}" for choice in choices), *([picked[site]] if picked else [])])
    print_table(("site", *(f"{width} bits" for width in widths), *(["chosen"] if picked else [])), rows)
    typer.echo(f"loss in full precision: {found.loss:.5f}, on {found.examples} training examples")
    if picked:
        typer.echo(
            f"chosen for {summary['budget']}: {summary['size']} ({summary['bits_per_weight']:.3f} bits per quantized "
            f"weight, file at most {summary['file_bytes'] / 1e6:.3f} MB)"
        )
        typer.echo(
            f"loss increase: sum {summary['sum_of_increases']:+.5f}, measured together "
            f"{summary['increase_together']:+.5f}"
        )


def _write(run: Run, chosen: list[Choice], request: Request, summary: dict[str, Any]) -> None:
    from qpipe.config import yaml_text
    from qpipe.files import write_text
    from qpipe.stages.sensitivity import rules

    assert request.out is not None
    head = (
        f"# Written by qpipe inspect sensitivity {request.source} --bits {request.bits} --budget {request.budget}\n"
        f"# {summary['examples']} training examples; {summary['bits_per_weight']:.3f} bits per quantized weight, "
        f"file at most {summary['file_bytes']} bytes\n"
    )
    request.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(request.out, head + yaml_text({"quantization": {"rules": rules(run, chosen)}}))
