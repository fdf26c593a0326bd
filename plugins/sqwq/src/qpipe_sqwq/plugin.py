"""The plugin `sqwq`: a quantizer, rules that put it on the transformer blocks, its regulariser and learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from pydantic import Field
from torch import nn

from qpipe import ParamGroup, Plugin, QuantizerKind, Rule, Run, SiteError, WeightLoss, hookimpl
from qpipe_sqwq.penalty import distribution_penalty
from qpipe_sqwq.quantizer import SqwqOptions, SqwqWeight
from qpipe_sqwq.stored import take_stored

NAME = "sqwq"


class SqwqPluginOptions(SqwqOptions):
    """Options of the plugin: where the quantizer goes, with which options, and the regulariser."""

    weight: float = Field(1.0, ge=0, description="factor of the regulariser in the loss (lambda_q)")
    every: int = Field(
        1, ge=1, description="evaluate the regulariser in every n-th optimizer step only, with n times the weight"
    )
    rules: bool = Field(True, description="contribute rules; false only offers the quantizer to rules of your own")
    sites: tuple[str, ...] = Field(("{block}.*:weight",), description="patterns over sites that are squashed")
    embedding: bool = Field(False, description="squash the input embedding too, with one gain for the table")


class Sqwq(Plugin):
    """Trains weights as `tanh(P) * e**g`, with P held at a distribution that fills a uniform grid."""

    Options = SqwqPluginOptions

    @hookimpl
    def qpipe_quantizers(self) -> Iterable[QuantizerKind]:
        """`sqwq`."""
        yield QuantizerKind(
            NAME, SqwqWeight, SqwqOptions, frozenset({"weight"}), "squashed weights on a mid-rise grid, 1 to 8 bits"
        )

    @hookimpl
    def qpipe_quant_rules(self) -> Iterable[Rule]:
        """Squashed weights at `sites`; the user's own rules come later and win."""
        if not self.options.rules:
            return
        options: dict[str, Any] = self.options.model_dump(include=set(SqwqOptions.model_fields))
        for pattern in self.options.sites:
            yield Rule(pattern, NAME, options)
        if self.options.embedding:
            yield Rule("{embedding}:weight", NAME, {**options, "granularity": "tensor"})

    @hookimpl
    def qpipe_weight_losses(self, run: Run) -> Iterable[WeightLoss]:
        """The regulariser, summed over the squashed weights; one term for each `sigma` that their rules name.

        Raises:
            SiteError: no weight is squashed.
        """
        paths: dict[float, set[str]] = {}
        for site, quantizer in squashed(run).items():
            paths.setdefault(quantizer.options.sigma, set()).add(site.rpartition(":")[0])
        if not paths:
            raise SiteError(
                "plugin 'sqwq' is named, but no rule squashes a weight; set sqwq.rules=true, write a rule with "
                "quantizer: sqwq, or leave the plugin out"
            )
        for sigma, members in paths.items() if self.options.weight else ():
            name = NAME if len(paths) == 1 else f"{NAME}-{sigma:g}"
            fn = partial(distribution_penalty, sigma=sigma)
            weight, every = self.options.weight, self.options.every
            yield WeightLoss(name, fn, weight, members.__contains__, "sum", every, stored=True, moments=True)

    @hookimpl
    def qpipe_model_prepared(self, run: Run) -> None:
        """Take P and gains from an earlier run where `init` says so.

        Raises:
            ConfigError: `model.name` is no folder of a run that squashed the same weights, or the model is another one.
        """
        wanted = {site: q for site, q in squashed(run).items() if q.options.init == "stored"}
        if wanted and not run.trained:
            take_stored(run, wanted)

    @hookimpl
    def qpipe_param_groups(self, run: Run) -> Iterable[ParamGroup]:
        """P and gains: their own learning rate, no decay (which would pull P below its deviation)."""
        members: dict[float, set[int]] = {}
        for site, quantizer in squashed(run).items():
            weight = run.student.get_parameter(f"{site.rpartition(':')[0]}.weight")
            members.setdefault(quantizer.lr_scale, set()).update({id(weight), id(quantizer.gain)})
        for scale, ids in members.items():
            yield ParamGroup(f"{NAME}-{scale:g}", _among(ids), lr_scale=scale, weight_decay=0.0)


def squashed(run: Run) -> dict[str, SqwqWeight]:
    """The squashed weights of a run, by site."""
    return {site: q for site, q in run.instruments.quantizers().items() if isinstance(q, SqwqWeight)}


def _among(ids: set[int]) -> Any:
    def match(name: str, parameter: nn.Parameter) -> bool:
        return id(parameter) in ids

    return match
