"""Scores + cluster labels -> the rows worth training on: complexity-diversity aware sampling, and its rivals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from codeact.base.errors import InputError, one_of
from codeact.base.protocols import resolve_protocol
from codeact.data.chosen import write_chosen
from codeact.data.forms import FORMS, form_columns
from codeact.data.records import BadRow, Record, jsonable
from codeact.data.sources import RowError
from codeact.scoring.length import correlation_text, rank_correlation
from codeact.selection.difficulty import check_columns, column, difficulty_scores, ok_rows
from codeact.selection.facility import facility_location
from codeact.selection.settings import (
    BY_CLUSTER,
    BY_DIFFICULTY,
    PER_QUESTION,
    SAMPLINGS,
    SELECTION_STRATEGIES,
    check_choice,
)

if TYPE_CHECKING:
    from codeact.data.records import RecordSet

UNCLUSTERED = -1  # the label of a row that has no embedding
_BLOCK_ROWS = 10_000  # records read at a time
_NOT_IN_THE_PAPERS_TABLE = ("unreadable", "empty_question", "empty_answer")  # its script leaves them out

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterCount:
    """One cluster: all rows with the label, those that may be chosen, those that were."""

    label: int
    size: int
    eligible: int
    chosen: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """What was chosen, and why not more.

    ``positions`` (int64) index the score table, in ascending order of its ``row`` column. ``budget`` is how many rows
    were asked for, under a budget of tokens how many fit in; ``shortfall`` how many of them no eligible row was left
    for. Tokens are prompt + answer tokens, over all rows of the table and over the chosen ones. ``failed_chosen``: rows
    without a score among the chosen, which only protocol paper has.

    In the order of the table, (rows,): ``score``, the difficulty, NaN where there is none; ``reasons`` why a row was
    not chosen, empty where it was; ``scored``, whether it has an IFD; ``answer_tokens``.
    """

    positions: _Ints
    budget: int
    shortfall: int
    clusters: tuple[ClusterCount, ...]
    rows_in: int
    tokens_in: int
    tokens_chosen: int
    failed_chosen: int
    difficulty: str
    score: _Floats
    reasons: NDArray[np.object_]
    scored: NDArray[np.bool_]
    answer_tokens: _Ints

    def among_longest(self) -> NDArray[np.bool_]:
        """Whether a scored row's answer is one of as many longest as were chosen, ties by place; (rows,)."""
        scored = np.flatnonzero(self.scored)
        longest = np.zeros(len(self.scored), np.bool_)
        order = np.argsort(-self.answer_tokens[scored], kind="stable")
        longest[scored[order[: len(self.positions)]]] = True
        return longest

    def length_line(self) -> str:
        """What the choice has to do with the length of the answers, for people."""
        chosen = len(self.positions)
        longest = int(self.among_longest()[self.positions].sum())
        by_chance = chosen * chosen / max(1, int(self.scored.sum()))
        correlation = rank_correlation(self.score, self.answer_tokens)
        return (
            f"{correlation_text(self.difficulty, correlation)}; {longest:,} of {chosen:,} chosen are among the "
            f"{chosen:,} longest answers (by chance {by_chance:,.0f})"
        )


def select(
    table: Any,
    labels: NDArray[Any] | Sequence[int] | None,
    ratio: float | str = 0.4,
    strategy: str = "cdas",
    **choice: Any,
) -> list[str]:
    """The ids of the chosen rows, in input order. Arguments and errors as in `plan_selection`.

    ``table`` may be any table (Arrow, pandas, polars, a ``datasets.Dataset``, rows or columns of Python) with ``id``
    and ``ifd`` or ``score``. Rows then are in their order, with a score where it is a number; token counts are needed
    where lengths or tokens choose.
    """
    needs_tokens = strategy == "longest" or choice.get("budget_tokens") is not None
    table = _as_score_table(table, needs_tokens)
    selection = plan_selection(table, labels, ratio, strategy, **choice)
    # large_string: tens of millions of ids exceed the 2 GiB that one Arrow string array can address
    ids = table.column("id").cast(pa.large_string()).take(pa.array(selection.positions))
    chosen: list[str] = ids.to_pylist()
    return chosen


def _as_score_table(table: Any, needs_tokens: bool) -> pa.Table:
    """A table of ids and scores in whatever form, with the columns of a score table that follow from these two."""
    try:
        if isinstance(table, list | tuple):
            table = pa.Table.from_pylist(list(table))
        elif hasattr(table, "with_format"):
            table = table.with_format("arrow")[:]
        elif not isinstance(table, pa.Table):
            table = pa.table(table)
    except (pa.ArrowException, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"the scores cannot be read as a table with id and score: {error}") from None
    if "ifd" not in table.column_names and "score" in table.column_names:
        table = table.append_column("ifd", table["score"])
    if not {"id", "ifd"} <= {*table.column_names}:
        raise InputError(f"a table of scores needs the columns id and score; there are {table.column_names}")
    if "status" not in table.column_names:
        scores = column(table, "ifd", pa.float64())
        table = table.append_column("status", pa.array(np.where(np.isfinite(scores), "ok", "unscored")))
    if "row" not in table.column_names:
        table = table.append_column("row", pa.array(np.arange(table.num_rows)))
    for name in () if needs_tokens else ("prompt_tokens", "answer_tokens"):
        if name not in table.column_names:
            table = table.append_column(name, pa.array(np.zeros(table.num_rows, np.int32)))
    return table


def plan_selection(
    table: pa.Table,
    labels: NDArray[Any] | Sequence[int] | None,
    ratio: float | str = 0.4,
    strategy: str = "cdas",
    *,
    protocol: str = "exact",
    seed: int = 42,
    difficulty: str = "ifd",
    easiest: bool = False,
    sampling: str = "top",
    budget_rows: int | None = None,
    budget_tokens: int | None = None,
    per_question: str | None = None,
    questions: NDArray[np.int64] | None = None,
    vectors: NDArray[np.float32] | None = None,
    left_out: NDArray[np.object_] | None = None,
) -> Selection:
    """Choose rows by a strategy, as many as a budget allows.

    ``cdas`` is the complexity and diversity aware sampling of CodeACT (arXiv 2408.02193). Its difficulty is IFD,
    instruction-following difficulty, as the quotient of perplexities (arXiv 2402.00530). A failed score is never
    chosen under protocol ``exact``.

    - ``cdas``: the most difficult rows of every cluster. Clusters share the budget in proportion to their size, by
      largest remainder (ties to the smaller label). What a cluster cannot fill goes to those with room, by the same
      rule, until nothing is left. In a cluster the highest difficulty comes first, ties by row.
    - ``top_ifd``: the most difficult rows anywhere. Both take the rows that ``codeact.selection.difficulty`` allows.
    - ``random``, ``longest``: drawn, or by answer tokens, from all rows with a score, also above 1. With one seed, a
      smaller budget draws a subset of what a larger one does.
    - ``facility_location``: of every cluster the rows that are nearest to all others, shares as in ``cdas``.

    The budget is ``ratio`` of *all* rows, half rounded up, or ``budget_rows``; or as many rows, best first, as fit in
    ``budget_tokens``, up to the first that does not: rows that are longer than the whole budget are left out, and
    clusters take turns in proportion to their size (by (place + 1/2) / size, ties to the smaller label).

    Protocol ``paper`` is the reference script: ``int(ratio * n)`` of each cluster, n its rows below an IFD of 1, where
    a score that failed is 0. So such rows count, and where nothing else is left they are chosen. ``random`` draws
    ``int(ratio * n)`` of all rows with a score.

    Args:
        table: the score table; columns id, row, status, ifd, prompt_tokens, answer_tokens, and those of the difficulty.
        labels: (table.num_rows,) integers, the cluster of each row, -1 where it has none; every ``ok`` row needs one.
            None: one cluster of everything, for the strategies that need no clusters.
        ratio: in (0, 1], read as the decimal that was typed (0.29 is 29/100, not the nearest binary fraction).
        seed: of ``random`` and of ``proportional``; the others draw nothing.
        difficulty: of ``codeact.selection.settings.DIFFICULTIES``.
        easiest: from the other end of the difficulty.
        sampling: "top", or "proportional": rows of a cluster are drawn one after the other, each with a probability in
            proportion to its difficulty (k-means-quality, arXiv 2409.11378).
        per_question: which of several eligible answers to one question to keep: "best_fit", the one that the model
            finds likeliest a token (GRAPE, arXiv 2502.04194), "hardest" or "first"; ties by row.
        questions: (table.num_rows,) the same number for rows with the same question; ``per_question`` needs it.
        vectors: (table.num_rows, D) unit vectors of the questions; ``facility_location`` needs them.
        left_out: (table.num_rows,) why a row may not be chosen whatever its score, empty where it may.

    Raises:
        InputError: an argument or a column is not as described.
    """
    one_of("strategy", strategy, SELECTION_STRATEGIES)
    one_of("sampling", sampling, SAMPLINGS)
    protocol = resolve_protocol(protocol)
    if seed < 0:
        raise InputError(f"seed must be 0 or more, not {seed}")
    given = {"budget_rows": budget_rows, "budget_tokens": budget_tokens, "difficulty": difficulty, "easiest": easiest}
    check_choice(strategy, {**given, "sampling": sampling, "per_question": per_question, "protocol": protocol}, ratio)
    share = _parse_ratio(ratio)
    rows = _read_rows(table, labels, strategy, difficulty, protocol, left_out)
    candidates = np.flatnonzero(rows.allowed)
    if per_question is not None:
        candidates = _one_a_question(table, rows, candidates, per_question, questions)
    eligible = candidates
    if budget_tokens is not None:
        candidates = _within(rows, candidates, budget_tokens)

    label_names, clusters = np.unique(rows.labels, return_inverse=True)
    sizes = np.bincount(clusters, minlength=len(label_names))
    if len(label_names) and label_names[0] == UNCLUSTERED:
        sizes[0] = 0  # these rows count for the budget, but are no cluster
    by_cluster = strategy in BY_CLUSTER
    group_sizes = sizes if by_cluster else np.array([table.num_rows])
    groups = clusters[candidates] if by_cluster else np.zeros(len(candidates), np.int64)
    room = np.bincount(groups, minlength=len(group_sizes))
    if budget_tokens is not None:
        quotas = room
    elif protocol == "paper":
        # the script's own arithmetic: a float product, cut; int(0.29 * 100) is 28 there and here
        quotas = np.floor(float(share) * room).astype(np.int64)
    else:
        budget = int(share * table.num_rows + Fraction(1, 2)) if budget_rows is None else budget_rows
        quotas = _share_budget(budget, group_sizes, room)

    if strategy == "facility_location":
        places = _facility_places(vectors, rows.positions[candidates], groups, quotas)
    else:
        keys = _keys(strategy, sampling, easiest, rows, candidates, np.random.default_rng(seed))
        places = _places(keys, groups, len(group_sizes))
    if budget_tokens is None:
        chosen = candidates[places < quotas[groups]]
    else:
        chosen = _fill(candidates, (places + 0.5) / group_sizes[groups], groups, rows.tokens, budget_tokens)
    if budget_tokens is not None or protocol == "paper":
        budget = len(chosen)

    rows.reasons[chosen] = ""
    counts = (np.bincount(clusters[which], minlength=len(label_names)) for which in (eligible, chosen))
    return Selection(
        positions=rows.positions[chosen],
        budget=budget,
        shortfall=budget - len(chosen),
        clusters=tuple(
            ClusterCount(label=int(label), size=int(size), eligible=int(allowed), chosen=int(taken))
            for label, size, allowed, taken in zip(label_names, sizes, *counts, strict=True)
            if label != UNCLUSTERED
        ),
        rows_in=table.num_rows,
        tokens_in=int(rows.tokens.sum()),
        tokens_chosen=int(rows.tokens[chosen].sum()),
        failed_chosen=int((~rows.scored[chosen]).sum()),
        difficulty=difficulty,
        score=_in_table(rows, rows.score),
        reasons=_in_table(rows, rows.reasons),
        scored=_in_table(rows, rows.scored),
        answer_tokens=_in_table(rows, rows.answer_tokens),
    )


def join_labels(
    table: pa.Table,
    embeddings_rows: NDArray[np.int64] | pa.ChunkedArray,
    embeddings_ids: Sequence[str] | pa.Array | pa.ChunkedArray,
    labels: NDArray[Any] | Sequence[int],
    *,
    table_fingerprint: str | None = None,
    embeddings_fingerprint: str | None = None,
) -> NDArray[np.int32]:
    """Bring the labels of the embedded rows to the order of the score table.

    Args:
        table: the score table; columns id, row, status.
        embeddings_rows, embeddings_ids, labels: (N,) each, row number, id and cluster of every embedded row.
        table_fingerprint, embeddings_fingerprint: of the data that was scored and embedded, where they are known.

    Returns:
        (table.num_rows,) int32; -1 for a row without an embedding, which is never an ``ok`` row.

    Raises:
        InputError: scores and embeddings are not of the same data; the message names the first row that differs.
    """
    if table_fingerprint and embeddings_fingerprint and table_fingerprint != embeddings_fingerprint:
        raise InputError(
            f"scores and embeddings are of different data: fingerprints {table_fingerprint} and "
            f"{embeddings_fingerprint}; score and embed the same file, by the same columns"
        )
    check_columns(table, ("id", "row", "status"))
    embedded = np.asarray(embeddings_rows, dtype=np.int64)
    label_array = np.asarray(labels)
    if isinstance(embeddings_ids, pa.Array | pa.ChunkedArray):
        ids = embeddings_ids.cast(pa.large_string())
    else:
        ids = pa.array(embeddings_ids, pa.large_string())
    if not len(embedded) == len(ids) == len(label_array):
        raise InputError(
            f"{len(embedded)} embedded rows, {len(ids)} ids and {len(label_array)} labels must be equally many"
        )

    rows = column(table, "row", pa.int64())
    order = _row_order(rows)
    sorted_rows = rows[order]
    slots = np.minimum(np.searchsorted(sorted_rows, embedded), max(len(rows) - 1, 0))
    unknown = np.flatnonzero(sorted_rows[slots] != embedded) if len(rows) else np.arange(len(embedded))
    if len(unknown):
        first = int(unknown[0])
        raise InputError(
            f"row {embedded[first]} (id {ids[first].as_py()!r}) has an embedding but no score; "
            "score and embed the same file"
        )
    positions = order[slots]
    times_embedded = np.bincount(positions, minlength=len(rows))
    if len(twice := np.flatnonzero(times_embedded > 1)):
        raise InputError(f"row {rows[twice[0]]} has {times_embedded[twice[0]]} embeddings; run codeact embed again")
    scored_ids = table.column("id").cast(pa.large_string()).take(pa.array(positions))
    different = np.flatnonzero(np.asarray(pc.fill_null(pc.not_equal(scored_ids, ids), True)))
    if len(different):
        first = int(different[0])
        raise InputError(
            f"row {embedded[first]} is {scored_ids[first].as_py()!r} in the scores and {ids[first].as_py()!r} in the "
            "embeddings; score and embed the same file"
        )
    missing = np.flatnonzero(ok_rows(table) & (times_embedded == 0))
    if len(missing):
        position = int(missing[0])
        raise InputError(
            f"row {rows[position]} (id {table.column('id')[position].as_py()!r}) has a score but no embedding; "
            "run codeact embed on the data that was scored"
        )
    joined = np.full(len(rows), UNCLUSTERED, dtype=np.int32)
    joined[positions] = label_array
    return joined


def write_selection(
    path: str | Path,
    record_set: RecordSet,
    table: pa.Table,
    selection: Selection,
    labels: NDArray[Any] | Sequence[int] | None,
    form: str = "messages",
) -> None:
    """Write the chosen rows in input order, as JSON lines or Parquet; the file appears whole or not at all.

    A row is ``{"id", "messages": [{"role", "content"}, ...], "ifd", "cluster", "extra": {other columns}}``; the
    messages are the record's history, then question and answer; an answer that is only context has ``"weight": 0``.
    ``cluster`` is null where ``labels`` is None, ``ifd`` where the score failed. ``form``: one of
    ``codeact.data.forms.FORMS``, with other columns for the messages.

    Raises:
        InputError: the data is not what was scored (a row is gone, cannot be read or has another id), or the form has
            no words for a row.
    """
    one_of("format", form, FORMS)
    write_chosen(path, _chosen(record_set, table, selection, labels, form))


def _chosen(
    record_set: RecordSet,
    table: pa.Table,
    selection: Selection,
    labels: NDArray[Any] | Sequence[int] | None,
    form: str,
) -> Iterator[dict[str, Any]]:
    positions = selection.positions
    rows = column(table, "row", pa.int64())[positions]
    ifd = column(table, "ifd", pa.float64())[positions]
    clusters = None if labels is None else np.asarray(labels)[positions]
    ids = table.column("id").cast(pa.large_string()).take(pa.array(positions))
    if len(rows) and rows[-1] >= len(record_set):
        raise InputError(
            f"row {rows[-1]} was scored, but the data has {len(record_set)} rows; pass the file that was scored"
        )
    start = 0
    while start < len(rows):
        first = int(rows[start])
        stop = int(np.searchsorted(rows, first + _BLOCK_ROWS))
        records = record_set.rows(first, int(rows[stop - 1]) + 1)
        block_ids = ids.slice(start, stop - start).to_pylist()
        for index, scored_id in enumerate(block_ids, start):
            record = records[int(rows[index]) - first]
            if isinstance(record, BadRow):
                raise InputError(f"row {rows[index]} was scored, but cannot be read now: {record.message}")
            if record.id != scored_id:
                raise InputError(
                    f"row {rows[index]} is {record.id!r} in the data and {scored_id!r} in the scores; "
                    "pass the file that was scored"
                )
            try:
                said = form_columns(record.turns, record.context, form)
            except RowError as fault:
                raise InputError(f"row {record.row} (id {record.id}): {fault.text}") from None
            yield {
                "id": record.id,
                **said,
                "ifd": float(ifd[index]) if np.isfinite(ifd[index]) else None,
                "cluster": None if clusters is None else int(clusters[index]),
                "extra": jsonable(record.extra),
            }
        start = stop


def question_numbers(record_set: RecordSet, table: pa.Table) -> _Ints:
    """The same number, from 0, for all rows of a score table whose record has the same question after the same history.

    Returns:
        (table.num_rows,) int64; -1 where there is no record.
    """
    numbers: dict[bytes, int] = {}
    by_row = np.full(len(record_set), -1, np.int64)
    for start in range(0, len(record_set), _BLOCK_ROWS):
        for record in record_set.rows(start, start + _BLOCK_ROWS):
            if isinstance(record, Record):
                text = repr((record.history, record.question)).encode("utf-8", "surrogatepass")
                by_row[record.row] = numbers.setdefault(hashlib.blake2b(text, digest_size=16).digest(), len(numbers))
    numbers_of_rows: _Ints = by_row[column(table, "row", pa.int64())]
    return numbers_of_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What selection needs of every row, in ascending order of row; ``positions`` leads back to the table.

    ``scored``: it has an IFD. ``score`` is its difficulty, ``rank`` what the strategy ranks by. ``allowed``: it may be
    chosen; ``reasons``: why it was not, if it is not.
    """

    positions: _Ints
    numbers: _Ints
    labels: _Ints
    tokens: _Ints
    answer_tokens: _Ints
    scored: NDArray[np.bool_]
    score: _Floats
    rank: _Floats
    allowed: NDArray[np.bool_]
    reasons: NDArray[np.object_]


def _read_rows(
    table: pa.Table,
    labels: NDArray[Any] | Sequence[int] | None,
    strategy: str,
    difficulty: str,
    protocol: str,
    left_out: NDArray[np.object_] | None,
) -> _Rows:
    check_columns(table, ("id", "row", "status", "ifd", "prompt_tokens", "answer_tokens"))
    if labels is None:
        if strategy in BY_CLUSTER:
            raise InputError(f"strategy {strategy} needs cluster labels; pass --embeddings, or use strategy top_ifd")
        labels = np.zeros(table.num_rows, dtype=np.int64)
    label_array = np.asarray(labels)
    if label_array.shape != (table.num_rows,):
        raise InputError(f"labels have shape {label_array.shape}, but the score table has {table.num_rows} rows")
    if len(label_array) and not np.issubdtype(label_array.dtype, np.integer):
        raise InputError(f"labels must be integers, not {label_array.dtype}")
    label_array = label_array.astype(np.int64)
    ok = ok_rows(table)
    numbers = column(table, "row", pa.int64())
    for bad in (np.flatnonzero(label_array < UNCLUSTERED), np.flatnonzero(ok & (label_array == UNCLUSTERED))):
        if len(bad):
            raise InputError(
                f"row {numbers[bad[0]]} has no cluster (label {label_array[bad[0]]}); run codeact embed again"
            )
    order = _row_order(numbers)
    answer_tokens = column(table, "answer_tokens", pa.int64())
    ifd = column(table, "ifd", pa.float64())
    scored = ok & np.isfinite(ifd)
    score, reasons = difficulty_scores(table, difficulty)
    rank, allowed = score, reasons == ""
    if strategy not in BY_DIFFICULTY:
        allowed, reasons = scored, np.where(scored, "", reasons)
    elif protocol == "paper":
        # The script gives a score that failed 0, which is below 1; what has no question or no answer it does not see.
        seen = ~np.isin(reasons, _NOT_IN_THE_PAPERS_TABLE) & (label_array != UNCLUSTERED)
        rank = np.where(ok & ~np.isnan(ifd), ifd, 0.0)
        allowed = seen & (rank < 1)
    if left_out is not None:
        reasons = np.where(allowed, left_out, reasons)
        allowed = allowed & (left_out == "")
    reasons = np.where(reasons == "", "below_budget", reasons)
    return _Rows(
        positions=order,
        numbers=numbers[order],
        labels=label_array[order],
        tokens=(column(table, "prompt_tokens", pa.int64()) + answer_tokens)[order],
        answer_tokens=answer_tokens[order],
        scored=scored[order],
        score=score[order],
        rank=rank[order],
        allowed=allowed[order],
        reasons=reasons[order],
    )


def _in_table(rows: _Rows, values: NDArray[Any]) -> NDArray[Any]:
    """In the order of the table."""
    back = np.empty_like(values)
    back[rows.positions] = values
    return back


def _one_a_question(
    table: pa.Table, rows: _Rows, candidates: _Ints, which: str, questions: NDArray[np.int64] | None
) -> _Ints:
    """The candidates without those that lose against another answer to their question."""
    one_of("per_question", which, PER_QUESTION)
    if questions is None or np.shape(questions) != (table.num_rows,):
        raise InputError(f"per_question needs the number of its question for each of {table.num_rows} rows")
    asked = np.asarray(questions)[rows.positions[candidates]]
    keys: NDArray[Any] = candidates
    if which == "best_fit":
        keys = difficulty_scores(table, "loss")[0][rows.positions[candidates]]
    elif which == "hardest":
        keys = -rows.score[candidates]
    order = np.lexsort((keys, asked))  # NaN, a row without the score, comes last; ties by row
    first = np.ones(len(order), np.bool_)
    first[1:] = asked[order[1:]] != asked[order[:-1]]
    first |= asked[order] == -1
    rows.reasons[candidates[order[~first]]] = "same_question"
    return np.sort(candidates[order[first]])


def _within(rows: _Rows, candidates: _Ints, budget_tokens: int) -> _Ints:
    """The candidates that are not longer than the whole budget."""
    fits = rows.tokens[candidates] <= budget_tokens
    if len(candidates) and not fits.any():
        shortest = candidates[np.argmin(rows.tokens[candidates])]
        raise InputError(
            f"a budget of {budget_tokens:,} tokens is below the shortest row that may be chosen, row "
            f"{rows.numbers[shortest]} with {rows.tokens[shortest]:,}; raise --budget-tokens"
        )
    rows.reasons[candidates[~fits]] = "longer_than_budget"
    return candidates[fits]


def _keys(
    strategy: str, sampling: str, easiest: bool, rows: _Rows, candidates: _Ints, rng: np.random.Generator
) -> NDArray[Any]:
    """What the candidates are sorted by, the smallest first."""
    if strategy == "random":
        return np.argsort(rng.permutation(len(candidates)))
    if strategy == "longest":
        return -rows.answer_tokens[candidates]
    rank = rows.rank[candidates]
    if sampling == "proportional":
        # Drawing one after the other without replacement is a race: the times are exponential, the scores the rates.
        with np.errstate(divide="ignore"):
            return rng.exponential(size=len(rank)) / rank
    return rank if easiest else -rank


def _places(keys: NDArray[Any], groups: _Ints, count: int) -> _Ints:
    """The place of every candidate in its group, from 0."""
    order = np.lexsort((keys, groups))  # a stable sort: candidates come in row order, so ties stay in row order
    starts = np.searchsorted(groups[order], np.arange(count))
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order)) - starts[groups[order]]
    return places


def _fill(candidates: _Ints, turns: _Floats, groups: _Ints, tokens: _Ints, budget_tokens: int) -> _Ints:
    """As many candidates, by their turn and then their group, as have no more tokens together than the budget."""
    in_turn = candidates[np.lexsort((groups, turns))]
    return np.sort(in_turn[: np.searchsorted(np.cumsum(tokens[in_turn]), budget_tokens, side="right")])


def _facility_places(vectors: NDArray[np.float32] | None, positions: _Ints, groups: _Ints, quotas: _Ints) -> _Ints:
    """The place of every candidate in its group; of those beyond the quota, the number of candidates."""
    if vectors is None:
        raise InputError("strategy facility_location needs the vectors of the questions; pass --embeddings")
    places = np.full(len(groups), len(groups))
    for group in np.flatnonzero(quotas):
        members = np.flatnonzero(groups == group)
        first = members[facility_location(vectors[positions[members]], int(quotas[group]))]
        places[first] = np.arange(len(first))
    return places


def _share_budget(budget: int, sizes: _Ints, eligible: _Ints) -> _Ints:
    """How many rows each cluster gives: largest remainder by size, then again among those with room for the rest."""
    taken = np.zeros_like(eligible)
    while budget > taken.sum() and (taken < eligible).any():
        weights = np.where(taken < eligible, sizes, 0)
        taken += np.minimum(_largest_remainder(int(budget - taken.sum()), weights), eligible - taken)
    return taken


def _largest_remainder(budget: int, weights: _Ints) -> _Ints:
    """Share ``budget`` in proportion to ``weights``, in whole numbers; the rest goes to the largest remainders."""
    products = budget * weights  # exact in int64 up to three thousand million rows
    shares, remainders = np.divmod(products, weights.sum())
    by_remainder = np.argsort(-remainders, kind="stable")  # stable: ties to the smaller label
    shares[by_remainder[: budget - shares.sum()]] += 1
    return shares


def _parse_ratio(ratio: float | str) -> Fraction:
    try:
        share = Fraction(str(ratio))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise InputError(f"ratio must be above 0 and at most 1, not {ratio}")
    return share


def _row_order(rows: _Ints) -> _Ints:
    """Positions in ascending order of row, which is the order a merged score table already has."""
    if (np.diff(rows) > 0).all():
        return np.arange(len(rows))
    order = np.argsort(rows, kind="stable")
    repeated = np.flatnonzero(np.diff(rows[order]) == 0)
    if len(repeated):
        raise InputError(
            f"row {rows[order[repeated[0]]]} is in the score table more than once; run codeact merge again"
        )
    return order
