"""The rows of a run as columns, the map of their embeddings, and the examples; made for tables of 10^8 rows.

Numbers are kept as 27 bytes a row; of the chosen conversations only those that are shown are parsed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from codeact.base.errors import InputError
from codeact.base.parsing import parse_json
from codeact.data.chosen import chosen_turns
from codeact.scoring.stage import TABLE

if TYPE_CHECKING:
    from codeact.embedding.files import EmbeddingTable

DRAWN = 2_500
"""Points of a scatter plot: more cannot be told apart, and each is 40 bytes of the page."""

_FITTED = 20_000  # vectors that the axes of the map are found from
_SHOWN = 3  # examples of each kind
_PART = 1 << 20  # rows of a table that are in memory at a time

_SCORES = ("row", "status", "prompt_tokens", "answer_tokens", "scored_tokens", "uncond_scored_tokens",
           "cond_nll_sum", "uncond_nll_sum", "ifd")  # fmt: skip

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """A conversation or a program; ``notes`` stand beside ``head``, ``turns`` are (role, text)."""

    head: str
    notes: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Map:
    """A sample of the embedded questions on the plane where they differ most.

    ``xy``: (points, 2); ``rows``: (points,) int64; ``explained``: share of the variance along x and along y;
    ``total``: embedded rows; ``fitted``: how many the axes were found from.
    """

    xy: FloatArray
    rows: NDArray[np.int64]
    explained: tuple[float, float]
    total: int
    fitted: int


class Rows:
    """The score table, and what was chosen of it, read from a run's folder.

    All arrays are (rows,), in the order of the data. ``ifd``, ``cond`` and ``uncond`` (mean loss of a token in nats,
    with and without the question) are NaN where there is no score. ``chosen`` and ``cluster`` (-1: none) are None
    before selection; ``status`` and ``reasons`` count rows: by how scoring went, and by why they were not chosen.
    ``fate`` is the place of a row's reason in ``reasons``, -1: chosen. ``embedded``: the questions' vectors, if any.
    ``length`` is a line about the answers' length, of a selection that says it.

    Raises:
        InputError: a file is damaged, or they are not of one run.
    """

    def __init__(self, folder: Path) -> None:
        path, selected = folder / TABLE, folder / "selected.rows.parquet"
        with _reading(path):
            count = int(pq.read_metadata(path).num_rows)
            self.status, self.reasons = Counter[str](), Counter[str]()
            self.ifd, self.tokens = np.empty(count), np.empty(count, np.int32)
            self.cond, self.uncond = np.empty(count, np.float32), np.empty(count, np.float32)
            self._read_scores(path)
        self.chosen: NDArray[np.bool_] | None = None
        self.cluster: NDArray[np.int32] | None = None
        self.fate = np.full(count, -1, np.int16)
        self.length = ""
        self.hardest: tuple[Example, ...] = ()
        self.easiest: tuple[Example, ...] = ()
        if selected.exists():
            with _reading(selected):
                self._read_selected(selected, count)
            conversations = folder / "selected.jsonl"
            with _reading(conversations):
                self.hardest, self.easiest = _examples(conversations, self.ifd, self.chosen)
        self.embedded = _read_embedded(folder / "embeddings.npy", count)
        self.map = None if self.embedded is None else _plane(self.embedded)

    def _read_scores(self, path: Path) -> None:
        for part, table in _parts(path, _SCORES):
            if not np.array_equal(_numpy(table["row"], pa.int64()), np.arange(part.start, part.stop)):
                raise InputError(f"{path} does not hold every row once, in order; run codeact merge {path.parent}")
            self.status += _counts(table["status"])
            scores = _numpy(table["ifd"], pa.float64())
            self.ifd[part] = np.where(np.isfinite(scores), scores, np.nan)
            self.tokens[part] = _numpy(pc.add(table["prompt_tokens"], table["answer_tokens"]), pa.int32())
            with np.errstate(divide="ignore", invalid="ignore"):
                scored, alone = (_numpy(table[f"{of}scored_tokens"], pa.int64()) for of in ("", "uncond_"))
                self.cond[part] = _numpy(table["cond_nll_sum"], pa.float64()) / scored
                self.uncond[part] = _numpy(table["uncond_nll_sum"], pa.float64()) / alone

    def _read_selected(self, path: Path, rows: int) -> None:
        self.length = (pq.read_schema(path).metadata or {}).get(b"length", b"").decode("utf-8", "replace")
        self.chosen, self.cluster, done = np.zeros(rows, np.bool_), np.full(rows, -1, np.int32), 0
        for part, table in _parts(path, ("row", "cluster", "chosen", "reason")):
            numbers = _numpy(table["row"], pa.int64())
            if part.stop > rows or not np.array_equal(numbers, np.arange(part.start, part.stop)):
                break
            self.cluster[part] = pc.fill_null(table["cluster"].cast(pa.int32()), -1).to_numpy()
            self.chosen[part] = pc.fill_null(table["chosen"], False).to_numpy()
            self.reasons += _counts(table["reason"])
            for place, reason in enumerate(self.reasons):
                self.fate[part][pc.fill_null(pc.equal(table["reason"], reason), False).to_numpy()] = place
            done = part.stop
        if done != rows:
            raise InputError(f"{path} and scores/scores.parquet are not of the same rows; run stage select again")

    def label(self, row: int) -> int | None:
        """The cluster of a row, if it has one."""
        return None if self.cluster is None or self.cluster[row] < 0 else int(self.cluster[row])


def draw_positions(positions: NDArray[Any], size: int, seed: int = 0) -> NDArray[Any]:
    """At most ``size`` of ``positions``, drawn without replacement, in their order; the same ones every time."""
    if len(positions) <= size:
        return positions
    drawn = np.random.default_rng(seed).choice(len(positions), size, replace=False, shuffle=False)
    return positions[np.sort(drawn)]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file that is damaged: cut, or a column is missing or of another type."""
    try:
        yield
    except (OSError, pa.ArrowException, KeyError) as error:
        raise InputError(f"{path} is damaged: {str(error).splitlines()[0]}; run its stage again") from None


def _parts(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[slice, pa.Table]]:
    """Read some million rows at a time, and where they belong: a table takes three times the memory of its arrays."""
    start = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_PART, columns=list(columns)):
            yield slice(start, start + batch.num_rows), pa.Table.from_batches([batch])
            start += batch.num_rows


def _numpy(column: pa.ChunkedArray, kind: pa.DataType) -> NDArray[Any]:
    """A column as numpy; null becomes NaN, or 0 in a column of integers."""
    missing = float("nan") if pa.types.is_floating(kind) else 0
    return np.asarray(pc.fill_null(column.cast(kind, safe=False), missing).to_numpy())


def _counts(column: pa.ChunkedArray) -> Counter[str]:
    counted = pc.value_counts(column.cast(pa.large_string()))
    return Counter({item["values"]: item["counts"] for item in counted.to_pylist() if item["values"] is not None})


def _examples(path: Path, ifd: FloatArray, chosen: Any) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The chosen conversations of highest and of lowest IFD; no conversation is in both."""
    rows = np.flatnonzero(chosen)
    ranked = np.flatnonzero(np.isfinite(ifd[rows]))
    values = ifd[rows[ranked]]
    shown = min(_SHOWN, len(ranked) // 2) or min(1, len(ranked))
    highest = ranked[np.lexsort((ranked, -values))[:shown]]
    lowest = ranked[np.lexsort((ranked, values))[: min(shown, len(ranked) - shown)]]
    wanted = {*highest.tolist(), *lowest.tolist()}
    with path.open("rb") as file:  # of the other lines only the ends are looked for
        lines = {at: line for at, line in enumerate(islice(file, max(wanted, default=-1) + 1)) if at in wanted}
    if len(lines) < len(wanted):
        raise InputError(f"{path} has fewer lines than rows were chosen; run stage select again")
    made = {at: _example(path, at, int(rows[at]), line) for at, line in lines.items()}
    return tuple(made[at] for at in highest.tolist()), tuple(made[at] for at in lowest.tolist())


def _example(path: Path, number: int, row: int, line: bytes) -> Example:
    try:
        content = parse_json(line)
        return talk(row, str(content["id"]), float(content["ifd"]), content.get("cluster"), chosen_turns(content))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__} {error}"
        raise InputError(f"{path}, line {number + 1} is damaged: {what}; run stage select again") from None


def talk(row: int, name: str, ifd: float, cluster: int | None, turns: tuple[tuple[str, str], ...]) -> Example:
    """A row of the data as an example."""
    notes = (f"row {row:,}", f"id {name[:80]}", *([] if cluster is None else [f"cluster {cluster}"]))
    return Example(head=f"IFD {ifd:.3f}" if np.isfinite(ifd) else "no IFD", notes=notes, turns=turns)


def _read_embedded(path: Path, rows: int) -> EmbeddingTable | None:
    if not path.exists():
        return None
    from codeact.embedding.files import read_embeddings

    table = read_embeddings(path)
    if len(table.rows) and not 0 <= table.rows[-1] < rows:
        raise InputError(f"{path} and scores/scores.parquet are not of the same rows; run stage embed again")
    return table


def _plane(table: EmbeddingTable) -> Map | None:
    if len(table.rows) < 3:
        return None
    fitted = draw_positions(np.arange(len(table.rows)), _FITTED)
    vectors = np.asarray(table.vectors[fitted], dtype=np.float64)
    centre = vectors.mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov(vectors - centre, rowvar=False, bias=True))
    axes = axes[:, [-1, -2]]
    axes *= np.where(axes[np.abs(axes).argmax(axis=0), [0, 1]] < 0, -1, 1)  # the sign of an eigenvector is a whim
    total = float(variances.sum())
    if not total > 0:  # all questions are the same
        return None
    drawn = draw_positions(np.arange(len(fitted)), DRAWN, seed=1)
    return Map(
        xy=(vectors[drawn] - centre) @ axes,
        rows=table.rows[fitted[drawn]],
        explained=(float(variances[-1]) / total, float(variances[-2]) / total),
        total=len(table.rows),
        fitted=len(fitted),
    )
