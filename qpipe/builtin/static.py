"""Uniform weights whose grid is set once."""

from __future__ import annotations

from collections.abc import Iterable

from qpipe.plugin import Plugin, hookimpl
from qpipe.quant.static import StaticOptions, StaticWeight
from qpipe.types import QuantizerKind


class StaticQuantizers(Plugin):
    """Offers `uniform-static` for weights."""

    @hookimpl
    def qpipe_quantizers(self) -> Iterable[QuantizerKind]:
        """`uniform-static`."""
        yield QuantizerKind(
            "uniform-static",
            StaticWeight,
            StaticOptions,
            frozenset({"weight"}),
            "integer weights, 2 to 8 bits, on a grid chosen once: min-max, least error, percentile",
        )
