"""The strategies themselves: lengths -> which samples share a row, and which rows a forward pass -> what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from codeact.base.errors import one_of
from codeact.ops.flops import ModelShape
from codeact.packing.packs import pack

Integers = npt.NDArray[np.int64]

STRATEGIES: Mapping[str, str] = {
    "max_length": "max_length",
    "dynamic_pad": "dynamic_pad",
    "dynamic_pad_sorted": "dynamic_pad, sorted by length",
    "paper_pack": "the paper's packing",
    "dynamic_pack_batch": "dynamic_pack, batch scope",
    "dynamic_pack_epoch": "dynamic_pack, epoch scope",
}
"""Names, and how they are shown."""


def strategy_of(pad_mode: str, pack_scope: str) -> str:
    """The name of what these flags of training ask for."""
    return f"dynamic_pack_{pack_scope}" if pad_mode == "dynamic_pack" else pad_mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Samples -> rows -> forward passes.

    Attributes:
        samples: (samples,) int64, positions in ``lengths``, row after row.
        row_offsets: (rows + 1,) int64; row i holds ``samples[row_offsets[i]:row_offsets[i + 1]]``.
        forward_offsets: (forwards + 1,) int64; forward pass i runs rows ``forward_offsets[i]`` to the next.
        width: what a row is padded to: "capacity", "longest" (row of the forward pass) or "own" (not padded).
    """

    samples: Integers
    row_offsets: Integers
    forward_offsets: Integers
    width: str

    @property
    def isolated(self) -> bool:
        """Whether attention is computed within samples; otherwise over all of the padded row."""
        return self.width == "own"

    def row_tokens(self, lengths: Integers) -> Integers:
        """Real tokens of every row, (rows,)."""
        return np.add.reduceat(lengths[self.samples], self.row_offsets[:-1])

    def row_widths(self, lengths: Integers, capacity: int) -> Integers:
        """Tokens computed of every row, (rows,)."""
        tokens = self.row_tokens(lengths)
        if self.width == "own":
            return tokens
        if self.width == "capacity":
            return np.full_like(tokens, capacity)
        longest = np.maximum.reduceat(tokens, self.forward_offsets[:-1])
        return np.repeat(longest, np.diff(self.forward_offsets))


def plan(strategy: str, lengths: Integers, capacity: int, batch_size: int, seed: int) -> Plan:
    """Plan an epoch; ``lengths``: (samples,), 1 to ``capacity``, at least one.

    Random orders are the same for every strategy, so micro-batch i of the paper's packing and of "dynamic_pack_batch"
    holds the samples of micro-batch i of "dynamic_pad". In epoch scope every pack is a forward pass of its own. In
    batch scope a micro-batch is one, its packs laid end to end: where one ends makes no difference to the model, and
    they are counted as rows to compare with the paper's.

    Raises:
        InputError: there is no such strategy.
    """
    one_of("strategy", strategy, STRATEGIES)
    count, packs_all = len(lengths), strategy == "dynamic_pack_epoch"
    order = np.arange(count) if packs_all else np.random.default_rng(seed).permutation(count)
    if strategy == "dynamic_pad_sorted":
        order = np.argsort(lengths, kind="stable")
    width = {"max_length": "capacity", "dynamic_pack_batch": "own", "dynamic_pack_epoch": "own"}.get(
        strategy, "longest"
    )
    if strategy in ("max_length", "dynamic_pad", "dynamic_pad_sorted"):  # a row holds one sample
        forwards = np.append(np.arange(0, count, batch_size), count)
        return Plan(samples=order, row_offsets=np.arange(count + 1), forward_offsets=forwards, width=width)
    algorithm, size = ("next_fit" if strategy == "paper_pack" else "bfd"), (count if packs_all else batch_size)
    samples, sizes = [], []
    for start in range(0, count, size):
        batch = order[start : start + size]
        packs = pack(lengths[batch], capacity, algorithm)
        samples.append(batch[packs.indices])
        sizes.append(np.diff(packs.offsets))
    rows = _offsets(np.concatenate(sizes))
    forwards = np.arange(len(rows)) if packs_all else _offsets(np.array([len(each) for each in sizes]))
    return Plan(samples=np.concatenate(samples), row_offsets=rows, forward_offsets=forwards, width=width)


def _offsets(sizes: Integers) -> Integers:
    return np.concatenate([[0], np.cumsum(sizes)])


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyStats:
    """One epoch under one strategy.

    Attributes:
        strategy: a key of ``STRATEGIES``.
        tokens: real ones; the same for every strategy, as are ``samples`` and ``supervised`` (tokens with a label).
        padding: tokens computed and thrown away.
        rows, forwards: rows of all forward passes, and how many passes.
        largest_forward: tokens computed, padding included, by the largest forward pass: what peak memory grows with.
        fill: real tokens / (rows x capacity).
        squared_lengths: sum of length² over what attention runs on: samples in our packs, else whole padded rows. In
            the paper's packs samples attend to one another, which is part of that cost and also changes what is learnt.
        attention_flops: estimate from it, forward and backward (``ModelShape.attention_flops``). Causality is taken to
            halve it everywhere; attention under a padding mask often computes both halves.
        activation_bytes: estimate for the largest forward pass (``ModelShape.activation_bytes``), in 16 bits.
        logit_bytes: estimate of float32 logits and their gradient for the forward pass that has most: ours forms them
            for supervised tokens only (and none at all with a fused loss), the others for every token.
    """

    strategy: str
    samples: int
    tokens: int
    supervised: int
    padding: int
    rows: int
    forwards: int
    largest_forward: int
    fill: float
    squared_lengths: int
    attention_flops: int | None
    activation_bytes: int | None
    logit_bytes: int | None

    @property
    def padding_share(self) -> float:
        """Padding / tokens computed."""
        return self.padding / (self.tokens + self.padding)


def strategy_stats(
    strategy: str, lengths: Integers, supervised: Integers, capacity: int, batch_size: int, shape: ModelShape | None,
    seed: int,
) -> StrategyStats:  # fmt: skip
    """Plan one strategy and count what it computes; the arguments of ``codeact.padding.stats.pack_stats``, valid."""
    rows = plan(strategy, lengths, capacity, batch_size, seed)
    tokens, widths = int(lengths.sum()), rows.row_widths(lengths, capacity)
    forwards = np.add.reduceat(widths, rows.forward_offsets[:-1])
    largest, logits = int(forwards.max()), int(forwards.max())
    if rows.isolated:
        logits = int(np.add.reduceat(rows.row_tokens(supervised), rows.forward_offsets[:-1]).max())
    squared = int(np.square(lengths if rows.isolated else widths).sum())
    return StrategyStats(
        strategy=strategy,
        samples=len(lengths),
        tokens=tokens,
        supervised=int(supervised.sum()),
        padding=int(widths.sum()) - tokens,
        rows=len(widths),
        forwards=len(forwards),
        largest_forward=largest,
        fill=tokens / (len(widths) * capacity),
        squared_lengths=squared,
        attention_flops=None if shape is None else shape.attention_flops(squared),
        activation_bytes=None if shape is None else shape.activation_bytes(largest),
        logit_bytes=None if shape is None else shape.logit_bytes(logits),
    )
