"""Kurtosis regularization of weights."""

from qpipe_kure.penalty import KurtosisPenalty, kurtosis
from qpipe_kure.plugin import Kure, KureOptions

__all__ = ["Kure", "KureOptions", "KurtosisPenalty", "kurtosis"]
