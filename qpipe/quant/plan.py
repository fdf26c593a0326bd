"""From rules to a plan: which quantizer, with which options, sits at which site."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from pydantic import BaseModel, ValidationError

from qpipe.errors import SiteError, suggest
from qpipe.model.roles import ROLES
from qpipe.quant.precedence import Selections
from qpipe.quant.tensor import QTensor
from qpipe.types import Json, ModelMap, QuantizerKind, Rule, Site
from qpipe.validation import describe

NONE = "none"


@dataclass(frozen=True)
class PlannedSite:
    """A site with its quantizer, validated options, and who asked for it.

    Attributes:
        site: where.
        quantizer: name of the quantizer.
        options: its options.
        source: who asked for it: a preset, a plugin, or the configuration.
        bits: width of a code; for weights, measured on the weight itself.
        granularity: what shares a scale; likewise.
        zero_point: `none`, `integer`, `half` or `float`; likewise.
    """

    site: Site
    quantizer: str
    options: BaseModel
    source: str
    bits: int | None = None
    granularity: str | None = None
    zero_point: str = "none"


@dataclass(frozen=True)
class Plan:
    """The planned sites by name, in model order.

    Attributes:
        sites: by name.
        lost: in words, exceptions of an earlier source that a later one's general rule has undone.
    """

    sites: Mapping[str, PlannedSite]
    lost: tuple[str, ...] = ()

    def measured(self, name: str, tensor: QTensor, zero_point: str) -> Plan:
        """The plan with bits and granularity of a weight taken from its lattice."""
        entry = replace(self.sites[name], bits=tensor.bits, granularity=tensor.granularity, zero_point=zero_point)
        return replace(self, sites={**self.sites, name: entry})

    def to_json(self) -> Json:
        """A list of plain mappings, as written to `plan.json`."""
        return [
            {
                "site": name,
                "quantizer": entry.quantizer,
                "bits": entry.bits,
                "granularity": entry.granularity,
                "options": entry.options.model_dump(mode="json"),
                "source": entry.source,
            }
            for name, entry in self.sites.items()
        ]

    def dumps(self) -> str:
        """`to_json` as text."""
        return json.dumps(self.to_json(), indent=1)


def placeholders(model_map: ModelMap) -> dict[str, tuple[str, ...]]:
    """What a pattern can name in braces, and the paths or sites that it stands for in this model."""
    return {
        "block": model_map.blocks,
        "embedding": (model_map.embedding,) if model_map.embedding else (),
        "head": model_map.head,
        "norm": model_map.norms,
        "outputs": tuple(name for names in model_map.sites.values() for name in names),
        **model_map.sites,
    }


def expand(pattern: str, model_map: ModelMap) -> list[str]:
    """Replace `{block}`, `{ffn_sum}`, `{head[0]}` and the like by what they stand for.

    Raises:
        SiteError: the model has no such part, or not so many, or another word is in braces.
    """
    found = re.search(r"\{(\w*)(?:\[(-?\d+)\])?\}", pattern)
    if found is None:
        return [pattern]
    parts, word, index = placeholders(model_map), found[1], found[2]
    if word not in parts and word not in ROLES:
        names = [f"{{{part}}}" for part in (*parts, *(r for r in ROLES if r not in parts))]
        raise SiteError(
            f"rule {pattern!r}: {found[0]} stands for nothing{suggest(found[0], names)}; there are {', '.join(names)}"
        )
    values = parts.get(word, ())
    if not values:
        raise SiteError(
            f"rule {pattern!r}: this model has no {word} that qpipe knows; "
            "write module paths instead, as `qpipe inspect plan --sites` lists them"
        )
    if index is not None:
        if not -len(values) <= int(index) < len(values):
            raise SiteError(f"rule {pattern!r}: this model has {len(values)} of {word}, counted from 0")
        values = (values[int(index)],)
    return [p for value in values for p in expand(pattern.replace(found[0], value), model_map)]


def selects(pattern: str, site: Site) -> bool:
    """True if a pattern without placeholders selects a site; see `Site.by_name`."""
    if not fnmatchcase(site.name, pattern):
        return False
    if not site.by_name:
        return True
    own = pattern.rpartition(":")[0].rpartition(".")[2]
    return bool(own.strip("*?")) and fnmatchcase(site.path.rpartition(".")[2], own)


def matches(rule: Rule, sites: Sequence[Site], model_map: ModelMap) -> list[Site]:
    """The sites a rule selects, at least one.

    Raises:
        SiteError: none matches; names the nearest site and what slots exist.
    """
    patterns = expand(rule.site, model_map)
    found = [site for site in sites if any(selects(p, site) for p in patterns)]
    if not found:
        slots = sorted({site.slot for site in sites})
        near = suggest(patterns[0], [site.name for site in sites])
        raise SiteError(
            f"rule {rule.site!r} (quantizer {rule.quantizer!r}) matches no site{near}; a site is `module.path:slot` "
            f"with slot one of {', '.join(slots)}. `qpipe inspect plan --sites` lists them"
        )
    return found


def validated(rule: Rule, source: str, kinds: Mapping[str, QuantizerKind]) -> BaseModel:
    """The options of a rule as the quantizer's own model.

    Raises:
        SiteError: the quantizer is unknown or an option is not allowed.
    """
    if rule.quantizer not in kinds:
        raise SiteError(
            f"rule {rule.site!r} of {source}: no quantizer is called {rule.quantizer!r}"
            f"{suggest(rule.quantizer, kinds)}; available: {', '.join([*kinds, NONE])}"
        )
    model = kinds[rule.quantizer].options
    try:
        return model(**rule.options)
    except ValidationError as error:
        raise SiteError(f"rule {rule.site!r} of {source}: {describe(error, model)}") from error


def make_plan(
    sites: Sequence[Site],
    rules: Iterable[tuple[str, Rule]],
    kinds: Mapping[str, QuantizerKind],
    model_map: ModelMap,
) -> Plan:
    """Apply rules in order; the last one that matches a site decides, unless an earlier one is more specific.

    A rule is more specific than another of the same source if it selects some of the other's sites and no further ones:
    where the general one comes later, it would leave nothing to the specific one, which nobody can have meant. Across
    sources (preset, each plugin, configuration) only the order counts, so that whoever comes last can undo everything.

    Args:
        sites: every site of the model.
        rules: `(who contributed it, rule)`.
        kinds: quantizers on offer.
        model_map: for placeholders.

    Raises:
        SiteError: a rule matches nothing, names an unknown quantizer, gives wrong options, or puts a quantizer where
            it cannot work.
    """
    chosen: dict[str, PlannedSite] = {}
    selections = Selections()
    for source, rule in rules:
        found = matches(rule, sites, model_map)
        deciding = selections.decided(source, rule.site, found)
        if rule.quantizer == NONE:
            for site in deciding:
                chosen.pop(site.name, None)
            continue
        options = validated(rule, source, kinds)
        allowed = kinds[rule.quantizer].slots
        for site in found:
            if site.slot not in allowed:
                raise SiteError(
                    f"rule {rule.site!r} of {source}: quantizer {rule.quantizer!r} serves "
                    f"{', '.join(sorted(allowed))}, not {site.name!r}"
                )
            if site.module_type == "Conv2d" and getattr(options, "granularity", None) == "token":
                raise SiteError(
                    f"rule {rule.site!r} of {source}: {site.name} is an image, which has no tokens to have ranges of "
                    "their own; set granularity: tensor there, or leave it out with quantizer: none"
                )
            if site in deciding:
                chosen[site.name] = PlannedSite(
                    site,
                    rule.quantizer,
                    options,
                    source,
                    bits=getattr(options, "bits", None),
                    granularity=getattr(options, "granularity", None),
                    zero_point="none" if getattr(options, "symmetric", True) else "integer",
                )
    for entry in chosen.values():
        _require_shared_scale(entry)
    return Plan({site.name: chosen[site.name] for site in sites if site.name in chosen}, selections.lost)


def _require_shared_scale(entry: PlannedSite) -> None:
    """Refuse granularities that would give every element of a weight, such as a normalisation's, a scale of its own.

    Raises:
        SiteError: as said.
    """
    shape, granularity = entry.site.shape, getattr(entry.options, "granularity", None)
    if len(shape) == 1 and granularity in ("channel", "group"):
        raise SiteError(
            f"{entry.site.name} ({entry.source}): granularity {granularity} would give each of the {shape[0]} elements "
            "of this weight a scale of its own; set granularity: tensor there, or leave it out with quantizer: none"
        )
