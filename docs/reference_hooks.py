"""`docs/hooks.md`: every hook, with its arguments, how results combine, who implements it, and what it returns."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reference_text import anchor, repository_plugins

from qpipe import hookspecs, run, types
from qpipe.data import loading, text
from qpipe.engine.base import Engine
from qpipe.export.program import Program
from qpipe.export.record import ActivationSite, ExportRecord, PackedWeight
from qpipe.host import BUILTINS
from qpipe.model.instrument import Instruments
from qpipe.quant.affine import ActivationRange, AffineActivation
from qpipe.quant.calibrated import CalibratedActivation
from qpipe.quant.estimators import RangeEstimator, RangeGrid
from qpipe.quant.grid import Grid, GridKernel, GridQuantizer
from qpipe.quant.learned import GridActivation
from qpipe.quant.modules import QuantModule
from qpipe.quant.plan import PlannedSite
from qpipe.quant.quantizer import QuantContext, Quantizer
from qpipe.quant.settable import SettableGrid
from qpipe.quant.tensor import QTensor

CONTRIBUTIONS = (
    types.Site,
    types.Rule,
    types.QuantizerKind,
    types.RangeEstimatorKind,
    RangeGrid,
    types.WeightLoss,
    types.Loss,
    types.Signals,
    types.TrainingPhase,
    types.ParamGroup,
    types.CalibrationPass,
    types.ModelMap,
    types.Metric,
    types.Task,
    types.Exporter,
    PlannedSite,
    ExportRecord,
    PackedWeight,
    ActivationSite,
    Program,
    types.ReportSection,
    loading.TaskData,
    text.Texts,
    run.Run,
    run.Step,
    QTensor,
    QuantContext,
)
"""Classes of what hooks take and return, in reading order."""

BASES: Mapping[Any, tuple[str, ...]] = {
    RangeEstimator: ("add", "range"),
    QuantModule: ("before", "apply_weight", "after"),
    Quantizer: ("initialize", "encode", "surrogate", "snap", "quantize"),
    GridQuantizer: ("kernel", "state", "with_gradient"),
    GridKernel: ("snap", "grid", "codes"),
    Grid: (),
    SettableGrid: ("search", "set_grid", "grid_in_use"),
    AffineActivation: ("parameters_of", "describe"),
    CalibratedActivation: ("calibrated", "range_grid", "observer", "range_of"),
    GridActivation: ("new_parameter", "step", "zero_point", "gradient", "set_range"),
    ActivationRange: (),
    Instruments: ("site", "quantizers", "add_tap"),
    Engine: ("gathered", "reduce", "gather_objects", "broadcast_object", "broadcast_tensor", "any", "barrier"),
}
"""Classes to derive quantizers and range estimators from, what these give back, and what a run holds, with the methods
that matter to a plugin."""


def stages() -> list[tuple[str, list[str]]]:
    """`(stage, its hooks)` in the order of `hookspecs.py`, from the comments that divide it."""
    found: list[tuple[str, list[str]]] = []
    for line in inspect.getsource(hookspecs.Specs).splitlines():
        if banner := re.match(r"\s*# --- ([a-z ]+) -", line):
            found.append((banner.group(1).strip(), []))
        elif name := re.match(r"\s*def (qpipe_\w+)\(", line):
            found[-1][1].append(name.group(1))
    return found


def signature(name: str) -> str:
    """`name(first, second)`, without types: what an implementation may ask for."""
    arguments = [a for a in inspect.signature(getattr(hookspecs.Specs, name)).parameters if a != "self"]
    return f"{name}({', '.join(arguments)})"


def kind(name: str) -> str:
    """`first`, `all` or `event`."""
    function = getattr(hookspecs.Specs, name)
    if function.qpipe_spec["firstresult"]:
        return "first"
    return "event" if function.__annotations__.get("return") == "None" else "all"


def declaration(name: str) -> str:
    """The arguments and result with their types, one argument a line if they are long."""
    found = inspect.signature(getattr(hookspecs.Specs, name))
    parts = [f"{a.name}: {a.annotation}" for a in found.parameters.values() if a.name != "self"]
    return f"{name}({', '.join(parts)}) -> {found.return_annotation}"


def implementers(root: Path) -> dict[str, list[str]]:
    """Who implements each hook: built-ins by module, then plugins of this repository."""
    owners: dict[str, Any] = {}
    for target in BUILTINS.values():
        module, _, attribute = target.partition(":")
        path = module.replace(".", "/")
        owners[f"[`{module}`](../{path}.py)"] = getattr(importlib.import_module(module), attribute)
    for name, (folder, cls) in repository_plugins(root).items():
        owners[f"[`{name}`](../{folder})"] = cls
    return {hook: [o for o, cls in owners.items() if hasattr(cls, hook)] for _, hooks in stages() for hook in hooks}


def page(root: Path) -> str:
    """The whole page."""
    users = implementers(root)
    lines = ["# Hooks\n", inspect.cleandoc(hookspecs.__doc__ or "").partition("\n\n")[2] + "\n"]
    lines.append("A guide is in [writing-a-plugin.md](writing-a-plugin.md); the classes are [below](#classes).\n")
    for stage, hooks in stages():
        lines.append(f"- {stage}: " + ", ".join(f"[`{h}`](#{anchor(signature(h))})" for h in hooks))
    for stage, hooks in stages():
        lines.append(f"\n## {stage.capitalize()}")
        for hook in hooks:
            documentation = inspect.getdoc(getattr(hookspecs.Specs, hook))
            lines.append(f"\n### `{signature(hook)}`\n")
            lines.append(f"**{kind(hook)}**, implemented by {', '.join(users[hook]) or 'nobody yet'}\n")
            lines.append(f"```text\n{declaration(hook)}\n```\n\n{prose(documentation or '')}")
    lines.append("\n## Classes\n\nAll are importable from `qpipe`.")
    lines += [described(cls) for cls in CONTRIBUTIONS]
    lines += [described(cls, methods) for cls, methods in BASES.items()]
    return "\n".join(lines) + "\n"


def prose(documentation: str) -> str:
    """A Google-style docstring as Markdown: its argument lists become bullet lists."""
    text, lists = [], False
    for line in documentation.splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Raises):", line):
            lists = line != "Returns:"
            text += ["", line.rstrip(":") + ":", ""]
        elif lists and (item := re.match(r" {4}([\w.]+): (.*)", line)):
            text.append(f"- `{item.group(1)}`: {item.group(2)}")
        else:
            text.append("  " + line.strip() if lists and line.startswith("    ") else line.strip())
            lists = lists and bool(line.strip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(text)).strip()


def described(cls: Any, methods: tuple[str, ...] = ()) -> str:
    """A class: constructor arguments if it is a dataclass, docstring, chosen methods."""
    lines = [f"\n### `{cls.__name__}`\n"]
    if dataclasses.is_dataclass(cls) and cls is not run.Run:
        fields = [f"    {f.name}: {f.type}{_default(f)}" for f in dataclasses.fields(cls)]
        lines.append("```text\n" + f"{cls.__name__}(\n" + "\n".join(fields) + "\n)\n```\n")
    lines.append(prose(inspect.getdoc(cls) or ""))
    for name in methods:
        method = getattr(cls, name)
        typed = _stable(str(inspect.signature(method))).replace("'", "")
        lines.append(f"\n```text\n{name}{typed}\n```\n\n{prose(inspect.getdoc(method) or '')}")
    return "\n".join(lines)


def _stable(text: str) -> str:
    """Without addresses: `<pkg.Class object at 0x7f>` as `Class()`, `<function f at 0x7f>` as `f`."""
    text = re.sub(r"<(?:\w+\.)*(\w+) object at 0x\w+>", r"\1()", text)
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", text)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    if field.default_factory is not dataclasses.MISSING:
        return f" = {_stable(repr(field.default_factory()))}"
    return ""
