"""Experiment trackers of Accelerate: whether those that are wanted can be used here."""

from __future__ import annotations

from collections.abc import Sequence

from qpipe.errors import ConfigError


def require_installed(names: Sequence[str]) -> None:
    """Refuse trackers that cannot be used here; a finished run can be, also where its trackers are absent.

    Args:
        names: of trackers that Accelerate knows.

    Raises:
        ConfigError: one needs a package that is not installed.
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    absent = {str(name) for name in LoggerType} - {str(name) for name in get_available_trackers()}
    for name in names:
        if name in absent:
            raise ConfigError(f"train.trackers: {name!r} needs its own package: pip install {name}, or leave it out")
