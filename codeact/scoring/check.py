"""How far a small model's scores are those of a large one: a seeded sample of the rows, scored by both.

The sample is kept in ``check.parquet`` beside the scores, so that a rerun scores nothing again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from codeact.base.files import atomic_path
from codeact.base.parsing import parse_json
from codeact.data.tables import read_table
from codeact.scoring.length import rank_correlation
from codeact.workers.shards import rows_done

if TYPE_CHECKING:
    from codeact.data.records import RecordSet
    from codeact.scoring.folder import ScoreFolder
    from codeact.scoring.ifd import IfdScorer

CHECK_FILE = "check.parquet"
SEED = 42
_RESAMPLES = 1000
_KEY = b"codeact check"


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherModel:
    """Its name, what tells it from every other, and how it is loaded."""

    name: str
    identity: str
    load: Callable[[], IfdScorer]


def sample_rows(table: pa.Table, count: int) -> NDArray[np.int64]:
    """Places in a score table, ascending: ``count`` rows with an IFD, or all if there are fewer; a smaller count draws
    a subset of a larger one."""
    scored = np.flatnonzero(np.isfinite(np.asarray(table["ifd"].to_numpy(zero_copy_only=False), np.float64)))
    return np.sort(np.random.default_rng(SEED).permutation(scored)[:count])


def check_table(folder: ScoreFolder, records: RecordSet, places: NDArray[np.int64], other: OtherModel) -> pa.Table:
    """Scores of some rows by another model: columns row and ifd, of each of ``places`` in order.

    Args:
        folder: the merged scores.
        records: the data that they are of.
        places: of rows.
        other: the other model; it is loaded only if it has not scored these rows.

    Returns:
        The table; its metadata has seconds and tokens of the scoring.
    """
    from codeact.base.console import Progress

    key = hashlib.sha256(json.dumps([folder.hash, other.identity, places.tolist()]).encode()).hexdigest()
    path = folder.folder / CHECK_FILE
    if path.exists() and _facts(known := read_table(path, "delete it and score again")).get("key") == key:
        return known
    scorer = other.load()
    rows = [records.rows(place, place + 1)[0] for place in places.tolist()]
    begin = time.perf_counter()
    with Progress(len(rows), "rows", f"checking with {other.name}") as bar:
        scores, cost = scorer.score(rows, rows_done(len(rows), bar))
    facts = {"key": key, "model": other.name, "seconds": time.perf_counter() - begin, "tokens": cost.tokens}
    table = scores.select(["row", "ifd"]).replace_schema_metadata({_KEY: json.dumps(facts).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
    return table


def _facts(table: pa.Table) -> dict[str, Any]:
    return dict(parse_json((table.schema.metadata or {}).get(_KEY, b"{}")))


def partial_correlation(a: ArrayLike, b: ArrayLike, given: ArrayLike) -> float | None:
    """Spearman's rank correlation of ``a`` and ``b`` with the ranks of ``given`` held fixed, all (n,).

    Returns:
        -1 to 1; None where it is not defined: one of the three is all the same, or follows from ``given``.
    """
    found = [rank_correlation(*pair) for pair in ((a, b), (a, given), (b, given))]
    if any(value is None for value in found):
        return None
    ab, ag, bg = (float(value) for value in found if value is not None)
    spread = (1 - ag**2) * (1 - bg**2)
    return (ab - ag * bg) / spread**0.5 if spread > 1e-12 else None


def overlap_at(small: ArrayLike, large: ArrayLike, ratio: float) -> tuple[float, float, float]:
    """Which share of the highest by one score are among as many highest by the other, and where that lies by chance.

    Args:
        small, large: (n,) both finite; ties by place.
        ratio: of the rows that count as the highest, at least one.

    Returns:
        The share, and the ends of its 95 % interval over rows drawn with replacement (seeded).
    """
    both = np.stack([np.asarray(small, np.float64), np.asarray(large, np.float64)])
    count = both.shape[1]
    top = max(1, round(ratio * count))
    generator = np.random.default_rng(SEED)

    def share(values: NDArray[np.float64]) -> float:
        chosen = np.argsort(-values, axis=1, kind="stable")[:, :top]
        return float(len(np.intersect1d(chosen[0], chosen[1])) / top)

    drawn = [share(both[:, generator.integers(count, size=count)]) for _ in range(_RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return share(both), float(low), float(high)


def agreement_lines(folder: ScoreFolder, checked: pa.Table, ratio: float) -> list[tuple[str, str]]:
    """Lines of the summary about a check."""
    from codeact.base.console import duration

    table = folder.read()
    places = np.asarray(checked["row"])
    small, large = (_floats(column) for column in (table["ifd"].take(pa.array(places)), checked["ifd"]))
    tokens = _floats(table["answer_tokens"].take(pa.array(places)))
    both = np.isfinite(large)
    facts = _facts(checked)
    lost = f", which could not score {int((~both).sum()):,} of them" if not both.all() else ""
    lines = [("checked", f"{len(places):,} rows with {facts['model']}{lost}")]
    if both.sum() < 2:
        return lines
    small, large, tokens = small[both], large[both], tokens[both]
    raw, held = rank_correlation(small, large), partial_correlation(small, large, tokens)
    share, low, high = overlap_at(small, large, ratio)
    totals = folder.totals()
    ours, theirs = (seconds / n if n else 0.0 for seconds, n in (
        (totals["seconds"], totals["status"].get("ok", 0)), (facts["seconds"], len(places))
    ))  # fmt: skip
    text = ["not defined" if value is None else f"{value:.2f}" for value in (raw, held)]
    return [
        *lines,
        ("rank agreement", f"Spearman {text[0]}; with the answer's length held fixed {text[1]}"),
        ("overlap", f"{share:.1%} of the top {ratio:.0%} are in both [{low:.1%}, {high:.1%}]; by chance {ratio:.0%}"),
        ("cost", f"{ours * 1000:,.0f} ms a row and {theirs * 1000:,.0f} ms by it: all rows would take it "
                 f"{duration(theirs * totals['rows'])}"),
    ]  # fmt: skip


def _floats(column: Any) -> NDArray[np.float64]:
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float64)
