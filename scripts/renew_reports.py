"""Writes the reports in checkpoints/published again, from their numbers.

    python scripts/renew_reports.py [FOLDER]

Every folder with a results.json or sweep.json gets its report.md, report.html and plots
by this version. The numbers stay as they are. Folders without a report.md get none.
"""

import sys
from pathlib import Path

from pcagpt.json_files import read_json
from pcagpt.report import write_sweep_report
from pcagpt.report.page import write_experiment_pages
from pcagpt.report.read import read_row
from pcagpt.rows import read_sweep

PUBLISHED = Path(__file__).parent.parent / "checkpoints" / "published"


def renew(root: Path) -> None:
    """Renews the reports below `root`."""
    for page in sorted(root.rglob("report.md")):
        folder = page.parent
        if (folder / "sweep.json").exists():
            print(write_sweep_report(folder, read_sweep(folder / "sweep.json")))
        else:
            results = read_json(folder / "results.json", "publish it again")
            # Results of older versions have no curves; those are in their runs.
            rows = [read_row(folder / row["folder"]) | row for row in results["rows"]]
            print(write_experiment_pages(folder, results | {"rows": rows}))


if __name__ == "__main__":
    renew(Path(sys.argv[1]) if len(sys.argv) > 1 else PUBLISHED)
