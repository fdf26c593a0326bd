"""Statistics of a weight and its quantized form. Sums run in float64 over chunks, so that large weights fit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qpipe.errors import FormatError
from qpipe.quant.tensor import QTensor, code_range
from qpipe.types import Json

BINS = 64
CHUNK = 1 << 22
"""Elements per chunk: 32 MiB in float64."""


def weight_statistics(weight: Tensor, qtensor: QTensor) -> dict[str, Json]:
    """What `tensors.json` holds of one quantized weight, beside its name.

    Args:
        weight: the float weight, any shape and dtype.
        qtensor: its quantized form, of the same shape.

    Returns:
        `bits`; `granularity`; `shape`; `sqnr_db`, see `sqnr_db`; `kurtosis`, see `kurtosis`; `histogram` with the
        `edges` and `counts` of 64 bins from the smallest to the largest weight; `code_counts`, the number of elements
        by code (as text; codes that occur only), None above 8 bits.

    Raises:
        FormatError: the shapes differ, the weight is empty, or it holds NaN or infinity.
    """
    if weight.shape != qtensor.codes.shape:
        raise FormatError(f"weight of shape {tuple(weight.shape)} has codes of shape {tuple(qtensor.codes.shape)}")
    if weight.numel() == 0:
        raise FormatError("an empty weight has no statistics; leave its site out with quantizer: none")
    if not bool(torch.isfinite(weight).all()):
        raise FormatError("the weight holds NaN or infinity; export an earlier checkpoint")
    return {
        "bits": qtensor.bits,
        "granularity": qtensor.granularity,
        "shape": list(weight.shape),
        "sqnr_db": sqnr_db(weight, qtensor.decode()),
        "kurtosis": kurtosis(weight),
        "histogram": histogram(weight),
        "code_counts": code_counts(qtensor),
    }


def _chunks(value: Tensor) -> Iterator[Tensor]:
    for chunk in value.detach().reshape(-1).split(CHUNK):
        yield chunk.to("cpu").double()


def sqnr_db(weight: Tensor, quantized: Tensor) -> float | None:
    """Signal-to-quantization-noise ratio in dB, `10 log10(sum w^2 / sum (w - q)^2)`.

    None where it is not finite: no error at all, or a weight of zeros only.
    """
    signal = noise = 0.0
    for w, q in zip(_chunks(weight), _chunks(quantized), strict=True):
        signal += float(w.square().sum())
        noise += float((w - q).square().sum())
    if signal == 0 or noise == 0:
        return None
    return 10 * math.log10(signal / noise)


def kurtosis(value: Tensor) -> float | None:
    """Population kurtosis `m4 / m2^2`: 1.8 for a uniform, 3 for a normal distribution. None for a constant."""
    count = value.numel()
    mean = sum(float(c.sum()) for c in _chunks(value)) / count
    second = fourth = 0.0
    for chunk in _chunks(value):
        squared = (chunk - mean).square_()
        second += float(squared.sum())
        fourth += float(squared.square_().sum())
    variance = second / count
    # Rounding of the mean leaves a variance of this order for constants.
    if variance <= (torch.finfo(torch.float64).eps * abs(mean)) ** 2 or variance**2 == 0:
        return None
    return fourth / count / variance**2


def histogram(value: Tensor, bins: int = BINS) -> dict[str, Json]:
    """Counts of equal bins from the smallest to the largest value (of width 1 in all, around a constant)."""
    low, high = (float(x) for x in torch.aminmax(value.detach()))
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.zeros(bins, dtype=torch.float64)
    for chunk in _chunks(value):
        counts += torch.histc(chunk, bins=bins, min=low, max=high)
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return {"edges": edges.tolist(), "counts": [int(c) for c in counts]}


def code_counts(qtensor: QTensor) -> dict[str, int] | None:
    """How often each code occurs, by code; None above 8 bits, where the list would be long."""
    if qtensor.bits > 8:
        return None
    low, high = code_range(qtensor.bits)
    counts = torch.zeros(high - low + 1, dtype=torch.int64)
    for chunk in qtensor.integers().reshape(-1).split(CHUNK):
        counts += torch.bincount(chunk.to("cpu").long() - low, minlength=len(counts))
    return {str(low + i): n for i, n in enumerate(counts.tolist()) if n}
