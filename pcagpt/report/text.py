"""Formats numbers and escapes text for markdown; fills in templates.

The first template imports Jinja2, so that training starts without it.
"""

import datetime
import functools
import html
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

MINUS, NOTHING = "−", "–"  # NOTHING replaces a number that was not measured.
# They garble a page, or end a line in some programs. Bidirectional ones reorder it.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
_MARKUP = str.maketrans({mark: f"&#{ord(mark)};" for mark in "*`[]{}|\\#!~$"})


class Markdown(str):
    """Text that is already markdown: `escaped` leaves it as it is."""


def fixed(value: Any, places: int = 3) -> str:
    """−1234.5 → '−1,234.500', never minus zero."""
    if not isinstance(value, (int, float)):
        return NOTHING
    text = f"{abs(value):,.{places}f}"
    return MINUS + text if value < 0 and text.strip("0.,") else text


def signed(value: Any, places: int = 3) -> str:
    """As `fixed`, with a plus sign before positive numbers."""
    text = fixed(value, places)
    is_positive = text.strip("0.,") and not text.startswith((MINUS, NOTHING))
    return f"+{text}" if is_positive else text


def plus_minus(value: Any, half: float | None, show=fixed, places: int = 3) -> str:
    """3.123, 0.004 → '3.123 ± 0.004'; without half an interval, '3.123'.

    Both have more decimals (up to 6) if `places` would show a small half as 0, or a
    small value that has no half. What 6 cannot show, such as the rounding of a table of
    full rank, stays 0.
    """
    small = value if half is None else half
    if isinstance(small, float):
        places = next((p for p in range(places, 7) if round(small, p)), places)
    return show(value, places) + ("" if half is None else f" ± {fixed(half, places)}")


def half_of(bounds: Sequence[float] | None) -> float | None:
    """Half of an interval."""
    return (bounds[1] - bounds[0]) / 2 if bounds else None


def with_interval(value: Any, bounds: Sequence[float] | None, places: int = 4) -> str:
    """0.039, [0.0378, 0.0402] → '+0.0390 ± 0.0012'; without bounds, '+0.0390'."""
    return plus_minus(value, half_of(bounds), signed, places)


def two_digits(value: float) -> str:
    """0.1734 → '0.17'."""
    return f"{value:.2g}"


def plain(value: Any) -> str:
    """0.00150 → '0.0015'."""
    return f"{value:g}" if value else NOTHING


def count(value: Any) -> str:
    """38597376 → '38,597,376'."""
    return fixed(value, 0)


def times(value: Any) -> str:
    """5.907 → '5.91×'."""
    return f"{fixed(value, 2)}×".replace(f"{NOTHING}×", NOTHING)


def percent(value: Any) -> str:
    """0.8245 → '82.5%'."""
    return f"{fixed(100 * value, 1)}%" if fixed(value) != NOTHING else NOTHING


def duration(seconds: float | None) -> str:
    """200.3 → '0:03:20'."""
    return str(datetime.timedelta(seconds=round(seconds))) if seconds else NOTHING


def visible(text: str) -> str:
    r"""Text with its control characters but tabs and line ends as \x00 or \u202e."""

    def escape(found: re.Match) -> str:
        return found[0].encode("unicode_escape").decode()

    return _CONTROL.sub(escape, text.replace("\r\n", "\n"))


def escaped(value: object) -> str:
    """Text in one line, with all markup of markdown and HTML escaped."""
    if isinstance(value, Markdown):
        return value
    text = html.escape(_in_one_line(value), quote=False).translate(_MARKUP)
    # An underscore within a word is not markup.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", "&#95;", text)


def code(value: object) -> Markdown:
    """Text in the typeface of code; safe in a table."""
    text = _in_one_line(value)
    is_plain = re.fullmatch(r"[\w./:=,+@ -]+", text)
    return Markdown(f"`{text}`" if is_plain else f"<code>{escaped(text)}</code>")


def command(text: str) -> Markdown:
    """A line of an indented block of code, where markdown has no markup."""
    return Markdown(_in_one_line(text))


def _in_one_line(value: object) -> str:
    return " ".join(visible(str(value)).split())


def fields(value: object) -> str:
    """{'window': 8, 'split': ''} → 'window 8'; other values as they are."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{k} {v}" for k, v in value.items() if v not in (None, ""))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> Markdown:
    """A markdown table; `sides` aligns each column: 'l' left, 'r' right."""
    rule = ["---:" if side == "r" else ":---" for side in sides]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]
    return Markdown("\n".join(lines))


class Column(NamedTuple):
    """A column of a table: what it means, and the text of a row's cell."""

    title: str
    meaning: str
    cell: Callable[[Any], str]
    side: str = "r"


def table_of(
    rows: Iterable[Any], of: Sequence[Column], for_page: bool = False
) -> Markdown:
    """A table alone; on the page, each column's head has its meaning as a title."""
    head = [
        column.title
        + (f' {{: title="{column.meaning}" }}' if for_page and column.meaning else "")
        for column in of
    ]
    cells = [[escaped(column.cell(row)) for column in of] for row in rows]
    return table(head, cells, "".join(column.side for column in of))


def columns(
    rows: Iterable[Any], of: Sequence[Column], for_page: bool = False
) -> Markdown:
    """A table, and what its columns mean."""
    shown = table_of(rows, of, for_page)
    meanings = "\n".join(f"- **{c.title}**: {c.meaning}" for c in of if c.meaning)
    if for_page and meanings:
        summary = "<summary>What the columns mean</summary>"
        meanings = f'<details markdown="1">{summary}\n\n{meanings}\n\n</details>'
    return Markdown(f"{shown}\n\n{meanings}".strip())


HINT = "Drag to move, Ctrl and wheel to zoom, click twice to go back. The legend hides."


def figure(name: str, words: str, for_page: bool = False) -> Markdown:
    """A figure: its picture in report.md, a place for its charts on the page."""
    if not for_page:
        return Markdown(f"![{words}](plots/{name}.png)")
    place = f'<div class="charts" data-figure="{name}" aria-label="{words}"></div>'
    return Markdown(f'{place}\n\n<p class="hint">{HINT}</p>')


def side_by_side(sample: dict[str, Any], for_page: bool = False) -> Markdown:
    """What several models wrote after one prompt: {'prompt', 'seed', 'texts'}."""
    head = f"After “{escaped(sample['prompt'])}”, seed {sample['seed']}:"
    if not for_page:
        texts = ((f"**{escaped(n)}**", escaped(t)) for n, t in sample["texts"].items())
        return Markdown(f"{head}\n\n{table(['Model', 'Text'], list(texts), 'll')}")
    boxes = (
        f"<div><strong>{html.escape(visible(name))}</strong><br>{_one_line(text)}</div>"
        for name, text in sample["texts"].items()
    )
    return Markdown(f'{head}\n\n<div class="samples">{"".join(boxes)}</div>')


def _one_line(text: str) -> str:
    """Text as HTML without line ends, which could end a block of markdown."""
    return "<br>".join(html.escape(line) for line in visible(text).splitlines())


def render(template: str, for_page: bool = False, **view: Any) -> Markdown:
    """Fills in a template; escapes every inserted value that is not Markdown.

    `for_page`: the text becomes a page, where tables and figures are interactive.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("pcagpt.report"), trim_blocks=True, finalize=escaped
    )
    filters = (
        fixed,
        two_digits,
        with_interval,
        count,
        times,
        percent,
        code,
        fields,
        command,
    )
    for function in filters:
        environment.filters[function.__name__] = function
    for function in (columns, figure, side_by_side):
        made = functools.partial(function, for_page=for_page)
        environment.filters[function.__name__] = made
    text = environment.get_template(template).render(view)
    return Markdown(re.sub(r"\n{3,}", "\n\n", text).strip())
