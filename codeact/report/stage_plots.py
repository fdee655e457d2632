"""The plots of a report about training and evaluation: packs, losses, pass@1 and outcomes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from codeact.evaluation.judge import KINDS
from codeact.padding.figure import draw_rows, first_batches
from codeact.padding.strategies import STRATEGIES, plan
from codeact.report.data import Evaluations, PackFigures, Training
from codeact.report.plots import Plot
from codeact.report.svg import COLOURS, classed, inline_svg, new_figure
from codeact.report.text import counted, moved, percent, short, signed, title

_POINTS = 400  # of a line: more are averaged
_SHADES = 6  # colours ``s0`` to ``s5``
_MARGIN = 0.7  # inches of axis and labels


def packs(lengths: NDArray[np.int64], figures: PackFigures, used: str) -> Plot | None:
    """The same samples in the rows of three modes: padded to the capacity, padded to the longest, packed."""
    if not len(lengths) or lengths.max() > figures.capacity:
        return None
    drawn = first_batches(lengths, figures.batch_size, figures.seed)
    packed = used if used.startswith("dynamic_pack") else "dynamic_pack_epoch"
    names = ("max_length", "dynamic_pad", packed)
    plans = [plan(name, drawn, figures.capacity, figures.batch_size, figures.seed) for name in names]
    rows = [len(made.row_offsets) - 1 for made in plans]
    figure = new_figure(_MARGIN + 0.055 * sum(rows) + 0.3 * len(rows))
    panels = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": rows})
    ranks = np.argsort(np.argsort(drawn, kind="stable"), kind="stable")
    colours = [COLOURS[f"s{rank * _SHADES // len(drawn)}"] for rank in ranks]
    shares = []
    for axes, name, made in zip(panels, names, plans, strict=True):
        draw_rows(
            axes, made, drawn, figures.capacity, colours,
            padding={"color": COLOURS["waste"], "linewidth": 0}, edge={"edgecolor": COLOURS["paper"], "linewidth": 0.7},
        )  # fmt: skip
        computed = int(made.row_widths(drawn, figures.capacity).sum())
        shares.append(1 - int(drawn.sum()) / computed)
        axes.set_title(f"{STRATEGIES[name]}: {percent(shares[-1])} padding", size=9)
        axes.set_xlim(0, figures.capacity)
        axes.set_ylim(len(made.row_offsets) - 1, 0)
        axes.set_yticks([])
        axes.set_ylabel(f"{len(made.row_offsets) - 1} rows", size=9)
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
    return Plot(name="packs", svg=inline_svg(figure, "packs", "Rows of three padding modes"), caption=text)


def training_loss(training: Training) -> Plot | None:
    """Loss by step, and the loss of held-out rows."""
    trained = _points([(entry.step, entry.loss) for entry in training.log])
    held_out = _points([(entry.step, entry.eval_loss) for entry in training.log])
    if not len(trained) + len(held_out):
        return None
    figure = new_figure(2.8)
    axes = figure.subplots()
    line = _averaged(trained)
    if len(line):
        few = len(line) <= 40
        axes.plot(
            *line.T, color=COLOURS["chosen"], linewidth=1.5, marker="o" if few else "", markersize=3, label="training"
        )
    if len(held_out):
        axes.plot(
            *held_out.T, color=COLOURS["accent"], linewidth=1.3, linestyle=(0, (4, 2)), marker="D", markersize=4.5,
            label="held out",
        )  # fmt: skip
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, handlelength=1.6, borderpad=0.2)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.margins(x=0.03, y=0.12)
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    return Plot(
        name="loss",
        svg=inline_svg(figure, "loss", "Training and held-out loss by step"),
        caption=_loss_caption(trained, held_out, len(line), training.held_out),
    )


def _points(pairs: list[tuple[int, float | None]]) -> NDArray[np.float64]:
    kept = [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]
    return np.array(kept, np.float64).reshape(-1, 2)


def _averaged(points: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(points) <= _POINTS:
        return points
    return np.array([part.mean(axis=0) for part in np.array_split(points, _POINTS)])


def _loss_caption(trained: NDArray[np.float64], held_out: NDArray[np.float64], drawn: int, rows: int) -> str:
    parts = []
    if len(held_out) > 1:
        (_, first), (step, last) = held_out[0], held_out[-1]
        parts.append(
            f"The loss of the {counted(rows, 'held-out row')} {moved(first, last, '{:.3f}'.format)} nats per token "
            f"({signed(100 * (last / first - 1))} %)"
        )
        best = held_out[held_out[:, 1].argmin()]
        if best[0] < step and best[1] < last:
            parts.append(f"it was lowest at step {best[0]:,.0f} ({best[1]:.3f}) and rose after: a sign of overfitting")
    elif len(held_out):
        parts.append(
            f"The loss of the {counted(rows, 'held-out row')} was {held_out[0, 1]:.3f} at step {held_out[0, 0]:,.0f}"
        )
    if len(trained) > 1:
        parts.append(
            f"The training loss went from {trained[0, 1]:.3f} to {trained[-1, 1]:.3f} over {trained[-1, 0]:,.0f} steps"
        )
    elif len(trained):
        parts.append(f"The training loss was {trained[0, 1]:.3f}, logged once, at step {trained[0, 0]:,.0f}")
    if drawn < len(trained):
        parts.append(f"Drawn are {drawn} means of {len(trained):,} logged values")
    if not len(held_out):
        parts.append("No rows were held out")
    return ". ".join(parts) + "."


def pass_at_1(name: str, found: Evaluations) -> Plot | None:
    """Tasks solved before and after training, and how the other programs ended."""
    sides = [(label, side) for label, side in (("before", found.before), ("after", found.after)) if side is not None]
    if not sides or not any(sum(side.outcomes.values()) for _, side in sides):
        return None
    kinds = [kind for kind in KINDS if any(side.outcomes.get(kind) for _, side in sides)]
    figure = new_figure(1.05 + 0.42 * len(sides))
    axes = figure.subplots()
    colours = {
        "pass": "chosen",
        "wrong": "c1",
        "exception": "c4",
        "syntax": "c5",
        "time": "c7",
        "memory": "c8",
        "crash": "other",
    }
    for at, (_, side) in enumerate(sides):
        total, left = sum(side.outcomes.values()), 0.0
        for kind in kinds:
            share = 100 * side.outcomes.get(kind, 0) / total
            axes.barh(
                -at, share, left=left, height=0.62, color=COLOURS[colours[kind]], edgecolor=COLOURS["paper"],
                linewidth=0.8, label=None if at else kind,
            )  # fmt: skip
            if share >= 6:
                number = axes.text(left + share / 2, -at, f"{side.outcomes[kind]:,}", ha="center", va="center", size=9)
                classed(number, "onbar", at * 10 + kinds.index(kind))
            left += share
    axes.set_yticks([-at for at in range(len(sides))], [label for label, _ in sides])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the programs (%); numbers are programs")
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, handlelength=0.9, handleheight=0.9, columnspacing=1.2,
        handletextpad=0.5, borderpad=0.2,
    )  # fmt: skip
    return Plot(
        name=f"pass-{name}",
        svg=inline_svg(figure, f"pass-{name}", f"Outcomes of the programs of {title(name)}"),
        caption=_pass_caption(found),
    )


def _pass_caption(found: Evaluations) -> str:
    before, after = found.before, found.after
    if before is None or after is None:
        side, when = (after, "after") if before is None else (before, "before")
        assert side is not None
        return f"Only the model {when} training was evaluated, on {counted(side.tasks, 'task')}."
    texts = []
    for kind in ("base", "plus"):
        first, last = found.pass_at(kind, "pass@1")
        if first is not None and last is not None:
            tests = "the base tests" if kind == "base" else "base and plus tests together"
            texts.append(f"On {tests} pass@1 {moved(first, last, percent)}")
    kind = "plus" if "plus" in before.pass_at and "plus" in after.pass_at else "base"
    solved = [
        {task for task, verdicts in side.samples.items() if verdicts and getattr(verdicts[0], kind) == "pass"}
        for side in (before, after)
    ]
    won, lost = len(solved[1] - solved[0]), len(solved[0] - solved[1])
    many = f"{counted(won, 'task')} {'are' if won > 1 else 'is'}" if won else "No task is"
    texts.append(f"{many} solved only after training, {lost} only before")
    changed, fewer = won + lost, min(won, lost)
    if changed:
        chance = min(1.0, 2 * sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed)
        word = "no evidence" if chance > 0.05 else "evidence"
        texts.append(
            f"A split at least so uneven comes by chance with p = {chance:.2f} (sign test): {word} of a change"
        )
    else:
        texts.append("No verdict changed")
    return ". ".join(texts) + "."
