"""Rows that repeat an earlier row: the same text, nearly the same n-grams, or nearly the same question by its vector.

In all three a row is marked only for an earlier row that is itself not marked, so of every group one row stays, and
all who are marked are as near to the row they name as the threshold asks.

Nothing here grows with the square of the rows: a row is compared with the first few of its bucket, and at most
``MOST_COMPARED`` times.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from codeact.base.errors import import_extra
from codeact.cleaning.shingles import HashBlock, Hashes, chained

BANDS, BAND_ROWS = 25, 5
"""Of the MinHash signatures. Two rows of Jaccard similarity s share a bucket with probability 1 - (1 - s^5)^25:
0.99995 at 0.8, 0.99 at 0.7, 0.55 at 0.5."""
MOST_COMPARED = 32
"""Other rows that a row is compared with."""
_LEADERS = 4  # of a bucket, in every band
_ROUNDS = 10
_SEED = 42
_CELL = 4096  # vectors of a cell, about
_MOST_LEADERS = 1 << 14  # of a cell, that others are compared with
_BLOCK = 2048  # vectors that are compared at a time

_Rows = NDArray[np.int64]
_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Repeats:
    """``partner``: (rows,) the earlier row that each repeats, -1: none. ``similarity``: (rows,) to that row; of a row
    that repeats none, to the nearest that it was compared with, 0: with none; ``nearest`` is that row, or -1."""

    partner: _Rows
    similarity: _Floats
    nearest: _Rows

    @classmethod
    def none(cls, rows: int) -> Repeats:
        """No row repeats another."""
        return cls(np.full(rows, -1, np.int64), np.zeros(rows), np.full(rows, -1, np.int64))

    def note(self, rows: _Rows, others: _Rows, similarity: _Floats, threshold: float) -> None:
        """Take in comparisons; of several with one row the nearest stays, of equal ones the earliest."""
        known = self.similarity[rows]
        nearer = (similarity > known) | ((similarity == known) & (others < self.nearest[rows]))
        rows, others, similarity = rows[nearer], others[nearer], similarity[nearer]
        self.similarity[rows], self.nearest[rows] = similarity, others
        self.partner[rows[similarity >= threshold]] = others[similarity >= threshold]


def exact_repeats(digests: NDArray[np.uint64], allowed: NDArray[np.bool_]) -> _Rows:
    """The first row with the same text.

    Args:
        digests: (rows, 2), 128 bits of the text of each.
        allowed: (rows,) which to look at.

    Returns:
        (rows,) the first row, -1 where that is the row itself.
    """
    rows = np.flatnonzero(allowed)
    order = rows[np.lexsort((rows, digests[rows, 1], digests[rows, 0]))]
    first = np.ones(len(order), np.bool_)
    first[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    partner = np.full(len(digests), -1, np.int64)
    heads = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]
    partner[order[~first]] = heads[~first]
    return partner


class ShingleStore:
    """The n-grams of every row and its MinHash buckets, in files without a name, which end with the process.

    Memory is 8 bytes a row; the files are 8 bytes an n-gram and 200 a row.
    """

    def __init__(self, rows: int, folder: Path) -> None:
        import tempfile

        self._signatures = import_extra("rensa", "clean", "finding near duplicates").RMinHash
        self._shingles: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - both as long as this is
        self._buckets: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._buckets.truncate(rows * BANDS * 8)
        self._bounds = np.zeros(rows + 1, np.int64)
        self._rows, self._done = rows, 0

    def add(self, block: HashBlock) -> None:
        """The n-grams of the next rows, in order; at most ``MOST_TEXTS``."""
        sets = block.distinct()
        bounds = sets.bounds()
        start, stop = self._done, self._done + block.texts
        self._bounds[start + 1 : stop + 1] = self._bounds[start] + bounds[1:]
        self._shingles.write(sets.hashes.tobytes())
        matrix = self._signatures.digest_matrix_from_flat_token_hashes(
            sets.hashes, bounds.astype(np.uint64), BANDS * BAND_ROWS, _SEED
        )
        signatures = np.array(matrix.to_rows(), np.uint64).reshape(block.texts, BANDS, BAND_ROWS)
        keys = signatures[:, :, 0]
        for part in range(1, BAND_ROWS):
            keys = chained(keys, signatures[:, :, part])
        for band in range(BANDS):
            os.pwrite(self._buckets.fileno(), keys[:, band].tobytes(), 8 * (band * self._rows + start))
        self._done = stop

    def buckets(self, band: int) -> Hashes:
        """(rows,) the bucket of every row."""
        self._buckets.seek(8 * band * self._rows)
        return np.frombuffer(self._buckets.read(8 * self._rows), np.uint64)

    def jaccard(self, rows: _Rows, others: _Rows) -> _Floats:
        """Exact similarity of the n-grams of ``rows[i]`` and ``others[i]``, 0 where one has none."""
        self._shingles.flush()
        result = np.zeros(len(rows))
        sizes = np.diff(self._bounds)
        smaller, larger = np.minimum(sizes[rows], sizes[others]), np.maximum(sizes[rows], sizes[others])
        last, theirs = -1, np.empty(0, np.uint64)
        for index in np.lexsort((rows, others)).tolist():  # those of one leader after each other
            if smaller[index]:
                if others[index] != last:
                    last, theirs = others[index], self._read(others[index])
                both = np.concatenate([theirs, self._read(rows[index])])
                both.sort()
                shared = int((both[1:] == both[:-1]).sum())
                result[index] = shared / (int(smaller[index]) + int(larger[index]) - shared)
        return result

    def _read(self, row: int) -> Hashes:
        start, stop = self._bounds[row : row + 2].tolist()
        return np.frombuffer(os.pread(self._shingles.fileno(), 8 * (stop - start), 8 * start), np.uint64)


def near_repeats(store: ShingleStore, allowed: NDArray[np.bool_], threshold: float) -> Repeats:
    """Rows whose n-grams have a Jaccard similarity of ``threshold`` and more with those of an earlier row.

    MinHash proposes whom to compare (rows of one bucket, with the first of it), the n-grams themselves decide.

    Args:
        store: of all rows.
        allowed: (rows,) which to look at.
        threshold: above 0, at most 1.
    """
    found = Repeats.none(len(allowed))
    compared = np.zeros(len(allowed), np.uint8)
    pairs: list[tuple[_Rows, _Rows, _Floats]] = []
    for _ in range(_ROUNDS):
        live = np.flatnonzero(allowed & (found.partner < 0))
        for band in range(BANDS):
            keys = store.buckets(band)[live]
            order = np.argsort(keys, kind="stable")
            rows, keys = live[order], keys[order]
            for _leader in range(_LEADERS):
                first = np.ones(len(rows), np.bool_)
                first[1:] = keys[1:] != keys[:-1]
                heads = rows[np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))]
                rows, keys, heads = rows[~first], keys[~first], heads[~first]
                # Rows that are marked by now go on: the one they repeat may turn out to repeat another.
                near = found.partner[rows] == heads
                new = np.flatnonzero(~near & (compared[rows] < MOST_COMPARED) & (found.nearest[rows] != heads))
                similarity = store.jaccard(rows[new], heads[new])
                found.note(rows[new], heads[new], similarity, threshold)
                compared[rows[new]] += 1
                near[new] = similarity >= threshold
                new, similarity = new[near[new]], similarity[near[new]]
                pairs.append((rows[new], heads[new], similarity))
                # The leader goes, and who is near to it: the rest have another one in the next turn.
                rows, keys = rows[~near], keys[~near]
                if not len(rows):
                    break
        if not _settle(found, pairs):
            break
    return found


def _settle(found: Repeats, pairs: list[tuple[_Rows, _Rows, _Floats]]) -> bool:
    """Mark anew, in the order of rows and by all pairs that are near, where a row repeats one that was marked later.

    Returns:
        Whether a row is free again, and may be near to others that it was not compared with.
    """
    marked = found.partner >= 0
    if not marked[found.partner[marked]].any():
        return False
    rows, others, similarity = map(np.concatenate, zip(*pairs, strict=True))
    order = np.lexsort((others, -similarity, rows))
    found.partner[:] = -1
    for row, other, share in zip(*(part[order].tolist() for part in (rows, others, similarity)), strict=True):
        if found.partner[row] < 0 and found.partner[other] < 0:
            found.partner[row] = found.nearest[row] = other
            found.similarity[row] = share
    free = np.flatnonzero(marked & (found.partner < 0))
    found.nearest[free], found.similarity[free] = -1, 0.0  # what they are near to is marked itself
    return len(free) > 0


def similar_questions(
    vectors: Any, rows: _Rows, allowed: NDArray[np.bool_], threshold: float, seed: int = 0
) -> Repeats:
    """Rows whose question has a cosine of ``threshold`` and more with an earlier one, by unit vectors.

    Up to 20,480 rows all pairs are compared. Beyond that every vector is compared with those of its cell: the cells
    are those of a seeded sample of the vectors, some 4,096 a cell, and a pair that lies in two of them is missed.

    Args:
        vectors: (N, D) float32 unit vectors, also in a memory-mapped file.
        rows: (N,) which row each belongs to, ascending.
        allowed: (rows,) which to look at.
        threshold: a cosine.
        seed: of the sample.
    """
    found = Repeats.none(len(allowed))
    for cell in _cells(vectors, np.flatnonzero(allowed[rows]), seed):
        leaders = np.empty(0, np.int64)
        for start in range(0, len(cell), _BLOCK):
            places = cell[start : start + _BLOCK]
            block = np.asarray(vectors[places])
            for first in range(0, len(leaders), _BLOCK):
                others = leaders[first : first + _BLOCK]
                _nearest(found, block @ np.asarray(vectors[others]).T, rows[places], rows[others], threshold)
            free = found.partner[rows[places]] < 0
            kept, places = block[free], places[free]
            _repeats_within(found, kept @ kept.T, rows[places], threshold)
            leaders = np.append(leaders, places[found.partner[rows[places]] < 0])[:_MOST_LEADERS]
    return found


def _repeats_within(found: Repeats, cosines: NDArray[np.float32], rows: _Rows, threshold: float) -> None:
    """Compare rows with those before them, of which only unmarked ones count."""
    free = np.ones(len(rows), np.bool_)
    for place in np.flatnonzero((np.triu(cosines, 1) >= threshold).any(axis=0)).tolist():
        earlier = np.flatnonzero(free[:place])
        _nearest(found, cosines[place, earlier][None], rows[place : place + 1], rows[earlier], threshold)
        free[place] = found.partner[rows[place]] < 0


def _nearest(found: Repeats, cosines: NDArray[np.float32], rows: _Rows, others: _Rows, threshold: float) -> None:
    best = cosines.argmax(axis=1)
    found.note(rows, others[best], cosines[np.arange(len(rows)), best].astype(np.float64), threshold)


def _cells(vectors: Any, places: _Rows, seed: int) -> Iterable[_Rows]:
    """The places parted by where the vectors lie near each other, ascending in every part."""
    if len(places) <= 5 * _CELL:
        return [places]
    sample = np.random.default_rng(seed).choice(places, -(-len(places) // _CELL), replace=False)
    centres = np.asarray(vectors[np.sort(sample)])
    names = np.empty(len(places), np.int64)
    for start in range(0, len(places), _BLOCK):
        part = slice(start, start + _BLOCK)
        names[part] = (np.asarray(vectors[places[part]]) @ centres.T).argmax(axis=1)
    order = np.argsort(names, kind="stable")
    return np.split(places[order], np.flatnonzero(np.diff(names[order])) + 1)
