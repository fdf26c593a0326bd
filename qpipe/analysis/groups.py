"""Sites in groups: of one role or kind over all blocks, of one block, or each by itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from qpipe.errors import ConfigError, SiteError, suggest
from qpipe.quant.plan import expand, selects
from qpipe.run import Run

By = Literal["role", "kind", "block", "site"]
_BLOCK = re.compile(r"(?<=\.)\d+(?=[.:])")


def kind_of(site: str) -> str:
    """A site's name with the block number left out: `encoder.layer.*.output.dense:output`."""
    return _BLOCK.sub("*", site, count=1)


def block_of(site: str) -> str:
    """`block 3`, or `outside blocks`."""
    found = _BLOCK.search(site)
    return f"block {found.group()}" if found else "outside blocks"


def grouped(sites: Iterable[str], by: By, roles: Mapping[str, Iterable[str]] | None = None) -> dict[str, list[str]]:
    """Sites by the name of their group, in model order.

    Args:
        sites: names.
        by: `role` groups sites without one by kind.
        roles: names of sites by role, as `ModelMap.sites`.
    """
    role_of = {site: role for role, names in (roles or {}).items() for site in names}
    groups: dict[str, list[str]] = {}
    for site in sites:
        kinds = {"role": role_of.get(site) or kind_of(site), "kind": kind_of(site), "block": block_of(site)}
        groups.setdefault(kinds.get(by, site), []).append(site)
    return groups


def select(run: Run, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of the names that any pattern selects as a rule would, in their order; all if there is no pattern.

    Raises:
        SiteError: a pattern matches none.
    """
    if not patterns:
        return list(names)
    wanted: set[str] = set()
    for pattern in patterns:
        spelled = expand(pattern, run.instruments.map)
        found = {name for name in names if any(selects(p, run.instruments.site(name)) for p in spelled)}
        if not found:
            raise SiteError(f"{pattern!r} matches no site{suggest(pattern, names)}; there are {len(names)}")
        wanted |= found
    return [name for name in names if name in wanted]


def quantized(run: Run) -> tuple[list[str], list[str]]:
    """Names of the quantized weights and of the quantized activations.

    Raises:
        ConfigError: nothing is quantized.
    """
    names = list(run.plan.sites)
    if not names:
        raise ConfigError(
            f"{run.out} quantizes nothing, so there is nothing to take apart; give a preset, such as "
            "--set quantization.preset=w8a8"
        )
    weights = [name for name in names if name.endswith(":weight")]
    return weights, [name for name in names if not name.endswith(":weight")]
