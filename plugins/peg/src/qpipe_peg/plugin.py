"""The plugin `peg`: a quantizer of activations, and rules that put it around the feed-forward networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import Field
from torch import nn

from qpipe import Exporter, ModelMap, Plugin, QuantizerKind, Rule, Run, Site, SiteError, hookimpl
from qpipe_peg import exporting
from qpipe_peg.quantizer import PegActivation, PegOptions

NAME = "peg"
FFN = ("ffn_output", "ffn_sum", "ffn_input")
"""The sites that share an order of features: the first of them that a block has gives it."""
WIDE = (
    "embedding_sum",
    "embedding_output",
    "attention_input",
    "query",
    "key",
    "value",
    "context",
    "attention_output",
    "attention_sum",
    *FFN,
    "block_output",
    "final_output",
)
"""Roles of activations along the hidden size."""
SLOTS = frozenset({"input", "output", "sum", "stream"})


class PegPluginOptions(PegOptions):
    """Options of the plugin: where the quantizer goes, and with which options."""

    rules: bool = Field(True, description="contribute rules; false only offers the quantizer to rules of your own")
    sites: tuple[str, ...] = Field(
        ("{ffn_input}", "{ffn_output}", "{ffn_sum}"), description="patterns over sites that get groups"
    )
    everywhere: bool = Field(
        False, description="every activation along the hidden size, not only those of `sites`; each in its own order"
    )


class Peg(Plugin):
    """Gives groups of features of an activation their own scale, so that outliers do not take the others' levels."""

    Options = PegPluginOptions

    @hookimpl
    def qpipe_quantizers(self) -> Iterable[QuantizerKind]:
        """`peg`."""
        yield QuantizerKind(
            NAME, PegActivation, PegOptions, SLOTS, "activations with a scale for each group of features, 2 to 16 bits"
        )

    @hookimpl
    def qpipe_quant_rules(self, run: Run) -> Iterable[Rule]:
        """Groups at `sites`; the user's own rules come later and win."""
        if not self.options.rules:
            return
        options = self.options.model_dump(include=set(PegOptions.model_fields))
        patterns = list(self.options.sites)
        if self.options.everywhere:
            roles = run.instruments.map.sites
            names = [name for role in WIDE for name in roles.get(role, ())]
            patterns += [name for name in names if name.rpartition(":")[2] in SLOTS]
        for pattern in patterns:
            yield Rule(pattern, NAME, options)

    @hookimpl
    def qpipe_exporters(self) -> Iterable[Exporter]:
        """`peg-tensors`."""
        yield Exporter(
            exporting.NAME,
            exporting.write,
            exporting.check,
            "native, and a program of torch.export that quantizes whole tensors in place of groups of features",
            exporting.stored_bytes,
            loads_with_transformers=True,
        )

    @hookimpl
    def qpipe_model_prepared(self, run: Run) -> None:
        """Tell quantizers how many features they get, and whose order they share.

        Raises:
            SiteError: no site has groups, the groups do not divide the features of one, or their number is unknown.
            FormatError: orders differ within a block, and the export is to have none.
        """
        found = {site: q for site, q in run.instruments.quantizers().items() if isinstance(q, PegActivation)}
        if not found:
            raise SiteError(
                "plugin 'peg' is named, but no rule gives an activation groups; set peg.rules=true, write a rule with "
                "quantizer: peg, or leave the plugin out"
            )
        for site, quantizer in found.items():
            quantizer.set_width(width_of(run.student, run.instruments.map, run.instruments.sites[site]))
        share(found, run.instruments.map.sites)
        if run.config.export.format == exporting.NAME:
            exporting.require_one_order(found, run.instruments.map.sites)


def share(found: Mapping[str, PegActivation], roles: Mapping[str, tuple[str, ...]]) -> None:
    """Let the sites around each feed-forward network share an order of features, where their options say so.

    Args:
        found: the quantizers, by site.
        roles: `ModelMap.sites`.
    """
    for sites in zip(*(roles.get(role, ()) for role in FFN), strict=True):
        members = [found[site] for site in sites if site in found and found[site].options.shared]
        for member in members[1:]:
            if len(member.order) == len(members[0].order):
                member.shared_with = (members[0],)


def width_of(model: nn.Module, parts: ModelMap, site: Site) -> int:
    """How many features an activation has.

    Args:
        model: the student.
        parts: its map.
        site: of the activation.

    Raises:
        SiteError: the module does not tell.
    """
    module = model.get_submodule(site.path)
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.in_features if site.slot == "input" else module.out_features
    if site.path in parts.norms and weight is not None:
        return int(weight.shape[-1])
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    if hidden and site.name in {name for role in WIDE for name in parts.sites.get(role, ())}:
        return int(hidden)
    raise SiteError(
        f"{site.name}: groups of features are for inputs and outputs of linear maps, normalisations, embeddings and "
        f"blocks; how many features a {site.module_type} has is not known. Leave it out with quantizer: none"
    )
