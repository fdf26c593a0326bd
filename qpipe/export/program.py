"""Programs: networks that run without the code that made them, for targets that need other operations than the model's.

A program computes what the run computed, from the same codes, in operations that its target has. It is written by
`torch.export` beside a native checkpoint, with its weights as int8 codes: `program.pt2` and `program.json`
(docs/format.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qpipe.errors import FormatError
from qpipe.export import native
from qpipe.export.companions import dtype_name
from qpipe.export.folder import PROGRAM, PROGRAM_LAYOUT, write_json
from qpipe.export.record import ExportRecord, decoded_sha256, tensor_sha256
from qpipe.quant.tensor import QTensor

VERSION = 1
PREFIX = "network."
"""Of the names in a program's state: the network is a submodule of what returns its logits."""


@dataclass(frozen=True)
class Program:
    """A network that computes what a run computed, in other operations.

    Attributes:
        network: takes the inputs of the reference examples by name and returns an object with `logits`; in evaluation
            mode, on the CPU, with decoded weights. Its activations are quantized. It is changed when it is written.
        weights: codes of its quantized weights, of at most 8 bits, by parameter name.
        activations: what it quantizes, as `ActivationRange` has it, with `module` and `slot` in the network.
    """

    network: nn.Module
    weights: Mapping[str, QTensor]
    activations: Sequence[Mapping[str, Any]]


class _Decoded(nn.Module):
    """Codes as the values of a parameter, formed as every reader forms them."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, tensor: QTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits, self.group_size, self.dtype = tensor.bits, tensor.group_size, dtype
        self.register_buffer("scale", tensor.scale.float())
        self.register_buffer("zero_point", tensor.zero_point.float())

    def forward(self, codes: Tensor) -> Tensor:
        """Int8 codes of any shape to values of the same."""
        return QTensor(codes, self.scale, self.zero_point, self.bits, self.group_size).decode(self.dtype)


class _Logits(nn.Module):
    """The network with one result, called with inputs of these names."""

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.network = network

        def forward(**inputs: Tensor) -> Tensor:
            logits: Tensor = network(**inputs).logits
            return logits

        # torch.export reads names of inputs from the signature, and knows none in `**inputs`.
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


def write_program(record: ExportRecord, directory: Path, program: Program) -> None:
    """Write a native checkpoint with a program beside it.

    Args:
        record: what the run has trained.
        directory: becomes the checkpoint; empty, missing, or an earlier export.
        program: computes the same.

    Raises:
        FormatError: the network's weights are not those of the codes, torch cannot trace the network, or the native
            format cannot hold the record.
        CheckpointError: the disk is full.
    """
    for name, tensor in program.weights.items():
        store_codes(program.network, name, tensor, record.dtype)
    exported = traced(program.network, record.reference)
    native.write(record, directory, beside=lambda folder: _save(exported, program, record.dtype, folder))


def store_codes(network: nn.Module, name: str, tensor: QTensor, dtype: torch.dtype) -> None:
    """Replace a parameter by int8 codes, from which each forward pass forms its values.

    Raises:
        FormatError: these are other values than the parameter's, or codes that int8 does not hold.
    """
    path, _, local = name.rpartition(".")
    module, decoded = network.get_submodule(path), _Decoded(tensor, dtype)
    if tensor.bits > 8:
        raise FormatError(f"{name}: {tensor.bits}-bit codes do not fit a program, which holds 1 to 8 bits")
    codes = tensor.integers()
    if not torch.equal(decoded(codes), network.get_parameter(name)):
        raise FormatError(f"{name}: the program's network has other values than its codes decode to")
    module.register_parameter(local, nn.Parameter(codes, requires_grad=False))
    parametrize.register_parametrization(module, local, decoded, unsafe=True)  # unsafe: codes are of another type


def traced(network: nn.Module, reference: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """The network as a graph, for any number of examples and, in text, of tokens.

    Args:
        network: as in `Program`.
        reference: `inputs.<name>`, `[examples, ...]`; of two axes where they are tokens.

    Raises:
        FormatError: torch cannot trace it.
    """
    given = {k.removeprefix("inputs."): v for k, v in reference.items() if k.startswith("inputs.")}
    # Twice, since torch takes an axis of one element for one that is always so.
    inputs = {name: torch.cat([value, value]) for name, value in given.items()}
    shapes = {
        name: dict.fromkeys(range(2 if value.ndim == 2 else 1), torch.export.Dim.DYNAMIC)
        for name, value in inputs.items()
    }
    try:
        with torch.no_grad():
            exported = torch.export.export(_Logits(network, inputs), (), inputs, dynamic_shapes=shapes)
    except Exception as error:  # torch raises what it likes, with pages of advice
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise FormatError(
            f"torch.export cannot make a program of this {type(network).__name__}: {reason}; export to native"
        ) from error
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, and most of the file
    return exported


def _save(exported: torch.export.ExportedProgram, program: Program, dtype: torch.dtype, folder: Path) -> None:
    state = exported.state_dict
    weights = {name: _entry(name, tensor, dtype) for name, tensor in program.weights.items()}
    parts = {entry[part] for entry in weights.values() for part in ("codes", "scale", "zero_point")}
    layout = {
        "format": "qpipe-program",
        "version": VERSION,
        "dtype": dtype_name(dtype),
        "weights": weights,
        "tensors": {
            name: {"shape": list(t.shape), "dtype": dtype_name(t.dtype), "sha256": tensor_sha256(t)}
            for name, t in state.items()
            if name not in parts
        },
        "activations": [dict(record) for record in program.activations],
    }
    torch.export.save(exported, folder / PROGRAM)
    write_json(folder / PROGRAM_LAYOUT, layout)


def _entry(name: str, tensor: QTensor, dtype: torch.dtype) -> dict[str, Any]:
    """What `program.json` says of a weight: names in the program's state, layout, and hash of the decoded values."""
    path, _, local = name.rpartition(".")
    held = f"{PREFIX}{path}.parametrizations.{local}"
    return {
        "codes": f"{held}.original",
        "scale": f"{held}.0.scale",
        "zero_point": f"{held}.0.zero_point",
        "bits": tensor.bits,
        "shape": list(tensor.codes.shape),
        "granularity": tensor.granularity,
        "group_size": tensor.group_size,
        "sha256": decoded_sha256(tensor, dtype),
    }
