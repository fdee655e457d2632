"""matplotlib figure -> SVG that belongs to its page: in its font and colours, light and dark; always the same."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from codeact.base.errors import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 4.7
"""Inches of a figure: narrow, so that its text can be read on a phone. A unit of the SVG is 1/72 inch."""

_VARIABLES = (
    "ink muted rule paper chosen other accent waste "
    "s0 s1 s2 s3 s4 s5 c0 c1 c2 c3 c4 c5 c6 c7 c8"
).split()  # fmt: skip
COLOURS: Mapping[str, str] = {name: f"#0001{number:02x}" for number, name in enumerate(_VARIABLES)}
"""What to draw with: colours that stand for the variables of the page's style sheet, ``--ink`` and so on.

``c0`` to ``c8`` tell things apart; ``s0`` to ``s5`` are a scale.
"""


@contextmanager
def page_style() -> Iterator[None]:
    """Draw in the style of the page, whatever the user's own settings of matplotlib are.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    import_extra("matplotlib", "report", "the report")
    from matplotlib import rc, rc_context, rcdefaults

    ink, muted, rule = COLOURS["ink"], COLOURS["muted"], COLOURS["rule"]
    with rc_context():
        rcdefaults()
        rc("font", size=9.5)
        rc("text", color=ink, parse_math=False)
        rc("axes", labelsize=9.5, labelcolor=ink, edgecolor=rule, facecolor="none")
        rc("axes", titlesize=9.5, titleweight="bold", titlelocation="left", titlecolor=ink)
        rc("axes.spines", top=False, right=False)
        rc("xtick", labelsize=9, color=rule, labelcolor=muted)
        rc("ytick", labelsize=9, color=rule, labelcolor=muted)
        rc("legend", fontsize=9.5, frameon=False, loc="lower left", borderpad=0.2)
        rc("figure", facecolor="none")
        rc("savefig", facecolor="none")
        rc("svg", fonttype="none", hashsalt="codeact")
        yield


def new_figure(height: float, panels: int = 1, **subplots: Any) -> tuple[Figure, Any]:
    """A figure of the page's width and its axes, ``panels`` one below the other; only within ``page_style``.

    ``height`` in inches; ``subplots``: more for matplotlib's function of that name.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)  # pyplot would choose a backend, and keep the figure
    return figure, figure.subplots(panels, 1, **subplots)


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """Return the figure as an ``<svg>`` element for an HTML page.

    Args:
        figure: of ``new_figure``.
        name: unlike that of every other figure of the page: ids begin with it.
        label: what a screen reader says.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    source = buffer.getvalue().replace(' xmlns="http://www.w3.org/2000/svg"', "").replace("xlink:href", "href")
    source = re.sub(r"(?<=\burl\(#)|(?<=\bhref=\"#)", f"{name}-", source)
    used = set(re.findall(rf"#({re.escape(name)}-[^\")]+)", source))
    root = ElementTree.fromstring(source)
    for parent in list(root.iter())[::-1]:  # a group before what it is in, which may be empty then
        for child in list(parent):
            nothing = child.tag in ("g", "defs") and not len(child) and not child.text
            if nothing or child.tag in ("metadata", "style"):
                parent.remove(child)
        parent.tail = None
        parent.text = parent.text if (parent.text or "").strip() else None
        parent.attrib.update(_attributes(parent, name, used))
        _hoist(parent)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": label, "class": "plot"})
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(element: ElementTree.Element, name: str, used: set[str]) -> Iterator[tuple[str, str]]:
    """Take an element's attributes; return them short, in the page's colours, with ids only where they are used."""
    attributes = dict(element.attrib)
    element.attrib.clear()
    for key, text in attributes.items():
        if key == "id" and text.startswith("class-"):  # matplotlib has ids only
            yield "class", text.removeprefix("class-").rstrip("0123456789")
        elif key == "id" and f"{name}-{text}" in used:
            yield key, f"{name}-{text}"
        elif key == "style":
            yield key, _style(text)
        elif key in ("d", "x", "y", "width", "height", "transform", "points"):
            rounded = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), text)
            yield key, " ".join(rounded.split())
        elif key != "id":
            yield key, text


def _style(text: str) -> str:
    text = re.sub(r"(fill|stroke): #[0-9a-f]{6}; \1-opacity: 0(?![.\d])", r"\1: none", text)
    text = re.sub(r"#0001([0-9a-f]{2})", lambda match: f"var(--{_VARIABLES[int(match[1], 16)]})", text)
    # The font is the page's, its size and weight are the figure's; matplotlib before 3.10 writes one property of all.
    text = re.sub(r"font-family: [^;]*(; )?", "", text)
    text = re.sub(r"font: ((?:bold|\d+) )?([\d.]+)px [^;]*", r"font-size: \2px; font-weight: \1", text)
    return re.sub(r"; font-weight: (?=;|$)|(?<=\S) (?=;|$)", "", text)


def _hoist(element: ElementTree.Element) -> None:
    """Give the style that all markers of a series share to their group: half of the bytes of a scatter plot."""
    uses = [child for child in element if child.tag == "use"]
    styles = {child.get("style") for child in uses}
    if len(uses) > 1 and len(styles) == 1 and (style := styles.pop()) and not element.get("style"):
        element.set("style", style)
        for child in uses:
            del child.attrib["style"]
