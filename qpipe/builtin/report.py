"""The report's own sections, contributed through the hook that plugins use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from qpipe.errors import CheckpointError
from qpipe.plugin import Plugin, hookimpl
from qpipe.report import analysis, convergence, robustness, sections
from qpipe.types import ReportSection

SECTIONS: tuple[tuple[int, str, Callable[[Path], str | None]], ...] = (
    (10, "Result", sections.result),
    (20, "Training", sections.training),
    (30, "Quantized layers", sections.layers),
    (40, "Size", sections.sizes),
    (50, "Quantization error", sections.weights),
    (55, "Robustness", robustness.robustness),
    (57, "Where quantization acts", analysis.analysis),
    (58, "Convergence", convergence.convergence),
    (900, "Configuration", sections.configuration),
)
"""Order, title and body; a body that is None is no section. Sections of plugins come before the configuration unless
they ask for another place."""


class ReportSections(Plugin):
    """Result, training curves, layers, size, quantization error, robustness, analysis, convergence, configuration."""

    @hookimpl
    def qpipe_report_sections(self, run_dir: Path) -> Iterable[ReportSection]:
        """One section each; a damaged file is reported in the sections that need it."""
        for order, title, body in SECTIONS:
            try:
                html = body(run_dir)
            except CheckpointError as error:
                html = sections.missing("A file of the run is damaged", f"{error}.")
            if html is not None:
                yield ReportSection(title, html, order)
