"""qpipe: quantization-aware training on DeepSpeed and Accelerate.

The names below are all that plugins may use, beside `qpipe.testing`. They are loaded on first use, so that importing
qpipe costs nothing and the command line starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Plugin": "qpipe.plugin",
    "Options": "qpipe.plugin",
    "hookimpl": "qpipe.plugin",
    "QpipeError": "qpipe.errors",
    "ConfigError": "qpipe.errors",
    "PluginError": "qpipe.errors",
    "SiteError": "qpipe.errors",
    "ModelError": "qpipe.errors",
    "DataError": "qpipe.errors",
    "TrainingError": "qpipe.errors",
    "CheckpointError": "qpipe.errors",
    "FormatError": "qpipe.errors",
    "ACTIVATION_SLOTS": "qpipe.types",
    "CalibrationPass": "qpipe.types",
    "Exporter": "qpipe.types",
    "Loss": "qpipe.types",
    "Metric": "qpipe.types",
    "ModelMap": "qpipe.types",
    "ParamGroup": "qpipe.types",
    "QuantizerKind": "qpipe.types",
    "RangeEstimatorKind": "qpipe.types",
    "ReportSection": "qpipe.types",
    "Rule": "qpipe.types",
    "SignalKind": "qpipe.types",
    "Signals": "qpipe.types",
    "Site": "qpipe.types",
    "TapStage": "qpipe.types",
    "Task": "qpipe.types",
    "TrainingPhase": "qpipe.types",
    "WeightLoss": "qpipe.types",
    "TaskData": "qpipe.data.loading",
    "Texts": "qpipe.data.text",
    "locate": "qpipe.data.locate",
    "LossWeight": "qpipe.schedules",
    "WeightSchedule": "qpipe.schedules",
    "weight_function": "qpipe.schedules",
    "Engine": "qpipe.engine.base",
    "QTensor": "qpipe.quant.tensor",
    "QuantContext": "qpipe.quant.quantizer",
    "Quantizer": "qpipe.quant.quantizer",
    "straight_through": "qpipe.quant.quantizer",
    "ActivationRange": "qpipe.quant.affine",
    "AffineActivation": "qpipe.quant.affine",
    "FixedActivation": "qpipe.quant.affine",
    "by_feature": "qpipe.quant.affine",
    "CalibratedActivation": "qpipe.quant.calibrated",
    "RangeChoice": "qpipe.quant.calibrated",
    "RangeEstimator": "qpipe.quant.estimators",
    "RangeGrid": "qpipe.quant.estimators",
    "FirstRange": "qpipe.quant.learned",
    "GridActivation": "qpipe.quant.learned",
    "GridActivationOptions": "qpipe.quant.learned",
    "Observed": "qpipe.quant.observed",
    "Grid": "qpipe.quant.grid",
    "GridKernel": "qpipe.quant.grid",
    "GridOptions": "qpipe.quant.grid",
    "GridQuantizer": "qpipe.quant.grid",
    "SettableGrid": "qpipe.quant.settable",
    "search_grid": "qpipe.quant.ranges",
    "float64_mean": "qpipe.quant.grid",
    "float64_sum": "qpipe.quant.grid",
    "mean_magnitude": "qpipe.quant.grid",
    "over_rows": "qpipe.quant.compiled",
    "tanh": "qpipe.quant.rounding",
    "visible_nan": "qpipe.quant.rounding",
    "split_to_binary": "qpipe.quant.splitting",
    "QuantModule": "qpipe.quant.modules",
    "Moments": "qpipe.quant.moments",
    "moments": "qpipe.quant.moments",
    "all_scores_mse": "qpipe.model.distances",
    "attention_mse": "qpipe.model.distances",
    "example_mean": "qpipe.model.distances",
    "hidden_cosine": "qpipe.model.distances",
    "hidden_mse": "qpipe.model.distances",
    "logits_kl": "qpipe.model.distances",
    "logits_mse": "qpipe.model.distances",
    "Inject": "qpipe.model.gradients",
    "StopGradient": "qpipe.model.gradients",
    "load_native": "qpipe.export.native",
    "plain_model": "qpipe.export.native",
    "ActivationSite": "qpipe.export.record",
    "ExportRecord": "qpipe.export.record",
    "PackedWeight": "qpipe.export.record",
    "Instruments": "qpipe.model.instrument",
    "PlannedSite": "qpipe.quant.plan",
    "Program": "qpipe.export.program",
    "write_program": "qpipe.export.program",
    "quantize_activations": "qpipe.export.activations",
    "Run": "qpipe.run",
    "Step": "qpipe.run",
    "RunConfig": "qpipe.config",
    "resolve": "qpipe.config",
    "execute": "qpipe.stages",
}

__all__ = [
    "ACTIVATION_SLOTS",
    "ActivationRange",
    "ActivationSite",
    "AffineActivation",
    "CalibratedActivation",
    "CalibrationPass",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Engine",
    "ExportRecord",
    "Exporter",
    "FirstRange",
    "FixedActivation",
    "FormatError",
    "Grid",
    "GridActivation",
    "GridActivationOptions",
    "GridKernel",
    "GridOptions",
    "GridQuantizer",
    "Inject",
    "Instruments",
    "Loss",
    "LossWeight",
    "Metric",
    "ModelError",
    "ModelMap",
    "Moments",
    "Observed",
    "Options",
    "PackedWeight",
    "ParamGroup",
    "PlannedSite",
    "Plugin",
    "PluginError",
    "Program",
    "QTensor",
    "QpipeError",
    "QuantContext",
    "QuantModule",
    "Quantizer",
    "QuantizerKind",
    "RangeChoice",
    "RangeEstimator",
    "RangeEstimatorKind",
    "RangeGrid",
    "ReportSection",
    "Rule",
    "Run",
    "RunConfig",
    "SettableGrid",
    "SignalKind",
    "Signals",
    "Site",
    "SiteError",
    "Step",
    "StopGradient",
    "TapStage",
    "Task",
    "TaskData",
    "Texts",
    "TrainingError",
    "TrainingPhase",
    "WeightLoss",
    "WeightSchedule",
    "__version__",
    "all_scores_mse",
    "attention_mse",
    "by_feature",
    "example_mean",
    "execute",
    "float64_mean",
    "float64_sum",
    "hidden_cosine",
    "hidden_mse",
    "hookimpl",
    "load_native",
    "locate",
    "logits_kl",
    "logits_mse",
    "mean_magnitude",
    "moments",
    "over_rows",
    "plain_model",
    "quantize_activations",
    "resolve",
    "search_grid",
    "split_to_binary",
    "straight_through",
    "tanh",
    "visible_nan",
    "weight_function",
    "write_program",
]

if TYPE_CHECKING:
    from qpipe.config import RunConfig, resolve
    from qpipe.data.loading import TaskData
    from qpipe.data.locate import locate
    from qpipe.data.text import Texts
    from qpipe.engine.base import Engine
    from qpipe.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        FormatError,
        ModelError,
        PluginError,
        QpipeError,
        SiteError,
        TrainingError,
    )
    from qpipe.export.activations import quantize_activations
    from qpipe.export.native import load_native, plain_model
    from qpipe.export.program import Program, write_program
    from qpipe.export.record import ActivationSite, ExportRecord, PackedWeight
    from qpipe.model.distances import (
        all_scores_mse,
        attention_mse,
        example_mean,
        hidden_cosine,
        hidden_mse,
        logits_kl,
        logits_mse,
    )
    from qpipe.model.gradients import Inject, StopGradient
    from qpipe.model.instrument import Instruments
    from qpipe.plugin import Options, Plugin, hookimpl
    from qpipe.quant.affine import ActivationRange, AffineActivation, FixedActivation, by_feature
    from qpipe.quant.calibrated import CalibratedActivation, RangeChoice
    from qpipe.quant.compiled import over_rows
    from qpipe.quant.estimators import RangeEstimator, RangeGrid
    from qpipe.quant.grid import Grid, GridKernel, GridOptions, GridQuantizer, float64_mean, float64_sum, mean_magnitude
    from qpipe.quant.learned import FirstRange, GridActivation, GridActivationOptions
    from qpipe.quant.modules import QuantModule
    from qpipe.quant.moments import Moments, moments
    from qpipe.quant.observed import Observed
    from qpipe.quant.plan import PlannedSite
    from qpipe.quant.quantizer import QuantContext, Quantizer, straight_through
    from qpipe.quant.ranges import search_grid
    from qpipe.quant.rounding import tanh, visible_nan
    from qpipe.quant.settable import SettableGrid
    from qpipe.quant.splitting import split_to_binary
    from qpipe.quant.tensor import QTensor
    from qpipe.run import Run, Step
    from qpipe.schedules import LossWeight, WeightSchedule, weight_function
    from qpipe.stages.execute import execute
    from qpipe.types import (
        ACTIVATION_SLOTS,
        CalibrationPass,
        Exporter,
        Loss,
        Metric,
        ModelMap,
        ParamGroup,
        QuantizerKind,
        RangeEstimatorKind,
        ReportSection,
        Rule,
        SignalKind,
        Signals,
        Site,
        TapStage,
        Task,
        TrainingPhase,
        WeightLoss,
    )


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qpipe' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
