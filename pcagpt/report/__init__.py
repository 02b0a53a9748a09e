"""From finished run folders to results.json, report.md, report.html and plots."""

from pcagpt.report.page import write_report, write_sweep_report
from pcagpt.report.plots import spectrum_figure
from pcagpt.report.results import collect_results

__all__ = [
    "collect_results",
    "spectrum_figure",
    "write_report",
    "write_sweep_report",
]
