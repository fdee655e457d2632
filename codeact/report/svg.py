"""matplotlib figure -> SVG that belongs to its page: in its font and colours, light and dark; always the same."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from codeact.base.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 4.7
"""Inches of a figure: narrow, so that its text can be read on a phone. A unit of the SVG is 1/72 inch."""

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_VARIABLES = (
    "ink muted rule paper chosen other accent waste "
    "s0 s1 s2 s3 s4 s5 c0 c1 c2 c3 c4 c5 c6 c7 c8"
).split()  # fmt: skip
COLOURS: Mapping[str, str] = {name: f"#0001{number:02x}" for number, name in enumerate(_VARIABLES)}
"""What to draw with: colours that stand for the variables of the page's style sheet, ``--ink`` and so on.

``c0`` to ``c8`` tell things apart; ``s0`` to ``s5`` are a scale.
"""
_NAMES = {colour: name for name, colour in COLOURS.items()}


@contextmanager
def page_style() -> Iterator[None]:
    """Draw in the style of the page, whatever the user's own settings of matplotlib are.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "the report") from None
    ink, muted, rule = COLOURS["ink"], COLOURS["muted"], COLOURS["rule"]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 9.5,
                "axes.labelsize": 9.5,
                "axes.titlesize": 9.5,
                "axes.titleweight": "bold",
                "axes.titlelocation": "left",
                "xtick.labelsize": 9,
                "ytick.labelsize": 9,
                "legend.fontsize": 9.5,
                "legend.frameon": False,
                "text.color": ink,
                "axes.labelcolor": ink,
                "axes.titlecolor": ink,
                "xtick.color": rule,
                "ytick.color": rule,
                "xtick.labelcolor": muted,
                "ytick.labelcolor": muted,
                "axes.edgecolor": rule,
                "axes.facecolor": "none",
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": False,
                "grid.color": rule,
                "grid.linewidth": 0.5,
                "figure.facecolor": "none",
                "savefig.facecolor": "none",
                "svg.fonttype": "none",
                "svg.hashsalt": "codeact",
                "text.parse_math": False,
            }
        )
        yield


def new_figure(height: float) -> Figure:
    """An empty figure of the page's width; ``height`` in inches. Only within ``page_style``."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)  # pyplot would choose a backend, and keep the figure
    return figure


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """Return the figure as an ``<svg>`` element for an HTML page.

    Args:
        figure: of ``new_figure``.
        name: unlike that of every other figure of the page: ids begin with it.
        label: what a screen reader says.
    """
    buffer = io.BytesIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=empty)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    used = _references(root)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        _clean(element, name, used)
        _hoist(element)
    _drop_empty(root)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": label, "class": "plot"})
    return ElementTree.tostring(root, encoding="unicode")


def _references(root: ElementTree.Element) -> set[str]:
    used = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == f"{{{_XLINK}}}href":
                used.add(value.removeprefix("#"))
            used.update(re.findall(r"url\(#([^)]+)\)", value))
    return used


def _clean(element: ElementTree.Element, name: str, used: set[str]) -> None:
    attributes = dict(element.attrib)
    element.attrib.clear()
    for key, value in attributes.items():
        text = re.sub(r"url\(#", f"url(#{name}-", value)
        if key == f"{{{_XLINK}}}href":
            element.attrib["href"] = f"#{name}-{value.removeprefix('#')}"
        elif key == "id":
            if value in used:
                element.attrib["id"] = f"{name}-{value}"
            elif value.startswith("class-"):  # matplotlib has ids only
                element.attrib["class"] = value.removeprefix("class-").rstrip("0123456789")
        elif key == "style":
            element.attrib["style"] = _style(text)
        elif key in ("d", "x", "y", "width", "height", "transform", "points"):
            element.attrib[key] = _rounded(text)
        else:
            element.attrib[key] = text
    element.tail = None
    if element.text is not None and not element.text.strip():
        element.text = None


def _style(text: str) -> str:
    text = re.sub(r"(fill|stroke): #[0-9a-f]{6}; \1-opacity: 0(?![.\d])", r"\1: none", text)
    text = re.sub(r"#0001[0-9a-f]{2}", lambda match: f"var(--{_NAMES[match[0]]})", text)
    # The font is the page's, its size and weight are the figure's; matplotlib before 3.10 writes one property of all.
    text = re.sub(r"font-family: [^;]*(; )?", "", text)
    return re.sub(r"font: (bold |\d+ )?([\d.]+)px [^;]*", _font, text)


def _font(match: re.Match[str]) -> str:
    weight = f"; font-weight: {match[1].strip()}" if match[1] else ""
    return f"font-size: {match[2]}px{weight}"


def _rounded(text: str) -> str:
    text = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), text)
    return re.sub(r"\s+", " ", text).strip()


def _hoist(element: ElementTree.Element) -> None:
    """Give the style that all markers of a series share to their group: half of the bytes of a scatter plot."""
    uses = [child for child in element if child.tag.endswith("use")]
    styles = {child.get("style") for child in uses}
    if len(uses) > 1 and len(styles) == 1 and None not in styles and not element.get("style"):
        element.set("style", _style(styles.pop() or ""))
        for child in uses:
            del child.attrib["style"]


def _drop_empty(root: ElementTree.Element) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("g", "defs") and not len(child) and not child.text:
                parent.remove(child)


def classed(artist: Any, name: str, number: int = 0) -> Any:
    """Give an artist a class of the page's style sheet; ``number`` keeps apart several of one class."""
    artist.set_gid(f"class-{name}{number}")
    return artist
