"""A status for every row of a data set, the row or task that it repeats, and how near it is to that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from codeact.base.console import Progress
from codeact.base.errors import InputError
from codeact.base.files import atomic_path
from codeact.cleaning.answers import answer_fault
from codeact.cleaning.contamination import MEASURES, EvaluationTask, Matches, TaskIndex, vector_matches
from codeact.cleaning.duplicates import Repeats, ShingleStore, exact_repeats, near_repeats, similar_questions
from codeact.cleaning.shingles import MOST_TEXTS, HashBlock
from codeact.data.records import BadRow, Record, RecordSet

if TYPE_CHECKING:
    from codeact.embedding.files import EmbeddingTable

GRAM = 5
"""Tokens of the n-grams that rows are compared by."""
_BLOCK_CHARACTERS = 1 << 23

MARKED = ("unparsable_answer", "contaminated", "exact_duplicate", "near_duplicate", "similar_question")
"""What a record can be marked as; of several the first. A row that holds no record has its reason as its status."""

MARKS_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("partner", pa.string()),
        pa.field("similarity", pa.float64()),
        pa.field("measure", pa.string()),
        pa.field("reason", pa.string()),
    ]
)
"""One row for each row of the data, in order. ``status`` is ok, one of ``MARKED``, or why the row holds no record.
``partner`` is the id of the row or task that it repeats, ``similarity`` a share or a cosine by ``measure``; of a row
that is ok they are of what it is nearest to among all that it was compared with, null where that is nothing. ``reason``
says what of an answer, or of a row, cannot be read. The schema's metadata has the ``fingerprint`` of the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """From where on a row is marked; 0: that is not looked at.

    ``near``: Jaccard similarity of two rows' 5-grams. ``overlap``: share of a task's 8-grams in a row. ``words``:
    cosine of a row's question and a task's, by rare words. ``similar``: cosine of two questions' vectors.
    """

    near: float = 0.7
    overlap: float = 0.5
    words: float = 0.6
    similar: float = 0.95


def mark_rows(
    records: RecordSet,
    thresholds: Thresholds,
    tasks: Sequence[EvaluationTask] = (),
    embeddings: EmbeddingTable | None = None,
    task_vectors: NDArray[np.float32] | None = None,
    *,
    scratch: Path,
    progress: bool = False,
) -> pa.Table:
    """Look at every row, and at every pair of rows that could be near.

    Args:
        records: the data.
        thresholds: from where on a row is marked.
        tasks: of evaluation sets.
        embeddings: of the questions of the same data.
        task_vectors: (tasks, D) float32 unit vectors of the tasks' questions, by the same model.
        scratch: a folder with 1 kB or so a row of free space, which is given back.
        progress: whether to show how far it is.

    Returns:
        A table of ``MARKS_SCHEMA``.

    Raises:
        InputError: the embeddings are of other data, or the data has changed.
        MissingExtraError: rensa is absent, and near duplicates are asked for.
    """
    if embeddings is not None and embeddings.metadata.data_fingerprint != records.fingerprint:
        raise InputError(
            f"the embeddings are not of {records.source}; embed it by the same columns, or leave out --embeddings"
        )
    pass_ = _Pass(records, thresholds, tasks, scratch)
    with Progress(len(records), "rows", "cleaning", show=progress) as bar:
        for block in _blocks(records):
            pass_.add(block)
            bar(len(block))
    if embeddings is not None and task_vectors is not None and thresholds.similar and len(tasks):
        vector_matches(pass_.matches, embeddings.vectors, embeddings.rows, task_vectors, thresholds.similar)
    return pass_.table(embeddings)


def _blocks(records: RecordSet) -> Iterable[list[Record | BadRow]]:
    """Rows in order, no more of them at a time than memory should hold."""
    for start in range(0, len(records), MOST_TEXTS):
        block: list[Record | BadRow] = []
        size = 0
        for row in records.rows(start, start + MOST_TEXTS):
            block.append(row)
            size += sum(len(text) for _, text in row.turns) if isinstance(row, Record) else 0
            if size > _BLOCK_CHARACTERS:
                yield block
                block, size = [], 0
        if block:
            yield block


class _Pass:
    """One pass over the rows: what each says by itself, and what is needed to compare them."""

    def __init__(
        self, records: RecordSet, thresholds: Thresholds, tasks: Sequence[EvaluationTask], scratch: Path
    ) -> None:
        count = len(records)
        self._records, self._thresholds, self._tasks = records, thresholds, tasks
        self._index = TaskIndex(tasks, thresholds.overlap, thresholds.words) if tasks else None
        self._store = ShingleStore(count, scratch) if thresholds.near else None
        self._digests = np.zeros((count, 2), np.uint64)
        self._ids: list[pa.Array] = []
        self._faults: dict[int, tuple[str, str]] = {}
        self._done = 0
        self.matches = Matches.none(count)

    def add(self, block: Sequence[Record | BadRow]) -> None:
        """Take in the next rows."""
        turns: list[str] = []
        owners: list[int] = []  # the place in the block, of every turn
        questions: list[int] = []  # the same of those that are the question, else -1
        for place, row in enumerate(block):
            if isinstance(row, BadRow):
                self._faults[self._done + place] = (row.reason, row.message)
                continue
            if (fault := answer_fault(row.question, row.answer)) is not None:
                self._faults[self._done + place] = (MARKED[0], fault)
            texts = [text for _, text in row.turns]
            turns += texts
            owners += [place] * len(texts)
            questions += [-1] * (len(texts) - 2) + [place, -1]
            said = "\0".join(f"{role}\0{' '.join(text.split())}" for role, text in row.turns)
            digest = blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            self._digests[self._done + place] = np.frombuffer(digest, np.uint64)
        self._ids.append(pa.array([row.id for row in block], pa.string()))
        tokens = HashBlock.tokens_of(turns)
        rows = tokens.joined(np.array(owners, np.int64), len(block))
        if self._index is not None:
            found = self._index.matches(rows, tokens.joined(np.array(questions, np.int64), len(block)))
            self.matches.put(self._done, found)
        if self._store is not None:
            self._store.add(rows.grams(GRAM))
        self._done += len(block)

    def table(self, embeddings: EmbeddingTable | None) -> pa.Table:
        count, thresholds, matches = len(self._records), self._thresholds, self.matches
        faulty = np.zeros(count, np.bool_)
        faulty[list(self._faults)] = True
        given_away = (matches.excess >= 1) & ~faulty
        # A row that is marked for what it says itself can be nobody's partner: a dropped row would stand for another.
        allowed = ~faulty & ~given_away
        partner = exact_repeats(self._digests, allowed)
        status = np.full(count, "ok", object)
        for place, (name, _) in self._faults.items():
            status[place] = name
        status[given_away] = "contaminated"
        status[partner >= 0] = "exact_duplicate"
        similarity = np.where(partner >= 0, 1.0, 0.0)
        measure = np.where(partner >= 0, "text", "").astype(object)
        # Of what is near to a row without being marked, the nearest as a share of its threshold.
        excess = similarity.copy()

        def take(found: Repeats, name: str, how: str, threshold: float) -> None:
            marked = found.partner >= 0
            nearest = (status == "ok") & (found.nearest >= 0) & (marked | (found.similarity / threshold > excess))
            status[marked] = name
            partner[nearest], similarity[nearest] = found.nearest[nearest], found.similarity[nearest]
            measure[nearest], excess[nearest] = how, found.similarity[nearest] / threshold

        if self._store is not None and thresholds.near:
            found = near_repeats(self._store, allowed & (partner < 0), thresholds.near)
            take(found, "near_duplicate", "row_ngrams", thresholds.near)
        if embeddings is not None and thresholds.similar:
            found = similar_questions(embeddings.vectors, embeddings.rows, status == "ok", thresholds.similar)
            take(found, "similar_question", "question_vector", thresholds.similar)
        ids = pa.chunked_array(self._ids, pa.string())
        partners = ids.take(pa.array(partner, mask=partner < 0)).combine_chunks()
        tasks = given_away | ((status == "ok") & (matches.excess > excess))
        if tasks.any():
            names = pa.array([task.id for task in self._tasks], pa.string())
            partners = pc.if_else(pa.array(tasks), names.take(pa.array(matches.task, mask=~tasks)), partners)
            similarity[tasks] = matches.similarity[tasks]
            measure[tasks] = np.array(MEASURES, object)[matches.measure[tasks]]
        nothing = measure == ""
        reasons: list[str | None] = [None] * count
        for place, (_, text) in self._faults.items():
            reasons[place] = text
        columns = [
            pa.array(np.arange(count)),
            ids,
            pa.array(status, pa.string()),
            partners,
            pa.array(similarity, mask=nothing),
            pa.array(measure, pa.string(), mask=nothing),
            pa.array(reasons, pa.string()),
        ]
        return pa.table(columns, schema=MARKS_SCHEMA.with_metadata({"fingerprint": self._records.fingerprint}))


def marks_path(output: str | Path) -> Path:
    """Where the marks of the cleaned rows ``output`` lie."""
    path = Path(output)
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.rows.parquet")


def write_marks(path: Path, marks: pa.Table) -> None:
    """Write a table of marks; it appears whole or not at all."""
    with atomic_path(path) as temporary:
        pq.write_table(marks, temporary)


def read_marks(path: str | Path) -> pa.Table:
    """Read a table of marks.

    Raises:
        InputError: it is not there, or is something else.
    """
    try:
        table = pq.read_table(path, columns=MARKS_SCHEMA.names)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot use {path} as marks: {reason}; make it with: codeact clean") from None
    if b"fingerprint" not in (table.schema.metadata or {}):
        raise InputError(f"cannot use {path} as marks: it was not written by codeact clean; make it with that")
    return table


def counts_of(marks: pa.Table) -> Counter[str]:
    """Rows by status."""
    counted = pc.value_counts(marks["status"]).to_pylist()
    return Counter({item["values"]: item["counts"] for item in counted})


def thresholds_by_measure(limits: Any) -> dict[str, float]:
    """From where on a row is marked by each measure, those that are not looked at left out."""
    both = dict.fromkeys(("question_ngrams", "solution_ngrams"), limits.overlap)
    found = {"row_ngrams": limits.near, **both, "question_words": limits.words, "question_vector": limits.similar}
    return {measure: threshold for measure, threshold in found.items() if threshold}
