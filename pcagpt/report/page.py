"""Renders report.md from a template and a view, and report.html from report.md.

Each file of a report has a mark. A file without it is a person's, and is moved aside.
"""

import base64
import hashlib
import io
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcagpt.files import is_sealed, write_file, write_json
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
from pcagpt.run.folder import move_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PNG = {"format": "png", "metadata": {"Software": "pcagpt"}}
_MARK_OF_OLD_PNG = b"Software\0pcagpt"  # Older versions wrote no hash.
_MARK_OF_PNG = b"tEXtComment\0written by pcagpt, sha256 "  # of all chunks before
_END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"
_MARK_OF_PAGE = b"<!-- written by pcagpt, sha256 "  # of all before it


def write_report(workdir: Path, results: dict[str, Any]) -> Path:
    """Writes results.json, plots/*.png, report.md and report.html; returns the last.

    `results` come from `collect_results`. The spectrum is read from `workdir`.
    """
    write_json(_free(workdir / "results.json"), results)
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
        path = _free(folder / "plots" / f"{plot}.png")
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            content = _picture(figure)
            write_file(path, lambda file, c=content: file.write(c))
    plots = [plot for plot, figure in figures.items() if figure is not None]
    page = render(f"{name}.md.j2", plots=plots, **view)
    _write_page(folder / "report.md", page)

    def inlined(match: re.Match) -> str:
        image = base64.b64encode((folder / match[1]).read_bytes()).decode("ascii")
        return f'src="data:image/png;base64,{image}"'

    body = markdown.markdown(page, extensions=["tables"], output_format="html")
    body = Markdown(re.sub(r'src="(plots/\w+\.png)"', inlined, body))
    title = page.splitlines()[0].removeprefix("# ")
    html = render("page.html.j2", title=title, body=body)
    return _write_page(folder / "report.html", html)


def _write_page(path: Path, page: str) -> Path:
    """Writes a page with its mark; returns the path."""
    content = _marked(f"{page}\n".encode())
    write_file(_free(path), lambda file: file.write(content))
    return path


def _picture(figure: "Figure") -> bytes:
    """A figure as a PNG with its mark."""
    file = io.BytesIO()
    figure.savefig(file, **_PNG)
    return _marked_png(file.getvalue().removesuffix(_END_OF_PNG))


def _marked_png(chunks: bytes) -> bytes:
    """A whole PNG from all its chunks but the end; its mark is a text chunk."""
    mark = _MARK_OF_PNG + hashlib.sha256(chunks).hexdigest().encode()
    length, check = len(mark) - len(b"tEXt"), zlib.crc32(mark)
    framed = length.to_bytes(4, "big") + mark + check.to_bytes(4, "big")
    return chunks + framed + _END_OF_PNG


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
