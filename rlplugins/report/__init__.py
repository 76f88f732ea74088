"""What came out of a study or a run: a table with confidence intervals, and a page with learning curves."""

from rlplugins.report.folder import ReportError
from rlplugins.report.page import write_html
from rlplugins.report.results import Cell, Results, Run, Summary, load

__all__ = ["Cell", "ReportError", "Results", "Run", "Summary", "load", "write_html"]
