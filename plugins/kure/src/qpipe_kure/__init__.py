"""Kurtosis regularization of weights."""

from qpipe_kure.penalty import kurtosis, kurtosis_penalty
from qpipe_kure.plugin import Kure, KureOptions

__all__ = ["Kure", "KureOptions", "kurtosis", "kurtosis_penalty"]
