"""Squashed weight distributions."""

from qpipe_sqwq.plugin import Sqwq, SqwqPluginOptions
from qpipe_sqwq.quantizer import SqwqOptions, SqwqWeight

__all__ = ["Sqwq", "SqwqOptions", "SqwqPluginOptions", "SqwqWeight"]
