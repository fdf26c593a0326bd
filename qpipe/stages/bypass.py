"""Weights that a model computes with outside the modules that quantize them."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qpipe.quant.modules import QuantModule

MADE_LIKE = ("_like", "new_")
"""In the names of functions that take nothing but shape and type of a tensor."""


class _Weights:
    """The memory of weights that are quantized. An engine may keep them all in one tensor, as parts of it."""

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[int, list[QuantModule]] = {}
        self._ends: dict[int, int] = {}
        for module in model.modules():
            if isinstance(module, QuantModule) and module.hosted("weight") is not None and _address(module.weight):
                start = _address(module.weight)
                self._owners.setdefault(start, []).append(module)
                self._ends[start] = start + module.weight.nbytes
        self._starts = sorted(self._owners)

    @property
    def modules(self) -> set[QuantModule]:
        """Those that have any of them."""
        return {module for modules in self._owners.values() for module in modules}

    def owners(self, tensor: Tensor) -> list[QuantModule]:
        """The modules of the weight that a tensor is, or is a view of; none for other tensors."""
        address = _address(tensor)
        position = bisect.bisect_right(self._starts, address) - 1
        if position < 0 or address >= self._ends[self._starts[position]]:
            return []
        return self._owners[self._starts[position]]


def _address(tensor: Tensor) -> int:
    """Where its data begin; 0 for none, such as those of weights that are partitioned."""
    if type(tensor) not in (Tensor, nn.Parameter):  # such as one that is distributed, which is no memory of its own
        return 0
    with torch._C.DisableTorchFunction():
        return tensor.data_ptr()


class _Watch(TorchFunctionMode):
    """Notes which weights functions of torch compute with while none of the modules that have them is at work."""

    def __init__(self, weights: _Weights) -> None:
        super().__init__()
        self.weights = weights
        self.at_work: set[nn.Module] = set()
        self.found: dict[str, str] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if isinstance(result, Tensor) and not any(part in name for part in MADE_LIKE):
            for tensor in _tensors((*args, *(kwargs or {}).values())):
                owners = self.weights.owners(tensor)
                # A view of the weight is still the weight.
                if owners and not self.at_work.intersection(owners) and self.weights.owners(result) != owners:
                    self.found.setdefault(owners[0].qpipe.path, name)
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


@contextmanager
def bypasses_noted(model: nn.Module) -> Iterator[dict[str, str]]:
    """By path of a module with a weight quantizer: the function that computed with its weight outside of it.

    What it finds is complete at the end. Weights that are partitioned are not seen, and cannot be read outside either.
    """
    watch = _Watch(_Weights(model))
    handles = []
    for module in watch.weights.modules:
        handles.append(module.register_forward_pre_hook(lambda module, _: watch.at_work.add(module)))
        leave = module.register_forward_hook(lambda module, _, __: watch.at_work.discard(module), always_call=True)
        handles.append(leave)
    try:
        with watch:
            yield watch.found
    finally:
        for handle in handles:
            handle.remove()
