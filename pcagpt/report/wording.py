"""Numbers and words of the data → text, safe in markdown and in its tables."""

import html
import re

MINUS = "−"
NOTHING = "–"  # where a number was not measured
_PLAIN = re.compile(r"[\w./:=,+@ -]*")
_MARKUP = str.maketrans({mark: f"&#{ord(mark)};" for mark in "*`[]|\\#!~$"})
_OUTER_UNDERSCORE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def fixed(value: float | None, places: int = 3) -> str:
    """1234.5 → 1,234.500; a minus sign rather than a hyphen, never minus zero."""
    if value is None:
        return NOTHING
    text = f"{abs(value):,.{places}f}"
    return MINUS + text if value < 0 and text.strip("0.,") else text


def signed(value: float | None, places: int = 3) -> str:
    """As `fixed`, with a plus before what is more than zero."""
    text = fixed(value, places)
    return "+" + text if value is not None and value > 0 and text.strip("0.,") else text


def places_for(values: list[float]) -> int:
    """Decimals (3 to 6) at which no value other than zero is shown as zero."""
    for places in (3, 4, 5):
        if all(not value or round(value, places) for value in values):
            return places
    return 6


def interval(bounds: list[float] | None) -> str:
    """−0.130 to −0.116."""
    if bounds is None:
        return NOTHING
    places = places_for(bounds)
    return f"{signed(bounds[0], places)} to {signed(bounds[1], places)}"


def perplexity(value: float | None) -> str:
    """Four or five digits: 7.12, 31.45, 131.2, 5,012."""
    if value is None:
        return NOTHING
    return fixed(value, 2 if value < 100 else 1 if value < 1000 else 0)


def count(value: float | None) -> str:
    """38597376 → 38,597,376."""
    return NOTHING if value is None else f"{round(value):,}"


def amount(value: float) -> str:
    """A count in prose: 38.6 million, 524,288."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{round(value):,}"


def times(value: float | None) -> str:
    """A compression ratio: 5.91×."""
    return NOTHING if value is None else f"{fixed(value, 2)}×"


def percent(value: float | None, places: int = 1) -> str:
    """0.8245 → 82.5%."""
    return NOTHING if value is None else f"{fixed(100 * value, places)}%"


def duration(seconds: float | None) -> str:
    """41 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None:
        return NOTHING
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute:02d} min"
    return f"{minute} min {second:02d} s" if minute else f"{second} s"


def listed(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def escaped(value: object) -> str:
    """Foreign text as it is: no mark of markdown or HTML in it has a meaning."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return _OUTER_UNDERSCORE.sub("&#95;", text.translate(_MARKUP))


def code(value: object) -> str:
    """Foreign text in the typeface of code, in a table too."""
    text = " ".join(str(value).split())
    if text and _PLAIN.fullmatch(text):
        return f"`{text}`"
    return f"<code>{escaped(text)}</code>"


def table(header: list[str], rows: list[list[str]], right: str) -> str:
    """A markdown table; `right` has an r for each column of numbers, else an l."""
    rule = ["---:" if side == "r" else ":---" for side in right]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]
    return "\n".join(lines)
