"""The plugin `kure`: a kurtosis penalty on the weights that will be quantized."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qpipe import ModelError, Moments, Options, Plugin, ReportSection, Run, TrainingError, WeightLoss, hookimpl
from qpipe_kure.penalty import kurtosis, kurtosis_penalty
from qpipe_kure.report import FILE, read, sections
from qpipe_kure.selection import Candidate, matching, select, table

logger = logging.getLogger("qpipe.kure")


class KureOptions(Options):
    """Options of `kure`."""

    target: float = Field(1.8, ge=1, description="kurtosis aimed at: 1.8 is a uniform distribution, 3 a normal one")
    weight: float = Field(0.1, ge=0, description="factor of the penalty in the loss (lambda)")
    penalty: Literal["squared", "linear"] = Field(
        "squared", description="`squared`: (K - target)^2; `linear`: K itself"
    )
    reduction: Literal["mean", "sum"] = Field("mean", description="how the penalties of several weights combine")
    every: int = Field(
        1, ge=1, description="evaluate in every n-th optimizer step only, with n times the weight; saves its cost"
    )
    include: tuple[str, ...] = Field(
        (), description="patterns over module paths; default: every quantized weight except embeddings"
    )
    exclude: tuple[str, ...] = Field((), description="patterns over module paths to leave out")
    skip_above: float | None = Field(
        10.0, gt=0, description="leave out weights whose kurtosis before training is larger; null leaves out none"
    )


def measured(run: Run, path: str) -> float:
    """Kurtosis of a module's weight, of what it stands for where it is stored in another form; NaN if it is constant.

    Raises:
        ModelError: the weight is not finite.
    """
    weight = run.student.get_parameter(f"{path}.weight").detach()
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"the weight of {path} holds NaN or infinity before training; load another checkpoint")
    quantizer = run.instruments.quantizers().get(f"{path}:weight")
    with torch.no_grad():
        return kurtosis(weight if quantizer is None else quantizer.master(weight))


class Kure(Plugin):
    """Pulls the kurtosis of weights towards that of a uniform distribution, which quantizes well at any bit width."""

    Options = KureOptions

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.candidates: tuple[Candidate, ...] = ()

    def penalty(self, m: Moments) -> Tensor:
        """The penalty on each of several weights, `[weights]`."""
        return kurtosis_penalty(m, self.options.target, self.options.penalty == "squared")

    def weights(self, run: Run) -> dict[str, str]:
        """Module paths of all weights that can be quantized, with why each is left out; empty for those to choose from.

        Those are what `include` selects; if it is empty, the quantized weights without embeddings.

        Raises:
            SiteError: a pattern matches nothing.
        """
        sites = run.instruments.sites.values()
        paths = [site.path for site in sites if site.slot == "weight" and not site.by_name]
        if self.options.include:
            included = set(matching(paths, self.options.include, "include"))
            return {path: "" if path in included else "not included by pattern" for path in paths}
        planned = {entry.site.path for entry in run.plan.sites.values() if entry.site.slot == "weight"}

        def reason(path: str) -> str:
            if path not in planned:
                return "not quantized"  # a weight that is tied to a quantized one is regularized once, there
            return "embedding" if isinstance(run.student.get_submodule(path), nn.Embedding) else ""

        return {path: reason(path) for path in paths}

    @hookimpl
    def qpipe_weight_losses(self, run: Run) -> Iterable[WeightLoss]:
        """Measure all weights while they are whole on every process, and penalise the selected ones."""
        options = self.options
        recorded = read(run.out / FILE) if run.trained else None
        if recorded is not None:  # A finished run, loaded for evaluation or export: its weights are trained ones.
            self.candidates = tuple(Candidate(**entry) for entry in recorded["weights"])
        else:
            measure = partial(measured, run)
            self.candidates = tuple(select(self.weights(run), options.exclude, options.skip_above, measure))
            if run.engine.rank == 0:
                logger.info("%s", table(self.candidates))
        chosen = frozenset(c.name for c in self.candidates if not c.left_out)
        yield WeightLoss(
            "kure",
            self.penalty,
            options.weight,
            chosen.__contains__,
            options.reduction,
            options.every,
            moments=True,
        )

    def _record(self) -> dict[str, Any]:
        options = self.options.model_dump(mode="json")
        return {"options": options, "weights": [c.to_json() for c in self.candidates]}

    @hookimpl
    def qpipe_run_start(self, run: Run) -> None:
        """Leave the table in the run directory, for the report."""
        if run.engine.rank == 0:
            temporary = run.out / f".{FILE}.tmp"
            temporary.write_text(json.dumps(self._record(), indent=1), encoding="utf-8")
            temporary.replace(run.out / FILE)

    @hookimpl
    def qpipe_state(self, run: Run) -> Mapping[str, Any]:
        """The table, measured before the first step."""
        return {"weights": [c.to_json() for c in self.candidates]}

    @hookimpl
    def qpipe_restore(self, run: Run, state: Mapping[str, Any]) -> None:
        """Take the first start's table; what is regularized must not change within a training.

        Raises:
            TrainingError: another set of weights is selected now.
        """
        before = tuple(Candidate(**entry) for entry in state["weights"])
        then, now = ({c.name for c in cs if not c.left_out} for cs in (before, self.candidates))
        if then != now:
            changed = sorted(then ^ now)
            raise TrainingError(
                f"kure: the resumed run would regularize other weights than before ({changed[0]!r} and "
                f"{len(changed) - 1} more differ); resume with the options and model it was started with"
            )
        self.candidates = before

    @hookimpl
    def qpipe_export_metadata(self, run: Run) -> Mapping[str, Any]:
        """Options, and kurtosis before training of every weight."""
        return self._record()

    @hookimpl
    def qpipe_report_sections(self, run_dir: Path) -> Iterable[ReportSection]:
        """Kurtosis of each weight before and after training, and sensitivity to the step size."""
        yield from sections(Path(run_dir))
