"""Losses on held-out rows, by arm and seed -> by how much an arm differs from another, and whether that is noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4_000

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean loss less another, in nats, and the interval that holds 95 % of its resamples."""

    mean: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def differences(
    arm: _Floats, other: _Floats, tokens: NDArray[np.int64], seed: int = 0
) -> tuple[Difference, Difference]:
    """How much more an arm loses than another on the same rows: for each token, and for each row.

    Rows are resampled in pairs, and the seeds of both arms each for itself, so that the interval holds what other
    held-out rows and other trainings would have changed. With one seed it holds the rows alone.

    Args:
        arm, other: (seeds, rows) float64, the sums of the losses of each row's answer tokens; seeds may differ.
        tokens: (rows,) how many tokens that is, at least 1.
        seed: of the resamples.
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), RESAMPLES).astype(np.float64)
    results = []
    for scale, size in ((1.0, tokens.astype(np.float64)), (1.0 / tokens, np.ones(len(tokens)))):
        # (resamples, seeds): the mean of each training on each resample of the rows
        sides = [(weights @ (side * scale).T) / (weights @ size)[:, None] for side in (arm, other)]
        means = [np.take_along_axis(side, rng.integers(0, side.shape[1], side.shape), 1).mean(axis=1) for side in sides]
        low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
        mean = float(((arm.mean(axis=0) - other.mean(axis=0)) * scale).sum() / size.sum())
        results.append(Difference(mean, float(low), float(high)))
    return results[0], results[1]
