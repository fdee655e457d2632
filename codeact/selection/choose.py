"""Scores + cluster labels -> the rows worth training on: complexity-diversity aware sampling and two baselines."""

from __future__ import annotations

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
from codeact.data.records import BadRow, jsonable, write_jsonl

if TYPE_CHECKING:
    from codeact.data.records import RecordSet

_STRATEGIES = ("cdas", "top_ifd", "random")
UNCLUSTERED = -1  # the label of a row that has no embedding
_BLOCK_ROWS = 10_000  # records read at a time by write_selection

_Ints = NDArray[np.int64]


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
    the protocol asks for; ``shortfall`` how many of them no eligible row was left for. Tokens are prompt + answer
    tokens, over all rows of the table and over the chosen ones.
    """

    positions: _Ints
    budget: int
    shortfall: int
    clusters: tuple[ClusterCount, ...]
    rows_in: int
    tokens_in: int
    tokens_chosen: int
    strategy: str
    protocol: str
    ratio: str


def select(
    table: pa.Table,
    labels: NDArray[Any] | Sequence[int] | None,
    ratio: float | str = 0.4,
    strategy: str = "cdas",
    *,
    protocol: str = "exact",
    seed: int = 42,
) -> list[str]:
    """The ids of the chosen rows, in input order. Arguments and errors as in `plan_selection`."""
    selection = plan_selection(table, labels, ratio, strategy, protocol=protocol, seed=seed)
    # large_string: tens of millions of ids exceed the 2 GiB that one Arrow string array can address
    ids = table.column("id").cast(pa.large_string()).take(pa.array(selection.positions))
    chosen: list[str] = ids.to_pylist()
    return chosen


def plan_selection(
    table: pa.Table,
    labels: NDArray[Any] | Sequence[int] | None,
    ratio: float | str = 0.4,
    strategy: str = "cdas",
    *,
    protocol: str = "exact",
    seed: int = 42,
) -> Selection:
    """Choose rows by their difficulty, spread over clusters of like questions.

    The difficulty is IFD (instruction-following difficulty, arXiv 2308.12032); ``cdas`` is the complexity and diversity
    aware sampling of CodeACT (arXiv 2408.02193). A row is eligible when its status is ``ok`` and 0 < IFD < 1: at 1 and
    above, the question does not help the model to the answer; 0 or less is no ratio of perplexities. A failed score is
    never chosen.

    - ``cdas``, ``exact``: the budget is ``ratio`` of *all* rows, half rounded up, shared among the clusters in
      proportion to their size by largest remainder (ties to the smaller label). What a cluster cannot fill goes to
      those with room, by the same rule, until nothing is left. In a cluster the highest IFD comes first, ties by row.
    - ``cdas``, ``paper``: the reference script's rule, ``int(ratio * eligible rows of the cluster)`` per cluster.
    - ``top_ifd``: the highest IFD anywhere. Budget of ``exact`` as above; of ``paper``, ``int(ratio * eligible)``.
    - ``random``: the baseline; eligible is every ``ok`` row with a finite IFD, also above 1. The same budgets. With one
      seed, a smaller ratio chooses a subset of what a larger one does.

    Args:
        table: the score table; columns id, row, status, ifd, prompt_tokens, answer_tokens.
        labels: (table.num_rows,) integers, the cluster of each row, -1 where it has none; every ``ok`` row needs one.
            None: one cluster of everything, for the strategies that need no clusters.
        ratio: in (0, 1], read as the decimal that was typed (0.29 is 29/100, not the nearest binary fraction).
        seed: of ``random``; the others draw nothing.

    Raises:
        InputError: an argument or a column is not as described.
    """
    one_of("strategy", strategy, _STRATEGIES)
    protocol = resolve_protocol(protocol)
    if seed < 0:
        raise InputError(f"seed must be 0 or more, not {seed}")
    share = _parse_ratio(ratio)
    scores = _read_scores(table, labels, strategy)

    eligible = scores.ok & np.isfinite(scores.ifd)
    if strategy != "random":
        eligible &= (scores.ifd > 0) & (scores.ifd < 1)
    candidates = np.flatnonzero(eligible)

    cluster_labels, clusters = np.unique(scores.labels, return_inverse=True)
    cluster_sizes = np.bincount(clusters, minlength=len(cluster_labels))
    if len(cluster_labels) and cluster_labels[0] == UNCLUSTERED:
        cluster_sizes[0] = 0  # these rows count for the budget, but are no cluster
    cluster_eligible = np.bincount(clusters[candidates], minlength=len(cluster_labels))

    exact_budget = int(share * table.num_rows + Fraction(1, 2))
    if strategy == "cdas":
        if protocol == "exact":
            budget = exact_budget
            quotas = _share_budget(budget, cluster_sizes, cluster_eligible)
        else:
            # the script's own arithmetic: a float product, cut; int(0.29 * 100) is 28 there and here
            quotas = np.floor(float(share) * cluster_eligible).astype(np.int64)
            budget = int(quotas.sum())
        chosen = _top_of_each_cluster(candidates, clusters[candidates], scores.ifd[candidates], quotas)
    else:
        budget = exact_budget if protocol == "exact" else int(float(share) * len(candidates))
        if strategy == "top_ifd":
            order = np.argsort(-scores.ifd[candidates], kind="stable")
        else:
            order = np.random.default_rng(seed).permutation(len(candidates))
        chosen = np.sort(candidates[order[:budget]])

    cluster_chosen = np.bincount(clusters[chosen], minlength=len(cluster_labels))
    counts = zip(cluster_labels, cluster_sizes, cluster_eligible, cluster_chosen, strict=True)
    return Selection(
        positions=scores.positions[chosen],
        budget=budget,
        shortfall=budget - len(chosen),
        clusters=tuple(
            ClusterCount(label=int(label), size=int(size), eligible=int(room), chosen=int(taken))
            for label, size, room, taken in counts
            if label != UNCLUSTERED
        ),
        rows_in=table.num_rows,
        tokens_in=int(scores.tokens.sum()),
        tokens_chosen=int(scores.tokens[chosen].sum()),
        strategy=strategy,
        protocol=protocol,
        ratio=str(ratio),
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
    _check_columns(table, ("id", "row", "status"))
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

    rows = _column(table, "row", pa.int64())
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
    missing = np.flatnonzero(_ok_rows(table) & (times_embedded == 0))
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
) -> None:
    """Write the chosen rows as JSON lines in input order; the file appears whole or not at all.

    A line is ``{"id", "conversation": [{"role", "content"}, ...], "ifd", "cluster", "extra": {other columns}}``; the
    conversation is the record's history, then question and answer. ``cluster`` is null where ``labels`` is None.

    Raises:
        InputError: the data is not what was scored (a row is gone, cannot be read or has another id).
    """
    write_jsonl(path, _conversations(record_set, table, selection, labels))


def _conversations(
    record_set: RecordSet, table: pa.Table, selection: Selection, labels: NDArray[Any] | Sequence[int] | None
) -> Iterator[dict[str, Any]]:
    positions = selection.positions
    rows = _column(table, "row", pa.int64())[positions]
    ifd = _column(table, "ifd", pa.float64())[positions]
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
            yield {
                "id": record.id,
                "conversation": [
                    {"role": role, "content": text, **({"weight": 0} if number in record.context else {})}
                    for number, (role, text) in enumerate(record.turns)
                ],
                "ifd": float(ifd[index]),
                "cluster": None if clusters is None else int(clusters[index]),
                "extra": jsonable(record.extra),
            }
        start = stop


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scores:
    """The columns that selection needs, in ascending order of row; ``positions`` leads back to the table."""

    positions: _Ints
    ok: NDArray[np.bool_]
    ifd: NDArray[np.float64]
    labels: _Ints
    tokens: _Ints


def _read_scores(table: pa.Table, labels: NDArray[Any] | Sequence[int] | None, strategy: str) -> _Scores:
    _check_columns(table, ("id", "row", "status", "ifd", "prompt_tokens", "answer_tokens"))
    if labels is None:
        if strategy == "cdas":
            raise InputError("strategy cdas needs cluster labels; pass --embeddings, or use strategy top_ifd")
        labels = np.zeros(table.num_rows, dtype=np.int64)
    label_array = np.asarray(labels)
    if label_array.shape != (table.num_rows,):
        raise InputError(f"labels have shape {label_array.shape}, but the score table has {table.num_rows} rows")
    if len(label_array) and not np.issubdtype(label_array.dtype, np.integer):
        raise InputError(f"labels must be integers, not {label_array.dtype}")
    label_array = label_array.astype(np.int64)
    ok = _ok_rows(table)
    rows = _column(table, "row", pa.int64())
    for bad in (np.flatnonzero(label_array < UNCLUSTERED), np.flatnonzero(ok & (label_array == UNCLUSTERED))):
        if len(bad):
            raise InputError(
                f"row {rows[bad[0]]} has no cluster (label {label_array[bad[0]]}); run codeact embed again"
            )
    order = _row_order(rows)
    tokens = _column(table, "prompt_tokens", pa.int64()) + _column(table, "answer_tokens", pa.int64())
    ifd = _column(table, "ifd", pa.float64())
    return _Scores(positions=order, ok=ok[order], ifd=ifd[order], labels=label_array[order], tokens=tokens[order])


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


def _top_of_each_cluster(candidates: _Ints, clusters: _Ints, ifd: NDArray[np.float64], quotas: _Ints) -> _Ints:
    order = np.lexsort((-ifd, clusters))  # a stable sort: candidates come in row order, so ties stay in row order
    ranked_clusters = clusters[order]
    cluster_starts = np.searchsorted(ranked_clusters, np.arange(len(quotas)))
    rank = np.arange(len(order)) - cluster_starts[ranked_clusters]
    return np.sort(candidates[order[rank < quotas[ranked_clusters]]])


def _parse_ratio(ratio: float | str) -> Fraction:
    try:
        share = Fraction(str(ratio))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise InputError(f"ratio must be above 0 and at most 1, not {ratio}")
    return share


def _check_columns(table: pa.Table, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise InputError(
            f"the score table has no column {', '.join(missing)}; pass the folder that codeact score wrote"
        )


def _column(table: pa.Table, name: str, kind: pa.DataType) -> NDArray[Any]:
    """A column as numpy; null becomes NaN, or 0 in a column of integers."""
    column = table.column(name).cast(kind)
    fill = float("nan") if pa.types.is_floating(kind) else 0
    values: NDArray[Any] = pc.fill_null(column, fill).to_numpy()
    return values


def _ok_rows(table: pa.Table) -> NDArray[np.bool_]:
    status = table.column("status")
    ok: NDArray[np.bool_] = pc.fill_null(pc.equal(status, pa.scalar("ok", status.type)), False).to_numpy()
    return ok


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
