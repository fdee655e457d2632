"""Stage clean: the rows of a data set -> a status for every one; marked ones are left out where that is asked."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from codeact.base.errors import InputError
from codeact.base.ledger import Entry, changes
from codeact.base.settings import Settings, decisive, setting
from codeact.base.stage import Lines, Run, Stage
from codeact.data.settings import DataSettings
from codeact.embedding.stage import EMBEDDINGS_FILE
from codeact.evaluation.settings import GenerationSettings

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from codeact.cleaning.contamination import EvaluationTask
    from codeact.embedding.files import EmbeddingTable

MARKS_FILE = "cleaned.rows.parquet"
NEAREST_TOLD = 3


class CleanSettings(Settings):
    """From where on a row is marked, 0: not looked at; see ``codeact.cleaning.marks.mark_rows``."""

    near: float = setting(0.7, "Jaccard similarity of two rows' 5-grams; 0: not looked at.", ge=0, le=1)
    overlap: float = setting(0.5, "Share of a task's 8-grams that are in a row; 0: not looked at.", ge=0, le=1)
    words: float = setting(0.6, "Cosine of a row's and a task's question, by words; 0: not looked at.", ge=0, le=1)
    similar: float = setting(0.95, "Cosine of two questions' embeddings; 0: not looked at.", ge=0, le=1)
    against: str | None = setting(
        None, "Evaluation sets: humaneval, mbpp, data of your own, with commas; none; default: those at hand."
    )
    drop: bool = setting(False, "Leave marked rows out.")

    @field_validator("near")
    @classmethod
    def _found_by_buckets(cls, value: float) -> float:
        if 0 < value < 0.5:
            raise ValueError("must be 0, or 0.5 to 1: less alike rows share no bucket")
        return value


def clean_data(
    data: DataSettings, settings: CleanSettings, output: Path, embeddings: str | Path | None = None
) -> tuple[pa.Table, Lines]:
    """Write the rows of a data set as conversations to ``output``, and what became of every row beside it.

    Args:
        data: the data set.
        settings: from where on a row is marked, and whether marked ones are left out.
        output: JSON lines; the marks go to NAME.rows.parquet.
        embeddings: FILE.npy of the questions of the same data.

    Returns:
        The marks, and lines for the summary.

    Raises:
        InputError: data, embeddings or an evaluation set cannot be read or do not fit.
        MissingExtraError: rensa is absent.
    """
    from codeact.base.files import keep_apart
    from codeact.cleaning.marks import marks_path, write_marks
    from codeact.data.forms import form_columns
    from codeact.data.records import Record, jsonable, write_jsonl

    keep_apart(marks_path(output), embeddings)
    records = data.open()
    tasks = evaluation_tasks(settings.against)
    marks = _marks(data, settings, tasks, embeddings, output.parent)

    def rows() -> Iterator[dict[str, Any]]:
        for batch in marks.select(["row", "status", "partner"]).to_batches(2048):
            found = records.rows(batch["row"][0].as_py(), batch["row"][-1].as_py() + 1)
            for row, status, partner in zip(found, *(batch[c].to_pylist() for c in ("status", "partner")), strict=True):
                if isinstance(row, Record) and (status == "ok" or not settings.drop):
                    mark = {} if settings.drop else {"status": status, "partner": partner if status != "ok" else None}
                    said = form_columns(row.turns, row.context, "messages")
                    yield {"id": row.id, **said, **mark, "extra": jsonable(row.extra)}

    write_jsonl(output, rows())
    write_marks(marks_path(output), marks)
    return marks, clean_lines(marks, settings, tasks)


def evaluation_tasks(against: str | None, tried: tuple[str, Path | None] | None = None) -> Sequence[EvaluationTask]:
    """The tasks of evaluation sets.

    Args:
        against: their names with commas between them: humaneval, mbpp, or what ``DataSettings`` opens; none; None: all
            of humaneval and mbpp that need not be downloaded, and a line for each that is not here.
        tried: data set and file of the tasks that a run tries its models on; always among them, unless it is none.

    Raises:
        InputError: one cannot be read.
    """
    from codeact.base.console import say
    from codeact.cleaning.contamination import EvaluationTask, question_of_prompt
    from codeact.data.records import Record
    from codeact.evaluation.problems import DATASETS, file_at_hand, remedy_for
    from codeact.evaluation.tasks import open_problems

    if against == "none":
        return []
    tasks: list[EvaluationTask] = []
    names = [name.strip() for name in against.split(",")] if against is not None else list(DATASETS)
    for name in dict.fromkeys([*names, *([tried[0]] if tried else [])]):
        path = tried[1] if tried and tried[0] == name else None
        if name not in DATASETS and path is None:
            own = [row for row in DataSettings(source=name).open() if isinstance(row, Record)]
            title = Path(name).name.partition(".")[0]
            tasks += [EvaluationTask(id=f"{title}/{r.id}", question=r.question, solution=r.answer) for r in own]
            continue
        if against is None and path is None and (path := file_at_hand(name)) is None:
            say(f"no row is compared with the tasks of {name}, which are not here: {remedy_for(name, '--against')}")
            continue
        tasks += [
            EvaluationTask(
                id=p.task_id, question=p.question or question_of_prompt(p.prompt), solution=p.canonical_solution
            )
            for p in open_problems(name, path).problems
        ]
    return tasks


def _marks(
    data: DataSettings,
    settings: CleanSettings,
    tasks: Sequence[EvaluationTask],
    embeddings: str | Path | None,
    scratch: Path,
) -> pa.Table:
    from codeact.cleaning.marks import Thresholds, mark_rows
    from codeact.embedding.files import read_embeddings

    limits = Thresholds(**settings.model_dump(include={"near", "overlap", "words", "similar"}))
    table = read_embeddings(embeddings) if embeddings is not None and settings.similar else None
    vectors = _vectors_of(tasks, table) if table is not None and tasks else None
    scratch.mkdir(parents=True, exist_ok=True)
    return mark_rows(data.open(), limits, tasks, table, vectors, scratch=scratch, progress=True)


def _vectors_of(tasks: Sequence[EvaluationTask], table: EmbeddingTable) -> NDArray[np.float32]:
    """The tasks' questions, embedded as those of the rows were."""
    from codeact.embedding.vectors import embed, embedder_fingerprint
    from codeact.models.loading import quiet_transformers

    known = table.metadata
    if known.model_fingerprint and embedder_fingerprint(known.model) != known.model_fingerprint:
        raise InputError(f"the embeddings are of another state of {known.model}; make them again with: codeact embed")
    quiet_transformers()
    return embed([task.question for task in tasks], known.model, dtype=known.dtype or "auto")


def clean_lines(marks: pa.Table, settings: CleanSettings, tasks: Sequence[EvaluationTask]) -> Lines:
    """Lines of the summary table about the marks."""
    from codeact.base.console import percent
    from codeact.cleaning.contamination import number_of_tasks
    from codeact.cleaning.marks import MARKED, counts_of

    counts = counts_of(marks)
    rows = marks.num_rows
    refused = sum(count for status, count in counts.items() if status not in ("ok", *MARKED))
    sets = ", ".join(f"{count:,} of {name}" for name, count in number_of_tasks(tasks).items()) or "none"
    lines = [
        ("rows in", f"{rows:,}" + (f" ({refused:,} hold no record)" if refused else "")),
        ("tasks", sets),
        ("clean", f"{counts['ok']:,} ({percent(counts['ok'] / rows)})"),
        *((status, f"{counts[status]:,}") for status in MARKED if counts[status]),
    ]
    return [*lines, *(("nearest miss", text) for text in _nearest_misses(marks, settings))]


def _nearest_misses(marks: pa.Table, settings: CleanSettings) -> Iterator[str]:
    """Of every measure the rows that came nearest to being marked."""
    import pyarrow.compute as pc

    from codeact.cleaning.marks import thresholds_by_measure

    clean = marks.filter(pc.equal(marks["status"], "ok"))
    for measure, threshold in thresholds_by_measure(settings).items():
        some = clean.filter(pc.equal(clean["measure"], measure))
        for row in some.sort_by([("similarity", "descending"), ("row", "ascending")]).slice(0, 1).to_pylist():
            yield f"{row['id']} and {row['partner']}: {measure} {row['similarity']:.2f}, marked from {threshold:g} on"


class Clean(Stage):
    """In a run that has a section ``clean``; marked rows stay, unless ``drop`` has ``select`` leave them out."""

    name = section = "clean"
    settings, default = CleanSettings, None
    needs = ("embed",)
    outputs, products = (MARKS_FILE,), (MARKS_FILE,)

    def check(self, run: Run) -> None:
        """An evaluation set that cannot be read."""
        _tasks_of(run)

    def inputs(self, run: Run) -> dict[str, Any]:
        """Data, vectors, tasks, and from where on rows are marked."""
        tasks = hashlib.sha256(repr(_tasks_of(run)).encode("utf-8", "surrogatepass")).hexdigest()
        settings = decisive(run.of(CleanSettings), "against", "drop")
        return {"data": run.data_fingerprint(), "tasks": tasks, **run.digest(*self.needs), **settings}

    def work(self, run: Run) -> Lines:
        """Mark."""
        from codeact.cleaning.marks import write_marks

        settings, tasks = run.of(CleanSettings), _tasks_of(run)
        marks = _marks(run.data, settings, tasks, run.output / EMBEDDINGS_FILE, run.output)
        write_marks(run.output / MARKS_FILE, marks)
        return clean_lines(marks, settings, tasks)

    def account(self, output: Path) -> Iterator[Entry]:
        """Records -> those without a mark."""
        if not (output / MARKS_FILE).exists():
            return
        from codeact.cleaning.marks import MARKED, counts_of, read_marks

        counts = counts_of(read_marks(output / MARKS_FILE))
        yield Entry(
            stage="clean",
            what="rows without a mark",
            after="read",
            rows_in=counts["ok"] + sum(counts[status] for status in MARKED),
            rows_out=counts["ok"],
            lost=changes({status: (counts[status], None) for status in MARKED}),
        )


@functools.lru_cache(maxsize=1)  # a run asks for them to check, to look what decides, and to work
def _tasks_of(run: Run) -> Sequence[EvaluationTask]:
    tried = run.section("generate")
    known = (tried.dataset, tried.data) if isinstance(tried, GenerationSettings) else None
    return evaluation_tasks(run.of(CleanSettings).against, known)
