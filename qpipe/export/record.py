"""What exporters are given: plain records, so that a writer needs neither a run nor a live model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from qpipe.quant.affine import ActivationRange
    from qpipe.quant.tensor import QTensor
    from qpipe.types import Json


@dataclass(frozen=True)
class PlannedSite:
    """A site of a plan, as far as a file format has to know it before training.

    Attributes:
        path: qualified name of the module.
        slot: `weight`, or the slot of an activation.
        module_type: class name of the module, such as `Linear`.
        bits: width of a code.
        granularity: `tensor`, `channel`, `group` for weights; `tensor`, `token`, `group` for activations.
        group_size: elements per group, None unless per group.
        dynamic: True if an activation's range is taken from each batch; meaningless for weights.
        zero_point: `none` (symmetric), `integer` or `half` (mid-rise); `float` for anything else.
        narrow: of a dynamic range; see `ActivationRange`.
        clip: likewise.
        scale_dtype: scales are rounded to this type while training; meaningless for a dynamic range.
        dtype: of the export.
    """

    path: str
    slot: str
    module_type: str
    bits: int
    granularity: str = "channel"
    group_size: int | None = None
    dynamic: bool = False
    zero_point: str = "none"
    narrow: bool = False
    clip: float | None = None
    scale_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """`path:slot`."""
        return f"{self.path}:{self.slot}"


@dataclass(frozen=True)
class PackedWeight:
    """One quantized weight.

    Attributes:
        module: qualified name of the module that owns it.
        module_type: `Linear`, `Conv2d`, `Embedding`, ...: the class before qpipe changed it.
        tensor: codes as trained, on the CPU.
        decoded_sha256: `decoded_sha256(tensor, dtype)` or `tensor_sha256(tensor.decode(dtype))`, dtype of the record.
    """

    module: str
    module_type: str
    tensor: QTensor
    decoded_sha256: str


@dataclass(frozen=True)
class ActivationSite:
    """One quantized activation.

    Attributes:
        module: qualified name of the module.
        slot: `input`, `output`, or a slot of attention.
        range: what its quantizer says of itself.
    """

    module: str
    slot: str
    range: ActivationRange

    def record(self) -> dict[str, Json]:
        """As `quantization.json` lists it."""
        return {"module": self.module, "slot": self.slot, **self.range._asdict()}


@dataclass(frozen=True)
class ExportRecord:
    """Everything an exporter writes.

    Attributes:
        model: read for `config`, `generation_config` and module classes only; its weights may be partitioned.
        dtype: float tensors are written in this type.
        weights: quantized weights by parameter name (`....weight`).
        activations: quantized activations; order does not matter.
        tensors: every other parameter and persistent buffer by name, floats in `dtype`.
        tied: parameter name -> name in `weights` or `tensors` whose value (quantized, if so) it shares at run time.
        tokenizer: anything with `save_pretrained`: a tokenizer, image processor or processor; or None.
        metadata: `task`, `base_model`, `plan`, `plugins`, `metrics`, `steps` (trained; 0 if none were), `config`,
            `licence`, `license_file`, `attention` (the attention implementation behind the reference logits); all
            optional.
        reference: `inputs.<argument>` and `logits` of the reference examples, from the trained quantized model, CPU.
    """

    model: nn.Module
    dtype: torch.dtype
    weights: Mapping[str, PackedWeight]
    activations: Sequence[ActivationSite]
    tensors: Mapping[str, Tensor]
    tied: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Any | None = None
    metadata: Mapping[str, Json] = field(default_factory=dict)
    reference: Mapping[str, Tensor] = field(default_factory=dict)


def tensor_sha256(value: Tensor) -> str:
    """SHA-256 of a CPU tensor's contiguous bytes (little-endian, C order), as hex."""
    flat = value.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def decoded_sha256(tensor: QTensor, dtype: torch.dtype) -> str:
    """Hash of the decoded weight as every reader gets it: from integer codes, which have no negative zero.

    Rounding a small negative number to a float code gives -0.0. It equals 0.0 in any sum, but not byte for byte.
    """
    return tensor_sha256(replace(tensor, codes=tensor.integers()).decode(dtype))


def zero_point_kind(zero_point: Tensor) -> str:
    """`none`, `integer`, `half` (integer + 1/2 throughout) or `float`; the vocabulary of `PlannedSite.zero_point`."""
    if not bool(zero_point.any()):
        return "none"
    if bool((zero_point == zero_point.round()).all()):
        return "integer"
    half = zero_point - 0.5
    return "half" if bool((half == half.round()).all()) else "float"
