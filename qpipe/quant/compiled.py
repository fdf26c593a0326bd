"""Compiled forms of elementwise functions: an option that saves time and never changes a bit."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from qpipe.errors import ConfigError
from qpipe.quant.quantizer import QuantContext
from qpipe.quant.rounding import block_rows

logger = logging.getLogger("qpipe.compile")

WORTHWHILE = 1e10
"""Quantized elements of a training from which `auto` compiles. Compiling saves 3 ns and more for each, and takes about
20 s in every process, or a few where the machine's inductor cache holds the kernels: see docs/benchmarks.md."""

Setting = Literal["auto", "on", "off"]


def compiler() -> str | None:
    """The C++ compiler that torch would call, None if there is none."""
    named = os.environ.get("CXX")
    return next((found for name in ([named] if named else ["g++", "clang++"]) if (found := shutil.which(name))), None)


def use_compiled(setting: Setting, elements: float, device: torch.device) -> bool:
    """Whether to quantize in compiled code.

    Args:
        setting: `quantization.compile`.
        elements: of weights and activations that this process quantizes from here on.
        device: where they are. Other devices than CPUs stay eager: their compilers round divisions differently.

    Raises:
        ConfigError: `on` where it is not possible.
    """
    if setting == "off":
        return False
    if device.type != "cpu":
        if setting == "on":
            raise ConfigError(
                f"quantization.compile: on works on CPUs only, and this run is on {device}; set auto or off"
            )
        return False
    if setting == "auto" and elements < WORTHWHILE:
        return False
    if compiler() is None:
        if setting == "on":
            raise ConfigError("quantization.compile: on needs a C++ compiler (g++, clang++ or $CXX); install one")
        logger.warning("no C++ compiler (g++, clang++ or $CXX): quantization runs in eager mode, which is slower")
        return False
    logger.info("quantizing in compiled code (quantization.compile: %s); the first step takes longer", setting)
    return True


@cache
def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of a function of tensors and constants, one kernel for all shapes."""
    # The compiler keeps a few variants per code object; closures of one function would share them.
    assert isinstance(fn, FunctionType)
    own = FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    # One thread: the pool of compiler processes costs more than the few small kernels here.
    return torch.compile(
        own, dynamic=True, fullgraph=True, options={"compile_threads": 1, "emulate_precision_casts": True}
    )


def turn_off(context: QuantContext, reason: str) -> None:
    """Go on in eager mode, and say so."""
    context.compiled = False
    logger.warning("quantization.compile: %s; weights are quantized in eager mode from here on", reason)


def _unrelated(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory, without the record of what each tensor is a view of; one tensor stays one tensor.

    The compiler makes code of its own for every kind of tensor behind a view, and keeps only a few variants.
    """
    made: dict[int, Tensor] = {}
    return [made.setdefault(id(tensor), tensor.data) for tensor in tensors]


@overload
def over_rows(
    context: QuantContext,
    fn: Callable[..., Tensor],
    out: Tensor,
    tensors: Sequence[Tensor],
    constants: Sequence[Any] = (),
) -> Tensor: ...


@overload
def over_rows(
    context: QuantContext,
    fn: Callable[..., None],
    out: Tensor,
    tensors: Sequence[Tensor],
    constants: Sequence[Any] = (),
) -> None: ...


def over_rows(
    context: QuantContext,
    fn: Callable[..., Tensor | None],
    out: Tensor,
    tensors: Sequence[Tensor],
    constants: Sequence[Any] = (),
) -> Tensor | None:
    """Call `fn(out, *tensors, *constants)`, which treats every row by itself: compiled, or eager in blocks of rows.

    Args:
        context: says whether compiled code may be used.
        fn: fills `out` and returns some numbers per row, `[rows, k]`, or nothing; a module-level function. A view of
            `out` is no such number: compiled code would write it once more.
        out: `[rows, width]`.
        tensors: `[rows, ...]`, or `[1, ...]` for what all rows share. One of them may be `out` itself.
        constants: numbers and the like.

    Returns what `fn` returns for all rows.
    """
    if context.compiled and out.device.type == "cpu":
        try:
            return compiled(fn)(*_unrelated([out, *tensors]), *constants)
        except Exception as error:  # The compiler's errors have no common base; the eager path does the same work.
            turn_off(context, f"compiling {fn.__name__} failed ({type(error).__name__}: {str(error)[:200]})")
    count, size = out.shape[0], block_rows(out)
    parts = []
    for start in range(0, count, size):
        stop = start + size
        part = [t[start:stop] if t.shape[0] == count else t for t in tensors]
        found = fn(out[start:stop], *part, *constants)
        if found is not None:
            parts.append(found)
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)
