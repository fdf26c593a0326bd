"""Weights that a model computes with outside the modules that quantize them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qpipe.quant.modules import QuantModule

MADE_LIKE = ("_like", "new")
"""In the names of functions that take nothing but shape and type of a tensor."""

LIKE_SECOND = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
"""Functions that take nothing but these of all tensors but the first."""


class _Watch(TorchFunctionMode):
    """Notes which weights functions of torch compute with while none of the modules that have them is at work.

    A weight is known as the Parameter that its modules have at that moment: an engine may keep many in one tensor, or
    gather them when they are read.
    """

    def __init__(self, modules: Iterable[QuantModule]) -> None:
        super().__init__()
        self.modules = list(modules)
        self.at_work: set[nn.Module] = set()
        self.found: dict[str, str] = {}
        self._views: dict[int, tuple[Tensor, list[QuantModule]]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        made = [tensor for tensor in _tensors((result,)) if tensor.dtype != torch.bool]
        if made and not any(part in name for part in MADE_LIKE):
            given = args[:1] if name in LIKE_SECOND else (*args, *(kwargs or {}).values())
            for tensor in _tensors(given):
                owners = self._owners(tensor)
                if owners and not self.at_work.intersection(owners):
                    self._note(name, tensor, owners, made)
        return result

    def _owners(self, tensor: Tensor) -> list[QuantModule]:
        """The modules of the weight that a tensor is, or is a view of; none for other tensors."""
        if id(tensor) in self._views:
            return self._views[id(tensor)][1]
        if not isinstance(tensor, nn.Parameter):
            return []
        return [module for module in self.modules if module._parameters.get("weight") is tensor]

    def _note(self, name: str, tensor: Tensor, owners: list[QuantModule], made: Iterable[Tensor]) -> None:
        for other in made:
            if _memory(other) == _memory(tensor):
                self._views[id(other)] = other, owners  # still the weight; kept, so that nothing else gets its number
            else:
                self.found.setdefault(owners[0].qpipe.path, name)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _memory(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        try:
            return tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):  # such as a sparse one, or one inside of torch.func
            return 0


@contextmanager
def bypasses_noted(model: nn.Module) -> Iterator[dict[str, str]]:
    """By path of a module with a weight quantizer: the function that computed with its weight outside of it.

    What it finds is complete at the end. Code that is compiled runs as it is written meanwhile.
    """
    watch = _Watch(m for m in model.modules() if isinstance(m, QuantModule) and m.hosted("weight") is not None)
    handles = []
    for module in watch.modules:
        handles.append(module.register_forward_pre_hook(lambda module, _: watch.at_work.add(module), prepend=True))
        leave = module.register_forward_hook(lambda module, _, __: watch.at_work.discard(module), always_call=True)
        handles.append(leave)
    try:
        with torch.compiler.set_stance("force_eager"), watch:
            yield watch.found
    finally:
        for handle in handles:
            handle.remove()
