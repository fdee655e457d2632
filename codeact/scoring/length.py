"""How much a score is about nothing but the length of the answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float | None:
    """Spearman's rank correlation of two arrays (n,), ties at their mean rank, over the pairs that are both finite.

    Returns:
        -1 to 1; None where it is not defined: fewer than two pairs, or one side is all the same.
    """
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = np.isfinite(left) & np.isfinite(right)
    ranks = [_ranks(side[both]) for side in (left, right)]
    spread = [float(rank.std()) if len(rank) else 0.0 for rank in ranks]
    if not all(spread):
        return None
    return float(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / (spread[0] * spread[1]))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, groups, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[groups]


def correlation_text(score: str, value: float | None) -> str:
    """In a line for people."""
    return f"Spearman({score}, answer tokens) {'is not defined' if value is None else f'{value:.2f}'}"
