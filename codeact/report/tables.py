"""The tables of a report, every cell a text with its unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from codeact.base.ledger import Change, Ledger
from codeact.padding.strategies import STRATEGIES
from codeact.report.data import Cost, Evaluations, PackFigures, RunRecord, StageRecord, Training
from codeact.report.rows import Rows
from codeact.report.text import NONE, count, counted, duration, percent, signed, size, title

_LINES = 40  # of a stage's summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """``columns``: heads; ``numbers`` are set to the right, ``texts`` are never narrow.

    The first cell of a row is its name. ``bars``: for every row a share, 0 to 1, drawn in the cell of ``bar_column``.
    ``marked``: a row to stress. ``folded``: under its caption until it is opened.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    texts: frozenset[int] = frozenset()
    bars: Sequence[float] = ()
    bar_column: int = 1
    marked: int | None = None
    folded: bool = False


def ledger_table(ledger: Ledger) -> Table:
    """What went into and out of every stage."""
    complaints = ledger.complaints()
    verdict = (
        "It balances: in and added are out and lost, and a stage takes in what the one before gave out."
        if not complaints
        else f"IT DOES NOT BALANCE: {'; '.join(complaints)}."
    )
    return Table(
        caption=f"Rows and tokens into and out of every stage, and why some were lost or added. {verdict}",
        columns=["stage", "of", "in", "out", "tokens in", "tokens out", "lost", "added"],
        rows=[
            [
                entry.stage,
                entry.what,
                count(entry.rows_in),
                count(entry.rows_out),
                count(entry.tokens_in),
                count(entry.tokens_out),
                _changes(entry.lost, entry.what),
                _changes(entry.added, entry.what),
            ]
            for entry in ledger.entries
        ],
        numbers=frozenset(range(2, 6)),
        texts=frozenset({6, 7}),
    )


def _changes(changes: Iterable[Change], what: str) -> str:
    texts = []
    for change in changes:
        parts = [counted(change.rows, what.removesuffix("s"))] if change.rows else []
        parts += [counted(change.tokens, "token")] if change.tokens else []
        if parts:
            texts.append(f"{_reason(change.reason)}: {', '.join(parts)}")
    return "\n".join(texts) or NONE


def _reason(text: str) -> str:
    return text.replace("ifd_at_least_1", "IFD of 1 or more").replace("_", " ")


def fate_table(rows: Rows) -> Table:
    """What became of every row: chosen, or why not."""
    total = len(rows.ifd)
    if rows.chosen is None:
        fates = [("scored" if status == "ok" else status, number) for status, number in rows.status.most_common()]
    else:
        fates = [("chosen", int(rows.chosen.sum())), *rows.reasons.most_common()]
    return Table(
        caption=f"What became of the {counted(total, 'row')}.",
        columns=["fate", "rows", "share"],
        rows=[[_reason(name), count(number), percent(number / max(1, total))] for name, number in fates],
        numbers=frozenset({1, 2}),
        bars=[number / max(1, total) for _, number in fates],
        bar_column=2,
    )


def mode_tables(packs: PackFigures, cost: Cost | None, training: Training | None) -> list[Table]:
    """What every padding mode computes, and what time and memory that takes."""
    used = None if training is None else training.strategy
    names = [s.strategy for s in packs.strategies]
    marked = names.index(used) if used in names else None
    # "largest forward" is what memory grows with
    computed = [
        [
            STRATEGIES.get(s.strategy, s.strategy),
            count(s.rows),
            count(s.forwards),
            percent(s.fill),
            count(s.padding),
            percent(s.padding_share),
            NONE if s.attention_flops is None else f"{s.attention_flops / 1e12:,.2f}",
        ]
        for s in packs.strategies
    ]
    first = packs.strategies[0]
    tables = [
        Table(
            caption=(
                f"One epoch over the {counted(first.samples, 'chosen conversation')} ({first.tokens:,} tokens), "
                f"{packs.capacity:,} tokens a row, {packs.batch_size} samples a batch; counted, not run. Attention is "
                "estimated from the lengths."
            ),
            columns=["mode", "rows", "passes", "row fill", "padding (tokens)", "padding share", "attention (TFLOP)"],
            rows=computed,
            numbers=frozenset(range(1, 7)),
            bars=[s.padding_share for s in packs.strategies],
            bar_column=5,
            marked=marked,
        )
    ]
    rate = None if cost is None or not cost.seconds else (cost.tokens + cost.padding) / cost.seconds
    body = []
    for s in packs.strategies:
        mine = s.strategy == used and cost is not None
        seconds, memory = NONE, NONE
        if cost is not None and rate:
            estimate = cost.tokens / max(1e-9, 1 - s.padding_share) / rate
            seconds = f"{duration(cost.seconds)} (measured)" if mine else f"{duration(estimate)} (estimated)"
            memory = size(cost.peak_cuda_allocated_bytes or cost.peak_resident_bytes) if mine else "not run"
        body.append(
            [
                STRATEGIES.get(s.strategy, s.strategy),
                seconds,
                memory,
                count(s.largest_forward),
                size(s.activation_bytes),
                size(s.logit_bytes),
            ]
        )
    caption = "Activations and logits are estimates for the largest forward pass, in 16 and 32 bits."
    if cost is not None and rate:
        where = "of the GPU" if cost.peak_cuda_allocated_bytes else "resident set of the process, weights and all"
        caption = (
            f"Time for the {cost.tokens:,} tokens of the training. The mode used was measured; the others are "
            f"estimated from their padding share at the measured {rate:,.0f} computed tokens/s. Peak memory is the "
            f"{where}. {caption}"
        )
    columns = ["mode", "time", "peak memory", "largest pass (tokens)", "activations", "logits"]
    tables.append(Table(caption=caption, columns=columns, rows=body, numbers=frozenset(range(1, 6)), marked=marked))
    return tables


def training_table(cost: Cost) -> Table:
    """What the training cost."""
    rows = [
        ["time of the steps", duration(cost.seconds)],
        ["devices", count(cost.devices)],
        ["samples", count(cost.samples)],
        ["tokens", count(cost.tokens)],
        ["of them with a label", count(cost.supervised)],
        ["padding", f"{count(cost.padding)} tokens"],
        ["speed", f"{cost.tokens / max(1e-9, cost.seconds):,.0f} tokens/s"],
        ["peak resident set", size(cost.peak_resident_bytes)],
    ]
    if cost.peak_cuda_allocated_bytes is not None:
        rows.append(["peak GPU memory", size(cost.peak_cuda_allocated_bytes)])
    if cost.model_utilisation is not None:
        rows.append(["share of the peak speed (MFU)", percent(cost.model_utilisation)])
    return Table(
        caption="Cost of the training, measured.", columns=["quantity", "value"], rows=rows, numbers=frozenset({1})
    )


def pass_table(name: str, found: Evaluations) -> Table:
    """pass@k before and after training."""
    sides = [found.before, found.after]
    names = {"base": title(name), "plus": f"{title(name)}+"}
    body = []
    for kind in ("base", "plus"):
        for k in ("pass@1", "pass@10", "pass@100"):
            before, after = found.pass_at(kind, k)
            if before is not None or after is not None:
                change = NONE if before is None or after is None else signed(100 * (after - before))
                body.append([f"{names[kind]} {k}", percent(before), percent(after), change])
    tasks = next(side.tasks for side in sides if side is not None)
    caption = f"Of {counted(tasks, 'task')}; one task is {100 / max(1, tasks):.1f} points."
    if any(side is not None and not side.isolated for side in sides):
        caption += " The programs were run WITHOUT isolation."
    columns = ["tests", "before", "after", "change (points)"]
    return Table(caption=caption, columns=columns, rows=body, numbers=frozenset({1, 2, 3}))


def stage_table(record: RunRecord) -> Table:
    """Time and memory of every stage."""
    stages = _stages(record)
    total = sum(stage.seconds or 0 for stage in stages.values())
    shares = [(stage.seconds or 0) / total if total else 0.0 for stage in stages.values()]
    rows = [
        [
            name,
            "unfinished" if stage.seconds is None else duration(stage.seconds),
            percent(share),
            size(stage.peak_memory),
            stage.started[:16].replace("T", " ") or NONE,
        ]
        for (name, stage), share in zip(stages.items(), shares, strict=True)
    ]
    return Table(
        caption=f"The stages took {duration(total)} together. Peak memory is the resident set of the process.",
        columns=["stage", "time", "share", "peak memory", "started (UTC)"],
        rows=rows,
        numbers=frozenset({1, 2, 3, 4}),
        bars=shares,
        bar_column=2,
    )


def line_tables(record: RunRecord) -> list[Table]:
    """The lines that each stage printed."""
    return [
        Table(caption=f"What {name} printed", columns=["line", "value"], rows=stage.lines[:_LINES], folded=True)
        for name, stage in _stages(record).items()
        if stage.lines
    ]


def _stages(record: RunRecord) -> dict[str, StageRecord]:
    """All but the report itself: what its last writing took is no part of it."""
    return {name: stage for name, stage in record.stages.items() if name != "report"}


def origin_table(record: RunRecord) -> Table:
    """Versions and machine."""
    rows = [["codeact", record.codeact], ["commit", record.commit or NONE]]
    rows += [[name, value or NONE] for name, value in record.versions.items()]
    for name, value in record.machine.items():
        shown = size(value) if name == "memory" and isinstance(value, int) else _value(value)
        rows.append([name, shown])
    return Table(caption="Versions and machine.", columns=["what", "value"], rows=rows)


def settings_table(record: RunRecord) -> Table:
    """All settings, by their path."""
    rows = list(_flat(record.settings, ""))
    caption = f"All {counted(len(rows), 'setting')}"
    return Table(caption=caption, columns=["setting", "value"], rows=rows, folded=True)


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterable[list[str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield [f"{prefix}{key}", _value(value)]


def _value(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)
