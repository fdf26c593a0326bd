"""The `native` format, for what compressed-tensors cannot hold: convolutions, small embeddings, codes at 1.6 bits.

Layout: docs/format.md. Every value is read back bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qpipe.errors import FormatError
from qpipe.export.companions import companions, model_config, plain_class, resolve_ties, save_config
from qpipe.export.folder import (
    MAX_SHARD,
    METADATA,
    PROGRAM,
    read_json,
    save_tensors,
    weight_files,
    whole_folder,
    write_json,
)
from qpipe.export.packing import pack_bits, pack_trits, packed_width, unpack_bits, unpack_trits
from qpipe.export.record import ExportRecord, PackedWeight, PlannedSite
from qpipe.quant.tensor import QTensor

if TYPE_CHECKING:
    from torch import nn

NAME = "native"
LAYOUT = "quantization.json"
VERSION = 1


def check(sites: Iterable[PlannedSite]) -> list[str]:
    """A reason for each planned site that the format cannot hold; only codes wider than 8 bits are refused."""
    return [
        f"{s.name}: {s.bits}-bit codes do not fit the native format, which holds 1 to 8 bits; lower bits there"
        for s in sites
        if s.slot == "weight" and not 1 <= s.bits <= 8
    ]


def _packer(tensor: QTensor) -> str:
    if tensor.bits != 2 or bool(tensor.zero_point.any()):
        return "bits"
    return "trits" if bool((tensor.codes.abs() <= 1).all()) else "bits"


def pack(name: str, weight: PackedWeight) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Layout entry and tensors (by full name) of one weight.

    Raises:
        FormatError: a code is not an integer in the range of its width, or wider than 8 bits.
    """
    tensor = weight.tensor
    if not 1 <= tensor.bits <= 8:
        raise FormatError(f"{name}: {tensor.bits}-bit codes do not fit the native format; allowed: 1 to 8")
    try:
        codes = tensor.integers().reshape(tensor.codes.shape[0], -1).numpy()
    except ValueError as error:
        raise FormatError(f"{name}: {error}") from error
    packer = _packer(tensor)
    packed = pack_trits(codes) if packer == "trits" else pack_bits(codes, tensor.bits)
    rows = codes.shape[0]
    columns = tensor.scale.numel() // rows if tensor.group_size is not None else 1
    entry = {
        "module": weight.module,
        "module_type": weight.module_type,
        "packer": packer,
        "bits": tensor.bits,
        "shape": list(tensor.codes.shape),
        "granularity": tensor.granularity,
        "group_size": tensor.group_size,
    }
    # One axis: whoever loads the file without reading quantization.json gets a shape error, never wrong weights.
    found = {name: torch.from_numpy(packed.reshape(-1)), f"{name}_scale": _table(tensor.scale, columns)}
    if bool(tensor.zero_point.any()):
        found[f"{name}_zero_point"] = _table(tensor.zero_point, columns)
    return entry, found


def _table(value: Tensor, columns: int) -> Tensor:
    flat = value.float().reshape(-1)
    return (flat.reshape(1, 1) if flat.numel() == 1 else flat.reshape(-1, columns)).contiguous()


def write(
    record: ExportRecord,
    directory: Path,
    max_shard: int = MAX_SHARD,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a native checkpoint.

    Args:
        record: what to write.
        directory: becomes the checkpoint; empty, missing, or an earlier export.
        max_shard: bytes per weight file.
        beside: writes a program into the folder (`qpipe.export.program`).

    Raises:
        FormatError: a weight has more than 8 bits, or `directory` holds other files.
        CheckpointError: the disk is full.
    """
    if not record.weights and not record.activations:
        raise FormatError("nothing is quantized, so there is nothing to pack; save the model with save_pretrained")
    record = resolve_ties(record)
    if beside is not None:
        record = replace(record, metadata={**record.metadata, "program": PROGRAM})
    entries: dict[str, Any] = {}
    tensors: dict[str, Tensor] = dict(record.tensors)
    for name, weight in record.weights.items():
        entries[name], found = pack(name, weight)
        tensors.update(found)
    needed = sum(t.nbytes for t in tensors.values())
    if beside is not None:
        needed += needed_by_program(record)
    with whole_folder(Path(directory), needed) as folder:
        save_config(record, folder)
        save_tensors(folder, tensors, max_shard)
        layout = {
            "format": "qpipe-native",
            "version": VERSION,
            "dtype": str(record.dtype).removeprefix("torch."),
            "weights": entries,
            "activations": [site.record() for site in record.activations],
        }
        write_json(folder / LAYOUT, layout)
        if beside is not None:
            beside(folder)
        stored = {e["module"]: (e["packer"], e["bits"]) for e in entries.values()}
        companions(record, folder, NAME, stored)


def needed_by_program(record: ExportRecord) -> int:
    """Bytes of a program with the same weights: a byte for each code."""
    return sum(w.tensor.codes.numel() for w in record.weights.values()) + sum(t.nbytes for t in record.tensors.values())


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} is truncated or damaged: {error}") from error
    return tensors


def unpack(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QTensor:
    """One weight's codes, scale and zero point.

    Raises:
        FormatError: tensors are missing or their sizes contradict the layout.
    """
    try:
        shape, bits, group = tuple(entry["shape"]), int(entry["bits"]), entry["group_size"]
        packed, scale = tensors[name].numpy(), tensors[f"{name}_scale"]
        rows, count = shape[0], math.prod(shape[1:])
        width = packed_width(entry["packer"], bits, count)
        matrix = packed.reshape(rows, width)
        codes = unpack_trits(matrix, count) if entry["packer"] == "trits" else unpack_bits(matrix, bits, count)
        zero = tensors.get(f"{name}_zero_point", torch.zeros(1))
        axes = 3 if group is not None else len(shape)
        columns = count // group if group is not None else 1
        if scale.shape not in ((1, 1), (rows, columns)):
            raise ValueError(f"scale has shape {tuple(scale.shape)}")
        scale, zero = _spread(scale, axes), _spread(zero, axes)
        return QTensor(torch.from_numpy(np.ascontiguousarray(codes)).reshape(shape), scale, zero, bits, group)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FormatError(f"{name} does not fit its entry in {LAYOUT}: {type(error).__name__}: {error}") from error


def _spread(value: Tensor, axes: int) -> Tensor:
    if value.numel() == 1:
        return value.reshape((1,) * axes)
    return value.reshape(*value.shape, *[1] * (axes - value.ndim)) if axes >= value.ndim else value


def read_layout(directory: Path) -> dict[str, Any]:
    """The contents of `quantization.json`.

    Raises:
        FormatError: it is missing, damaged, or of a newer version.
    """
    layout = read_json(directory / LAYOUT)
    if layout.get("format") != "qpipe-native" or not isinstance(layout.get("weights"), dict):
        raise FormatError(f"{directory / LAYOUT} does not describe a native checkpoint")
    if layout.get("version") != VERSION:
        raise FormatError(
            f"{directory / LAYOUT} has version {layout.get('version')}, this qpipe reads version {VERSION}; "
            "install a newer qpipe"
        )
    return layout


def read_native(directory: Path) -> dict[str, Tensor]:
    """Every parameter and buffer of a native checkpoint by name, weights decoded, in the checkpoint's dtype.

    Raises:
        FormatError: a file is missing, truncated or damaged; names it.
    """
    directory = Path(directory)
    layout = read_layout(directory)
    tensors = _read_tensors(directory)
    dtype = getattr(torch, str(layout["dtype"]))
    decoded: dict[str, Tensor] = {}
    for name, entry in layout["weights"].items():
        decoded[name] = unpack(name, entry, tensors).decode(dtype)
        for suffix in ("", "_scale", "_zero_point"):
            tensors.pop(name + suffix, None)
    return {**tensors, **decoded}


def load_native(directory: Path | str, attention: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The model of a native checkpoint with its decoded weights, in evaluation mode. Activations are not quantized.

    Args:
        directory: the checkpoint.
        attention: attention implementation of transformers; None takes its default.
        trust_remote_code: run the Python code that lies in the checkpoint, where its architecture has any.

    Raises:
        FormatError: a file is missing, truncated or damaged, the weights do not fit the architecture, or that is code
            which may not run.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    directory = Path(directory)
    about = read_json(directory / METADATA)
    auto = getattr(transformers, about["auto_class"])
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise FormatError(f"the configuration in {directory} does not load: {error}") from error
    own = (getattr(config, "auto_map", None) or {}).get(about["auto_class"]) if trust_remote_code else None
    made = get_class_from_dynamic_module(own, directory) if own else auto._model_mapping[type(config)]
    attention = _supported(made, attention)
    dtype = getattr(torch, about["dtype"])
    model = auto.from_config(config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code)
    return _filled(model, read_native(directory), f"the weights in {directory} do not fit its config.json")


def plain_model(record: ExportRecord) -> nn.Module:
    """The model of an export with its decoded weights, in evaluation mode on the CPU. Activations are not quantized.

    It is what `load_native` returns for the file, with the attention implementation of the run.

    Raises:
        FormatError: no transformers auto class makes such a model, or the record does not hold its weights.
    """
    record = resolve_ties(record)
    made = plain_class(record.model)
    attention = _supported(made, record.metadata.get("attention"))
    model = made._from_config(model_config(record), dtype=record.dtype, attn_implementation=attention)
    decoded = {
        name: replace(w.tensor, codes=w.tensor.integers()).decode(record.dtype) for name, w in record.weights.items()
    }
    return _filled(model, {**record.tensors, **decoded}, f"the record does not fit a {made.__name__}")


def _supported(made: Any, attention: str | None) -> str | None:
    """The attention implementation; None for convolution nets, which have none to choose."""
    return attention if attention is None or getattr(made, f"_supports_{attention}", True) else None


def _filled(model: Any, tensors: Mapping[str, Tensor], problem: str) -> nn.Module:
    """The model with these parameters and buffers; `problem` begins the message where they do not fit."""
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise FormatError(f"{problem}: {error}") from error
    model.tie_weights()
    absent = set(missing) - set(getattr(model, "_tied_weights_keys", None) or {})
    if absent or unexpected:
        raise FormatError(f"{problem}: {sorted(absent) + unexpected}")
    filled: nn.Module = model.eval()
    return filled
