"""Sizes: how large the exported file will be, before it is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from qpipe.errors import ConfigError
from qpipe.export.record import PackedWeight
from qpipe.quant.tensor import QTensor
from qpipe.run import Run
from qpipe.stages.export import on_cpu
from qpipe.stages.gather import model_tensors, ties
from qpipe.stages.prepare import checked_lattice, find_exporter, tied_sites
from qpipe.stages.variants import planned_weights, rebuilt, weight_sites, with_bits
from qpipe.types import Site

HEADER = 110
"""Most bytes that the header of a safetensors file takes for a tensor beside its name: type, shape and offsets."""
TENSORS = 4
"""Most tensors that a packed weight is stored as: codes, scales, zero points and shape."""


@dataclass(frozen=True)
class FixedSize:
    """What is in the file beside the weights whose width is to be chosen.

    Attributes:
        header: bytes of the file's header, an upper bound; everything else is exact.
        other: bytes of the tensors that are not quantized.
        quantized: bytes of the quantized weights whose width stays.
        weights: number of elements of all quantized weights.
    """

    header: int
    other: int
    quantized: int
    weights: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.header + self.other + self.quantized


def copies(run: Run, name: str) -> list[Site]:
    """The sites under which a quantized weight is stored: its own, and those that share its Parameter."""
    site = run.plan.sites[name].site
    return [site, *tied_sites(run, site)]


def stored_bytes(run: Run, name: str, lattice: QTensor, format_name: str | None = None) -> int:
    """Bytes of a quantized weight in an export format (default: the configured one), with scales, in all its copies.

    Raises:
        FormatError: the format cannot hold it.
    """
    exporter = find_exporter(run, format_name)
    total = 0
    for site in copies(run, name):
        weight = PackedWeight(site.path, site.module_type, on_cpu(lattice), "")
        if exporter.stored_bytes is not None:
            total += exporter.stored_bytes(f"{site.path}.weight", weight, run.engine.dtype)
        else:
            scale_bits = torch.finfo(run.engine.dtype).bits
            total += math.ceil(lattice.bits_per_weight(scale_bits) * lattice.codes.numel() / 8)
    return total


def lattice_of(run: Run, name: str) -> QTensor:
    """The codes of a weight with the quantizer that is at its site now."""
    weight = run.student.get_parameter(f"{run.plan.sites[name].site.path}.weight")
    with torch.no_grad():
        return checked_lattice(name, run.instruments.quantizers()[name], weight.detach())


def stored_sizes(
    run: Run, bits: Sequence[int], patterns: Sequence[str] = (), format_name: str | None = None
) -> dict[str, dict[int, int]]:
    """Bytes of each quantized weight at every width.

    Args:
        run: a run on one process with its quantizers in place.
        bits: widths.
        patterns: weights, as in `weight_sites`; none: every quantized weight whose quantizer has an option `bits`,
            embeddings too.
        format_name: name of an exporter; default: the configured one.

    Raises:
        ConfigError: no quantized weight has an option `bits`, or no exporter has that name.
        SiteError: a width is not allowed.
        FormatError: the format cannot hold a weight at that width.
    """
    names = weight_sites(run, patterns) if patterns else planned_weights(run)
    able = with_bits(run, names, bits[0])
    if not able:
        raise ConfigError(f"no quantizer of {run.out} has an option `bits`, so there is no width to choose")
    found: dict[str, dict[int, int]] = {name: {} for name in able}
    for width in bits:
        with rebuilt(run, able, width):
            for name in able:
                found[name][width] = stored_bytes(run, name, lattice_of(run, name), format_name)
    return found


def fixed_size(run: Run, varied: Iterable[str], format_name: str | None = None) -> FixedSize:
    """Size of everything but the varied weights.

    Args:
        run: a run on one process with its quantizers in place.
        varied: names of sites whose size is not counted; their elements are.
        format_name: name of an exporter; default: the configured one.
    """
    left_out = set(varied)
    names: set[str] = set()
    other = quantized = weights = 0
    header = 8
    for name, entry in run.plan.sites.items():
        if entry.site.slot != "weight":
            continue
        places = copies(run, name)
        names |= {f"{site.path}.weight" for site in places}
        weights += len(places) * math.prod(entry.site.shape)
        header += sum(TENSORS * (HEADER + len(site.path) + len(".weight_zero_point")) for site in places)
        if name not in left_out:
            quantized += stored_bytes(run, name, lattice_of(run, name), format_name)
    tied = ties(run.student)
    # Where one of a pair is quantized, all tied parameters are written for each of their names.
    untied = any(name in names or owner in names for name, owner in tied.items())
    for name, tensor in model_tensors(run):
        if name not in names and (name not in tied or (untied and tied[name] not in names)):
            width = torch.finfo(run.engine.dtype).bits // 8 if tensor.is_floating_point() else tensor.element_size()
            other += tensor.numel() * width
            header += HEADER + len(name)
    return FixedSize(header, other, quantized, weights)
