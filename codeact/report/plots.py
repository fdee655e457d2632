"""The plots of a report: difficulty, losses, map, lengths, packs, training, outcomes. Every caption is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from codeact.base.console import counted, percent, short, visible
from codeact.evaluation.judge import KINDS
from codeact.padding.figure import draw_rows, first_batches, length_ranks
from codeact.padding.strategies import STRATEGIES, plan
from codeact.report.data import Evaluations, PackFigures, Training, moved, proper_name, signed
from codeact.report.rows import DRAWN, FloatArray, Map, Rows, draw_positions
from codeact.report.svg import COLOURS, inline_svg, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CLUSTERS = 12  # strips of a figure; beyond, the largest
_HUES = 9  # colours that can be told apart, ``c0`` to ``c8``
_SEEN = 0.995  # share of the values that an axis must show
_POINTS = 400  # of a line: more are averaged
_SHADES = 6  # colours ``s0`` to ``s5``
_DASHED = (0, (4, 3))
_STEPS = [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10]  # of ticks that are whole numbers
_OUTCOMES = {
    "pass": "chosen", "wrong": "c1", "exception": "c4", "syntax": "c5", "time": "c7", "memory": "c8", "crash": "other",
}  # fmt: skip


Points = Iterable[tuple[float, float, str]]


class Plot:
    """``svg``: an element for the page, trusted; ``caption``: plain text. ``label`` is for a screen reader.

    ``points``: what a pointer near a point of the axes is told, in their coordinates; ``flat``: near along x is enough.
    ``hover`` is the same in units of the SVG, for the page's script.
    """

    kind = "plot"

    def __init__(
        self, figure: Figure, name: str, label: str, caption: str, points: Points = (), flat: bool = False
    ) -> None:
        self.name, self.svg, self.caption = name, inline_svg(figure, name, label), caption
        told, scale = [*points], 72 / figure.dpi
        places = np.array([point[:2] for point in told]).reshape(-1, 2)
        x, y = (figure.axes[0].transData.transform(places) * scale).round(1).T.tolist()
        top = round(float(figure.bbox.height * scale), 1)
        spots = [(a, round(top - b, 1), visible(text)) for a, b, (*_, text) in zip(x, y, told, strict=True)]
        self.hover = {"flat": flat, "points": spots} if spots else None


def ifd_histogram(rows: Rows) -> Plot | None:
    """Rows by IFD, the chosen ones apart."""
    scored = np.isfinite(rows.ifd)
    ifd = rows.ifd[scored]
    if not len(ifd):
        return None
    chosen = None if rows.chosen is None else rows.chosen[scored]
    edges = _edges(ifd)
    figure, axes = new_figure(2.6)
    bins = _histogram(axes, ifd, chosen, edges)
    _ifd_axis(axes, "rows")
    hard = ifd >= 1
    low, middle, high = np.percentile(ifd, [25, 50, 75])
    text = (
        f"{percent(hard.mean()) if hard.any() else 'None'} of the {counted(len(ifd), 'scored row')} "
        f"{'have' if hard.any() else 'has'} an IFD of 1 or more (right of the dashed line), where the question does "
        f"not help the model to the answer. Half of the rows lie between {low:.2f} and {high:.2f}, the median is "
        f"{middle:.2f}"
    )
    if chosen is not None and chosen.any():
        mine = np.median(ifd[chosen])
        easier = 0.0 if chosen.all() else float((ifd[~chosen] < mine).mean())
        many = "all the" if easier == 1 else f"{percent(easier)} of the"
        text += f". The chosen rows' median is {mine:.2f}, higher than {many} others"
        text += f"; {counted(count, 'chosen row')} of IFD 1 or more" if (count := int((hard & chosen).sum())) else ""
    return Plot(figure, "ifd", "Histogram of IFD", f"{text}.{_beyond(ifd, edges)}", bins, True)


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
    figure, axes = new_figure(0.75 + 0.33 * len(shown))
    for base, label in zip(range(len(shown))[::-1], shown, strict=True):
        inside = cluster == label
        _strip(axes, ifd[inside], chosen[inside], edges, base)
        taken, right = f"{chosen[inside].sum():,} of {inside.sum():,}", axes.get_yaxis_transform()
        axes.text(1.01, base + 0.15, taken, transform=right, color=COLOURS["muted"], size=9)
    axes.set_yticks(np.arange(len(shown)) + 0.28, [str(label) for label in shown[::-1]])
    _no_left_axis(axes)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(-0.1, len(shown)))
    _ifd_axis(axes, "cluster")
    axes.set_title("chosen of rows", loc="right", size=9, weight="normal", color=COLOURS["muted"])
    medians = [np.median(ifd[cluster == label]) for label in shown]
    easiest, hardest = int(np.argmin(medians)), int(np.argmax(medians))
    shares = [chosen[cluster == label].mean() for label in labels]
    text = (
        f"Cluster {shown[easiest]} is the easiest by its median IFD (short line), {medians[easiest]:.2f}, cluster "
        f"{shown[hardest]} the hardest, {medians[hardest]:.2f}. Between {percent(min(shares), 0)} and "
        f"{percent(max(shares), 0)} of a cluster's rows were chosen (blue). Every strip is as high as its own highest "
        "bin."
    )
    if len(shown) < len(labels):
        text += f" Shown are the {len(shown)} largest of {len(labels)} clusters."
    return Plot(figure, "clusters", "Histograms of IFD by cluster", text)


def losses(rows: Rows) -> Plot | None:
    """Mean loss of the answer with the question against that without it."""
    x, y = rows.uncond, rows.cond
    usable = np.flatnonzero(np.isfinite(x) & np.isfinite(y) & np.isfinite(rows.ifd))
    if not len(usable):
        return None
    drawn = draw_positions(usable, DRAWN)
    highest = max(_reach(x[usable])[1], _reach(y[usable])[1]) * 1.02
    top = math.ceil(highest / (step := _round_up(highest / 10))) * step
    inside = drawn[(x[drawn] <= top) & (y[drawn] <= top)]
    figure, axes = new_figure(4.2)
    axes.plot([0, top], [0, top], color=COLOURS["ink"], linewidth=1, linestyle=_DASHED)
    taken = np.zeros(len(inside), np.bool_) if rows.chosen is None else rows.chosen[inside]
    others = "scored" if rows.chosen is None else "not chosen"
    for at, colour, width, label in ((inside[~taken], "other", 1.9, others), (inside[taken], "chosen", 2.1, "chosen")):
        if len(at) or label == others:
            axes.plot(
                x[at], y[at], linestyle="none", marker="o", markersize=width if len(at) > 400 else width * 2.1,
                label=label, markerfacecolor=COLOURS[colour], markeredgecolor="none", alpha=0.6,
            )  # fmt: skip
    xlabel, ylabel = (f"mean loss {given} (nats per token)" for given in ("of the answer alone", "given the question"))
    axes.set(xlim=(0, top), ylim=(0, top), aspect="equal", xlabel=xlabel, ylabel=ylabel)
    axes.locator_params(nbins=7, steps=[1, 2, 5, 10])
    axes.annotate(
        "IFD = 1", (top, top), xytext=(-12, -2), textcoords="offset points", ha="right", rotation=45,
        rotation_mode="anchor", color=COLOURS["muted"], size=9,
    )  # fmt: skip
    for handle in _legend(axes, 2).legend_handles:
        handle.set(markersize=5, alpha=1)
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
    points = [(x[n], y[n], f"row {n:,}, IFD {rows.ifd[n]:.3f}") for n in inside.tolist()]
    return Plot(figure, "losses", "Scatter plot of mean losses", text, points)


def cluster_map(rows: Rows, plane: Map, question: Callable[[int], str] | None) -> Plot:
    """The questions on a plane, coloured by cluster, the chosen ones marked; ``question``: the text of a row."""
    figure, axes = new_figure(4.3)
    drawn = plane.rows
    cluster = np.full(len(drawn), -1, np.int32) if rows.cluster is None else rows.cluster[drawn]
    chosen = np.zeros(len(drawn), np.bool_) if rows.chosen is None else rows.chosen[drawn]
    labels = [int(label) for label in np.unique(cluster)]
    widths = (2.2, 3.4) if len(drawn) > 600 else (4.5, 6.5)
    for label in labels:
        colour, shape = ("other", "o") if label < 0 else (f"c{label % _HUES}", "osD^v"[label // _HUES % 5])
        for mark in (False, True):
            x, y = plane.xy[(cluster == label) & (chosen == mark)].T
            if len(x):
                axes.plot(
                    x, y, linestyle="none", marker=shape, markersize=widths[mark], markerfacecolor=COLOURS[colour],
                    markeredgecolor=COLOURS["ink"] if mark else "none", markeredgewidth=0.6,
                    alpha=1.0 if mark else 0.55, zorder=2 + mark,
                )  # fmt: skip
    first, second = map(percent, plane.explained)
    axes.margins(0.04)
    axes.set(aspect="equal", xlabel=f"first principal component ({first} of the variance)", ylabel=f"second ({second})")
    centres = {n: np.median(plane.xy[cluster == n], axis=0) for n in labels if n >= 0}
    if len(centres) > 1:
        largest = sorted(centres, key=lambda n: -int((cluster == n).sum()))[:_CLUSTERS]
        _name_clusters(axes, {n: centres[n] for n in sorted(largest)})
    text = "Every dot is a question; dots that are near each other ask for like things"
    if centres:
        named = f", the {_CLUSTERS} largest named" if len(centres) > _CLUSTERS else ""
        text += f", colour and number are its cluster ({len(centres)} in all{named})"
    if chosen.any():
        text += f". Ringed and larger are the {percent(chosen.mean())} that were chosen"
        if len(centres) > 1:
            spread = len({*cluster[chosen].tolist()} & {*centres})
            text += f", which lie in {spread} of {len(centres)} clusters"
    overlap = ", so clusters that overlap here may well be apart" if sum(plane.explained) < 0.5 else ""
    text += f". The plane holds {percent(sum(plane.explained))} of the embeddings' variance{overlap}."
    if len(drawn) < plane.total:
        text += f" Drawn is a random sample of {len(drawn):,} of {counted(plane.total, 'question')}"
        text += f"; the axes were found from {plane.fitted:,}." if plane.fitted < plane.total else "."
    asked = [f": {question(row)[:90]}" if question else "" for row in drawn.tolist()]
    names = [f", cluster {label}" if label >= 0 else "" for label in cluster.tolist()]
    told = [f"row {row:,}{name}{text}" for row, name, text in zip(drawn.tolist(), names, asked, strict=True)]
    points = ((x, y, text) for (x, y), text in zip(plane.xy.tolist(), told, strict=True))
    return Plot(figure, "map", "Map of the questions", text, points)


def length_histogram(rows: Rows) -> Plot | None:
    """Rows by tokens of question and answer."""
    from matplotlib.ticker import LogLocator

    usable = rows.tokens > 0
    tokens = rows.tokens[usable].astype(np.float64)
    if not len(tokens):
        return None
    middle, longest = float(np.median(tokens)), float(tokens.max())
    logarithmic = longest > 12 * middle
    edges = _edges(tokens, whole=True)
    if logarithmic:
        edges = np.unique(np.geomspace(tokens.min(), longest * 1.0001, int(_bins(tokens)) + 1))
    figure, axes = new_figure(2.6)
    chosen = None if rows.chosen is None else rows.chosen[usable]
    bins = _histogram(axes, tokens, chosen, edges)
    axes.axvline(middle, color=COLOURS["ink"], linewidth=1, linestyle=(0, (1.2, 1.6)))
    if logarithmic:
        axes.set_xscale("log", subs=())
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if edges[-1] < 300 * edges[0] else (1, 3)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(xlabel=f"tokens of question and answer{' (logarithmic)' if logarithmic else ''}", ylabel="rows")
    text = (
        f"The median row has {middle:,.0f} tokens (dotted line), one in twenty more than "
        f"{np.percentile(tokens, 95):,.0f}, the longest {longest:,.0f}"
    )
    if chosen is not None and chosen.any():
        mine = float(np.median(tokens[chosen]))
        axes.axvline(mine, color=COLOURS["accent"], linewidth=1.3, linestyle=(0, (4, 2)))
        than = "longer than all" if mine > middle else "shorter than all" if mine < middle else "as long"
        text += f". Chosen rows have {mine:,.0f} in the median (dashed line): {than}"
    return Plot(figure, "lengths", "Histogram of tokens per row", f"{text}.{_beyond(tokens, edges)}", bins, True)


def packs(lengths: NDArray[np.int64], figures: PackFigures, used: str) -> Plot | None:
    """The same samples in the rows of three modes: padded to the capacity, padded to the longest, packed."""
    if not len(lengths) or lengths.max() > figures.capacity:
        return None
    drawn = first_batches(lengths, figures.batch_size, figures.seed)
    names = ("max_length", "dynamic_pad", used if used.startswith("dynamic_pack") else "dynamic_pack_epoch")
    plans = [plan(name, drawn, figures.capacity, figures.batch_size, figures.seed) for name in names]
    rows = [len(each.row_offsets) - 1 for each in plans]
    height = 0.7 + 0.055 * sum(rows) + 0.3 * len(rows)  # axis and labels, rows, titles
    figure, panels = new_figure(height, 3, sharex=True, gridspec_kw={"height_ratios": rows})
    colours = [COLOURS[f"s{rank * _SHADES // len(drawn)}"] for rank in length_ranks(drawn)]
    padding, edge = {"color": COLOURS["waste"], "linewidth": 0}, {"edgecolor": COLOURS["paper"], "linewidth": 0.7}
    shares = [1 - int(drawn.sum()) / int(each.row_widths(drawn, figures.capacity).sum()) for each in plans]
    for axes, name, each, count, share in zip(panels, names, plans, rows, shares, strict=True):
        draw_rows(axes, each, drawn, figures.capacity, colours, padding=padding, edge=edge)
        axes.set_title(f"{STRATEGIES[name]}: {percent(share)} padding", size=9)
        axes.set(xlim=(0, figures.capacity), ylim=(count, 0), yticks=[])
        axes.set_ylabel(f"{count} rows", size=9)
        axes.tick_params(axis="x", labelbottom=axes is panels[-1])
    panels[-1].set_xlabel("position in the row (tokens)")
    text = (
        f"The same {counted(len(drawn), 'sample')} ({drawn.sum():,} tokens) in each panel; area is compute. Blue "
        f"blocks are samples, the stronger the longer; orange is padding, computed and thrown away. Padding to "
        f"{figures.capacity:,} tokens wastes {percent(shares[0])} of the compute, padding to the longest of "
        f"{figures.batch_size} samples {percent(shares[1])}, packing {percent(shares[2])}: {rows[-1]} rows hold what "
        f"{rows[0]} held."
    )
    if len(drawn) < len(lengths):
        text += f" Drawn are the first of {len(lengths):,} chosen conversations in a random order."
    return Plot(figure, "packs", "Rows of three padding modes", text)


def training_loss(training: Training) -> Plot | None:
    """Loss by step, and the loss of held-out rows."""
    trained, held_out = training.points("loss"), training.points("eval_loss")
    if not len(trained) + len(held_out):
        return None
    figure, axes = new_figure(2.8)
    parts = np.array_split(trained, min(len(trained), _POINTS) or 1)
    line = np.array([part.mean(axis=0) for part in parts]) if len(trained) else trained
    if len(line):
        marker = "o" if len(line) <= 40 else ""
        axes.plot(*line.T, color=COLOURS["chosen"], linewidth=1.5, marker=marker, markersize=3, label="training")
    if len(held_out):
        axes.plot(
            *held_out.T, color=COLOURS["accent"], linewidth=1.3, linestyle=(0, (4, 2)), marker="D", markersize=4.5,
            label="held out",
        )  # fmt: skip
    axes.legend(bbox_to_anchor=(-0.01, 1.0), ncols=2, handlelength=1.6)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.margins(x=0.03, y=0.12)
    axes.locator_params(axis="x", nbins=7, integer=True, steps=_STEPS)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    caption = _loss_caption(trained, held_out, len(line), training.held_out)
    kinds = (("training", line), ("held-out", held_out))
    points = [(x, y, f"step {x:,.0f}: {kind} loss {y:.4f}") for kind, of in kinds for x, y in of.tolist()]
    return Plot(figure, "loss", "Training and held-out loss by step", caption, points)


def _loss_caption(trained: FloatArray, held_out: FloatArray, drawn: int, rows: int) -> str:
    parts = []
    held = f"The loss of the {counted(rows, 'held-out row')}"
    if len(held_out) > 1:
        (_, first), (step, last) = held_out[0], held_out[-1]
        change = signed(100 * (last / first - 1))
        parts.append(f"{held} {moved(first, last, '{:.3f}'.format)} nats per token ({change} %)")
        best = held_out[held_out[:, 1].argmin()]
        if best[0] < step and best[1] < last:
            parts.append(f"it was lowest at step {best[0]:,.0f} ({best[1]:.3f}) and rose after: a sign of overfitting")
    elif len(held_out):
        parts.append(f"{held} was {held_out[0, 1]:.3f} at step {held_out[0, 0]:,.0f}")
    if len(trained) > 1:
        (_, first), (step, last) = trained[0], trained[-1]
        parts.append(f"The training loss went from {first:.3f} to {last:.3f} over {step:,.0f} steps")
    elif len(trained):
        parts.append(f"The training loss was {trained[0, 1]:.3f}, logged once, at step {trained[0, 0]:,.0f}")
    if drawn < len(trained):
        parts.append(f"Drawn are {drawn} means of {len(trained):,} logged values")
    if not len(held_out):
        parts.append("No rows were held out")
    return ". ".join(parts) + "."


def outcome_bars(name: str, evaluations: Evaluations) -> Plot | None:
    """Programs solved before and after training, and how the others ended."""
    sides = {when: side.outcomes for when, side in evaluations._asdict().items() if side}
    if not any(sum(outcomes.values()) for outcomes in sides.values()):
        return None
    kinds = [kind for kind in KINDS if any(outcomes.get(kind) for outcomes in sides.values())]
    figure, axes = new_figure(1.05 + 0.42 * len(sides))
    places, left = -np.arange(len(sides)), np.zeros(len(sides))
    for number, kind in enumerate(kinds):
        counts = np.array([outcomes.get(kind, 0) for outcomes in sides.values()])
        shares = 100 * counts / [max(1, sum(outcomes.values())) for outcomes in sides.values()]
        bars = axes.barh(
            places, shares, left=left, height=0.62, color=COLOURS[_OUTCOMES[kind]], edgecolor=COLOURS["paper"],
            linewidth=0.8, label=kind,
        )  # fmt: skip
        told = [f"{count:,}" if share >= 6 else "" for count, share in zip(counts, shares, strict=True)]
        for at, text in enumerate(axes.bar_label(bars, told, label_type="center", size=9)):
            text.set_gid(f"class-onbar{at * 10 + number}")  # of the page's style sheet
        left += shares
    axes.set_yticks(places, [*sides])
    _no_left_axis(axes)
    axes.set(xlim=(0, 100), xlabel="share of the programs (%); numbers are programs")
    _legend(axes, 4, columnspacing=1.2)
    label = f"Outcomes of the programs of {proper_name(name)}"
    return Plot(figure, f"pass-{name}", label, _outcomes_caption(evaluations))


def _outcomes_caption(evaluations: Evaluations) -> str:
    before, after = evaluations.before, evaluations.after
    if before is None or after is None:
        side, when = (after, "after") if before is None else (before, "before")
        assert side is not None
        return f"Only the model {when} training was evaluated, on {counted(side.tasks, 'task')}."
    texts = []
    for kind, tests in (("base", "the base tests"), ("plus", "base and plus tests together")):
        first, last = evaluations.pass_at(kind, "pass@1")
        if first is not None and last is not None:
            texts.append(f"On {tests} pass@1 {moved(first, last, percent)}")
    kind = "plus" if "plus" in before.pass_at and "plus" in after.pass_at else "base"
    first_solved, last_solved = (side.solved(kind) for side in (before, after))
    won, lost = len(last_solved - first_solved), len(first_solved - last_solved)
    many = f"{counted(won, 'task')} {'are' if won > 1 else 'is'}" if won else "No task is"
    texts.append(f"{many} solved only after training, {lost} only before")
    changed = won + lost
    chance = min(1.0, 2 * sum(math.comb(changed, k) for k in range(min(won, lost) + 1)) / 2**changed)
    split = f"A split at least so uneven comes by chance with p = {chance:.2f} (sign test)"
    evidence = f"{split}: {'no ' if chance > 0.05 else ''}evidence of a change"
    texts.append(evidence if changed else "No verdict changed")
    return ". ".join(texts) + "."


# ------------------------------------------------------------------------------------------------- how things are drawn


def _edges(values: FloatArray, most: int = 60, whole: bool = False) -> FloatArray:
    """Edges of bins of a round width; every multiple of it is one, so 1 is. Outliers may fall outside."""
    low, high = _reach(values)
    target = (high - low) / _bins(values, most)
    step = _round_up(float(target)) if target > 0 else 1.0 if whole else 0.05
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step), math.floor(high / step) + 1
    if not whole:  # the line at 1 is always in the picture
        first, last = min(first, math.floor(0.9 / step)), max(last, math.ceil(1.1 / step))
    return np.array([round(number * step, 9) for number in range(first, last + 1)])


def _bins(values: FloatArray, most: int = 60) -> float:
    return float(np.clip(2 * len(values) ** (1 / 3), 12, most))


def _reach(values: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """What an axis shows: everything, but for outliers that would squeeze the rest."""
    low, high = map(float, np.quantile(values, [1 - _SEEN, _SEEN]))
    spare = (high - low) / 2
    return max(low - spare, float(values.min())), min(high + spare, float(values.max()))


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    scale = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next((step * scale for step in (1, 2, 2.5, 5, 10) if step * scale >= value * 0.999999), value)


def _beyond(values: FloatArray, edges: FloatArray) -> str:
    outside = int(((values < edges[0]) | (values > edges[-1])).sum())
    largest = short(float(values.max()))
    return f" Not drawn: {counted(outside, 'row')} beyond the axis, the largest at {largest}." if outside else ""


def _histogram(axes: Axes, values: FloatArray, chosen: NDArray[np.bool_] | None, edges: FloatArray) -> Points:
    everything, _ = np.histogram(values, edges)
    taken = np.histogram(values if chosen is None else values[chosen], edges)[0]
    if chosen is None:
        axes.stairs(everything, edges, fill=True, color=COLOURS["other"])
    else:
        axes.stairs(everything, edges, baseline=taken, fill=True, color=COLOURS["other"], label="not chosen")
        axes.stairs(taken, edges, fill=True, color=COLOURS["chosen"], label="chosen")
        _legend(axes, 2)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, max(1, everything.max()) * 1.06))
    axes.locator_params(axis="y", nbins=5, integer=True, steps=_STEPS)
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    told = ["" if chosen is None else f", {count:,} chosen" for count in taken]
    bins = [*zip(edges, edges[1:], everything, told, strict=False)]  # there is an edge more
    return [((a + b) / 2, n, f"{a:,.4g} to {b:,.4g}: {counted(int(n), 'row')}{also}") for a, b, n, also in bins]


def _strip(axes: Axes, values: FloatArray, chosen: NDArray[np.bool_], edges: FloatArray, base: float) -> None:
    everything, _ = np.histogram(values, edges)
    scale = 0.82 / max(1, everything.max())
    top, taken = (base + scale * counts for counts in (everything, np.histogram(values[chosen], edges)[0]))
    axes.stairs(top, edges, baseline=taken, fill=True, color=COLOURS["other"])
    axes.stairs(taken, edges, baseline=base, fill=True, color=COLOURS["chosen"])
    axes.plot([edges[0], edges[-1]], [base, base], color=COLOURS["rule"], linewidth=0.6)
    axes.plot([np.median(values)] * 2, [base, base + 0.9], color=COLOURS["accent"], linewidth=1.6)


def _legend(axes: Axes, columns: int, columnspacing: float = 1.4) -> Any:
    """Above the axes."""
    return axes.legend(
        bbox_to_anchor=(-0.01, 1.0), ncols=columns, handlelength=0.9, handleheight=0.9, handletextpad=0.5,
        columnspacing=columnspacing,
    )  # fmt: skip


def _ifd_axis(axes: Axes, ylabel: str) -> None:
    axes.axvline(1, color=COLOURS["ink"], linewidth=1, linestyle=_DASHED)
    axes.set(xlabel="IFD (ratio of perplexities, no unit)", ylabel=ylabel)


def _no_left_axis(axes: Axes) -> None:
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _name_clusters(axes: Axes, centres: dict[int, FloatArray]) -> None:
    """Write the numbers of the clusters at their medians, moved apart where they would touch."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    apart = max(right - left, top - bottom) / 18
    placed: list[FloatArray] = []
    for number, (label, centre) in enumerate(centres.items()):
        at = centre
        for turn in range(1, 60):
            if all(np.hypot(*(at - other)) >= apart for other in placed):
                break
            angle = 2.4 * turn  # outwards along a spiral
            at = centre + apart * 0.25 * math.sqrt(turn) * 1.4 * np.array([math.cos(angle), math.sin(angle)])
        placed.append(at)
        text = axes.text(at[0], at[1], str(label), ha="center", va="center", weight="bold", size=11, zorder=5)
        text.set_gid(f"class-halo{number}")
