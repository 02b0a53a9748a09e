"""Finished runs and sweeps -> results.json, report.md, report.html and figures.

`collect` makes the dictionary of results.json. `experiment` and `sweep` select from
results.json and sweep.json what the templates show, `bare_table` from errors.json.
`page` fills in the templates.
"""

from pcagpt.report.bare_table import lacking_line, table_lines, table_text
from pcagpt.report.collect import (
    check_dtype,
    check_runs,
    collect_results,
    recovered_rows,
)
from pcagpt.report.experiment import compared_runs, means_over_seeds, summary_table
from pcagpt.report.figures import (
    error_figure,
    pareto_figure,
    size_figure,
    spectrum_figure,
)
from pcagpt.report.finding import experiment_lines, how_to_take, sweep_lines
from pcagpt.report.page import write_report, write_sweep_report, write_table_report
from pcagpt.report.recommend import recommended_row
from pcagpt.report.row_text import advice_text
