"""What stands on the page and where: the sentence on top, the figures, the sections."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from codeact.base.console import counted, percent, visible
from codeact.base.errors import import_extra
from codeact.base.files import atomic_path
from codeact.report import plots, tables, texts
from codeact.report.data import Evaluations, RunData, moved, proper_name
from codeact.report.rows import Example
from codeact.report.svg import page_style


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples under a heading."""

    kind: ClassVar[str] = "examples"
    title: str
    intro: str
    examples: Sequence[Example]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder; the same folder gives the same bytes.

    Args:
        folder: what ``codeact run`` made. Stages may be missing: their sections say so.

    Returns:
        The page.

    Raises:
        InputError: the folder is no run folder, or a file in it is damaged.
        MissingExtraError: matplotlib or jinja2 is absent.
    """
    jinja2 = import_extra("jinja2", "report", "the report")
    with page_style():
        run = RunData(folder)
        sections = _sections(run, folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"unbroken": _unbroken, "counted": counted}
    sentence, tiles = _head(run)
    shown = {"title": f"codeact run {folder.resolve().name}", "codeact": run.record.codeact, "sentence": sentence}
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # of the one script that may run
    page = environment.get_template("page.html").render(
        **shown, tiles=tiles, sections=sections, script=script, digest=digest
    )
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return folder / "report.html"


def _text(value: Any) -> Any:
    """How the page shows a value: what is trusted as it is, everything else as visible text."""
    if value is None:
        return "\N{EN DASH}"
    if type(value) is int:
        return f"{value:,}"
    return visible(value) if type(value) is str else value


def _unbroken(value: Any) -> Any:
    """Keep a number and its unit or noun on one line."""
    return re.sub(r"(?<=\d) (?=[A-Za-z%])", "\N{NO-BREAK SPACE}", value) if isinstance(value, str) else value


def _sections(run: RunData, folder: Path) -> list[tuple[str, str, str, list[Any]]]:
    """Id, title, stage and parts of each; one with no parts says that its stage was not run."""
    rows, packs, cost, training = run.rows, run.packs, run.cost, run.training
    modes: list[Any] = []
    if packs is not None:
        used = training.strategy if training else ""
        modes = [run.lengths is not None and plots.packs(run.lengths, packs, used)]
        modes += tables.mode_tables(packs, cost, training)
    solved = [
        show(name, evaluations)
        for name, evaluations in run.evaluations.items()
        for show in (tables.pass_table, plots.outcome_bars, tables.task_table, _failures)
    ]
    record = run.record
    stages = [tables.stage_table(record), *tables.line_tables(record)] if record.stages else []
    origin = [tables.origin_table(record), tables.settings_table(record)]
    said = texts.Texts(folder, len(rows.ifd)) if rows and rows.chosen is not None else None
    known = None if said is None or said.missing else said
    fate: list[Any] = [run.ledger and tables.ledger_table(run.ledger), rows and tables.fate_table(rows)]
    difficulty = [draw(rows) for draw in (plots.ifd_histogram, plots.ifd_by_cluster, plots.losses) if rows]
    about: list[Any] = [rows and rows.map and plots.cluster_map(rows, rows.map, known.question if known else None)]
    if rows and known:
        fate.append(texts.row_table(rows, known))
        about.append(texts.cluster_table(rows, known))
    learning = [training and plots.training_loss(training), cost and tables.training_table(cost)]
    sections: list[tuple[str, str, str, list[Any]]] = [
        ("ledger", "What became of every row", "score", fate),
        ("difficulty", "Difficulty", "score", difficulty),
        ("diversity", "What the questions are about", "embed", about),
        ("examples", "Examples, chosen and not", "select", _examples(run, said)),
        ("lengths", "Lengths", "score", [rows and plots.length_histogram(rows)]),
        ("packing", "Padding and packing", "select", modes),
        ("training", "Training", "train", learning),
        ("evaluation", "Programs solved", "evaluate", solved),
        ("cost", "Time and memory", "score", stages),
        ("origin", "Versions, machine and settings", "run", origin),
        ("files", "Files of this run", "run", [tables.file_table(folder)]),
    ]
    return [(*section, list(filter(None, parts))) for *section, parts in sections]  # type: ignore[misc]


def _head(run: RunData) -> tuple[str, list[tuple[str, str, str]]]:
    """The sentence on top, and the figures below it: name, value, what it is compared to."""
    parts, tiles = [], []
    total = None if run.rows is None else len(run.rows.ifd)
    if run.ledger and run.ledger.entries:
        total = run.ledger.entries[0].rows_in
    kept = None if run.rows is None or run.rows.chosen is None else int(run.rows.chosen.sum())
    if total is not None:
        rows, tile = counted(total, "row"), ("rows in", f"{total:,}", "")
        if kept is None:
            parts, tiles = [f"{rows} read"], [tile]
        else:
            share = percent(kept / max(1, total))
            parts, tiles = [f"{kept:,} of {rows} kept ({share})"], [tile, ("rows kept", f"{kept:,}", share)]
    padding = {s.strategy: s.padding_share for s in run.packs.strategies} if run.packs else {}
    used = padding.get(run.training.strategy if run.training else "dynamic_pack_epoch")  # packs, before training
    padded = padding.get("dynamic_pad")
    if used is not None and padded is not None:
        parts.append(f"{percent(used) if used else 'no'} padding where padded batches have {percent(padded)}")
        tiles.append(("padding", percent(used), f"{percent(padded)} if padded"))
    if run.training and len(held_out := run.training.points("eval_loss")[:, 1]):
        first, last, once = f"{held_out[0]:.3f}", f"{held_out[-1]:.3f}", len(held_out) == 1
        how = f"is {last}" if once else moved(held_out[0], held_out[-1], "{:.3f}".format)
        parts.append(f"the held-out loss {how}")
        tiles.append(("held-out loss", last, "after training" if once else f"{first} at first"))
    for name, evaluations in run.evaluations.items():
        for kind, plus in (("plus", "+"), ("base", "")):
            before, after = evaluations.pass_at(kind, "pass@1")
            if before is not None and after is not None:
                tasks = min(side.tasks for side in (evaluations.before, evaluations.after) if side)
                tests = f"{proper_name(name)}{plus}"
                parts.append(f"pass@1 on {counted(tasks, 'task')} of {tests} {moved(before, after, percent)}")
                tiles.append((f"pass@1, {tests}", percent(after), f"{percent(before)} before"))
                return "; ".join(parts) + ".", tiles
    return "; ".join(parts) + "." if parts else "No stage has run yet.", tiles


def _failures(_: str, evaluations: Evaluations) -> Examples | None:
    """The first program of every kind of failure, after training if that was evaluated."""
    when, side = next((when, side) for when, side in list(evaluations._asdict().items())[::-1] if side)
    failed: dict[str, Example] = {}
    for task, verdicts in side.samples.items():
        for v in (v for v in verdicts[:1] if v.outcome != "pass"):
            rest = [turn for turn in (("failed on", v.input), ("message", v.message)) if turn[1]]
            turns = (("program", v.solution), *rest)
            failed.setdefault(v.outcome, Example(head=v.outcome, notes=(task[:80],), turns=turns))
    intro = f"The first of every kind, {when} training."
    return Examples("Programs that failed", intro, [*failed.values()]) if failed else None


def _examples(run: RunData, said: texts.Texts | None) -> list[Examples]:
    if run.rows is None:
        return []
    hardest = "Highest IFD: the question helps least. Look for answers that do not follow from their question."
    easiest = "Lowest IFD of the chosen: where the budget ended. Look for answers that the question gives away."
    kinds = (("The hardest", hardest, run.rows.hardest), ("The easiest", easiest, run.rows.easiest))
    groups = [Examples(*kind) for kind in kinds if kind[2]]
    if said is not None and said.missing:
        return [*groups, Examples("Not chosen", said.missing, ())]
    return groups + [Examples(*group) for group in (texts.left_out(run.rows, said) if said else ())]
