"""Lloyd's k-means, compiled for the CPU, and in PyTorch for any device; starts, stop, empty clusters as scikit-learn's.

The draws are those of scikit-learn's ``KMeans`` with the same seed, so all backends begin at the same centres. A sum
has one order on any number of threads: fixed blocks of rows, each by one thread, added up in their order in float64.
Shapes: N rows, D features, k clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import codeact._native as _native
from codeact.ops.native import instruction_set

TOLERANCE = 1e-4  # of the variance: a smaller shift of all centres together ends a run
_BLOCK = 4096  # rows; 16 MiB of float32 products at 1,000 clusters, and a sum that loses nothing that matters
_CANCELLED = 1e-3  # of |x|^2 + |c|^2: a smaller squared distance by products has lost its digits
# Two runs often end in the same clusters under other numbers; the first one stays, whatever rounding says.
_SAME = 1 - 1e-6

_Map = Callable[..., Iterator[Any]]
Lloyd = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]
"""Rows (N, D), starts (k, D) and the shift that ends a run -> labels (N,), centres (k, D), inertia."""


def fit(
    vectors: Tensor, k: int, seed: int, n_init: int, iterations: int, lloyd: Lloyd | None = None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Cluster float32 (N, D) ``vectors`` where they are; the tightest of ``n_init`` runs.

    Args:
        iterations: of a run at most.
        lloyd: another implementation of the iterations.

    Returns:
        int64 (N,) labels, and the function that labels other rows.
    """
    first, draws = draw(len(vectors), k, seed, n_init)
    with _blocks_in_parallel(vectors.device) as each:
        mean = vectors.mean(dim=0)
        rows = vectors - mean  # products lose less near the origin
        squares = _squares(rows)
        stop = TOLERANCE * float(rows.var(dim=0, correction=0).mean())
        best: tuple[Tensor, Tensor, float] | None = None
        for start, some in zip(first.tolist(), draws, strict=True):
            starts = _starts(rows, squares, start, torch.from_numpy(some), each)
            run = lloyd(rows, starts, stop) if lloyd else _lloyd(rows, starts, stop, iterations, each)
            if best is None or run[2] < _SAME * best[2]:
                best = run
    assert best is not None
    labels, centres, _ = best

    def assign(others: Tensor) -> Tensor:
        with _blocks_in_parallel(others.device) as each:
            return _nearest(others - mean, centres, each)

    return labels, assign


def fit_native(
    vectors: NDArray[np.float32], k: int, seed: int, n_init: int, iterations: int
) -> tuple[NDArray[np.int32], Callable[[NDArray[np.float32]], NDArray[np.int32]], int]:
    """The same by csrc/clustering, on as many threads as PyTorch takes; and how many passes over all rows it took."""
    threads, instructions = torch.get_num_threads(), instruction_set()
    first, draws = draw(len(vectors), k, seed, n_init)
    labels, centres, mean, passes = _native.kmeans(
        vectors, k, first, draws, TOLERANCE, iterations, threads, instructions
    )
    return labels, lambda others: _native.nearest_centres(others, centres, mean, threads, instructions), passes


def draw(count: int, k: int, seed: int, runs: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What decides the starts: the first row of each run, (runs,), and its draws, (runs, k - 1, candidates), 0 to 1."""
    random = np.random.RandomState(seed)
    first, draws = [], []
    for _ in range(runs):
        first.append(random.choice(count, p=np.full(count, 1 / count)))
        draws.append(random.uniform(size=(k - 1, 2 + int(math.log(k)))))
    return np.array(first, np.int64), np.array(draws)


@contextmanager
def _blocks_in_parallel(device: torch.device) -> Iterator[_Map]:
    """A ``map`` over blocks: on the CPU one thread a block, which waits for no other, as OpenMP's do."""
    if device.type != "cpu":
        yield map
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield lambda work, first, *more: (pool.map if len(first) > 1 else map)(work, first, *more)
    finally:
        torch.set_num_threads(threads)


def _starts(rows: Tensor, squares: Tensor, start: int, draws: Tensor, each: _Map) -> Tensor:
    """(k, D) rows by greedy k-means++: of 2 + log k candidates, drawn by squared distance, the best one."""
    count = len(rows)
    first = torch.tensor([start], device=rows.device)

    def distances(candidates: Tensor) -> Tensor:
        """(N, candidates), squared."""

        def of_block(block: Tensor, own: Tensor) -> Tensor:
            scale = own[:, None] + squares[candidates]
            result = torch.addmm(scale, block, rows[candidates].T, alpha=-2)
            row, column = (result < _CANCELLED * scale).nonzero(as_tuple=True)
            result[row, column] = _squares(block[row] - rows[candidates[column]])
            return result

        return torch.cat(list(each(of_block, _blocks(rows), _blocks(squares))))

    nearest = distances(first)[:, 0]
    chosen = [first]
    for draw in draws.to(rows.device):
        cumulated = nearest.cumsum(0, dtype=torch.float64)
        candidates = torch.searchsorted(cumulated, draw * cumulated[-1]).clamp_(max=count - 1)
        remaining = torch.minimum(distances(candidates), nearest[:, None])
        best = remaining.sum(dim=0, dtype=torch.float64).argmin()
        nearest = remaining[:, best].contiguous()
        chosen.append(candidates[best][None])
    return rows[torch.cat(chosen)]


def _lloyd(rows: Tensor, centres: Tensor, stop: float, iterations: int, each: _Map) -> tuple[Tensor, Tensor, float]:
    sums = torch.zeros(centres.shape, dtype=torch.float64, device=rows.device)
    counts = torch.zeros(len(centres), dtype=torch.int64, device=rows.device)
    labels = _nearest(rows, centres, each)
    _add(sums, counts, rows, labels, each)
    for _ in range(iterations):
        if not counts.all():
            _fill_empty(sums, counts, rows, labels, _distances(rows, centres, labels, each), each)
        means = (sums / counts.clamp(min=1)[:, None]).to(rows.dtype)
        means = torch.where((counts > 0)[:, None], means, centres)
        shift = float(_squares(means - centres).sum())
        centres, before = means, labels
        labels = _nearest(rows, centres, each)
        moved = (labels != before).nonzero()[:, 0]
        if not len(moved) or shift <= stop:
            break
        # In most iterations few rows change their cluster: the sums follow those.
        for some in _blocks(moved, 16 * _BLOCK):
            _add(sums, counts, rows[some], before[some], each, sign=-1)
            _add(sums, counts, rows[some], labels[some], each)
    return labels, centres, float(_distances(rows, centres, labels, each).sum(dtype=torch.float64))


def _nearest(rows: Tensor, centres: Tensor, each: _Map) -> Tensor:
    """The nearest centre of every row, (N,)."""
    half = _squares(centres) / 2
    return torch.cat(
        list(each(lambda block: torch.addmm(half, block, centres.T, alpha=-1).argmin(dim=1), _blocks(rows)))
    )


def _distances(rows: Tensor, centres: Tensor, labels: Tensor, each: _Map) -> Tensor:
    """Of every row to its centre, squared, (N,)."""
    blocks = each(lambda block, own: _squares(block - centres[own]), _blocks(rows), _blocks(labels))
    return torch.cat(list(blocks))


def _fill_empty(sums: Tensor, counts: Tensor, rows: Tensor, labels: Tensor, distances: Tensor, each: _Map) -> None:
    """Give each empty cluster the row that is farthest from its own centre, while there are rows that are off it."""
    empty = (counts == 0).nonzero()[:, 0]
    farthest = distances.topk(len(empty)).indices
    farthest = farthest[distances[farthest] > 0]
    _add(sums, counts, rows[farthest], labels[farthest], each, sign=-1)
    labels[farthest] = empty[: len(farthest)]
    _add(sums, counts, rows[farthest], labels[farthest], each)


def _add(sums: Tensor, counts: Tensor, rows: Tensor, labels: Tensor, each: _Map, sign: int = 1) -> None:
    """Add ``rows`` to float64 (k, D) ``sums`` and int64 (k,) ``counts`` of their clusters.

    A product with zeros and ones: on a GPU ``index_add_`` would add in the order in which threads come.
    """

    def of_block(block: Tensor, clusters: Tensor) -> Tensor:
        return block.new_zeros(len(block), len(sums)).scatter_(1, clusters[:, None], 1).T @ block

    counts += sign * torch.bincount(labels, minlength=len(counts))
    for part in each(of_block, _blocks(rows), _blocks(labels)):
        sums.add_(part, alpha=sign)


def _blocks(rows: Tensor, size: int | None = None) -> Sequence[Tensor]:
    return rows.split(size or _BLOCK)  # type: ignore[no-any-return, no-untyped-call]


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1)
