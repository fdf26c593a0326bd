"""The stages of a run, in order: build, prepare, calibrate, train, evaluate, export, verify.

Each is a function of a `Run` and usable alone from Python; `execute` puts them in a row.
"""

from __future__ import annotations

from qpipe.stages.execute import evaluate_run, execute, export_run, plan_run, sites_of
from qpipe.stages.quantize import quantize

__all__ = ["evaluate_run", "execute", "export_run", "plan_run", "quantize", "sites_of"]
