"""What a run says about itself: an HTML report and a table for the terminal, both made from the run directory."""

from qpipe.report.document import write_report
from qpipe.report.table import results_rows, results_table

__all__ = ["results_rows", "results_table", "write_report"]
