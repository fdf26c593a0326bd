"""Every hook, in the order of a run. This file is the manual; `docs/hooks.md` is generated from it.

How results combine:

* **all**: the results of every plugin, flattened; names are unique, and a clash is an error that names both plugins.
* **first**: the first result that is not None; the built-ins come last, so that a plugin can stand in for them.
* **event**: called for its effect; what it returns is ignored.

An implementation takes any subset of a hook's arguments. Plugins are called in the order of `--plugins`; nothing
numeric depends on it. An exception carries the name and version of the plugin it came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qpipe.plugin import hookspec

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from qpipe import types
    from qpipe.config import ModelConfig, RunConfig
    from qpipe.data.loading import TaskData
    from qpipe.engine.base import Engine
    from qpipe.run import Run, Step


class Specs:
    """The hooks. Each method is a specification: its arguments are what implementations may ask for."""

    # --- build ------------------------------------------------------------------------------------------------------

    @hookspec(firstresult=True)
    def qpipe_load_model(self, spec: ModelConfig, task: types.Task, num_labels: int, strict: bool) -> nn.Module | None:
        """Load a model (first). Called for the student and for the teacher.

        Args:
            spec: where it is, in the form of the `model` section of the configuration; and whether its weights are to
                be random (`weights`), from torch's global generator, which is seeded.
            task: what the model has to predict.
            num_labels: size of the head, 1 for regression, 0 for language models.
            strict: True for a teacher: refuse a checkpoint whose head is missing or of another size.
        """

    @hookspec(firstresult=True)
    def qpipe_model_map(self, model: nn.Module) -> types.ModelMap | None:
        """Say where blocks, attention and head of a model are (first). None if the model is of an unknown family."""

    @hookspec
    def qpipe_tasks(self) -> Iterable[types.Task]:  # type: ignore[empty-body]
        """Offer tasks (all)."""

    @hookspec(firstresult=True)
    def qpipe_training_data(
        self, config: RunConfig, task: types.Task, data: TaskData, engine: Engine
    ) -> TaskData | None:
        """Change what is trained on, and for how long (first). Collective, before the student is built.

        It is called again when a run resumes and must then give the same data. A teacher is fine-tuned on what the
        configuration names, and finished runs are evaluated and exported without it.

        Args:
            config: the resolved configuration.
            task: what is learned.
            data: the processed splits, and the training texts where there are any. Return
                `dataclasses.replace(data, train=data.text.encode(rows, labels), steps=optimizer_steps)`.
            engine: the processes, their device, and how they talk to each other.
        """

    # --- prepare ----------------------------------------------------------------------------------------------------

    @hookspec
    def qpipe_quantizers(self) -> Iterable[types.QuantizerKind]:  # type: ignore[empty-body]
        """Offer quantizers that rules can name (all)."""

    @hookspec
    def qpipe_range_estimators(self) -> Iterable[types.RangeEstimatorKind]:  # type: ignore[empty-body]
        """Offer estimators of activation ranges that options of quantizers can name (all)."""

    @hookspec(firstresult=True)
    def qpipe_quantize_module(self, module: nn.Module) -> type[nn.Module] | None:
        """Name the class that hosts quantizers in place of this module's class (first).

        The class must derive from `qpipe.QuantModule` and from the module's own class, and keep its parameter names.
        Its `forward` calls `before`, `apply_weight` and `after`; see there.
        """

    @hookspec
    def qpipe_quant_rules(self, run: Run, sites: tuple[types.Site, ...]) -> Iterable[types.Rule]:  # type: ignore[empty-body]
        """Contribute quantization rules (all).

        The user's own rules come after them, and the last match wins; see `Rule` for rules of one source.
        """

    @hookspec
    def qpipe_weight_losses(self, run: Run) -> Iterable[types.WeightLoss]:  # type: ignore[empty-body]
        """Contribute penalties on weights (all). Exact under every ZeRO stage."""

    @hookspec
    def qpipe_training_phases(self, run: Run) -> Iterable[types.TrainingPhase]:  # type: ignore[empty-body]
        """Put parts before the training that are trainings of their own (all), within `run.total_steps`.

        They follow one another in plugin order; the rest of the training comes last, with the configured learning rate
        and warm-up. `run.phases` holds them all, with their first steps, from `qpipe_model_prepared` on.

        Before a plugin changes the data, the run is prepared once to find errors, and `run.total_steps` is a number
        that no training reaches unless `train.max_steps` says what it will be.
        """

    @hookspec
    def qpipe_model_prepared(self, run: Run) -> None:
        """The quantizers are in place and the engine has not wrapped the model yet (event): add taps here."""

    @hookspec
    def qpipe_param_groups(self, run: Run) -> Iterable[types.ParamGroup]:  # type: ignore[empty-body]
        """Give some parameters their own learning rate or weight decay (all)."""

    @hookspec(firstresult=True)
    def qpipe_optimizer(self, run: Run, groups: list[dict[str, Any]]) -> Optimizer | None:
        """Make the optimizer (first). `groups` is what `torch.optim` optimizers take."""

    @hookspec(firstresult=True)
    def qpipe_scheduler(self, run: Run, optimizer: Optimizer) -> LRScheduler | None:
        """Make the learning-rate schedule (first), stepped once per optimizer step.

        `run.total_steps` is its length, and `run.phases` are the parts that have a schedule of their own.
        """

    # --- calibrate --------------------------------------------------------------------------------------------------

    @hookspec
    def qpipe_calibration(self, run: Run) -> Iterable[types.CalibrationPass]:  # type: ignore[empty-body]
        """Ask for passes over calibration data (all), run one after another in plugin order.

        The host sets static ranges of activations first, so that the model can run. Weights may be partitioned already.
        """

    # --- train ------------------------------------------------------------------------------------------------------

    @hookspec
    def qpipe_losses(self, run: Run) -> Iterable[types.Loss]:  # type: ignore[empty-body]
        """Contribute loss terms (all). Called once, when training starts, and when a run is prepared to find errors."""

    @hookspec
    def qpipe_run_start(self, run: Run) -> None:
        """Training is about to start, or to resume (event)."""

    @hookspec
    def qpipe_step_start(self, run: Run, step: Step) -> None:
        """A micro-batch is about to go forward (event): change phase here."""

    @hookspec
    def qpipe_signals(self, run: Run) -> types.Signals | None:
        """Say which tensors of student and teacher this step needs (all, united).

        Called after `qpipe_step_start`; and before any step, while `run.step` is None, when the run is prepared once to
        find errors: then say what any step will need.
        """

    @hookspec
    def qpipe_step_end(self, run: Run, step: Step, metrics: Mapping[str, float]) -> None:
        """An optimizer step has been taken (event).

        Args:
            run: the run.
            step: the last micro-batch of the optimizer step.
            metrics: `loss`, its parts, `grad_norm`, `lr` and `samples_per_second`; empty on steps that are not logged.
        """

    @hookspec
    def qpipe_evaluated(self, run: Run, metrics: Mapping[str, float]) -> None:
        """An evaluation during the training has ended (event); the run's result follows in `qpipe_run_end`."""

    @hookspec
    def qpipe_state(self, run: Run) -> Mapping[str, Any] | None:
        """Return what a checkpoint must hold of the plugin (all, kept by plugin name).

        Tensors, numbers, strings, None, and dicts, lists and tuples of these: other objects are refused when the first
        checkpoint is written, as none is read that could run code.
        """

    @hookspec
    def qpipe_restore(self, run: Run, state: Mapping[str, Any]) -> None:
        """Take back what `qpipe_state` of the same plugin returned (event).

        Called when a checkpoint is read: on resume, and at the end of a training that returns to its best step.
        """

    @hookspec
    def qpipe_run_end(self, run: Run) -> None:
        """Training has ended (event)."""

    @hookspec
    def qpipe_run_error(self, run: Run, error: BaseException) -> None:
        """The run failed (event). What an implementation raises is noted on that error, not raised."""

    # --- export and report ------------------------------------------------------------------------------------------

    @hookspec
    def qpipe_exporters(self) -> Iterable[types.Exporter]:  # type: ignore[empty-body]
        """Offer file formats (all)."""

    @hookspec
    def qpipe_export_metadata(self, run: Run) -> Mapping[str, types.Json] | None:
        """Return what the exported metadata should say about the plugin's work (all, kept by plugin name)."""

    @hookspec
    def qpipe_report_sections(self, run_dir: Path) -> Iterable[types.ReportSection]:  # type: ignore[empty-body]
        """Add sections to the HTML report of a finished or running run (all, by title)."""
