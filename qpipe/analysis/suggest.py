"""Suggest: from an ablation to a plan that keeps the groups that hurt at more bits.

Groups are taken in the order of what the metric gains without them, each time measured together with those taken
before, until the loss to full precision is within what is allowed. Bondarenko et al. (EMNLP 2021), section 4, choose
16-bit activations by hand from the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack

from qpipe.analysis.ablation import first_metric
from qpipe.errors import ConfigError, SiteError
from qpipe.quant.plan import PlannedSite
from qpipe.run import Run
from qpipe.stages.recalibrate import recalibrated
from qpipe.stages.variants import options_with_bits, rebuilt, rule_with_bits, switched_off
from qpipe.types import Json

Told = Callable[[str, float], None]


def suggest(
    run: Run,
    ablation: Mapping[str, Json],
    groups: Mapping[str, Sequence[str]],
    within: float,
    bits: int = 16,
    told: Told = lambda group, value: None,
) -> dict[str, Json]:
    """Choose groups for more bits until the metric is near enough to full precision.

    Args:
        run: as `ablate` was given it.
        ablation: its result.
        groups: sites by name of the group, as it was given them.
        within: largest loss of the metric to full precision.
        bits: of the chosen groups; their sites that have as many are left as they are, and those whose quantizer has
            no such width in full precision.
        told: called with each chosen group and the metric with it and those before.

    Returns:
        `within`, `bits`, `chosen` (names of groups with the metric after each), `reached` and `rules` for a plan.

    Raises:
        ConfigError: `within` is negative, or no activation has fewer bits than `bits`.
    """
    if within < 0:
        raise ConfigError(f"the allowed loss must be 0 or more, not {within:g}")
    narrower = {e["group"]: _narrower(run, groups[e["group"]], bits) for e in ablation["groups"]}
    if not any(narrower.values()):
        raise ConfigError(f"no activation has fewer than {bits} bits, so a plan with {bits} changes none; ask for more")
    sign = 1 if ablation["higher_is_better"] else -1
    goal = sign * ablation["full_precision"] - within
    ranked = sorted(ablation["groups"], key=lambda effect: -sign * effect["without"])
    chosen: list[dict[str, Json]] = []
    sites: list[str] = []
    value = ablation["quantized"]
    for effect in ranked:
        if sign * value >= goal or sign * effect["without"] <= sign * ablation["quantized"]:
            break
        if not narrower[effect["group"]]:
            continue
        sites += narrower[effect["group"]]
        value = at_bits(run, sites, bits)
        chosen.append({"group": effect["group"], "metric": value})
        told(effect["group"], value)
    reached = sign * value >= goal
    return {"within": within, "bits": bits, "chosen": chosen, "reached": reached, "rules": rules(run, sites, bits)}


def at_bits(run: Run, sites: Sequence[str], bits: int) -> float:
    """The metric with these sites at another width, calibrated as `recalibrated` says."""
    able = _able(run, sites, bits)
    with ExitStack() as stack:
        stack.enter_context(rebuilt(run, able, bits))
        stack.enter_context(switched_off(run, [name for name in sites if name not in able]))
        stack.enter_context(recalibrated(run, sites))
        return first_metric(run)


def _narrower(run: Run, sites: Iterable[str], bits: int) -> list[str]:
    """Sites that have fewer bits; those whose quantizer has no such option too."""
    return [site for site in sites if getattr(run.plan.sites[site].options, "bits", 0) < bits]


def _able(run: Run, sites: Sequence[str], bits: int) -> list[str]:
    """Sites whose quantizer can have that width."""
    return [site for site in sites if _allows(run.plan.sites[site], bits)]


def _allows(entry: PlannedSite, bits: int) -> bool:
    try:
        return options_with_bits(entry, bits) is not None
    except SiteError:
        return False


def rules(run: Run, sites: Sequence[str], bits: int) -> list[dict[str, Json]]:
    """Rules of a plan that put the sites at `bits`, or in full precision where their quantizer has no such width."""
    able = set(_able(run, sites, bits))
    return [
        rule_with_bits(run.plan.sites[site], bits) if site in able else {"site": site, "quantizer": "none"}
        for site in sites
    ]
