"""Which of the rules that select a site decides."""

from __future__ import annotations

from collections.abc import Sequence

from qpipe.types import Site


class Selections:
    """What rules have selected so far.

    Attributes:
        lost: in words, what a source had excepted from a general rule of its own, and a later source's general rule has
            undone. It may be meant: whoever comes last decides.
    """

    def __init__(self) -> None:
        self.lost: list[str] = []
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
                self.lost.append(
                    f"rule {pattern!r} of {source} also selects {len(lost)} site(s) that {other} treats apart from the "
                    f"others, such as {min(lost)}; they are like the others now. Select them with a rule of their own "
                    f"in {source} if they are to stay apart"
                )


def _is_exception(rules: Sequence[frozenset[Site]], selected: frozenset[Site]) -> bool:
    """True if a source's rules for a site are a general one and one more specific than that, and than `selected`."""
    smallest = min(rules, key=len, default=frozenset())
    return any(smallest < other for other in rules) and smallest < selected
