"""The tables of a report. A cell is a text with its unit, a whole number, or None where there is nothing to say."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from codeact.base.console import counted, duration, if_known, percent, size
from codeact.base.ledger import Change, Ledger
from codeact.padding.strategies import STRATEGIES
from codeact.report.data import Cost, Evaluations, PackFigures, RunRecord, StageRecord, Training, proper_name, signed
from codeact.report.rows import Rows

_LINES = 40  # of a stage's summary
_TASKS = 1_000  # of a list
_FILES = {
    "selected.jsonl": "the chosen rows as conversations",
    "selected.rows.parquet": "of every row whether it was chosen, and why not",
    "scores/scores.parquet": "the losses and the IFD of every row",
    "scores/turns.parquet": "the same of every answer of a conversation",
    "cleaned.rows.parquet": "what cleaning marked",
    "embeddings.npy": "the vectors of the questions",
    "pack_stats.json": "what each padding mode computes",
    "model": "the trained model, with the log and the cost of its training",
    "programs/*/*.jsonl": "what was generated",
    "evaluation/*/*-sanitized.jsonl": "the programs in it",
    "evaluation/*/*_eval.*": "their verdicts, with the test that failed",
    "ledger.json": "rows and tokens of every stage",
    "run.json": "settings, versions and times",
}
Cell = str | int | None


@dataclass(frozen=True, slots=True)
class Table:
    """``columns``: heads; ``numbers`` are set to the right, ``texts`` are never narrow.

    The first cell of a row is its name. ``bars``: for every row a share, 0 to 1, drawn in the cell of ``bar_column``.
    ``marked``: a row to stress. ``folded``: under its caption until it is opened. ``listed``: the page's script lets
    one search and sort it. ``linked``: names are of files in the run's folder.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: Collection[int] = ()
    texts: Collection[int] = ()
    bars: Sequence[float] = ()
    bar_column: int = 1
    marked: int | None = None
    folded: bool = False
    listed: bool = False
    linked: bool = False


def ledger_table(ledger: Ledger) -> Table:
    """What went into and out of every stage."""
    verdict = "It balances: in and added are out and lost, and a stage takes in what the one before gave out."
    if complaints := ledger.complaints():
        verdict = f"IT DOES NOT BALANCE: {'; '.join(complaints)}."
    caption = f"Rows and tokens into and out of every stage, and why some were lost or added. {verdict}"
    rows: list[list[Cell]] = []
    for e in ledger.entries:
        changes = (_changes(each, e.what) for each in (e.lost, e.added))
        rows.append([e.stage, e.what, e.rows_in, e.rows_out, e.tokens_in, e.tokens_out, *changes])
    columns = ["stage", "of", "in", "out", "tokens in", "tokens out", "lost", "added"]
    return Table(caption, columns, rows, numbers=range(2, 6), texts=(6, 7))


def _changes(changes: Iterable[Change], what: str) -> str | None:
    texts = []
    for change in changes:
        parts = [counted(change.rows, what.removesuffix("s"))] if change.rows else []
        parts += [counted(change.tokens, "token")] if change.tokens else []
        texts += [f"{reason_name(change.reason)}: {', '.join(parts)}"] if parts else []
    return "\n".join(texts) or None


def reason_name(text: str) -> str:
    """Why a row was lost, in words."""
    return text.replace("ifd_at_least_1", "IFD of 1 or more").replace("_", " ")


def fate_table(rows: Rows) -> Table:
    """What became of every row: chosen, or why not."""
    total = len(rows.ifd)
    if rows.chosen is None:
        fates = [("scored" if status == "ok" else status, number) for status, number in rows.status.most_common()]
    else:
        fates = [("chosen", int(rows.chosen.sum())), *rows.reasons.most_common()]
    shares = [number / max(1, total) for _, number in fates]
    body: list[list[Cell]] = [
        [reason_name(name), number, percent(share)] for (name, number), share in zip(fates, shares, strict=True)
    ]
    caption = f"What became of the {counted(total, 'row')}.{rows.length and f' {rows.length}.'}"
    return Table(caption, ["fate", "rows", "share"], body, numbers=(1, 2), bars=shares, bar_column=2)


def mode_tables(packs: PackFigures, cost: Cost | None, training: Training | None) -> list[Table]:
    """What every padding mode computes, and what time and memory that takes."""
    used = None if training is None else training.strategy
    names = [s.strategy for s in packs.strategies]
    marked = names.index(used) if used in names else None
    first = packs.strategies[0]
    computed: list[list[Cell]] = []
    taken: list[list[Cell]] = []
    rate = None if cost is None or not cost.seconds else (cost.tokens + cost.padding) / cost.seconds
    for s in packs.strategies:
        name = STRATEGIES.get(s.strategy, s.strategy)
        flops = if_known("{:,.2f}".format, s.attention_flops and s.attention_flops / 1e12)
        computed.append([name, s.rows, s.forwards, percent(s.fill), s.padding, percent(s.padding_share), flops])
        seconds = memory = None
        if cost is not None and rate:
            own, estimate = s.strategy == used, cost.tokens / max(1e-9, 1 - s.padding_share) / rate
            seconds = f"{duration(cost.seconds)} (measured)" if own else f"{duration(estimate)} (estimated)"
            memory = size(cost.peak_cuda_allocated_bytes or cost.peak_resident_bytes) if own else "not run"
        estimates = (if_known(size, s.activation_bytes), if_known(size, s.logit_bytes))
        taken.append([name, seconds, memory, s.largest_forward, *estimates])  # the largest is what memory grows with
    conversations = f"{counted(first.samples, 'chosen conversation')} ({first.tokens:,} tokens)"
    counts = (
        f"One epoch over the {conversations}, {packs.capacity:,} tokens a row, {packs.batch_size} samples a batch; "
        "counted, not run. Attention is estimated from the lengths."
    )
    costs = "Activations and logits are estimates for the largest forward pass, in 16 and 32 bits."
    if cost is not None and rate:
        where = "of the GPU" if cost.peak_cuda_allocated_bytes else "resident set of the process, weights and all"
        costs = (
            f"Time for the {cost.tokens:,} tokens of the training. The mode used was measured; the others are "
            f"estimated from their padding share at the measured {rate:,.0f} computed tokens/s. Peak memory is the "
            f"{where}. {costs}"
        )
    columns = ["mode", "rows", "passes", "row fill", "padding (tokens)", "padding share", "attention (TFLOP)"]
    shares = [s.padding_share for s in packs.strategies]
    estimated = ["mode", "time", "peak memory", "largest pass (tokens)", "activations", "logits"]
    return [
        Table(counts, columns, computed, numbers=range(1, 7), marked=marked, bars=shares, bar_column=5),
        Table(costs, estimated, taken, numbers=range(1, 6), marked=marked),
    ]


def training_table(cost: Cost) -> Table:
    """What the training cost."""
    rows: list[list[Cell]] = [
        ["time of the steps", duration(cost.seconds)],
        ["devices", cost.devices],
        ["samples", cost.samples],
        ["tokens", cost.tokens],
        ["of them with a label", cost.supervised],
        ["padding", counted(cost.padding, "tokens", "tokens")],
        ["speed", f"{cost.tokens / max(1e-9, cost.seconds):,.0f} tokens/s"],
        ["peak resident set", size(cost.peak_resident_bytes)],
        ["peak GPU memory", if_known(size, cost.peak_cuda_allocated_bytes)],
        ["share of the peak speed (MFU)", if_known(percent, cost.model_utilisation)],
    ]
    known = [row for row in rows if row[1] is not None]
    return Table("Cost of the training, measured.", ["quantity", "value"], known, numbers=(1,))


def pass_table(name: str, evaluations: Evaluations) -> Table:
    """pass@k before and after training."""
    sides = [side for side in (evaluations.before, evaluations.after) if side is not None]
    body: list[list[Cell]] = []
    for kind, plus in (("base", ""), ("plus", "+")):
        for k in ("pass@1", "pass@10", "pass@100"):
            before, after = evaluations.pass_at(kind, k)
            if before is not None or after is not None:
                change = None if before is None or after is None else signed(100 * (after - before))
                body.append([f"{proper_name(name)}{plus} {k}", percent(before), percent(after), change])
    tasks = sides[0].tasks
    caption = f"Of {counted(tasks, 'task')}; one task is {100 / max(1, tasks):.1f} points."
    if not all(side.isolated for side in sides):
        caption += " The programs were run WITHOUT isolation."
    return Table(caption, ["tests", "before", "after", "change (points)"], body, numbers=(1, 2, 3))


def task_table(name: str, evaluations: Evaluations) -> Table:
    """Every task: how its first program ended before and after training, and why the last one failed."""
    sides = [side.samples for side in evaluations if side is not None]
    body: list[list[Cell]] = []
    for task in list(dict.fromkeys(task for samples in sides for task in samples))[:_TASKS]:
        firsts = [side and next(iter(side.samples.get(task, ())), None) for side in evaluations]
        why = next((first.why() for first in firsts[::-1] if first), None)
        body.append([task, *(first.outcome if first else None for first in firsts), why])
    caption = f"Every task of {proper_name(name)}: how its program ended, and the first test that failed"
    columns = ["task", "before", "after", "why it failed"]
    return Table(caption, columns, body, texts=(3,), folded=True, listed=True)


def file_table(folder: Path) -> Table:
    """The files that a person may want to open."""
    found = [[str(path.relative_to(folder)), _FILES[name]] for name in _FILES for path in sorted(folder.glob(name))]
    caption = "The links lead to the files as long as this page lies in the run's folder."
    return Table(caption, ["file", "what it holds"], found, texts=(1,), linked=True)


def stage_table(record: RunRecord) -> Table:
    """Time and memory of every stage."""
    stages = _stages(record)
    total = sum(stage.seconds or 0 for stage in stages.values())
    shares = [(stage.seconds or 0) / total if total else 0.0 for stage in stages.values()]
    rows: list[list[Cell]] = []
    for (name, stage), share in zip(stages.items(), shares, strict=True):
        time, started = if_known(duration, stage.seconds), stage.started[:16].replace("T", " ")
        rows.append([name, time or "unfinished", percent(share), if_known(size, stage.peak_memory), started or None])
    caption = f"The stages took {duration(total)} together. Peak memory is the resident set of the process."
    columns = ["stage", "time", "share", "peak memory", "started (UTC)"]
    return Table(caption, columns, rows, numbers=range(1, 5), bars=shares, bar_column=2)


def line_tables(record: RunRecord) -> list[Table]:
    """The lines that each stage printed."""
    printed = ((name, stage.lines[:_LINES]) for name, stage in _stages(record).items() if stage.lines)
    return [Table(f"What {name} printed", ["line", "value"], lines, folded=True) for name, lines in printed]


def _stages(record: RunRecord) -> dict[str, StageRecord]:
    """All but the report itself: what its last writing took is no part of it."""
    return {name: stage for name, stage in record.stages.items() if name != "report"}


def origin_table(record: RunRecord) -> Table:
    """Versions and machine."""
    versions = {"codeact": record.codeact, "commit": record.commit, **record.versions}
    rows: list[list[Cell]] = [[name, value or None] for name, value in versions.items()]
    for name, value in record.machine.items():
        rows.append([name, size(value) if name == "memory" and isinstance(value, int) else _value(value)])
    return Table("Versions and machine.", ["what", "value"], rows)


def settings_table(record: RunRecord) -> Table:
    """All settings, by their path."""
    rows = list(_flat(record.settings, ""))
    return Table(f"All {counted(len(rows), 'setting')}", ["setting", "value"], rows, folded=True)


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterable[list[Cell]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield [f"{prefix}{key}", _value(value)]


def _value(value: Any) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    many = isinstance(value, int) and abs(value) >= 10_000
    return None if value is None else f"{value:,}" if many else str(value)
