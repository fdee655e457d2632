"""The plots of a report about its rows: difficulty, losses, map, lengths. Every caption is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from codeact.report.rows import DRAWN, Map, Rows, sample
from codeact.report.svg import COLOURS, classed, inline_svg, new_figure
from codeact.report.text import counted, percent, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CLUSTERS = 12  # strips of a figure; beyond, the largest
_HUES = 9  # colours that can be told apart, ``c0`` to ``c8``
_SEEN = 0.995  # share of the values that an axis must show

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """``svg``: an element for the page, trusted; ``caption``: plain text."""

    kind: ClassVar[str] = "plot"
    name: str
    svg: str
    caption: str


def ifd_histogram(rows: Rows) -> Plot | None:
    """Rows by IFD, the chosen ones apart."""
    scored = np.isfinite(rows.ifd)
    ifd = rows.ifd[scored]
    if not len(ifd):
        return None
    edges = _edges(ifd)
    figure = new_figure(2.6)
    axes = figure.subplots()
    _histogram(axes, ifd, None if rows.chosen is None else rows.chosen[scored], edges)
    axes.axvline(1, color=COLOURS["ink"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel("IFD (ratio of perplexities, no unit)")
    axes.set_ylabel("rows")
    hard = ifd >= 1
    low, middle, high = np.percentile(ifd, [25, 50, 75])
    text = (
        f"{percent(hard.mean()) if hard.any() else 'None'} of the {counted(len(ifd), 'scored row')} "
        f"{'have' if hard.any() else 'has'} an IFD of 1 or more (right of the dashed line), where the question does "
        f"not help the model to the answer. Half of the rows lie between {low:.2f} and {high:.2f}, the median is "
        f"{middle:.2f}"
    )
    if rows.chosen is not None and (taken := rows.chosen[scored]).any():
        easier = float((ifd[~taken] < np.median(ifd[taken])).mean()) if not taken.all() else 0.0
        many = "all the" if easier == 1 else f"{percent(easier)} of the"
        text += f". The chosen rows' median is {np.median(ifd[taken]):.2f}, higher than {many} others"
        text += f"; {counted(int((hard & taken).sum()), 'chosen row')} of IFD 1 or more" if (hard & taken).any() else ""
    text += "." + _beyond(ifd, edges)
    return Plot(name="ifd", svg=inline_svg(figure, "ifd", "Histogram of IFD"), caption=text)


def ifd_by_cluster(rows: Rows) -> Plot | None:
    """A strip for every cluster: its rows by IFD, the chosen ones apart."""
    if rows.chosen is None or rows.cluster is None:
        return None
    usable = np.isfinite(rows.ifd) & (rows.cluster >= 0)
    ifd, cluster, chosen = rows.ifd[usable], rows.cluster[usable], rows.chosen[usable]
    labels, sizes = np.unique(cluster, return_counts=True)
    if len(labels) < 2:
        return None
    shown = np.sort(labels[np.argsort(-sizes, kind="stable")[:_CLUSTERS]])
    edges = _edges(ifd, most=30)
    figure = new_figure(0.75 + 0.33 * len(shown))
    axes = figure.subplots()
    medians = {}
    for at, label in enumerate(shown):
        inside = cluster == label
        _strip(axes, ifd[inside], chosen[inside], edges, len(shown) - 1 - at)
        medians[int(label)] = float(np.median(ifd[inside]))
        taken = f"{chosen[inside].sum():,} of {inside.sum():,}"
        axes.text(
            1.01,
            len(shown) - 1 - at + 0.15,
            taken,
            transform=axes.get_yaxis_transform(),
            color=COLOURS["muted"],
            size=9,
        )
    axes.axvline(1, color=COLOURS["ink"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(np.arange(len(shown)) + 0.28, [str(label) for label in shown[::-1]])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.1, len(shown))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylabel("cluster")
    axes.set_xlabel("IFD (ratio of perplexities, no unit)")
    axes.set_title("chosen of rows", loc="right", size=9, weight="normal", color=COLOURS["muted"])
    easiest, hardest = min(medians, key=lambda k: medians[k]), max(medians, key=lambda k: medians[k])
    shares = [chosen[cluster == label].mean() for label in labels]
    text = (
        f"Cluster {easiest} is the easiest by its median IFD (short line), {medians[easiest]:.2f}, cluster {hardest} "
        f"the hardest, {medians[hardest]:.2f}. Between {percent(min(shares), 0)} and {percent(max(shares), 0)} of a "
        "cluster's rows were chosen (blue). Every strip is as high as its own highest bin."
    )
    if len(shown) < len(labels):
        text += f" Shown are the {len(shown)} largest of {len(labels)} clusters."
    return Plot(name="clusters", svg=inline_svg(figure, "clusters", "Histograms of IFD by cluster"), caption=text)


def losses(rows: Rows) -> Plot | None:
    """Mean loss of the answer with the question against that without it."""
    x, y = rows.uncond, rows.cond
    usable = np.flatnonzero(np.isfinite(x) & np.isfinite(y) & np.isfinite(rows.ifd))
    if not len(usable):
        return None
    drawn = sample(usable, DRAWN)
    from matplotlib.ticker import MaxNLocator

    highest = max(_reach(x[usable])[1], _reach(y[usable])[1]) * 1.02
    step = _round_up(highest / 10)
    top = math.ceil(highest / step) * step
    inside = drawn[(x[drawn] <= top) & (y[drawn] <= top)]
    figure = new_figure(4.2)
    axes = figure.subplots()
    axes.plot([0, top], [0, top], color=COLOURS["ink"], linewidth=1, linestyle=(0, (4, 3)))
    taken = np.zeros(len(inside), np.bool_) if rows.chosen is None else rows.chosen[inside]
    _dots(axes, x[inside[~taken]], y[inside[~taken]], "other", 1.9, "scored" if rows.chosen is None else "not chosen")
    if taken.any():
        _dots(axes, x[inside[taken]], y[inside[taken]], "chosen", 2.1, "chosen")
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    axes.set_xlabel("mean loss of the answer alone (nats per token)")
    axes.set_ylabel("mean loss given the question (nats per token)")
    axes.annotate(
        "IFD = 1", (top, top), xytext=(-12, -2), textcoords="offset points", ha="right", rotation=45,
        rotation_mode="anchor", color=COLOURS["muted"], size=9,
    )  # fmt: skip
    _legend(axes, markers=True)
    gain = x[usable] - y[usable]
    many = "all rows" if (gain > 0).all() else f"{percent((gain > 0).mean())} of the rows"
    text = (
        f"The question takes {np.median(gain):.2f} nats per token off the answer's loss in the median: {many} lie "
        "below the dashed line, where it helps. The farther below, the smaller the IFD."
    )
    if len(drawn) < len(usable):
        text += f" Drawn is a random sample of {len(drawn):,} of {counted(len(usable), 'row')}."
    if len(inside) < len(drawn):
        text += f" Not drawn: {counted(len(drawn) - len(inside), 'row')} beyond the axes."
    return Plot(name="losses", svg=inline_svg(figure, "losses", "Scatter plot of mean losses"), caption=text)


def cluster_map(rows: Rows, found: Map) -> Plot:
    """The questions on a plane, coloured by cluster, the chosen ones marked."""
    figure = new_figure(4.3)
    axes = figure.subplots()
    nothing = np.full(len(found.rows), -1, np.int32)
    cluster = nothing if rows.cluster is None else rows.cluster[found.rows]
    chosen = np.zeros(len(found.rows), np.bool_) if rows.chosen is None else rows.chosen[found.rows]
    labels = [int(label) for label in np.unique(cluster)]
    many = len(found.rows) > 600
    for label in labels:
        colour = "other" if label < 0 else f"c{label % _HUES}"
        shape = "o" if label < 0 else "osD^v"[label // _HUES % 5]
        for mark in (False, True):
            x, y = found.xy[(cluster == label) & (chosen == mark)].T
            if len(x):
                edge = COLOURS["ink"] if mark else "none"
                width = (3.4 if many else 6.5) if mark else (2.2 if many else 4.5)
                axes.plot(
                    x, y, linestyle="none", marker=shape, markersize=width, markerfacecolor=COLOURS[colour],
                    markeredgecolor=edge, markeredgewidth=0.6, alpha=1.0 if mark else 0.55, zorder=2 + mark,
                )  # fmt: skip
    axes.set_aspect("equal")
    axes.margins(0.04)
    axes.set_xlabel(f"first principal component ({percent(found.explained[0])} of the variance)")
    axes.set_ylabel(f"second ({percent(found.explained[1])})")
    centres = {n: np.median(found.xy[cluster == n], axis=0) for n in labels if n >= 0}
    if len(centres) > 1:
        largest = sorted(centres, key=lambda n: -int((cluster == n).sum()))[:_CLUSTERS]
        _name_clusters(axes, {n: centres[n] for n in sorted(largest)})
    shown = sum(found.explained)
    text = "Every dot is a question; dots that are near each other ask for like things"
    if centres:
        text += f", colour and number are its cluster ({len(centres)} in all"
        text += f", the {_CLUSTERS} largest named)" if len(centres) > _CLUSTERS else ")"
    if chosen.any():
        text += f". Ringed and larger are the {percent(chosen.mean())} that were chosen"
        if len(centres) > 1:
            spread = sum(bool((chosen & (cluster == n)).any()) for n in centres)
            text += f", which lie in {spread} of {len(centres)} clusters"
    text += (
        f". The plane holds {percent(shown)} of the embeddings' variance"
        + (", so clusters that overlap here may well be apart." if shown < 0.5 else ".")
    )  # fmt: skip
    if len(found.rows) < found.total:
        text += f" Drawn is a random sample of {len(found.rows):,} of {counted(found.total, 'question')}"
        text += f"; the axes were found from {found.fitted:,}." if found.fitted < found.total else "."
    return Plot(name="map", svg=inline_svg(figure, "map", "Map of the questions"), caption=text)


def length_histogram(rows: Rows) -> Plot | None:
    """Rows by tokens of question and answer."""
    usable = rows.tokens > 0
    tokens = rows.tokens[usable].astype(np.float64)
    if not len(tokens):
        return None
    middle = float(np.median(tokens))
    logarithmic = float(tokens.max()) > 12 * middle
    if logarithmic:
        bins = int(np.clip(2 * len(tokens) ** (1 / 3), 12, 60))
        low, high = tokens.min(), tokens.max()
        edges = np.unique(np.geomspace(low, high * 1.0001, bins + 1))
    else:
        edges = _edges(tokens, whole=True)
    figure = new_figure(2.6)
    axes = figure.subplots()
    chosen = None if rows.chosen is None else rows.chosen[usable]
    _histogram(axes, tokens, chosen, edges)
    axes.axvline(middle, color=COLOURS["ink"], linewidth=1, linestyle=(0, (1.2, 1.6)))
    if logarithmic:
        axes.set_xscale("log")
        _log_ticks(axes, edges[0], edges[-1])
    axes.set_xlabel(f"tokens of question and answer{' (logarithmic)' if logarithmic else ''}")
    axes.set_ylabel("rows")
    text = (
        f"The median row has {middle:,.0f} tokens (dotted line), one in twenty more than "
        f"{np.percentile(tokens, 95):,.0f}, the longest {tokens.max():,.0f}"
    )
    if chosen is not None and chosen.any():
        mine = float(np.median(tokens[chosen]))
        axes.axvline(mine, color=COLOURS["accent"], linewidth=1.3, linestyle=(0, (4, 2)))
        than = "longer" if mine > middle else "shorter" if mine < middle else "as long"
        text += (
            f". Chosen rows have {mine:,.0f} in the median (dashed line): {than}{'' if mine == middle else ' than all'}"
        )
    svg = inline_svg(figure, "lengths", "Histogram of tokens per row")
    return Plot(name="lengths", svg=svg, caption=f"{text}.{_beyond(tokens, edges)}")


# ------------------------------------------------------------------------------------------------- how things are drawn


def _edges(values: Floats, most: int = 60, whole: bool = False) -> Floats:
    """Edges of bins of a round width; every multiple of it is one, so 1 is. Outliers may fall outside."""
    low, high = _reach(values)
    target = (high - low) / np.clip(2 * len(values) ** (1 / 3), 12, most)
    step = _round_up(float(target)) if target > 0 else 1.0 if whole else 0.05
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step), math.floor(high / step) + 1
    if not whole:  # the line at 1 is always in the picture
        first, last = min(first, math.floor(0.9 / step)), max(last, math.ceil(1.1 / step))
    return np.array([round(number * step, 9) for number in range(first, last + 1)])


def _reach(values: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """What an axis shows: everything, but for outliers that would squeeze the rest."""
    low, high = map(float, np.quantile(values, [1 - _SEEN, _SEEN]))
    spare = (high - low) / 2
    return max(low - spare, float(values.min())), min(high + spare, float(values.max()))


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    scale = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next((step * scale for step in (1, 2, 2.5, 5, 10) if step * scale >= value * 0.999999), value)


def _beyond(values: Floats, edges: Floats) -> str:
    low, high = int((values < edges[0]).sum()), int((values > edges[-1]).sum())
    if not low + high:
        return ""
    return f" Not drawn: {counted(low + high, 'row')} beyond the axis, the largest at {short(float(values.max()))}."


def _histogram(axes: Axes, values: Floats, chosen: NDArray[np.bool_] | None, edges: Floats) -> None:
    everything, _ = np.histogram(values, edges)
    if chosen is None:
        axes.stairs(everything, edges, fill=True, color=COLOURS["other"])
    else:
        taken, _ = np.histogram(values[chosen], edges)
        axes.stairs(everything, edges, baseline=taken, fill=True, color=COLOURS["other"], label="not chosen")
        axes.stairs(taken, edges, fill=True, color=COLOURS["chosen"], label="chosen")
        _legend(axes)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, max(1, everything.max()) * 1.06)
    _count_axis(axes)


def _strip(axes: Axes, values: Floats, chosen: NDArray[np.bool_], edges: Floats, base: float) -> None:
    everything, _ = np.histogram(values, edges)
    taken, _ = np.histogram(values[chosen], edges)
    scale = 0.82 / max(1, everything.max())
    axes.stairs(base + everything * scale, edges, baseline=base + taken * scale, fill=True, color=COLOURS["other"])
    axes.stairs(base + taken * scale, edges, baseline=base, fill=True, color=COLOURS["chosen"])
    axes.plot([edges[0], edges[-1]], [base, base], color=COLOURS["rule"], linewidth=0.6)
    middle = float(np.median(values))
    axes.plot([middle, middle], [base, base + 0.9], color=COLOURS["accent"], linewidth=1.6)


def _dots(axes: Axes, x: Floats, y: Floats, colour: str, width: float, label: str) -> None:
    axes.plot(
        x, y, linestyle="none", marker="o", markersize=width if len(x) > 400 else width * 2.1, label=label,
        markerfacecolor=COLOURS[colour], markeredgecolor="none", alpha=0.6,
    )  # fmt: skip


def _legend(axes: Axes, markers: bool = False) -> None:
    options: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "ncols": 2, "borderpad": 0.2}
    made = axes.legend(handlelength=0.9, handleheight=0.9, columnspacing=1.4, handletextpad=0.5, **options)
    if markers:
        for handle in made.legend_handles:
            handle.set_markersize(5)  # type: ignore[union-attr]
            handle.set_alpha(1)  # type: ignore[union-attr]


def _count_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _log_ticks(axes: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    if len(ticks) > 8:
        ticks = [m * 10.0**d for d in decades for m in (1, 3) if low <= m * 10.0**d <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _name_clusters(axes: Axes, centres: dict[int, Floats]) -> None:
    """Write the numbers of the clusters at their medians, moved apart where they would touch."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    apart = max(right - left, top - bottom) / 18
    placed: list[Floats] = []
    for number, (label, centre) in enumerate(centres.items()):
        at = centre
        for turn in range(1, 60):
            if all(np.hypot(*(at - other)) >= apart for other in placed):
                break
            angle = 2.4 * turn  # outwards along a spiral
            at = centre + apart * 0.25 * math.sqrt(turn) * 1.4 * np.array([math.cos(angle), math.sin(angle)])
        placed.append(at)
        text = axes.text(at[0], at[1], str(label), ha="center", va="center", weight="bold", size=11, zorder=5)
        classed(text, "halo", number)
