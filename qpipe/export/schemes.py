"""One quantized weight in the terms of compressed-tensors: its arguments and its tensors, proven to decode exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from qpipe.errors import FormatError
from qpipe.export.record import ActivationSite, PackedWeight, PlannedSite, zero_point_kind
from qpipe.quant.affine import ActivationRange
from qpipe.quant.tensor import QTensor, grouped

PACKED = "pack-quantized"
NAIVE = "naive-quantized"
STORED_AS: Mapping[str, str] = {"Linear": PACKED, "Embedding": NAIVE}
"""Layout by module type. Packed embeddings fail in transformers' `from_pretrained`, which reads `embedding.weight`."""

NATIVE_HINT = "use export.format: native, which holds it"


@dataclass(frozen=True)
class Scheme:
    """Arguments shared by all weights of one config group; hashable, so that equal ones merge.

    Attributes:
        stored: `pack-quantized` or `naive-quantized`.
        bits: width of a stored code; one more than trained where a mid-rise grid was lifted.
        strategy: `tensor`, `channel` or `group`.
        group_size: elements per group, None unless per group.
        symmetric: True if the zero point is 0.
        float_zero: True if zero points are stored as floats.
        inputs: arguments of the input activation, as pairs, or None.
        outputs: likewise for the output activation.
    """

    stored: str
    bits: int
    strategy: str
    group_size: int | None
    symmetric: bool
    float_zero: bool = False
    inputs: tuple[tuple[str, object], ...] | None = None
    outputs: tuple[tuple[str, object], ...] | None = None

    def weights(self) -> QuantizationArgs:
        """The weight's arguments for compressed-tensors."""
        extra = {"zp_dtype": torch.float32} if self.float_zero else {}
        return QuantizationArgs(
            num_bits=self.bits,
            type="int",
            symmetric=self.symmetric,
            strategy=self.strategy,
            group_size=self.group_size,
            dynamic=False,
            **extra,
        )

    def config(self, targets: list[str]) -> QuantizationScheme:
        """The config group for these target modules."""

        def activation(pairs: tuple[tuple[str, object], ...] | None) -> QuantizationArgs | None:
            return None if pairs is None else QuantizationArgs(type="int", **dict(pairs))

        return QuantizationScheme(
            targets=targets,
            weights=self.weights(),
            input_activations=activation(self.inputs),
            output_activations=activation(self.outputs),
            format=self.stored,
        )


def _minus_zero(tensor: QTensor, factor: int) -> Tensor:
    """`factor * (codes - zero_point)`, integral where `factor` clears half-integers; shape of the codes."""
    codes = grouped(tensor.codes, tensor.group_size).float()
    return (factor * (codes - tensor.zero_point)).reshape(tensor.codes.shape)


def lift(tensor: QTensor) -> QTensor:
    """A mid-rise grid as odd integers of one more bit, symmetric and equal in every value.

    `(q - z) * s` with half-integer `z` is `(2q - 2z) * (s / 2)`; doubling and halving are exact in floating point.
    """
    return QTensor(_minus_zero(tensor, 2), tensor.scale / 2, torch.zeros(1), tensor.bits + 1, tensor.group_size)


def centre(tensor: QTensor) -> QTensor:
    """A grid with integer zero points as the symmetric grid of `codes - zero_point`, equal in every value.

    Needs at most one more bit. transformers 5.23 with compressed-tensors 0.20 refuses packed zero points per channel or
    group: it allocates them unpacked, so that the sizes in any such file mismatch.
    """
    codes = _minus_zero(tensor, 1)
    bits = max(tensor.bits, _bits_needed(codes))
    return QTensor(codes, tensor.scale, torch.zeros(1), bits, tensor.group_size)


def _bits_needed(codes: Tensor) -> int:
    low, high = (int(v) for v in torch.aminmax(codes))
    return max((-low - 1).bit_length() if low < 0 else 0, high.bit_length() if high > 0 else 0) + 1


def unsupported_weight(module_type: str, bits: int, zero_point: str) -> str | None:
    """Why compressed-tensors cannot hold such a weight, or None if it can."""
    if module_type not in STORED_AS:
        return f"compressed-tensors quantizes {' and '.join(STORED_AS)} only, not {module_type}; {NATIVE_HINT}"
    if zero_point == "float":
        return f"zero points that are neither integers nor half-integers do not survive the format; {NATIVE_HINT}"
    if not 1 <= bits <= 8:
        return f"{bits} bits exceed what the format holds: at most 8; {NATIVE_HINT}"
    return None


def scheme_of(name: str, weight: PackedWeight) -> tuple[Scheme, QTensor]:
    """The scheme of a weight, and the codes to store: lifted or centred where the format has no zero points for it.

    Raises:
        FormatError: the format cannot hold the weight.
    """
    tensor = weight.tensor
    kind = zero_point_kind(tensor.zero_point)
    reason = unsupported_weight(weight.module_type, tensor.bits, kind)
    if reason:
        raise FormatError(f"{name}: {reason}")
    if tensor.codes.ndim != 2:
        raise FormatError(f"{name} has shape {tuple(tensor.codes.shape)}; compressed-tensors holds matrices only")
    stored = STORED_AS[weight.module_type]
    if tensor.granularity != "tensor":
        if kind == "half" and tensor.bits < 8:
            tensor, kind = lift(tensor), "none"
        elif kind == "half":
            stored = NAIVE  # no ninth bit to lift into; as large at 8 bits, and its float zero points load
        elif kind == "integer" and stored == PACKED:
            centred = centre(tensor)
            if centred.bits <= 8:
                tensor, kind = centred, "none"
            else:
                stored = NAIVE  # as large at 8 bits, and its zero points load
    scheme = Scheme(stored, tensor.bits, tensor.granularity, tensor.group_size, kind == "none", kind == "half")
    return scheme, tensor


def exact_cast(name: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the export's dtype.

    Raises:
        FormatError: that would change one.
    """
    cast = scale.to(dtype)
    changed = cast.float() != scale.float()
    if bool(changed.any()):
        value = scale[changed].flatten()[0].item()
        raise FormatError(
            f"{name}: scale {value!r} is not representable in {str(dtype).removeprefix('torch.')}, so the exported "
            "weights would differ from the trained ones; train with quantization.scale_dtype set to that type"
        )
    return cast


def _zero_points(name: str, scheme: Scheme, tensor: QTensor, shape: tuple[int, ...]) -> Tensor:
    zero = tensor.zero_point.float()
    zero = zero.reshape(()).expand(shape).contiguous() if zero.numel() == 1 else zero.reshape(shape)
    if scheme.float_zero:
        return zero
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    if bool(((zero < low) | (zero > high)).any()):
        raise FormatError(
            f"{name}: zero points reach [{zero.min().item():g}, {zero.max().item():g}], but {scheme.bits} bits hold "
            f"[{low}, {high}]; {NATIVE_HINT}"
        )
    return zero.to(torch.int8)


def weight_tensors(name: str, weight: PackedWeight, dtype: torch.dtype) -> tuple[Scheme, dict[str, Tensor]]:
    """A weight's scheme and its tensors by local name (`weight_packed`, `weight_scale`, ...).

    Args:
        name: of the weight, for messages.
        weight: the codes as trained; they are stored, never derived again.
        dtype: of the export.

    Raises:
        FormatError: the format cannot hold the weight, or compressed-tensors would decode it to other values.
    """
    scheme, tensor = scheme_of(name, weight)
    rows = tensor.codes.shape[0]
    shape = {"tensor": (1,), "channel": (rows, 1), "group": (rows, tensor.scale.numel() // rows)}[scheme.strategy]
    try:
        codes = tensor.integers()
    except ValueError as error:
        raise FormatError(f"{name}: {error}") from error
    found = {"weight_scale": exact_cast(name, tensor.scale, dtype).reshape(shape)}
    if scheme.stored == PACKED:
        found["weight_packed"] = pack_to_int32(codes, scheme.bits)
        found["weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
    else:
        found["weight"] = codes.contiguous()
    if not scheme.symmetric:
        found["weight_zero_point"] = _zero_points(name, scheme, tensor, shape)
    decoder = BaseCompressor.get_value_from_registry(scheme.stored)
    decoded = decoder.decompress(dict(found), scheme.config([]))["weight"]
    if decoded.dtype != dtype or not torch.equal(decoded, weight.tensor.decode(dtype)):
        raise FormatError(
            f"{name}: compressed-tensors decodes it to other values than those trained (scale or zero point outside "
            f"what {str(dtype).removeprefix('torch.')} computes exactly); {NATIVE_HINT}"
        )
    return scheme, found


def unsupported_activation(slot: str, planned: PlannedSite | ActivationRange, host: str | None) -> str | None:
    """Why compressed-tensors cannot hold such an activation, or None if it can.

    Args:
        slot: of the site.
        planned: how it is quantized.
        host: type of the module if its weight is quantized too, else None.
    """
    bits, granularity, dynamic = planned.bits, planned.granularity, planned.dynamic
    if slot not in ("input", "output"):
        return f"the format has no place for activations inside attention or sums (slot {slot!r}); {NATIVE_HINT}"
    if host not in STORED_AS:
        return (
            f"the format quantizes activations only at a Linear or Embedding whose weight is quantized; {NATIVE_HINT}"
        )
    if host == "Embedding" and slot == "input":
        return "the input of an embedding is a row number, not an activation; set quantizer: none there"
    if not 1 <= bits <= 8:
        return f"{bits}-bit activations do not fit: at most 8; {NATIVE_HINT}"
    if granularity not in (("token", "tensor") if dynamic else ("tensor",)):
        return f"{'dynamic' if dynamic else 'static'} activation ranges per {granularity} do not fit; {NATIVE_HINT}"
    if planned.narrow or planned.clip is not None:
        return f"dynamic ranges with options narrow or clip do not fit; {NATIVE_HINT}"
    return None


def unsupported_scales(planned: PlannedSite) -> str | None:
    """Why the scales of a site would not survive the format, or None if they do, whatever training makes of them.

    They are stored in the type of the export (`exact_cast`), which has to have every number of the type that they are
    rounded to.
    """
    stored, trained = planned.dtype, planned.scale_dtype
    in_file = planned.slot == "weight" or not planned.dynamic
    if not in_file or torch.promote_types(stored, trained) == stored:
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in (trained, stored)]
    return (
        f"{names[0]} scales are not all representable in {names[1]}, the type of the export; "
        f"set quantization.scale_dtype: auto, or {NATIVE_HINT}"
    )


def activation_tensors(
    site: ActivationSite, dtype: torch.dtype
) -> tuple[tuple[tuple[str, object], ...], dict[str, Tensor]]:
    """Arguments of an activation as sorted pairs, and the tensors of a static range by local name.

    A zero point that is no 8-bit integer is stored as a float, in which the format's own arithmetic adds it too.

    Raises:
        FormatError: a static range lacks its scale or zero point, is one of groups, or its scale does not fit `dtype`.
    """
    name, given = f"{site.module}:{site.slot}", site.range
    pairs: tuple[tuple[str, object], ...] = (
        ("dynamic", given.dynamic),
        ("num_bits", given.bits),
        ("strategy", given.granularity),
        ("symmetric", given.symmetric),
    )
    if given.dynamic:
        return pairs, {}
    if isinstance(given.scale, Sequence) or isinstance(given.zero_point, Sequence):
        raise FormatError(f"{name}: static activation ranges per {given.granularity} do not fit; {NATIVE_HINT}")
    if given.scale is None or not given.scale > 0:
        raise FormatError(f"{name} has a static range without a scale ({given.scale}); was it calibrated?")
    found = {f"{site.slot}_scale": exact_cast(name, torch.tensor([given.scale]), dtype)}
    if not given.symmetric:
        zero = float(given.zero_point or 0.0)
        if not math.isfinite(zero):
            raise FormatError(f"{name} has a static range with the zero point {zero}; did the training diverge?")
        if zero == round(zero) and -128 <= zero <= 127:
            found[f"{site.slot}_zero_point"] = torch.tensor([int(zero)], dtype=torch.int8)
        else:
            pairs = (*pairs, ("zp_dtype", torch.float32))
            found[f"{site.slot}_zero_point"] = torch.tensor([zero], dtype=torch.float32)
    return pairs, found
