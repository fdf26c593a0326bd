"""The plugin `ternary-twn`: a quantizer, and rules that put it on the transformer blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from qpipe import Plugin, QuantizerKind, Rule, Run, SiteError, hookimpl
from qpipe_ternary_twn.quantizer import TernaryOptions, TernaryWeight

NAME = "ternary-twn"


class TernaryTwnOptions(TernaryOptions):
    """Options of the plugin: where the quantizer goes, and with which options."""

    rules: bool = Field(True, description="contribute rules; false only offers the quantizer to rules of your own")
    sites: tuple[str, ...] = Field(("{block}.*:weight",), description="patterns over sites that become ternary")
    embedding: bool = Field(False, description="make the input embedding ternary too, with a scale per row")


class TernaryTwn(Plugin):
    """Makes the weights of the transformer blocks ternary."""

    Options = TernaryTwnOptions

    @hookimpl
    def qpipe_quantizers(self) -> Iterable[QuantizerKind]:
        """`ternary-twn`."""
        yield QuantizerKind(
            NAME, TernaryWeight, TernaryOptions, frozenset({"weight"}), "weights -scale, 0, +scale by magnitude"
        )

    @hookimpl
    def qpipe_quant_rules(self) -> Iterable[Rule]:
        """Ternary weights at `sites`; the user's own rules come later and win."""
        if not self.options.rules:
            return
        options: dict[str, Any] = self.options.model_dump(include=set(TernaryOptions.model_fields), exclude_none=True)
        for pattern in self.options.sites:
            yield Rule(pattern, NAME, options)
        if self.options.embedding:
            own = {key: value for key, value in options.items() if key != "group_size"}
            yield Rule("{embedding}:weight", NAME, {**own, "granularity": "channel"})

    @hookimpl
    def qpipe_model_prepared(self, run: Run) -> None:
        """Refuse a run in which the plugin does nothing.

        Raises:
            SiteError: no rule makes a weight ternary, or later ones take all of them back.
        """
        if run.trained:
            return
        if not any(isinstance(quantizer, TernaryWeight) for quantizer in run.instruments.quantizers().values()):
            raise SiteError(
                "plugin 'ternary-twn' is named, but no rule makes a weight ternary; set ternary-twn.rules=true, write "
                "a rule with quantizer: ternary-twn, or leave the plugin out"
            )
