"""Which of the rules that select a site decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qpipe.types import Site


class Undone(NamedTuple):
    """Exceptions that a source has made among its sites, under a later source's rule.

    Attributes:
        source: of the later rule.
        pattern: of it.
        selected: the sites that it selects.
        other: the source that had made exceptions.
        sites: names of those exceptions.
    """

    source: str
    pattern: str
    selected: frozenset[Site]
    other: str
    sites: list[str]


class Selections:
    """What rules have selected so far."""

    def __init__(self) -> None:
        self._undone: list[Undone] = []
        self._earlier: dict[str, dict[str, list[frozenset[Site]]]] = {}

    def decided(self, source: str, pattern: str, found: Sequence[Site]) -> set[Site]:
        """Of the sites that a rule selects, those that no earlier and more specific rule of its source selects too.

        Args:
            source: who contributed the rule.
            pattern: of the rule.
            found: the sites.
        """
        selected = frozenset(found)
        own = self._earlier.setdefault(source, {})
        self._note_lost(source, pattern, selected)
        deciding = {site for site in found if not any(other < selected for other in own.get(site.name, ()))}
        for site in found:
            own.setdefault(site.name, []).append(selected)
        return deciding

    def _note_lost(self, source: str, pattern: str, selected: frozenset[Site]) -> None:
        for other, by_site in self._earlier.items():
            if other == source:
                continue
            lost = [site.name for site in selected if _is_exception(by_site.get(site.name, ()), selected)]
            if lost:
                self._undone.append(Undone(source, pattern, selected, other, lost))

    @property
    def lost(self) -> tuple[str, ...]:
        """In words, what a source had excepted from a general rule of its own, and a later source's rule has undone.

        It may be meant: whoever comes last decides. Where that source has a rule of its own for them, none is.
        """
        found = []
        for source, pattern, selected, other, sites in self._undone:
            own = self._earlier[source]
            lost = [name for name in sites if not any(rule < selected for rule in own[name])]
            if lost:
                found.append(
                    f"rule {pattern!r} of {source} also selects {len(lost)} site(s) that {other} treats apart from the "
                    f"others, such as {min(lost)}; they are like the others now. Select them with a rule of their own "
                    f"in {source} if they are to stay apart"
                )
        return tuple(found)


def _is_exception(rules: Sequence[frozenset[Site]], selected: frozenset[Site]) -> bool:
    """True if a source's rules for a site are a general one and one more specific than that, and than `selected`."""
    smallest = min(rules, key=len, default=frozenset())
    return any(smallest < other for other in rules) and smallest < selected
