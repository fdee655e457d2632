"""``codeact report``: a run folder -> one HTML page that needs nothing but itself.

run folder -> data, rows -> plots, stage_plots, tables -> page.html
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from codeact.base.errors import MissingExtraError
from codeact.base.files import atomic_path
from codeact.report import plots, stage_plots, tables
from codeact.report.data import Run, read_run
from codeact.report.plots import Plot
from codeact.report.rows import Example
from codeact.report.svg import page_style
from codeact.report.tables import Table
from codeact.report.text import counted, moved, percent, title, visible

_TEXT = 4_000  # characters of a turn that the page shows
_FOLDED = (13, 800)  # lines or characters from which on a turn is folded
_FOLDED_HEAD = 90  # characters of a folded turn that are seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A turn of an example; ``head`` is its first line where it is folded, ``more`` the characters left out."""

    role: str
    text: str
    head: str | None
    more: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Examples under a heading."""

    kind: ClassVar[str] = "examples"
    title: str
    intro: str
    examples: Sequence[tuple[Example, Sequence[Turn]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """``parts``: plots, tables and examples; with none, the section says that ``stage`` was not run."""

    id: str
    title: str
    stage: str
    parts: Sequence[Plot | Table | Examples]


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
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError("jinja2", "report", "the report") from None
    with page_style():
        run = read_run(folder)
        sections = _sections(run)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        title=f"codeact run {folder.resolve().name}",
        sentence=_sentence(run),
        tiles=_tiles(run),
        sections=sections,
        codeact=run.record.codeact,
    )
    target = folder / "report.html"
    with atomic_path(target) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return target


def _sections(run: Run) -> list[Section]:
    rows, packs = run.rows, run.packs
    difficulty = _kept(
        rows and plots.ifd_histogram(rows),
        rows and plots.ifd_by_cluster(rows),
        rows and plots.losses(rows),
    )
    mapped = _kept(rows and rows.map and plots.cluster_map(rows, rows.map))
    lengths = _kept(rows and plots.length_histogram(rows))
    modes: list[Any] = []
    if packs is not None:
        used = run.training.strategy if run.training else ""
        modes += _kept(None if run.lengths is None else stage_plots.packs(run.lengths, packs, used))
        modes += tables.mode_tables(packs, run.cost, run.training)
    evaluated: list[Any] = []
    for name, found in run.evaluations.items():
        evaluated += [tables.pass_table(name, found), *_kept(stage_plots.pass_at_1(name, found))]
    return [
        Section(
            id="ledger",
            title="What became of every row",
            stage="score",
            parts=[
                *((tables.ledger_table(run.ledger),) if run.ledger else ()),
                *((tables.fate_table(rows),) if rows else ()),
            ],
        ),
        Section(id="difficulty", title="Difficulty", stage="score", parts=difficulty),
        Section(id="diversity", title="Map of the questions", stage="embed", parts=mapped),
        Section(id="examples", title="Examples of what was chosen", stage="select", parts=_examples(run)),
        Section(id="lengths", title="Lengths", stage="score", parts=lengths),
        Section(id="packing", title="Padding and packing", stage="select", parts=modes),
        Section(
            id="training",
            title="Training",
            stage="train",
            parts=[
                *_kept(run.training and stage_plots.training_loss(run.training)),
                *((tables.training_table(run.cost),) if run.cost else ()),
            ],
        ),
        Section(id="evaluation", title="Programs solved", stage="evaluate", parts=evaluated),
        Section(
            id="cost",
            title="Time and memory",
            stage="score",
            parts=[tables.stage_table(run.record), *tables.line_tables(run.record)] if run.record.stages else [],
        ),
        Section(
            id="origin",
            title="Versions, machine and settings",
            stage="run",
            parts=[tables.origin_table(run.record), tables.settings_table(run.record)],
        ),
    ]


def _kept(*parts: Any) -> list[Any]:
    return [part for part in parts if part]


def _rows_in(run: Run) -> int | None:
    if run.ledger and run.ledger.entries:
        return run.ledger.entries[0].rows_in
    return None if run.rows is None else len(run.rows.ifd)


def _kept_rows(run: Run) -> int | None:
    return None if run.rows is None or run.rows.chosen is None else int(run.rows.chosen.sum())


def _padding(run: Run) -> tuple[float, float] | None:
    """Shares of padding: of batches padded to their longest sample, and of the mode used (packs, before training)."""
    if run.packs is None:
        return None
    by_name = {s.strategy: s for s in run.packs.strategies}
    used = by_name.get(run.training.strategy if run.training else "dynamic_pack_epoch")
    padded = by_name.get("dynamic_pad")
    return None if used is None or padded is None else (padded.padding_share, used.padding_share)


def _pass_at_1(run: Run) -> tuple[str, str, float, float, int] | None:
    """Name and kind of tests, pass@1 before and after, and tasks, of the first data set that has both."""
    for name, found in run.evaluations.items():
        for kind in ("plus", "base"):
            before, after = found.pass_at(kind, "pass@1")
            if before is not None and after is not None:
                tasks = min(side.tasks for side in (found.before, found.after) if side)
                return name, "+" if kind == "plus" else "", before, after, tasks
    return None


def _sentence(run: Run) -> str:
    total, kept, padding, passed = _rows_in(run), _kept_rows(run), _padding(run), _pass_at_1(run)
    parts = []
    if total is not None:
        rows = counted(total, "row")
        parts.append(f"{rows} read" if kept is None else f"{kept:,} of {rows} kept ({percent(kept / max(1, total))})")
    if padding is not None:
        mine = percent(padding[1]) if padding[1] else "no"
        parts.append(f"{mine} padding where padded batches have {percent(padding[0])}")
    if passed is not None:
        name, plus, before, after, tasks = passed
        parts.append(f"pass@1 on {counted(tasks, 'task')} of {title(name)}{plus} {moved(before, after, percent)}")
    return "; ".join(parts) + "." if parts else "No stage has run yet."


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures of the head: name, value, what it is compared to."""
    total, kept, padding, passed = _rows_in(run), _kept_rows(run), _padding(run), _pass_at_1(run)
    tiles = []
    if total is not None:
        tiles.append(("rows in", f"{total:,}", ""))
    if total is not None and kept is not None:
        tiles.append(("rows kept", f"{kept:,}", percent(kept / max(1, total))))
    if padding is not None:
        tiles.append(("padding", percent(padding[1]), f"{percent(padding[0])} if padded"))
    if passed is not None:
        name, plus, before, after, _ = passed
        tiles.append((f"pass@1, {title(name)}{plus}", percent(after), f"{percent(before)} before"))
    return tiles


def _examples(run: Run) -> list[Examples]:
    if run.rows is None:
        return []
    intros = {
        "hardest": "Highest IFD: the question helps least. Look for answers that do not follow from their question.",
        "easiest": "Lowest IFD of the chosen: where the budget ended. Look for answers that the question gives away.",
    }
    groups = (("hardest", run.rows.hardest), ("easiest", run.rows.easiest))
    return [
        Examples(
            title=f"The {name}",
            intro=intros[name],
            examples=[(example, [_turn(*turn) for turn in example.turns]) for example in examples],
        )
        for name, examples in groups
        if examples
    ]


def _turn(role: str, text: str) -> Turn:
    shown = text[:_TEXT]
    lines, characters = _FOLDED
    long = text.count("\n") >= lines or len(text) > characters
    first = next((line for line in shown.splitlines() if line.strip()), "")[:_FOLDED_HEAD]
    head = (
        f"{first} … ({counted(text.count(chr(10)) + 1, 'line')}, {counted(len(text), 'character')})" if long else None
    )
    return Turn(role=role, text=shown, head=head, more=len(text) - len(shown))
