"""Per-embedding-group quantization of activations."""

from qpipe_peg.exporting import program_of
from qpipe_peg.observed import ObservedFeatures, RunningRange
from qpipe_peg.plugin import Peg, PegPluginOptions
from qpipe_peg.quantizer import PegActivation, PegOptions
from qpipe_peg.rewriting import rewrite

__all__ = [
    "ObservedFeatures",
    "Peg",
    "PegActivation",
    "PegOptions",
    "PegPluginOptions",
    "RunningRange",
    "program_of",
    "rewrite",
]
