"""The format `peg-tensors`: a native checkpoint, and beside it the network without groups as a program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpipe import ExportRecord, FormatError, Program, QTensor, plain_model, quantize_activations, write_program
from qpipe_peg.proof import require_equal
from qpipe_peg.quantizer import PegActivation
from qpipe_peg.rewriting import FeedForward, Record, by_block, feed_forwards, rewrite

NAME = "peg-tensors"


def check(sites: Iterable[Any]) -> list[str]:
    """A reason for each planned site that the program cannot have, or for the plan as a whole."""
    planned = list(sites)
    reasons = [f"{site.name}: {reason}" for site in planned if (reason := unsupported(site))]
    grouped = [site for site in planned if site.slot != "weight" and site.granularity == "group"]
    if not grouped:
        reasons.append(
            "no activation has groups of features, so there is nothing to rewrite; use export.format: native"
        )
    _, misplaced = by_block((site.path, site.slot, site.module_type, site) for site in grouped)
    return reasons + misplaced


def stored_bytes(name: str, weight: Any, dtype: Any) -> int:
    """Bytes of a weight in both files: packed codes and int8 codes, with scales and zero points.

    Weights that are split have their scale a few times more in the program.

    Args:
        name: of the parameter.
        weight: its `PackedWeight`.
        dtype: of the export.
    """
    tensor: QTensor = weight.tensor
    columns, offset = tensor.codes[0].numel(), bool(tensor.zero_point.any())
    ternary = tensor.bits == 2 and not offset and bool((tensor.codes.abs() <= 1).all())
    row = -(-columns // 5) if ternary else -(-columns * tensor.bits // 8)
    scales, zeros = 4 * tensor.scale.numel(), 4 * tensor.zero_point.numel()
    return len(tensor.codes) * row + tensor.codes.numel() + 2 * scales + zeros * (1 + offset)


def unsupported(site: Any) -> str | None:
    """Why a target that quantizes whole tensors, its weights by row at most, cannot have this site; None if it can.

    Args:
        site: as exporters get it, before training.
    """
    if site.slot == "weight" and not 1 <= site.bits <= 8:
        return f"{site.bits}-bit codes of weights do not fit the format, which holds 1 to 8 bits; lower bits there"
    if site.slot == "weight" and site.granularity == "group":
        return "a row of a weight has several scales; set granularity to channel or tensor, or use native"
    if site.slot != "weight" and site.granularity == "token":
        return "each token has a range of its own; set granularity: tensor, or use native"
    return None


def require_one_order(found: Mapping[str, PegActivation], roles: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse, before training, orders or numbers of groups that differ within a block.

    Args:
        found: the quantizers, by site.
        roles: `ModelMap.sites`.

    Raises:
        FormatError: as said; names the sites.
    """
    around = (roles.get(role, ()) for role in ("ffn_input", "ffn_output", "ffn_sum"))
    for sites in zip(*around, strict=True):
        members = [found[site] for site in sites if site in found]
        # Without permutation all have the same order: that of the features.
        orders = {id((*m.shared_with, m)[0]) if m.options.permute else None for m in members}
        if len(orders) > 1 or len({len(m.steps) for m in members}) > 1:
            raise FormatError(
                f"export.format {NAME!r} cannot hold this plan: {', '.join(sites)} have orders or numbers of groups of "
                "their own; set shared: true and the same groups for all three, or use export.format: native"
            )


def write(record: ExportRecord, directory: Path) -> None:
    """Write the checkpoint, after a comparison of both networks in float64.

    Raises:
        FormatError: the record has what the program cannot have, or the networks differ.
        CheckpointError: the disk is full.
    """
    require_equal(record)
    write_program(record, directory, program_of(record))


def program_of(record: ExportRecord) -> Program:
    """The rewritten network with its codes.

    Raises:
        FormatError: as `rewrite` does, or a weight of a split map has groups.
    """
    activations = [site.record() for site in record.activations]
    network = plain_model(record)
    layers = feed_forwards(network, activations)
    rest = rewrite(network, activations)
    quantize_activations(network, rest)
    weights = split_weights(all_codes(record), layers)
    return Program(network, weights, [*rest, *(r for layer in layers for r in tensor_records(layer))])


def all_codes(record: ExportRecord) -> dict[str, QTensor]:
    """Codes by parameter name, also of parameters that are tied to a quantized one: `plain_model` has both."""
    codes = {name: weight.tensor for name, weight in record.weights.items()}
    pairs = [pair for name, source in record.tied.items() for pair in ((name, source), (source, name))]
    return codes | {name: codes[other] for name, other in pairs if other in codes}


def split_weights(weights: Mapping[str, QTensor], layers: Iterable[FeedForward]) -> dict[str, QTensor]:
    """Codes by parameter name in the rewritten network.

    Args:
        weights: codes by parameter name in the model.
        layers: what was rewritten.

    Raises:
        FormatError: a weight that is split has groups.
    """
    result = dict(weights)
    for layer in layers:
        maps = {f"maps.{number}": part for number, part in enumerate(layer.parts)}
        norm = {"norm": torch.cat(layer.parts)}
        replaced = ((layer.first, maps, 1), (layer.h["module"], maps, 0))
        for path, parts, axis in (*replaced, (layer.x["module"], norm, 0), (layer.y["module"], norm, 0)):
            tensor = result.pop(f"{path}.weight", None)
            if tensor is None:
                continue
            if tensor.group_size is not None:
                raise FormatError(f"{path}:weight has groups, which cannot be split; use export.format: native")
            result |= {f"{path}.{name}.weight": part_of(tensor, part, axis) for name, part in parts.items()}
    return result


def part_of(tensor: QTensor, part: Tensor, axis: int) -> QTensor:
    """Some rows (axis 0) or columns (axis 1) of a weight without groups, in order, with scales and zero points."""

    def of_rows(values: Tensor) -> Tensor:
        return values[part] if axis == 0 and values.numel() > 1 else values.clone()

    codes = tensor.codes.index_select(axis, part)
    return replace(tensor, codes=codes, scale=of_rows(tensor.scale), zero_point=of_rows(tensor.zero_point))


def tensor_records(layer: FeedForward) -> list[Record]:
    """The activations that stand for x, h and y: the module that quantizes each, and its `features` in the model."""
    return [
        {
            "module": f"{record['module']}.quantizers.groups.{number}",
            "slot": "output",
            **{key: record[key] for key in ("bits", "dynamic", "symmetric")},
            "granularity": "tensor",
            "scale": record["scale"][number],
            "zero_point": record["zero_point"][number],
            "features": part.tolist(),
        }
        for record in (layer.x, layer.h, layer.y)
        for number, part in enumerate(layer.parts)
    ]
