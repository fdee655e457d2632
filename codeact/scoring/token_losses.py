"""The loss of every scored answer token, a file beside each shard, and what is computed from it: selective IFD."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from codeact.base.errors import InputError
from codeact.base.files import atomic_path

Losses = NDArray[np.float16]
_Floats = NDArray[np.float64]


def losses_path(shard: Path) -> Path:
    """Where the losses of a shard's tokens lie."""
    return shard.with_suffix(".token_nll.npy")


def write_losses(shard: Path, losses: Losses) -> None:
    """Write (2, tokens) float16, nats: with the question and without it, of all scored tokens in order of row."""
    with atomic_path(losses_path(shard)) as temporary, temporary.open("wb") as file:
        np.save(file, losses)


def read_losses(shard: Path, tokens: int) -> Losses:
    """Read what ``write_losses`` wrote.

    Raises:
        InputError: it was not kept, or is not of these ``tokens``.
    """
    path = losses_path(shard)
    try:
        losses: Losses = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(
            f"difficulty s_ifd needs the loss of every token, and there is no {path}; score again with codeact score "
            "--keep-token-nll"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it and score again") from None
    if losses.dtype != np.float16 or losses.shape != (2, tokens):
        raise InputError(f"{path} holds {losses.shape} losses, not (2, {tokens}): delete it and score again")
    return losses


def selective_ifd(shards: Callable[[], Iterator[tuple[Losses, NDArray[np.int64]]]]) -> _Floats:
    """S-IFD (arXiv 2506.01317): IFD over the tokens that the question moves.

    A token's move is its loss given the question less its loss alone. The tokens that count are those whose move is
    larger, up or down, than that of half of all tokens of the data (the lower median, in float16). S-IFD is exp of a
    row's mean move over these.

    Args:
        shards: a pass over the losses (2, tokens) of every shard and the scored tokens (rows,) of its rows.

    Returns:
        (rows of all shards,) float64; 1 where no token counts, NaN where none was scored or one is not finite.
    """
    # A positive float16 is one of 31,745 bit patterns in order of size: so a median of any number of them is counted.
    counts = np.zeros(0x7C01, np.int64)
    for losses, _ in shards():
        moved = np.abs(_moves(losses)).astype(np.float16)
        counts += np.bincount(moved[np.isfinite(moved)].view(np.uint16), minlength=len(counts))
    below = np.cumsum(counts)
    median = np.searchsorted(below, (below[-1] + 1) // 2).astype(np.uint16).view(np.float16)
    parts = [np.empty(0)]
    for losses, tokens in shards():
        moves = _moves(losses)
        kept = np.abs(moves).astype(np.float16) > median
        with np.errstate(over="ignore", invalid="ignore"):
            kept |= ~np.isfinite(moves)
            sums = _by_row(np.where(kept, moves, 0.0), tokens)
            means = np.exp(sums / np.maximum(_by_row(kept.astype(np.float64), tokens), 1))
        parts.append(np.where((tokens > 0) & np.isfinite(means), means, np.nan))
    return np.concatenate(parts)


def _moves(losses: Losses) -> _Floats:
    with np.errstate(invalid="ignore"):
        moves: _Floats = losses[0].astype(np.float64) - losses[1]
    return moves


def _by_row(values: _Floats, tokens: NDArray[np.int64]) -> _Floats:
    """Sums of consecutive runs of ``values``, as long as ``tokens`` says."""
    ends = np.cumsum(tokens)
    sums = np.zeros(len(tokens))
    rows = np.flatnonzero(tokens)
    if len(rows):
        sums[rows] = np.add.reduceat(values, (ends - tokens)[rows])
    return sums
