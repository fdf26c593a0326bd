"""The default format: compressed-tensors, which stock transformers and vLLM load."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor, nn

from qpipe.errors import FormatError
from qpipe.export.companions import companions, resolve_ties, save_config
from qpipe.export.folder import MAX_SHARD, read_json, save_tensors, whole_folder, write_json
from qpipe.export.record import ExportRecord, PlannedSite
from qpipe.export.schemes import (
    Scheme,
    activation_tensors,
    unsupported_activation,
    unsupported_scales,
    unsupported_weight,
    weight_tensors,
)

NAME = "compressed-tensors"


def check(sites: Iterable[PlannedSite]) -> list[str]:
    """A reason for each planned site that the format cannot hold; empty if it can hold them all.

    What the scales' type does not allow, which the sites of a run have in common, is said once.
    """
    planned = list(sites)
    hosts = {s.path: s.module_type for s in planned if s.slot == "weight"}
    reasons = []
    for site in planned:
        if site.slot == "weight":
            reason = unsupported_weight(site.module_type, site.bits, site.zero_point)
        else:
            reason = unsupported_activation(site.slot, site, hosts.get(site.path))
        if reason:
            reasons.append(f"{site.name}: {reason}")
    scales: dict[str, list[str]] = {}
    for site in planned:
        reason = unsupported_scales(site)
        if reason:
            scales.setdefault(reason, []).append(site.name)
    for reason, names in scales.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        reasons.append(f"{names[0]}{others}: {reason}")
    return reasons


def targets(names: Iterable[str]) -> list[str]:
    """Patterns that match exactly these module names: names that differ in one number share an anchored regex."""
    families: dict[tuple[str, str], list[str]] = {}
    plain = []
    for name in sorted(names):
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        if number is None:
            plain.append(name)
        else:
            families.setdefault((name[: number.start()], name[number.end() :]), []).append(number.group())
    patterns = [f"re:^{re.escape(name)}$" for name in plain]
    for (head, tail), numbers in families.items():
        ordered = sorted(numbers, key=int)
        middle = ordered[0] if len(ordered) == 1 else f"(?:{'|'.join(ordered)})"
        patterns.append(f"re:^{re.escape(head)}{middle}{re.escape(tail)}$")
    return patterns


def _activations(record: ExportRecord) -> dict[str, dict[str, Any]]:
    hosts = {w.module: w.module_type for w in record.weights.values()}
    found: dict[str, dict[str, Any]] = {}
    for site in record.activations:
        reason = unsupported_activation(site.slot, site.range, hosts.get(site.module))
        if reason:
            raise FormatError(f"{site.module}:{site.slot}: {reason}")
        found.setdefault(site.module, {})[site.slot] = site
    return found


def encode(record: ExportRecord) -> tuple[dict[str, Scheme], dict[str, Tensor]]:
    """Scheme of each quantized module, and every tensor of the file by name.

    Raises:
        FormatError: the format cannot hold a weight or an activation exactly.
    """
    activations = _activations(record)
    schemes: dict[str, Scheme] = {}
    tensors: dict[str, Tensor] = dict(record.tensors)
    for name, weight in record.weights.items():
        scheme, found = weight_tensors(name, weight, record.dtype)
        for slot, site in activations.get(weight.module, {}).items():
            pairs, ranges = activation_tensors(site, record.dtype)
            scheme = replace(scheme, inputs=pairs) if slot == "input" else replace(scheme, outputs=pairs)
            found |= ranges
        schemes[weight.module] = scheme
        tensors.update({f"{weight.module}.{local}": value for local, value in found.items()})
    return schemes, tensors


def quantization_config(schemes: Mapping[str, Scheme], model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of config.json: one group per distinct scheme."""
    groups: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        groups.setdefault(scheme, []).append(module)
    formats = {scheme.stored for scheme in groups}
    ignored = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in schemes]
    config = QuantizationConfig(
        config_groups={f"group_{i}": scheme.config(targets(names)) for i, (scheme, names) in enumerate(groups.items())},
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=ignored,
    )
    dumped: dict[str, Any] = config.model_dump(mode="json")
    dumped["quant_method"] = NAME
    dumped["version"] = version("compressed-tensors")
    return dumped


def write(record: ExportRecord, directory: Path, max_shard: int = MAX_SHARD) -> None:
    """Write a checkpoint that `from_pretrained` of stock transformers loads.

    Args:
        record: what to write.
        directory: becomes the checkpoint; empty, missing, or an earlier export.
        max_shard: bytes per weight file.

    Raises:
        FormatError: the format cannot hold a weight or activation exactly (names it), or `directory` holds other files.
        CheckpointError: the disk is full.
    """
    if not record.weights:
        raise FormatError("nothing is quantized, so there is nothing to pack; save the model with save_pretrained")
    record = resolve_ties(record)
    schemes, tensors = encode(record)
    with whole_folder(Path(directory), sum(t.nbytes for t in tensors.values())) as folder:
        save_config(record, folder)
        config = read_json(folder / "config.json")
        config["quantization_config"] = quantization_config(schemes, record.model)
        write_json(folder / "config.json", config)
        save_tensors(folder, tensors, max_shard)
        stored = {w.module: (schemes[w.module].stored, schemes[w.module].bits) for w in record.weights.values()}
        companions(record, folder, NAME, stored)
