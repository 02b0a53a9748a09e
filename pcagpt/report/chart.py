"""Charts of Vega-Lite: their parts, the scripts that draw them, and pictures of them.

The page draws a chart in the browser, where a reader can hover, zoom and hide;
report.md and TensorBoard have it as a picture. vl-convert makes the pictures and holds
the scripts: it is imported when it is first used.
"""

import functools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

CONFIG = {
    "axis": {
        **{"gridColor": "#ececec", "titleFontWeight": "normal"},
        **{"labelFontSize": 11, "titleFontSize": 12},
    },
    "legend": {"labelFontSize": 12},
    "title": {"anchor": "start", "fontWeight": "normal"},
}
PICTURE_SIZE = 940, 380  # pixels of all panels in a row, and of a panel's height
PICTURE_SCALE = 2
_DRAG = "[pointerdown[event.pointerType !== 'touch'], window:pointerup] > "
# A turn of the wheel without Ctrl scrolls the page.
_ZOOM = {
    "name": "zoom",
    "select": {
        "type": "interval",
        "translate": _DRAG + "window:pointermove!",
        "zoom": "wheel![event.ctrlKey || event.metaKey]",
    },
    "bind": "scales",
}
_SHOWN = [{"filter": {"param": "shown"}}]


class Look(NamedTuple):
    """How the lines and points of one entry of a legend are drawn."""

    colour: str
    shape: str = "circle"
    fill: str = ""  # of the points; empty: as the colour
    dash: Sequence[int] = ()


class Figure(NamedTuple):
    """Charts beside each other: specifications of Vega-Lite without sizes."""

    panels: list[dict[str, Any]]

    def png(self) -> bytes:
        """The charts as a picture, three in a row."""
        import vl_convert

        (width, height), columns = PICTURE_SIZE, min(len(self.panels), 3)
        size = {"width": width // columns, "height": height}
        legend = {"orient": "top", "columns": 4 // columns, "labelLimit": width // 3}
        legend |= CONFIG["legend"]
        whole = {
            "concat": [one | size for one in self.panels],
            "columns": columns,
            "config": CONFIG | {"legend": legend},
            "background": "white",
        }
        return _packed(vl_convert.vegalite_to_png(whole, scale=PICTURE_SCALE))


def _packed(picture: bytes) -> bytes:
    """The PNG in a third of its bytes: vl-convert compresses for speed."""
    start, content, others = 8, [], []
    while start < len(picture):
        length = int.from_bytes(picture[start : start + 4], "big")
        kind, data = picture[start + 4 : start + 8], picture[start + 8 :][:length]
        (content if kind == b"IDAT" else others).append(kind + data)
        start += length + 12
    pixels = zlib.decompress(b"".join(part[4:] for part in content))
    others.insert(-1, b"IDAT" + zlib.compress(pixels, 9))
    return picture[:8] + b"".join(map(png_chunk, others))


def png_chunk(content: bytes) -> bytes:
    """A chunk of a PNG from its kind and data."""
    length, check = len(content) - 4, zlib.crc32(content)
    return length.to_bytes(4, "big") + content + check.to_bytes(4, "big")


@functools.cache
def chart_scripts() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which defines `vegaEmbed`."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed")


def panel(
    points: list[dict[str, Any]],
    looks: Mapping[str, Look],
    axes: dict[str, Any],
    layers: list[dict[str, Any]],
    shown: Sequence[str],
    size: int = 70,
) -> dict[str, Any]:
    """A chart of `layers` below points; `of` is a point's entry in the legend.

    A click on an entry hides it. `shown` are the fields of the tooltip.
    """
    names = list(looks)

    def scale(values: Iterable) -> dict[str, Any]:
        legend = {"legend": None} if names == [""] else {}
        by = {"domain": names, "range": list(values)}
        return {"field": "of", "type": "nominal", "title": None, "scale": by} | legend

    every = looks.values()
    colour = scale(look.colour for look in every)
    entries = [{"of": name} for name in names]
    hide = {"type": "point", "fields": ["of"], "toggle": "true"}
    top = {
        "params": [
            {"name": "shown", "select": hide, "bind": "legend", "value": entries},
            _ZOOM,
        ],
        # A line of the legend alone has no points.
        "transform": [*_SHOWN, {"filter": "isValid(datum['" + shown[-1] + "'])"}],
        "mark": {"type": "point", "size": size, "opacity": 1, "clip": True},
        "encoding": {
            "shape": scale(look.shape for look in every),
            "fill": scale(look.fill or look.colour for look in every),
            "tooltip": [{"field": name, "type": "nominal"} for name in shown],
        },
    }
    below: list[dict[str, Any]] = []
    for layer in layers:
        is_line = layer["mark"]["type"] == "line"
        below += _dashed(layer, looks) if is_line else [layer]
    return {
        "data": {"values": points},
        "encoding": axes | {"color": colour},
        "layer": [
            layer if "data" in layer else {"transform": _SHOWN} | layer
            for layer in [*below, top]
        ],
    }


def _dashed(line: dict[str, Any], looks: Mapping[str, Look]) -> list[dict[str, Any]]:
    """The lines, a layer for each kind of dashes.

    A scale of dashes would draw them around the marks of the legend, too.
    """
    names: dict[tuple[int, ...], list[str]] = {}
    for name, look in looks.items():
        names.setdefault(tuple(look.dash), []).append(name)
    return [
        line
        | {
            "transform": [*_SHOWN, {"filter": {"field": "of", "oneOf": drawn}}],
            "mark": line["mark"] | {"strokeDash": list(dash)},
        }
        for dash, drawn in names.items()
    ]


def mark(kind: str) -> dict[str, Any]:
    """A mark of Vega-Lite that ends at the edge of the chart."""
    return {"type": kind, "clip": True}


def axis(
    field: str, title: str, kind: str = "linear", domain: Sequence[float] | None = None
) -> dict[str, Any]:
    """A position in a chart; kind: 'linear' or 'log'."""
    scale = {"type": kind} | ({"zero": False} if kind == "linear" else {})
    scale |= {"domain": domain} if domain else {"nice": False, "padding": 12}
    marks = {"format": "~r"} | ({"tickCount": 6} if kind == "log" else {})
    place = {"field": field, "type": "quantitative", "title": title}
    return place | {"scale": scale, "axis": marks}


def bars(low: str, high: str) -> dict[str, Any]:
    """The intervals as vertical bars."""
    ends = {"y": {"field": low, "type": "quantitative"}, "y2": {"field": high}}
    return {"mark": mark("rule"), "encoding": ends}
