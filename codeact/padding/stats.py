"""What every padding and packing strategy computes for given sample lengths, before anything is trained.

records -> lengths -> plan of every strategy -> StrategyStats -> table, JSON; and the picture of codeact.padding.figure
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from codeact.base.console import aligned, percent, size
from codeact.base.errors import InputError
from codeact.base.files import atomic_path
from codeact.data.records import RecordSet, open_records
from codeact.ops.flops import ModelShape
from codeact.packing.packs import pack
from codeact.padding.strategies import STRATEGIES, Integers, StrategyStats, strategy_stats
from codeact.text.conversations import BLOCK_ROWS, IGNORE, Refused, encode_conversations

__all__ = ["PackReport", "StrategyStats", "pack_stats", "stats_for_data", "strategy_table"]


def pack_stats(
    lengths: Sequence[int] | npt.ArrayLike,
    supervised: Sequence[int] | npt.ArrayLike,
    capacity: int,
    *,
    batch_size: int = 16,
    shape: ModelShape | None = None,
    seed: int = 42,
) -> list[StrategyStats]:
    """Compare all strategies on one epoch.

    Args:
        lengths: (samples,) tokens of each, 1 to ``capacity``.
        supervised: (samples,) how many of them carry a label.
        capacity: tokens of a row: the maximum length, and what a pack may hold.
        batch_size: samples of a micro-batch; of one forward pass, except where packs are forward passes.
        shape: of the model; None: no FLOPs and bytes.
        seed: of the random order.

    Returns:
        In the order of ``STRATEGIES``.

    Raises:
        InputError: no sample, a length out of range, or arguments that do not fit together.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    tokens, labels = np.asarray(lengths, dtype=np.int64), np.asarray(supervised, dtype=np.int64)
    if not tokens.size:
        raise InputError("there is no sample to pack")
    if tokens.shape != labels.shape:
        raise InputError(
            f"lengths has shape {tokens.shape}, supervised {labels.shape}; they must be of the same samples"
        )
    pack(tokens, capacity)  # for its checks: it names the first bad length
    if (labels < 0).any() or (labels > tokens).any():
        raise InputError("supervised holds a number below 0 or over the sample's length")
    return [strategy_stats(name, tokens, labels, capacity, batch_size, shape, seed) for name in STRATEGIES]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """The strategies on one data set.

    Attributes:
        data, tokenizer, model_type, capacity, batch_size, seed: what was asked for.
        rows: of the data set.
        truncated: samples that were cut to the capacity.
        refused: rows that give no sample, by reason (``codeact.text.conversations.Refused``).
        shape: of the model beside the tokenizer; None if there is none.
        lengths: (samples,) int64, tokens of every sample: what ``codeact.padding.figure`` draws.
        strategies: one of each.
    """

    data: str
    tokenizer: str
    model_type: str
    capacity: int
    batch_size: int
    seed: int
    rows: int
    truncated: int
    refused: dict[str, int]
    shape: ModelShape | None
    lengths: Integers
    strategies: list[StrategyStats]

    def table(self) -> str:
        """Markdown, aligned so that it reads as plain text too."""
        return strategy_table(self.strategies)

    def summary(self) -> str:
        """One line about the samples."""
        first, refused = self.strategies[0], _listed(dict(sorted(self.refused.items()))) or "none"
        return (
            f"{self.data}: {first.samples:,} samples of {self.rows:,} rows ({self.truncated:,} truncated; refused: "
            f"{refused}), {first.tokens:,} tokens, {first.supervised:,} supervised; "
            f"median {np.median(self.lengths):.0f}, longest {self.lengths.max():,}"
        )

    def write_json(self, path: str | Path) -> None:
        """Write everything but ``lengths``.

        Raises:
            InputError: the file cannot be written.
        """
        content = dataclasses.asdict(dataclasses.replace(self, lengths=np.array([], np.int64)))
        del content["lengths"]
        for fields, stats in zip(content["strategies"], self.strategies, strict=True):
            fields["padding_share"] = stats.padding_share
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def stats_for_data(
    data: str | Path | RecordSet,
    tokenizer: str,
    capacity: int,
    *,
    model_type: str = "chat",
    on_overflow: str = "truncate",
    batch_size: int = 16,
    seed: int = 42,
) -> PackReport:
    """Encode a data set as training does and compare the strategies on it.

    Args:
        data: what ``open_records`` opens, in any of the usual forms.
        tokenizer: folder or hub name; where a model's configuration lies there too, FLOPs and bytes are estimated.
        model_type, on_overflow: see ``encode_conversations``.
        capacity, batch_size, seed: see ``pack_stats``.

    Raises:
        InputError: the data or the tokenizer cannot be read, no sample is left, or a sample overflows under "error".
    """
    records = open_records(data)  # which gives back what is open already
    encoder, shape = _load(tokenizer)
    kept: list[tuple[int, int]] = []
    truncated, refused = 0, Counter[str]()
    for start in range(0, len(records), BLOCK_ROWS):  # block by block: only lengths are kept
        block = records.rows(start, start + BLOCK_ROWS)
        for result in encode_conversations(block, encoder, model_type, capacity, on_overflow):
            if isinstance(result, Refused):
                refused[result.reason] += 1
            else:
                truncated += result.truncated
                kept.append((len(result.input_ids), int(np.count_nonzero(result.labels[1:] != IGNORE))))
    if not kept:
        raise InputError(f"{records.source}: no row gives a sample of at most {capacity:,} tokens ({_listed(refused)})")
    lengths, supervised = np.array(kept, dtype=np.int64).T
    return PackReport(
        data=records.source,
        tokenizer=tokenizer,
        model_type=model_type,
        capacity=capacity,
        batch_size=batch_size,
        seed=seed,
        rows=len(records),
        truncated=truncated,
        refused=dict(refused),
        shape=shape,
        lengths=lengths,
        strategies=pack_stats(lengths, supervised, capacity, batch_size=batch_size, shape=shape, seed=seed),
    )


def _listed(refused: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in refused.items())


def _load(name: str) -> tuple[Any, ModelShape | None]:
    """The tokenizer, and the shape of the model of that name."""
    from transformers import AutoConfig

    from codeact.models.loading import load_tokenizer

    tokenizer = load_tokenizer(name)
    with suppress(OSError, ValueError):  # a tokenizer alone: lengths can be counted, FLOPs cannot
        return tokenizer, ModelShape.from_config(AutoConfig.from_pretrained(name, trust_remote_code=False))
    return tokenizer, None


def strategy_table(strategies: Sequence[StrategyStats]) -> str:
    """Return a Markdown table, aligned so that it reads as plain text too; no estimates without a model's shape."""
    table = [["strategy", "rows", "row fill", "forwards", "padding", "share", "largest forward"]]
    for s in strategies:
        padding = [f"{s.padding:,}", percent(s.padding_share), f"{s.largest_forward:,} tokens"]
        table.append([STRATEGIES[s.strategy], f"{s.rows:,}", percent(s.fill), f"{s.forwards:,}", *padding])
    if strategies[0].attention_flops is None:
        columns = [["sum of length²", *(f"{s.squared_lengths:.3g}" for s in strategies)]]
    else:
        columns = [["attention", *(f"{(s.attention_flops or 0) / 1e12:,.2f} TFLOP" for s in strategies)]]
        columns.append(["activations", *(size(s.activation_bytes or 0) for s in strategies)])
        columns.append(["logits", *(size(s.logit_bytes or 0) for s in strategies)])
    return aligned([[*row, *more] for row, *more in zip(table, *columns, strict=True)], 1, markdown=True)
