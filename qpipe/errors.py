"""Errors a user can cause. Each message says what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QpipeError(Exception):
    """Base of every error qpipe raises on purpose; the command line prints it without a traceback."""


class ConfigError(QpipeError, ValueError):
    """The configuration names something unknown or asks for something impossible."""


class PluginError(QpipeError):
    """A plugin is missing, does not load, or clashes with another one."""


class ModelError(QpipeError):
    """The model cannot be loaded, or does not offer what the run needs of it."""


class SiteError(QpipeError, ValueError):
    """A quantization rule matches nothing, or two rules contradict each other."""


class DataError(QpipeError, ValueError):
    """The data lack a column, hold an impossible label, or are empty."""


class TrainingError(QpipeError, RuntimeError):
    """Training cannot go on: a non-finite loss, or quantization that changes nothing."""


class CheckpointError(QpipeError, RuntimeError):
    """A checkpoint cannot be written, or cannot be trusted."""


class FormatError(QpipeError, ValueError):
    """An export cannot be written in the format asked for, or a packed file is damaged."""


def suggest(given: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name nearest to `given`, or an empty string."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
