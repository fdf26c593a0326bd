"""Ternary weights."""

from qpipe_ternary_twn.plugin import TernaryTwn, TernaryTwnOptions
from qpipe_ternary_twn.quantizer import TernaryOptions, TernaryWeight

__all__ = ["TernaryOptions", "TernaryTwn", "TernaryTwnOptions", "TernaryWeight"]
