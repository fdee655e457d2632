"""Samples -> packs of an epoch -> batches of a model: what a training step reads, whatever the padding.

Shapes: L tokens of a sample, T tokens of a batch laid end to end, N samples in it, K of its tokens with a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler

from codeact.base.errors import InputError, one_of, require
from codeact.ops.attention import PackedBatch
from codeact.packing.packs import pack
from codeact.text.conversations import IGNORE

SCOPES = ("epoch", "batch", "sample")

# Item `number` of epoch `epoch`.
Key = tuple[int, int]


class TokenizedSample(Protocol):
    """A sample of L tokens, and what is to be learnt of it."""

    @property
    def input_ids(self) -> npt.NDArray[np.integer[Any]]:
        """(L,) integer."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.integer[Any]]:
        """(L,) integer, -100 where nothing is to be learnt."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dummy:
    """One token and no label: it takes part in a step and adds nothing to its loss."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The items of one epoch: item i holds the samples ``indices[offsets[i]:offsets[i + 1]]``; if none, a dummy."""

    indices: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]


class PackDataset(Dataset[list[TokenizedSample]]):
    """Items that are packs: lists of samples that share a row. Every epoch packs and shuffles anew, by the seed alone.

    The number of items is the same in every epoch (best-fit decreasing opens as many packs in whatever order samples of
    one length come), and with several ranks it is a multiple of ``world_size * items_per_batch``: dummy items without a
    label fill it up, so that no rank waits for another and none trains a pack twice. Items stand in the order in which
    ``DataLoader`` deals them out: ``items_per_batch`` for rank 0, as many for rank 1, and so on, then the next batch.

    Args:
        samples: at least one; each of 1 to ``capacity`` tokens.
        capacity: most tokens in a pack.
        scope: what is packed together. "epoch": all samples, best-fit decreasing. "batch": random batches of
            ``samples_per_batch`` samples, each one item whatever its tokens (laid end to end without padding, where
            its packs end makes no difference to the model). "sample": nothing, every sample is an item of its own.
        seed: epochs follow from it and their number.
        world_size: ranks that share the items. They get items of like cost at the same time.
        items_per_batch: items in one batch of one rank.
        samples_per_batch: samples in an item of scope "batch".
        sort_window: so many batches of all ranks are sorted by cost and then shuffled as batches. 1 keeps batches
            random; more makes the items of one batch, on all ranks, more alike.
        square_cost: what a token's attention to another costs, in units of what a token costs.
        shuffle: False keeps the items in their first order, for evaluation.
        apart: (len(samples),), or None; samples of different numbers never share an item of scope "epoch".
        shared: most tokens of an item that holds several samples, if fewer than ``capacity``.

    Raises:
        InputError: there is no sample, one is empty or longer than ``capacity``, or its labels do not fit.
    """

    def __init__(
        self,
        samples: Sequence[TokenizedSample],
        capacity: int,
        scope: str = "epoch",
        seed: int = 0,
        world_size: int = 1,
        items_per_batch: int = 1,
        samples_per_batch: int = 1,
        sort_window: int = 1,
        square_cost: float = 1 / 8192,
        shuffle: bool = True,
        apart: npt.NDArray[np.int64] | None = None,
        shared: int | None = None,
    ) -> None:
        self.scope = one_of("pack scope", scope, SCOPES)
        self.lengths = _checked_lengths(samples, capacity)
        self.samples = samples
        self.capacity = capacity
        self.seed = seed
        self.world_size = world_size
        self.items_per_batch = items_per_batch
        self.samples_per_batch = samples_per_batch
        self.sort_window = sort_window
        self.shuffle = shuffle
        self.apart = np.zeros(len(samples), dtype=np.int64) if apart is None else apart
        self.shared = capacity if shared is None else min(shared, capacity)
        self.costs = self.lengths + square_cost * self.lengths.astype(np.float64) ** 2
        self.epoch = 0
        self._planned: tuple[int, _Plan] | None = None
        self._length = len(self._plan(0).offsets) - 1

    def __len__(self) -> int:
        """Items in an epoch, dummies included, of all ranks."""
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Make plain integer keys, and ``EpochSampler``, mean this epoch."""
        self.epoch = epoch

    def __getitem__(self, key: int | Key) -> list[TokenizedSample]:
        """Return the samples of an item: of the current epoch, or of the epoch in the key."""
        epoch, number = key if isinstance(key, tuple) else (self.epoch, key)
        if not 0 <= number < self._length:
            raise IndexError(f"item {number} of {self._length}")
        plan = self._plan(epoch)
        members = plan.indices[plan.offsets[number] : plan.offsets[number + 1]]
        return [self.samples[i] for i in members.tolist()] or [self._dummy()]

    def largest_pass(self) -> int:
        """Tokens of the batch that would hold the longest items of epoch 0; of scope "sample" padded to the longest."""
        if self.scope == "sample":
            return int(self.items_per_batch * self.lengths.max())
        plan = self._plan(0)
        ends = np.concatenate([[0], np.cumsum(self.lengths[plan.indices])])
        tokens = np.sort(np.diff(ends[plan.offsets]))
        return int(tokens[-self.items_per_batch :].sum())

    def _dummy(self) -> TokenizedSample:
        token = np.asarray(self.samples[0].input_ids[:1], dtype=np.int32)
        return _Dummy(input_ids=token, labels=np.full(1, IGNORE, dtype=np.int32))

    def _plan(self, epoch: int) -> _Plan:
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._make_plan(epoch))
        return self._planned[1]

    def _make_plan(self, epoch: int) -> _Plan:
        rng = np.random.default_rng([self.seed, epoch])
        count = len(self.samples)
        order = rng.permutation(count) if self.shuffle else np.arange(count)
        if self.scope == "epoch":
            indices, offsets = self._packs(order)
        else:
            size = self.samples_per_batch if self.scope == "batch" else 1
            indices, offsets = order, np.append(np.arange(0, count, size), count)
        items = self._arrange(np.add.reduceat(self.costs[indices], offsets[:-1]), rng)
        sizes = np.append(np.diff(offsets), 0)[items]  # the last of them, -1, is a dummy
        starts = np.repeat(offsets[items] - (np.cumsum(sizes) - sizes), sizes)
        return _Plan(indices=indices[starts + np.arange(len(starts))], offsets=np.concatenate([[0], np.cumsum(sizes)]))

    def _packs(self, order: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Best-fit decreasing over the samples that may share a pass; one that is longer than those has its own."""
        indices, sizes = [], []
        for key in np.unique(self.apart):
            members = order[self.apart[order] == key]
            alone = self.lengths[members] > self.shared
            rest = members[~alone]
            packs = pack(self.lengths[rest], self.shared)
            indices += [members[alone], rest[packs.indices]]
            sizes += [np.ones(int(alone.sum()), dtype=np.int64), np.diff(packs.offsets)]
        return np.concatenate(indices), np.concatenate([[0], np.cumsum(np.concatenate(sizes))])

    def _arrange(self, costs: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Order items so that the ranks' shares of every batch cost much the same; -1 stands for a dummy."""
        width = self.world_size * self.items_per_batch
        items = rng.permutation(len(costs)) if self.shuffle else np.arange(len(costs))
        if self.world_size > 1:
            items = np.append(items, np.full(-len(items) % width, -1))
        costs = np.append(costs, 0.0)
        if self.sort_window > 1:
            window = self.sort_window * width
            for start in range(0, len(items), window):
                part = items[start : start + window]
                items[start : start + window] = part[np.argsort(-costs[part], kind="stable")]
        if self.shuffle:
            # A last batch that is not full stays last, or it would shift the batches after it.
            full = len(items) // width * width
            items = np.append(rng.permutation(items[:full].reshape(-1, width)).ravel(), items[full:])
        return items if self.world_size == 1 else self._share(items.reshape(-1, width), costs)

    def _share(self, batches: npt.NDArray[np.int64], costs: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Deal each batch (row) to the ranks, dearest item first, to the rank that has had least work so far."""
        load = [0.0] * self.world_size
        shared: list[int] = []
        for batch in batches:
            hands: list[list[int]] = [[] for _ in load]
            for item in batch[np.argsort(-costs[batch], kind="stable")].tolist():
                rank = min((r for r in range(len(load)) if len(hands[r]) < self.items_per_batch), key=load.__getitem__)
                hands[rank].append(item)
                load[rank] += float(costs[item])
            shared.extend(item for hand in hands for item in hand)
        return np.array(shared, dtype=np.int64)


def _checked_lengths(samples: Sequence[TokenizedSample], capacity: int) -> npt.NDArray[np.int64]:
    require("samples", samples, "__len__", "a list of samples")
    for number, sample in enumerate(samples):
        require(f"sample {number}", sample, "input_ids", "a sample with input_ids and labels")
    if len(samples) == 0:
        raise InputError("there is no sample to train on or to evaluate")
    lengths = np.fromiter((len(sample.input_ids) for sample in samples), dtype=np.int64, count=len(samples))
    labels = np.fromiter((len(sample.labels) for sample in samples), dtype=np.int64, count=len(samples))
    for wrong, reason in (
        (lengths == 0, "has no token"),
        (lengths != labels, "has not as many labels as tokens"),
        (
            lengths > capacity,
            f"is longer than the {capacity} tokens of a pack; truncate or drop it, or raise max_length",
        ),
    ):
        if wrong.any():
            at = int(wrong.argmax())
            raise InputError(f"sample {at} ({lengths[at]} tokens) {reason}")
    return lengths


class EpochSampler(Sampler[Key]):
    """The items of a ``PackDataset`` in order, each with its epoch.

    The epoch travels in the key, so that a worker process with an old copy of the dataset still reads the right pack.
    ``set_epoch`` here and on the dataset are one thing: whichever of them a data loader calls, it works.
    """

    def __init__(self, dataset: PackDataset) -> None:
        self.dataset = dataset

    def set_epoch(self, epoch: int) -> None:
        """Go to another epoch."""
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        """Items in an epoch."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[Key]:
        """(epoch, 0), (epoch, 1), ... of the epoch that is current now."""
        epoch = self.dataset.epoch
        return ((epoch, number) for number in range(len(self.dataset)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackCollator:
    """Packs laid end to end in one row: no padding, whatever their number.

    Returns ``input_ids`` and ``position_ids`` int64 (1, T), ``cu_seq_lens_q`` and ``_k`` int32 (N + 1,),
    ``max_length_q`` and ``_k`` int, ``use_cache`` False, and

    - with ``supervised_only``: ``logits_to_keep`` bool (T,), True where the next token has a label, and those K next
      tokens as ``labels`` and ``shift_labels`` int64 (K,): the head sees no other row;
    - without: ``labels`` and ``shift_labels`` int64 (1, T).

    ``shift_labels[t]`` is what row t predicts; the first token of a sample is nobody's target.
    """

    supervised_only: bool = True

    def __call__(self, items: Sequence[Sequence[TokenizedSample]]) -> dict[str, Any]:
        """Collate the items of one batch."""
        samples = [sample for item in items for sample in item]
        inputs = PackedBatch.from_samples([sample.input_ids for sample in samples]).model_inputs(torch.device("cpu"))
        labels = torch.from_numpy(np.concatenate([sample.labels for sample in samples]).astype(np.int64))
        labels[inputs["cu_seq_lens_q"][:-1].long()] = IGNORE
        shift = F.pad(labels, (0, 1), value=IGNORE)[1:]
        if not self.supervised_only:
            return {**inputs, "labels": labels[None], "shift_labels": shift[None]}
        keep = shift != IGNORE
        # Trainer counts what `labels` is there for; the loss reads shift_labels.
        return {**inputs, "labels": shift[keep], "shift_labels": shift[keep], "logits_to_keep": keep}


@dataclass(frozen=True, slots=True, kw_only=True)
class PadCollator:
    """Samples as rows, padded on the right to the longest of the batch, or to ``length``.

    Returns ``input_ids``, ``attention_mask``, ``labels`` and ``shift_labels``: int64 (N, L). What is padding is known
    from the lengths, never from ``pad_id``, so 0 or an id that the text uses are as good as any.
    """

    pad_id: int = 0
    length: int | None = None

    def __call__(self, items: Sequence[Sequence[TokenizedSample]]) -> dict[str, Any]:
        """Collate the items of one batch."""
        samples = [sample for item in items for sample in item]
        longest = max(len(sample.input_ids) for sample in samples)
        shape = (len(samples), longest if self.length is None else self.length)
        ids = np.full(shape, self.pad_id, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        for row, sample in enumerate(samples):
            used = len(sample.input_ids)
            ids[row, :used] = sample.input_ids
            mask[row, :used] = 1
            labels[row, 1:used] = sample.labels[1:]
        shift = F.pad(torch.from_numpy(labels), (0, 1), value=IGNORE)[:, 1:].contiguous()
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
            "shift_labels": shift,
        }
