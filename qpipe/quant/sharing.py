"""One result for neighbours that would each make the same of the same activation."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Made = tuple[Tensor, Tensor | None]


class _View(NamedTuple):
    """Which values a tensor shows: equal ones of two tensors mean equal values while the storage lives."""

    storage: StorageWeakRef
    place: tuple[object, ...]
    version: int

    @classmethod
    def of(cls, value: Tensor) -> _View:
        place = (value.storage_offset(), value.shape, value.stride(), value.dtype)
        return cls(StorageWeakRef(value.untyped_storage()), place, value._version)


class Shared:
    """The last quantized activation, for those that quantize the same one: the inputs of query, key and value.

    They get the same tensor, so that the backward pass also keeps one copy instead of one each. The activation is told
    by its memory, not by the Python object, since engines pass every module an alias of its own.
    """

    def __init__(self) -> None:
        self._last: tuple[_View, Hashable, Made, list[int]] | None = None

    def __reduce__(self) -> tuple[type[Shared], tuple[()]]:
        """A copy of the model starts empty: a copied weak reference would free what it does not own."""
        return Shared, ()

    def made(self, value: Tensor, what: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, or what it returned for the same value and the same `what` if that was the last call.

        Args:
            value: what is quantized. Changes in place are noticed, those of the result too.
            what: everything else that the result depends on.
            make: called without gradients.
        """
        # Inference tensors do not count their changes, and a tracer's have no memory.
        if value.is_inference() or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return make()
        view = _View.of(value)
        found = self._kept(view, what)
        if found is None:
            self.forget()  # before there is more
            found = make()
            self._last = view, what, found, _versions(found)
        return found

    def _kept(self, view: _View, what: Hashable) -> Made | None:
        last = self._last
        if last is None:
            return None
        seen, before, made, versions = last
        same = seen == view and before == what and not seen.storage.expired() and versions == _versions(made)
        return made if same else None

    def forget(self) -> None:
        """Free the memory."""
        self._last = None


def _versions(made: Made) -> list[int]:
    return [tensor._version for tensor in made if tensor is not None]
