"""From finished run folders to results.json, report.md, report.html and plots."""

from pcagpt.report.page import write_report, write_sweep_report
from pcagpt.report.pareto import pareto_figure
from pcagpt.report.plots import spectrum_figure
from pcagpt.report.results import collect_results, recovered_rows
from pcagpt.report.sweep import (
    SMALLEST_ADDED,
    advice_text,
    equal_size_table,
    recovery_table,
)

__all__ = [
    "SMALLEST_ADDED",
    "advice_text",
    "collect_results",
    "equal_size_table",
    "pareto_figure",
    "recovered_rows",
    "recovery_table",
    "spectrum_figure",
    "write_report",
    "write_sweep_report",
]
