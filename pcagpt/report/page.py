"""Renders report.md and report.html from a template and a view.

Each file of a report has a mark. A file without it is a person's, and is moved aside.
"""

import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from pcagpt.files import write_file
from pcagpt.json_files import is_sealed, write_json
from pcagpt.report.bare_table import table_view
from pcagpt.report.chart import CONFIG, Figure, chart_scripts, png_chunk
from pcagpt.report.experiment import experiment_view
from pcagpt.report.figures import (
    SMALLEST_ERROR,
    arms_decile_figure,
    curves_figure,
    decile_figure,
    error_figure,
    numbers_figure,
    pareto_figure,
    size_figure,
    spectrum_figure,
)
from pcagpt.report.sweep import sweep_view
from pcagpt.report.text import Markdown, render
from pcagpt.run.folder import move_aside

_MARK_OF_OLD_PNG = b"Software\0pcagpt"  # Older versions wrote no hash.
_MARK_OF_PNG = b"tEXtComment\0written by pcagpt, sha256 "  # of all chunks before
_END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"
_MARK_OF_PAGE = b"<!-- written by pcagpt, sha256 "  # of all before it


def write_report(workdir: Path, results: dict[str, Any]) -> Path:
    """Writes results.json, plots/*.png, report.md and report.html; returns the last.

    `results` come from `collect_results`.
    """
    write_json(_free(workdir / "results.json"), results)
    return write_experiment_pages(workdir, results)


def write_experiment_pages(workdir: Path, results: dict[str, Any]) -> Path:
    """As `write_report`, without results.json."""
    view, spectrum = experiment_view(results), results["spectrum"] or {}
    figures = {
        "size": size_figure(view["models"]),
        "loss": curves_figure(results["rows"]),
        "decile": arms_decile_figure(view["by_decile"]),
        "spectrum": None,
    }
    if values := spectrum.get("singular_values"):
        ranks = [int(rank) for rank in spectrum["energy"]]
        figures["spectrum"] = spectrum_figure(values, ranks)
    return _write(workdir, "experiment", view, figures)


def write_sweep_report(folder: Path, sweep: dict[str, Any]) -> Path:
    """Writes plots/*.png, report.md and report.html; returns the last."""
    figures = {
        "pareto": pareto_figure(sweep),
        "decile": decile_figure(sweep),
        "numbers": numbers_figure(sweep),
    }
    return _write(folder, "sweep", sweep_view(sweep), figures)


def write_table_report(folder: Path, errors: dict[str, Any]) -> Path:
    """As `write_sweep_report`, of errors.json, for a table without its model."""
    view = table_view(errors) | {"smallest_error": SMALLEST_ERROR}
    return _write(folder, "bare_table", view, {"errors": error_figure(errors)})


def _write(
    folder: Path, name: str, view: dict, figures: dict[str, Figure | None]
) -> Path:
    """Writes the figures and both pages; removes figures of an earlier report."""
    (folder / "plots").mkdir(exist_ok=True)
    for plot, figure in figures.items():
        path = _free(folder / "plots" / f"{plot}.png")
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            content = _marked_png(figure.png())
            write_file(path, lambda file, c=content: file.write(c))
    drawn = {plot: figure.panels for plot, figure in figures.items() if figure}
    text = render(f"{name}.md.j2", plots=drawn, **view)
    _write_page(folder / "report.md", text)
    text = render(f"{name}.md.j2", for_page=True, plots=drawn, **view)
    return _write_page(folder / "report.html", _page(text, drawn))


def _page(text: Markdown, panels: dict[str, list]) -> str:
    """A whole page from its text: all that it shows is inside."""
    import markdown

    extensions = ["tables", "toc", "attr_list", "md_in_html"]
    toc = {"toc_depth": "2-3"}
    converter = markdown.Markdown(
        extensions=extensions, extension_configs={"toc": toc}, output_format="html"
    )
    body = converter.convert(text)
    figures = json.dumps({"config": CONFIG, "panels": panels}, allow_nan=False)
    assets = resources.files("pcagpt.report") / "assets"
    parts = {
        "title": re.sub("<.*?>", "", re.search("<h1.*?>(.*?)</h1>", body)[1]),
        "body": body,
        "contents": converter.toc,
        "figures": figures.replace("<", "\\u003c"),  # No end of the script in a text.
        "charts": chart_scripts(),
        "style": (assets / "page.css").read_text("utf-8"),
        "script": (assets / "page.js").read_text("utf-8"),
        "licence": (assets / "vega_licence.txt").read_text("utf-8"),
    }
    parts = {name: Markdown(part) for name, part in parts.items()}
    return render("page.html.j2", **parts)


def _write_page(path: Path, page: str) -> Path:
    """Writes a page with its mark; returns the path."""
    content = _marked(f"{page}\n".encode())
    write_file(_free(path), lambda file: file.write(content))
    return path


def _marked_png(picture: bytes) -> bytes:
    """A PNG with its mark, a text chunk before its end."""
    chunks = picture.removesuffix(_END_OF_PNG)
    mark = _MARK_OF_PNG + hashlib.sha256(chunks).hexdigest().encode()
    return chunks + png_chunk(mark) + _END_OF_PNG


def _marked(content: bytes) -> bytes:
    digest = hashlib.sha256(content).hexdigest()
    return content + _MARK_OF_PAGE + f"{digest} -->\n".encode()


def _free(path: Path) -> Path:
    """The path; moves a file aside that pcagpt did not write, or a person changed."""
    if path.exists() and not _is_own(path):
        move_aside(path)
    return path


def _is_own(path: Path) -> bool:
    if not path.is_file():  # A named pipe would be waited for.
        return False
    if path.suffix == ".json":
        return is_sealed(path)
    content = path.read_bytes()
    if path.suffix == ".png":
        before, mark, _ = content.rpartition(_MARK_OF_PNG)
        if not mark:
            return _MARK_OF_OLD_PNG in content
        return content == _marked_png(before[:-4])
    return content == _marked(content.rpartition(_MARK_OF_PAGE)[0])
