"""Finding installed plugins without importing any of them, nor anything else that takes time.

Apart from `qpipe.host` so that `qpipe plugins list` needs neither pydantic nor pluggy.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from qpipe.errors import PluginError

GROUP = "qpipe"


@dataclass(frozen=True)
class PluginInfo:
    """An installed plugin, known without importing it."""

    name: str
    distribution: str
    version: str
    target: str
    entry_point: EntryPoint


def installed() -> dict[str, PluginInfo]:
    """The plugins that installed distributions declare, by name, sorted. Imports none of them.

    Raises:
        PluginError: two distributions declare the same name.
    """
    found: dict[str, PluginInfo] = {}
    for point in entry_points(group=GROUP):
        dist = point.dist
        info = PluginInfo(
            point.name, dist.name if dist else "unknown", dist.version if dist else "?", point.value, point
        )
        other = found.get(point.name)
        if other is not None and other.target != info.target:
            raise PluginError(
                f"plugin {point.name!r} is offered by both {other.distribution} {other.version} and "
                f"{info.distribution} {info.version}; uninstall one of them"
            )
        found[point.name] = info
    return dict(sorted(found.items()))
