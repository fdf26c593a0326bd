"""What is in a packed checkpoint, tensor by tensor, and how large it is."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from qpipe.errors import FormatError
from qpipe.export.folder import METADATA, read_json, weight_files

ITEM_BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}
SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight")


def stored_bytes(directory: Path) -> dict[str, int]:
    """Bytes of each tensor in the checkpoint's weight files, from their headers alone.

    Raises:
        FormatError: a file is missing, truncated or no safetensors file; names it.
    """
    found: dict[str, int] = {}
    for path in weight_files(directory):
        size = path.stat().st_size
        try:
            with path.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > size:
                    raise ValueError("header longer than the file")
                header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            found |= {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise FormatError(f"{path} is truncated or no safetensors file: {error}") from error
        if size != 8 + length + end:
            raise FormatError(f"{path} is truncated or damaged: {size} bytes, its header says {8 + length + end}")
    return found


def describe(directory: Path | str) -> list[dict[str, Any]]:
    """One row per parameter or buffer: module, format, bits, granularity, shape, bytes, bits per weight.

    Bytes include scales and zero points.

    Raises:
        FormatError: the folder is no qpipe export, or damaged.
    """
    directory = Path(directory)
    about = read_json(directory / METADATA)
    stored = stored_bytes(directory)
    rows = [_weight_row(name, entry, stored) for name, entry in about["weights"].items()]
    for name, entry in about["tensors"].items():
        if name not in stored:
            raise FormatError(f"{directory} lacks the tensor {name} that {METADATA} lists")
        count = math.prod(entry["shape"])
        rows.append(
            {
                "module": name,
                "format": "plain",
                "bits": ITEM_BITS.get(entry["dtype"], 8 * stored[name] // max(1, count)),
                "granularity": "",
                "shape": tuple(entry["shape"]),
                "bytes": stored[name],
                "bits_per_weight": 8 * stored[name] / max(1, count),
            }
        )
    return rows


def _weight_row(name: str, entry: dict[str, Any], stored: dict[str, int]) -> dict[str, Any]:
    parts = [f"{entry['module']}.{suffix}" for suffix in SUFFIXES]
    total = sum(stored[part] for part in parts if part in stored)
    if not total:
        raise FormatError(f"the weight files lack {name}, which {METADATA} lists")
    grain = f"group {entry['group_size']}" if entry["group_size"] else entry["granularity"]
    return {
        "module": entry["module"],
        "format": entry["stored"],
        "bits": entry["bits"],
        "granularity": grain,
        "shape": tuple(entry["shape"]),
        "bytes": total,
        "bits_per_weight": 8 * total / math.prod(entry["shape"]),
    }


def sizes(directory: Path | str) -> dict[str, Any]:
    """Sizes of a checkpoint.

    Returns:
        `file_bytes` of the weight files; `full_precision_bytes` of the same parameters in `full_precision_dtype`, tied
        parameters counted once; `quantized_bits_per_weight` over quantized weights and `bits_per_weight` over all
        parameters, both with scales and zero points; `quantized_parameters` and `parameters`.

    Raises:
        FormatError: the folder is no qpipe export, or damaged.
    """
    directory = Path(directory)
    about = read_json(directory / METADATA)
    rows = describe(directory)
    width = ITEM_BITS[about["dtype"]]
    quantized = [r for r in rows if r["format"] != "plain"]
    weights = sum(math.prod(r["shape"]) for r in quantized)
    everything = sum(math.prod(r["shape"]) for r in rows)
    copies = sum(math.prod(r["shape"]) for r in quantized if f"{r['module']}.weight" in about.get("untied", ()))
    others = sum(r["bytes"] for r in rows if r["format"] == "plain")
    return {
        "file_bytes": sum(p.stat().st_size for p in weight_files(directory)),
        "full_precision_bytes": (weights - copies) * width // 8 + others,
        "full_precision_dtype": about["dtype"],
        "quantized_bits_per_weight": 8 * sum(r["bytes"] for r in quantized) / max(1, weights),
        "bits_per_weight": 8 * sum(r["bytes"] for r in rows) / max(1, everything),
        "quantized_parameters": weights,
        "parameters": everything,
    }
