"""Rows that between them are near to every row: the facility location function, maximised greedily."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from codeact.base.errors import InputError
from codeact.base.machine import free_memory


def facility_location(vectors: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The first ``count`` rows, best first, by what each adds to the sum of all rows' similarity to their nearest.

    Similarity is the dot product of unit vectors, 0 where it is negative. The greedy choice has at least 1 - 1/e of the
    best sum there is. Lazy (Minoux 1978): what a row adds only shrinks as others are chosen, so an old figure is a
    bound, and few are computed again. Ties go to the smaller position.

    Args:
        vectors: (rows, D), of unit length.
        count: rows at most.

    Raises:
        InputError: the similarities of all pairs do not fit in memory.
    """
    rows = len(vectors)
    needs, free = 4 * rows * rows, free_memory()
    if needs > free // 2:
        raise InputError(
            f"facility_location compares all pairs of a cluster: {rows:,} rows need {needs / 2**30:.1f} GiB, half of "
            f"the free memory is {free / 2**31:.1f} GiB; raise --clusters"
        )
    similar = np.maximum(vectors @ vectors.T, 0)
    nearest = np.zeros(rows, np.float32)
    heap = [(-_gain(similar[row], nearest), row) for row in range(rows)]
    heapq.heapify(heap)
    order: list[int] = []
    while heap and len(order) < count:
        _, row = heapq.heappop(heap)
        entry = (-_gain(similar[row], nearest), row)
        if heap and entry > heap[0]:
            heapq.heappush(heap, entry)
            continue
        order.append(row)
        np.maximum(nearest, similar[row], out=nearest)
    return np.array(order, np.int64)


def _gain(similar: NDArray[np.float32], nearest: NDArray[np.float32]) -> float:
    return float(np.maximum(similar - nearest, 0).sum(dtype=np.float64))
