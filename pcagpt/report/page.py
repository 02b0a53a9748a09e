"""Renders report.md from a template and a view, and report.html from report.md."""

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcagpt.files import write_file, write_json, write_text
from pcagpt.report.experiment import experiment_view
from pcagpt.report.figures import (
    curves_figure,
    pareto_figure,
    size_figure,
    spectrum_figure,
)
from pcagpt.report.read import read_singular_values
from pcagpt.report.sweep import sweep_view
from pcagpt.report.text import Markdown, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(workdir: Path, results: dict[str, Any]) -> Path:
    """Writes results.json, plots/*.png, report.md and report.html; returns the last.

    `results` come from `collect_results`. The spectrum is read from `workdir`.
    """
    write_json(workdir / "results.json", results)
    view, spectrum = experiment_view(results), results["spectrum"] or {}
    figures = {
        "loss": curves_figure(results["rows"]),
        "size": size_figure(view["models"]),
        "spectrum": None,
    }
    if spectrum:
        ranks = [int(rank) for rank in spectrum["energy"]]
        values = read_singular_values(workdir / spectrum["folder"])
        if values is not None:
            figures["spectrum"] = spectrum_figure(values, ranks)
    return _write(workdir, "experiment", view, figures)


def write_sweep_report(folder: Path, sweep: dict[str, Any]) -> Path:
    """Writes plots/pareto.png, report.md and report.html; returns the last."""
    return _write(folder, "sweep", sweep_view(sweep), {"pareto": pareto_figure(sweep)})


def _write(
    folder: Path, name: str, view: dict, figures: "dict[str, Figure | None]"
) -> Path:
    """Writes the figures and both pages; removes figures of an earlier report."""
    import markdown

    (folder / "plots").mkdir(exist_ok=True)
    for plot, figure in figures.items():
        path = folder / "plots" / f"{plot}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            png = {"format": "png", "metadata": {"Software": None}}
            write_file(path, lambda file, f=figure, png=png: f.savefig(file, **png))
    plots = [plot for plot, figure in figures.items() if figure is not None]
    page = render(f"{name}.md.j2", plots=plots, **view)
    write_text(folder / "report.md", page + "\n")

    def inlined(match: re.Match) -> str:
        image = base64.b64encode((folder / match[1]).read_bytes()).decode("ascii")
        return f'src="data:image/png;base64,{image}"'

    body = markdown.markdown(page, extensions=["tables"], output_format="html")
    body = Markdown(re.sub(r'src="(plots/\w+\.png)"', inlined, body))
    title = page.splitlines()[0].removeprefix("# ")
    html = render("page.html.j2", title=title, body=body)
    write_text(folder / "report.html", html + "\n")
    return folder / "report.html"
