"""Export: the trained lattice, written as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qpipe
from qpipe.data.locate import locate
from qpipe.export.record import ActivationSite, ExportRecord, PackedWeight, tensor_sha256
from qpipe.files import write_json
from qpipe.quant.tensor import QTensor
from qpipe.report.statistics import weight_statistics
from qpipe.run import Run
from qpipe.stages.calibrate import inference, inputs_of, to_device
from qpipe.stages.casting import own_types
from qpipe.stages.gather import model_tensors, ties
from qpipe.stages.prepare import checked_lattice, find_exporter, require_describable
from qpipe.types import Json

REFERENCE_TOKENS = 8
"""Tokens of each reference example of a language model, whose logits are as wide as its vocabulary."""


def export(run: Run, format_name: str | None = None, out: Path | None = None) -> Path:
    """Write the packed checkpoint; called by all processes.

    Args:
        run: a trained run.
        format_name: name of an exporter; default: the configured one.
        out: folder to write; default: `export/` in the run directory.

    Raises:
        ConfigError: no exporter has that name.
        FormatError: the format cannot hold the model.
    """
    exporter = find_exporter(run, format_name)
    folder = out or run.out / "export"
    record, statistics = build_record(run)
    if run.engine.rank == 0:
        exporter.write(record, folder)
        write_json(run.out / "tensors.json", statistics)
    run.engine.barrier()
    return folder


def build_record(run: Run) -> tuple[ExportRecord, list[dict[str, Json]]]:
    """Everything an exporter needs, and statistics of every quantized weight. Complete on process 0 only. Collective.

    Raises:
        FormatError: the lattice of a weight differs from what the forward pass uses (an error in a quantizer).
    """
    weights, statistics = packed_weights(run)
    tied = ties(run.student)
    tensors: dict[str, Tensor] = {}
    own = own_types(run.student, run.engine.dtype)
    for name, tensor in model_tensors(run):
        if run.engine.rank == 0 and name not in weights and name not in tied:
            value = tensor.to("cpu", copy=True)
            tensors[name] = value.to(own.get(name, run.engine.dtype)) if value.is_floating_point() else value
    record = ExportRecord(
        model=run.student,
        dtype=run.engine.dtype,
        weights=weights,
        activations=activation_sites(run),
        tensors=tensors,
        tied=tied,
        tokenizer=run.data.tokenizer,
        metadata=metadata(run),
        reference=reference(run),
    )
    return record, statistics


def packed_weights(run: Run) -> tuple[dict[str, PackedWeight], list[dict[str, Json]]]:
    """Codes of every quantized weight, by parameter name, with statistics."""
    packed: dict[str, PackedWeight] = {}
    statistics: list[dict[str, Json]] = []
    for site, quantizer in run.instruments.quantizers().items():
        path, _, slot = site.rpartition(":")
        if slot != "weight":
            continue
        name = f"{path}.weight"
        parameter = run.student.get_parameter(name)
        with run.engine.gathered([parameter, *quantizer.parameters()]) as (whole, *_), torch.no_grad():
            if run.engine.rank != 0:
                continue
            tensor = on_cpu(checked_lattice(site, quantizer, whole.detach()))
            weight = quantizer.master(whole.detach()).to("cpu", torch.float32, copy=True)  # gathered memory is freed
        decoded = tensor.decode(run.engine.dtype)
        module_type = run.plan.sites[site].site.module_type
        packed[name] = PackedWeight(path, module_type, tensor, tensor_sha256(decoded))
        statistics.append({"name": name, **weight_statistics(weight, tensor)})
    return packed, statistics


def on_cpu(lattice: QTensor) -> QTensor:
    """Integer codes, scale and zero point as they are written."""
    return QTensor(
        lattice.integers().cpu(),
        lattice.scale.float().cpu(),
        lattice.zero_point.float().cpu(),
        lattice.bits,
        lattice.group_size,
    )


def activation_sites(run: Run) -> list[ActivationSite]:
    """The quantized activations. Collective.

    Raises:
        FormatError: a quantizer's parameters cannot be described to an exporter.
    """
    found = []
    for site, quantizer in run.instruments.quantizers().items():
        path, _, slot = site.rpartition(":")
        if slot == "weight":
            continue
        affine = require_describable(site, quantizer)
        with run.engine.gathered(affine.parameters()), torch.no_grad():
            found.append(ActivationSite(path, slot, affine.describe()))
    return found


def metadata(run: Run) -> Mapping[str, Json]:
    """What the export says about its making."""
    model = run.config.model
    base = model.name if model.weights == "pretrained" else None  # of random weights a name says the shape only
    contributed = run.host.collect_mappings("qpipe_export_metadata", run=run)
    plugins = {
        name: {"version": run.host.versions[name], **dict(contributed.get(name, {}))} for name in run.config.plugins
    }
    result: dict[str, Json] = {
        "qpipe": qpipe.__version__,
        "task": run.task.name,
        "base_model": base,
        "plan": run.plan.to_json(),
        "plugins": plugins,
        "metrics": dict(run.results.get("evaluation", {})),
        "teacher_metrics": dict(run.results.get("teacher", {})),
        **({"steps": run.results["steps"]} if "steps" in run.results else {}),
        "config": run.config.model_dump(mode="json"),
        "attention": "sdpa",
    }
    licence = find_licence(base) if base is not None else None
    if licence is not None:
        result["license_file"] = str(licence)
    return result


def find_licence(model: str) -> Path | None:
    """A licence file in the model's folder, if it is a folder and has one."""
    folder = Path(locate(model))
    if not folder.is_dir():
        return None
    named = (path for path in sorted(folder.iterdir()) if path.name.upper().startswith(("LICENSE", "LICENCE")))
    return next((path for path in named if path.is_file()), None)  # REUSE has a folder LICENSES


def reference(run: Run) -> dict[str, Tensor]:
    """Inputs and logits of the first validation examples, from the trained model. Collective."""
    count = min(run.config.export.reference_examples, len(run.data.validation))
    batch = to_device(run.data.collate([run.data.validation[i] for i in range(count)]), run)
    if run.task.kind in ("causal-lm", "masked-lm"):  # logits of a whole vocabulary would outweigh the model
        batch = {name: value[:, :REFERENCE_TOKENS] for name, value in batch.items()}
    with inference(run):
        output: Any = run.engine.forward(**inputs_of(batch))
    result = {f"inputs.{name}": value.cpu() for name, value in inputs_of(batch).items()}
    result["logits"] = output.logits.cpu()
    return result
