"""The picture of padding: real samples as blocks in the rows of every strategy, drawn with matplotlib.

Every panel holds the same samples on the same axes, so that area is compute: coloured tokens are the same everywhere,
and what a strategy adds to them is hatched.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from codeact.base.console import percent, short
from codeact.base.errors import InputError, import_extra
from codeact.base.files import atomic_path
from codeact.packing.packs import pack
from codeact.padding.strategies import STRATEGIES, Integers, Plan, StrategyStats, plan, strategy_stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROWS = 32  # about so many samples can still be told apart
_INK = "#333333"


def plot_packs(
    lengths: Sequence[int] | npt.ArrayLike, capacity: int, path: str | Path, *, batch_size: int = 16, seed: int = 42
) -> None:
    """Draw the rows of every strategy for some micro-batches of a data set.

    Drawn are the first micro-batches in the random order of ``seed``, about 32 samples; every strategy is applied to
    these alone.

    Args:
        lengths: (samples,) tokens of each sample of the data set, 1 to ``capacity``.
        capacity: tokens of a row.
        path: where the picture goes; PNG, or what its suffix says (.svg, .pdf).
        batch_size: samples of a micro-batch.
        seed: of the random order.

    Raises:
        MissingExtraError: matplotlib is absent.
        InputError: there is no sample, the suffix names no known format, or the file cannot be written.
    """
    import_extra("matplotlib", "report", "drawing the packs")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    everything = np.asarray(lengths, dtype=np.int64)
    if not everything.size:
        raise InputError("there is no sample to draw")
    pack(everything, capacity)  # for its checks: it names the first bad length
    drawn = first_batches(everything, batch_size, seed)
    figure = Figure(figsize=(15, 9.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)  # pyplot would choose a backend, and keep the figure
    kind = Path(path).suffix.removeprefix(".").lower() or "png"
    if kind not in canvas.get_supported_filetypes():
        raise InputError(f"{path} has an unknown suffix; choose .png, .svg or .pdf")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    colours = _colours(drawn)
    for strategy, axes in zip(STRATEGIES, panels.flat, strict=True):
        whole = strategy_stats(strategy, everything, everything, capacity, batch_size, None, seed)
        _draw(axes, plan(strategy, drawn, capacity, batch_size, seed), whole, drawn, capacity, colours)
    for axes in panels[:, 0]:
        axes.set_ylabel("rows")
    for axes in panels[1]:
        axes.set_xlabel("position in the row (tokens)")
    panels[0, 0].set_xlim(0, capacity)
    panels[0, 0].set_ylim(len(drawn), 0)
    title = f"The same {len(drawn)} samples ({drawn.sum():,} tokens) under every strategy: area is compute"
    figure.suptitle(title, fontsize=15, weight="bold")
    caption = (
        "A coloured block is one real sample, blue the shortest, red the longest, in the same colour in every panel. "
        "Hatched is padding: computed and thrown away. A dashed line ends a forward pass; below the last one nothing "
        f"is computed. Drawn are the first {len(drawn)} samples of a random order in micro-batches of {batch_size}; "
        "every strategy sorts or packs these alone, while the second line above a panel is about all "
        f"{len(everything):,} samples. In the paper's packs the samples of a row attend to one another; in "
        "dynamic_pack none does."
    )
    figure.supxlabel(textwrap.fill(caption, 170), fontsize=10.5, color=_INK)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=130)


def first_batches(lengths: Integers, batch_size: int, seed: int) -> Integers:
    """Lengths of the first micro-batches in the random order of ``seed``, about 32 samples: (samples,) int64."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    return lengths[order[: max(1, _ROWS // batch_size) * batch_size]]


def length_ranks(lengths: Integers) -> Integers:
    """Of every sample, from 0, the shortest: (samples,) int64."""
    return np.argsort(np.argsort(lengths, kind="stable"), kind="stable")


def _colours(lengths: Integers) -> list[Any]:
    """A colour for every sample, by its rank in length: short ones blue, long ones red."""
    from matplotlib import colormaps

    places = 0.08 + 0.84 * length_ranks(lengths) / max(1, len(lengths) - 1)
    # Towards white: a block must not shout down the hatching, nor the full ends of the map look alike.
    return list(0.8 * colormaps["turbo"](places)[:, :3] + 0.2)


def _draw(
    axes: Axes, made: Plan, whole: StrategyStats, lengths: Integers, capacity: int, colours: Sequence[Any]
) -> None:
    hatched = {"color": "white", "edgecolor": "#b8b8b8", "hatch": "////", "linewidth": 0}
    draw_rows(axes, made, lengths, capacity, colours, padding=hatched, edge={"edgecolor": "white", "linewidth": 0.6})
    widths, filled = made.row_widths(lengths, capacity), made.row_tokens(lengths)
    for end in made.forward_offsets[1:]:
        axes.axhline(float(end), color=_INK, linewidth=0.9, linestyle=(0, (6, 4)))
    if len(widths) < len(lengths) / 2:
        axes.text(capacity / 2, (len(widths) + len(lengths)) / 2, "not computed", ha="center", color="#999999")
    axes.set_title(f"{STRATEGIES[whole.strategy]}\n\n", fontsize=12.5, weight="bold", loc="left")
    computed, tokens = int(widths.sum()), whole.tokens + whole.padding
    counts = (
        f"here: {short(computed)} tokens in {len(widths):,} rows, {percent(1 - int(filled.sum()) / computed)} padding\n"
        f"whole set: {short(tokens)} tokens in {whole.rows:,} rows, {percent(whole.padding_share)} padding"
    )
    note = axes.text(0, 1.015, counts, transform=axes.transAxes, fontsize=10.5, color=_INK)
    note.set_in_layout(False)  # a long line must not narrow the panels; the title's empty lines keep its place
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelbottom=True, labelleft=True)


def draw_rows(
    axes: Axes, rows: Plan, lengths: Integers, capacity: int, colours: Sequence[Any], *, padding: Mapping[str, Any],
    edge: Mapping[str, Any],
) -> None:  # fmt: skip
    """Draw the rows of a plan from y = 0 on, one high each: samples as blocks, then the padding.

    Args:
        axes: of matplotlib.
        rows: the plan of ``lengths``.
        lengths: (samples,) tokens of each.
        capacity: tokens of a row.
        colours: (samples,) of the blocks.
        padding, edge: what the bars of the padding and the edges of the blocks look like, in matplotlib's words.
    """
    widths, filled = rows.row_widths(lengths, capacity), rows.row_tokens(lengths)
    padded = np.flatnonzero(widths > filled)  # no bar of no width: a renderer may draw its edge
    axes.barh(padded, (widths - filled)[padded], left=filled[padded], height=1.0, align="edge", **padding)
    ends = np.cumsum(lengths[rows.samples])
    row_of = np.repeat(np.arange(len(widths)), np.diff(rows.row_offsets))
    starts = ends - lengths[rows.samples] - np.concatenate([[0], np.cumsum(filled)])[row_of]
    drawn = [colours[sample] for sample in rows.samples]
    axes.barh(row_of, lengths[rows.samples], left=starts, height=1.0, align="edge", color=drawn, **edge)
