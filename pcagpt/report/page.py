"""report.md and its plots, and the same text as a self-contained report.html."""

import base64
import html
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pcagpt.report.folders import strict
from pcagpt.report.pareto import pareto_figure
from pcagpt.report.plots import curves_figure, parameters_figure, spectrum_figure
from pcagpt.report.style import STYLE
from pcagpt.report.sweep import SWEEP_TITLE, sweep_markdown
from pcagpt.report.text import TITLE, report_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(workdir: Path, results: dict[str, Any]) -> Path:
    """Write results.json, plots/*.png, report.md and report.html; the last one's path.

    Args:
      workdir: folder of the run folders, whose curves and spectrum are drawn.
      results: what `collect_results` returned.
    """
    workdir = Path(workdir)
    text = json.dumps(strict(results), indent=1, allow_nan=False, ensure_ascii=False)
    _write(workdir / "results.json", text + "\n")
    plots = _save(workdir, _figures(workdir, results))
    return write_page(workdir, TITLE, report_markdown(results, plots))


def write_sweep_report(folder: Path, sweep: dict[str, Any]) -> Path:
    """Write plots/pareto.png, report.md and report.html of a sweep; the last's path.

    Args:
      folder: that holds sweep.json.
      sweep: what it holds.
    """
    _save(folder, {"pareto": pareto_figure(sweep)})
    return write_page(folder, SWEEP_TITLE, sweep_markdown(sweep))


def write_page(folder: Path, title: str, markdown_text: str) -> Path:
    """Write report.md and report.html into a folder whose plots/ it shows."""
    _write(folder / "report.md", markdown_text)
    _write(folder / "report.html", report_html(title, markdown_text, folder))
    return folder / "report.html"


def report_html(title: str, markdown_text: str, folder: Path) -> str:
    """The markdown as one HTML file: style and images are inside, nothing is fetched.

    Args:
      title: of the browser's window.
      markdown_text: headings, tables, text and images of plots/.
      folder: where its image links start.
    """
    import markdown

    def inlined(match: re.Match) -> str:
        image = base64.b64encode((folder / match[1]).read_bytes()).decode("ascii")
        return f'src="data:image/png;base64,{image}"'

    body = markdown.markdown(markdown_text, extensions=["tables"], output_format="html")
    body = body.replace("<table>", '<div class="table"><table>')
    body = body.replace("</table>", "</table></div>")
    body = re.sub(
        r"<strong>([A-G])([d+]?)</strong>", r'<strong class="\1">\1\2</strong>', body
    )
    body = re.sub(
        r"<p>(<img [^>]*>)</p>\s*<p><em>(.*?)</em></p>",
        r"<figure>\1<figcaption>\2</figcaption></figure>",
        body,
        flags=re.DOTALL,
    )
    body = re.sub(r'src="(plots/[\w]+\.png)"', inlined, body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _write(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old one or the new one."""
    replacement = path.with_name(path.name + ".tmp")
    replacement.write_text(text, "utf-8")
    os.replace(replacement, path)


def _figures(workdir: Path, results: dict[str, Any]) -> "dict[str, Figure | None]":
    """The figures by name; None where there is no data for one."""
    spectrum = workdir / (results["spectrum"] or {}).get("folder", "") / "spectrum.npy"
    figures = {
        "loss": curves_figure(workdir, results["rows"]),
        "size": parameters_figure(results["rows"]),
        "spectrum": None,
    }
    if results["spectrum"] and spectrum.exists():
        ranks = [int(rank) for rank in results["spectrum"]["energy"]]
        values = np.load(spectrum, allow_pickle=False)
        figures["spectrum"] = spectrum_figure(values, ranks)
    return figures


def _save(folder: Path, figures: "dict[str, Figure | None]") -> list[str]:
    """Save the figures there are, and give their names."""
    (folder / "plots").mkdir(exist_ok=True)
    for name, figure in figures.items():
        path = folder / "plots" / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # of an earlier report
        else:
            figure.savefig(path, metadata={"Software": None})
    return [name for name, figure in figures.items() if figure is not None]
