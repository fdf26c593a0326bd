"""The running sums of embeddings, inside a forward pass that adds them up without a module at each addition."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qpipe.errors import ModelError
from qpipe.quant.modules import QuantEmbedding


class Withheld(torch.autograd.Function):
    """`kept, zeros = Withheld.apply(x)`: `x` for later, and zeros that stand in for it now.

    The zeros stay connected to `x`, with no gradient of their own. So whatever an engine attaches to a module's output
    (ZeRO-3: gathering its weight for backward) still happens before the gradient reaches `x`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x` and zeros of its shape."""
        return x.view_as(x), torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Pass on the gradient of what was kept."""
        return grads[0]


class EmbeddingSums:
    """Takes the additions of several embeddings over from the forward pass of the module that holds them.

    `w + t + p` is computed as `0 + Q(w + t) + p`: the first tables return zeros, and the last one with a site in use
    returns the sum so far. Without a quantizer the result is the same, bit for bit.
    """

    def __init__(self, parent: nn.Module, tables: Sequence[QuantEmbedding]) -> None:
        self.tables = list(tables)
        self.last = 0
        self._kept: Tensor | None = None
        for table in self.tables:
            table.qpipe.sums = self
        self._place = list(inspect.signature(parent.forward).parameters).index("inputs_embeds")
        parent.register_forward_pre_hook(self._start, with_kwargs=True)

    def use(self, table: QuantEmbedding) -> None:
        """Take the additions over up to that of `table`, because something sits at its `sum`."""
        self.last = max(self.last, self.tables.index(table))

    def _start(
        self, parent: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A forward pass begins. Embeddings that the caller gives stand in for the output of the first table."""
        self._kept = None
        given = args[self._place] if len(args) > self._place else kwargs.get("inputs_embeds")
        if given is None or not self.last:
            return None
        self._kept, zeros = Withheld.apply(given)
        if len(args) > self._place:
            return (*args[: self._place], zeros, *args[self._place + 1 :]), dict(kwargs)
        return args, {**kwargs, "inputs_embeds": zeros}

    def add(self, table: QuantEmbedding, output: Tensor) -> Tensor:
        """What a table returns in place of its output `[batch, tokens, features]`.

        Raises:
            ModelError: the tables are not called in the order in which the model map lists them.
        """
        index = self.tables.index(table)
        if index > self.last or not self.last:
            return output
        if index > 0:
            if self._kept is None:
                raise ModelError(
                    f"{table.qpipe.path}:sum: {self.tables[index - 1].qpipe.path} has not been looked up before it, so "
                    "this model does not add its embeddings in the order of ModelMap.embeddings; leave the site out "
                    "with quantizer: none"
                )
            output = table.at("sum", self._kept + output)
            self._kept = None
        if index == self.last:
            return output
        self._kept, zeros = Withheld.apply(output)
        return zeros
