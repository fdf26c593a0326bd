"""Reading what a run leaves in its directory. A missing file is None; a damaged one is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from qpipe.config import read_yaml
from qpipe.errors import CheckpointError, ConfigError

METRICS_FILE = "metrics.jsonl"
VARIANTS_FILE = "variants.json"
ANALYSIS_FOLDER = "analysis"
COMPARED_FILE = "compared.json"


class PlanEntry(BaseModel):
    """One line of `plan.json`: what sits at a site."""

    site: str
    quantizer: str
    options: dict[str, Any] = {}
    bits: float | None = None
    granularity: str | None = None


class Histogram(BaseModel):
    """Counts between edges; one more edge than counts."""

    edges: list[float]
    counts: list[int]


class TensorStatistics(BaseModel):
    """One entry of `tensors.json`, as `qpipe.report.statistics.weight_statistics` makes it."""

    name: str
    bits: float
    sqnr_db: float | None = None
    kurtosis: float | None = None
    histogram: Histogram | None = None
    code_counts: dict[str, int] | None = None
    shape: list[int] | None = None
    granularity: str | None = None


class SizeResult(BaseModel):
    """Bytes of the packed weights and of the same weights in full precision; bits per weight: of those that are
    quantized, and of all, scales included.
    """

    file_bytes: float | None = None
    full_precision_bytes: float | None = None
    full_precision_dtype: str | None = None
    quantized_bits_per_weight: float | None = None
    bits_per_weight: float | None = None


class Results(BaseModel):
    """`results.json`. Metrics by name; None where a stage has not run."""

    teacher: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    reloaded: dict[str, Any] | None = None
    size: SizeResult | None = None
    seconds: dict[str, float] | None = None


class VariantPoint(BaseModel):
    """One evaluation of a sweep; see `qpipe.stages.sweep.Point`."""

    variant: str
    value: float | None = None
    activations: bool = False
    metrics: dict[str, float]


class Variants(BaseModel):
    """`variants.json`, as `qpipe evaluate --variants` writes it."""

    metric: str
    higher_is_better: bool = True
    examples: int
    bits: float | None = None
    sites: list[str]
    fixed: list[str] = []
    open_ended: bool = False
    points: list[VariantPoint]
    compared: list[str] = []

    def comparable(self, other: Variants) -> bool:
        """True if both sweeps measured the same: metric, number of examples, and how steps were counted."""
        return all(getattr(self, key) == getattr(other, key) for key in ("metric", "examples", "open_ended"))


def read_config(run_dir: Path) -> dict[str, Any]:
    """The configuration of a run as a mapping; not validated, so that runs of older versions can be read.

    Raises:
        ConfigError: the folder is no run directory, or its `config.yaml` is no YAML mapping.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        what = "has no config.yaml" if Path(run_dir).is_dir() else "is not a folder"
        raise ConfigError(
            f"{str(run_dir)!r} {what}, so it is not a run directory; a run directory is the folder that "
            "`qpipe launch --out DIR` writes (config.yaml, plan.json, metrics.jsonl, results.json, export/)"
        )
    config = read_yaml(path.read_text(encoding="utf-8"), str(path))
    plugins = config.get("plugins") or {}
    if not isinstance(plugins, Mapping) or not all(isinstance(v or {}, Mapping) for v in plugins.values()):
        raise ConfigError(f"{path}: plugins must map names to options, not {plugins!r}")
    return {**config, "plugins": {str(name): dict(options or {}) for name, options in plugins.items()}}


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if it does not exist.

    Raises:
        CheckpointError: the file is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); write it again by repeating the run") from error


def _validated(path: Path, model: Any) -> Any:
    value = read_json(path)
    if value is None:
        return None
    try:
        return TypeAdapter(model).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {where}: {first['msg']}, got {first.get('input')!r:.80}") from error


def read_plan(run_dir: Path) -> list[PlanEntry] | None:
    """`plan.json`, or None. Raises `CheckpointError` if it is damaged."""
    plan: list[PlanEntry] | None = _validated(Path(run_dir) / "plan.json", list[PlanEntry])
    return plan


def read_tensors(run_dir: Path) -> list[TensorStatistics] | None:
    """`tensors.json`, or None. Raises `CheckpointError` if it is damaged."""
    tensors: list[TensorStatistics] | None = _validated(Path(run_dir) / "tensors.json", list[TensorStatistics])
    return tensors


def read_results(run_dir: Path) -> Results | None:
    """`results.json`, or None. Raises `CheckpointError` if it is damaged."""
    results: Results | None = _validated(Path(run_dir) / "results.json", Results)
    return results


def read_variants(run_dir: Path) -> Variants | None:
    """`variants.json`, or None. Raises `CheckpointError` if it is damaged."""
    variants: Variants | None = _validated(Path(run_dir) / VARIANTS_FILE, Variants)
    return variants


def read_metrics(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a `metrics.jsonl`, or None if there is no such file.

    A last line that is cut off, as a killed process leaves it, is not a row.

    Raises:
        CheckpointError: another line is not a JSON object with `step` and `kind`.
    """
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or "kind" not in row:
            raise CheckpointError(f"{path}, line {number}: expected an object with step and kind, got {line:.80}")
        rows.append(row)
    return rows


def numbers(values: Mapping[str, Any] | None) -> dict[str, float]:
    """The entries that are numbers, in their order."""
    items = (values or {}).items()
    return {k: float(v) for k, v in items if isinstance(v, int | float) and not isinstance(v, bool)}
