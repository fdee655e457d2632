"""Every sample once an epoch, on one rank, in packs that the seed alone decides."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerate.data_loader import DataLoaderShard, prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from codeact import pack
from codeact.base.errors import InputError
from codeact.models.isolation import PassRule
from codeact.training.dataset import EpochSampler, PackCollator, PackDataset, PadCollator


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    input_ids: np.ndarray
    labels: np.ndarray


def sample(ids, answer):
    """The first ``answer`` ids are the prompt."""
    ids = np.asarray(ids, dtype=np.int32)
    return TokenizedSample(ids, np.where(np.arange(len(ids)) < answer, -100, ids).astype(np.int32))


def make_samples(count, longest=60, seed=0):
    """TokenizedSample i begins with the ids i // 256, i % 256, so that it can be told wherever it turns up."""
    rng = np.random.default_rng(seed)
    return [
        sample([i // 256, i % 256, *rng.integers(0, 256, int(rng.integers(1, longest - 1)))], answer=2)
        for i in range(count)
    ]


def members(item):
    """Numbers of an item's samples; none for a dummy."""
    return [int(s.input_ids[0]) * 256 + int(s.input_ids[1]) for s in item if len(s.input_ids) > 1]


def members_of_the_first(items):
    """A collate_fn: by name, as a worker that is not forked gets a pickled one."""
    return members(items[0])


def epoch_of(dataset, epoch):
    return [members(dataset[epoch, number]) for number in range(len(dataset))]


@pytest.mark.parametrize("scope", ["epoch", "batch", "sample"])
@pytest.mark.parametrize(("world_size", "items_per_batch"), [(1, 1), (1, 3), (2, 1), (4, 3)])
@pytest.mark.parametrize("sort_window", [1, 4])
def test_every_sample_once_in_every_epoch(scope, world_size, items_per_batch, sort_window):
    dataset = PackDataset(
        make_samples(203),
        64,
        scope,
        world_size=world_size,
        items_per_batch=items_per_batch,
        samples_per_batch=5,
        sort_window=sort_window,
    )
    for epoch in range(3):
        items = epoch_of(dataset, epoch)
        assert sorted(number for item in items for number in item) == list(range(203))
        if world_size > 1:
            assert len(items) % (world_size * items_per_batch) == 0
            assert sum(not item for item in items) < world_size * items_per_batch
        else:
            assert all(items)


def test_epoch_scope_packs_as_well_as_pack():
    samples = make_samples(500)
    lengths = [len(s.input_ids) for s in samples]
    dataset = PackDataset(samples, 64)
    assert len(dataset) == len(pack(lengths, 64))
    for epoch in range(3):
        assert max(sum(lengths[i] for i in item) for item in epoch_of(dataset, epoch)) <= 64


def test_every_epoch_packs_and_shuffles_anew_from_the_seed():
    samples = make_samples(500)
    first, second = (epoch_of(PackDataset(samples, 64, seed=3), epoch) for epoch in (0, 1))
    assert [len(item) for item in first] != [len(item) for item in second]  # another order
    together = [{frozenset(item) for item in items} for items in (first, second)]
    assert len(together[0] & together[1]) < len(first) / 5  # other packs
    assert epoch_of(PackDataset(samples, 64, seed=3), 1) == second
    assert epoch_of(PackDataset(samples, 64, seed=4), 1) != second
    still = PackDataset(samples, 64, shuffle=False)
    assert epoch_of(still, 0) == epoch_of(still, 1)


def test_batch_scope_keeps_random_batches_together():
    dataset = PackDataset(make_samples(23), 64, "batch", samples_per_batch=5)
    assert sorted(map(len, epoch_of(dataset, 0))) == [3, 5, 5, 5, 5]
    assert {frozenset(item) for item in epoch_of(dataset, 0)} != {frozenset(item) for item in epoch_of(dataset, 1)}


def test_ranks_get_items_of_like_cost():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5.5, 1.0, 3000).astype(int).clip(2, 2000)
    samples = [sample(np.zeros(length), answer=1) for length in lengths]

    def imbalance(window):
        dataset = PackDataset(samples, 2048, world_size=4, sort_window=window, square_cost=1 / 500)
        tokens = [np.array([len(s.input_ids) for s in dataset[0, i]]) for i in range(len(dataset))]
        costs = np.array([t.sum() + (t**2).sum() / 500 for t in tokens]).reshape(-1, 4)
        assert costs.sum(0).max() < 1.01 * costs.sum(0).mean()  # nobody works more in all
        return costs.max(1).sum() / costs.mean(1).sum() - 1  # what the ranks wait for each other

    assert imbalance(16) < 0.05
    assert imbalance(16) < imbalance(1) / 3


def test_sorted_windows_make_batches_of_like_length():
    samples = make_samples(400)

    def padding(window):
        dataset = PackDataset(samples, 64, "sample", items_per_batch=8, sort_window=window)
        lengths = np.array([len(dataset[0, i][0].input_ids) for i in range(400)]).reshape(-1, 8)
        return (lengths.max(1, keepdims=True) - lengths).sum() / lengths.sum()

    assert padding(50) < 0.1 < padding(1)


class TestSampler:
    """Epochs reach the packs on whatever way a loader takes, and also into worker processes."""

    @staticmethod
    def shard(dataset, rank=0, ranks=1, **more):
        loader = DataLoader(dataset, sampler=EpochSampler(dataset), collate_fn=members_of_the_first, **more)
        return prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False)

    def test_accelerate_counts_epochs(self):
        dataset = PackDataset(make_samples(60), 64)
        shard = self.shard(dataset)
        assert isinstance(shard, DataLoaderShard)
        for epoch in range(3):
            assert list(shard) == epoch_of(dataset, epoch)

    def test_two_ranks_share_an_epoch_and_may_skip(self):
        dataset = PackDataset(make_samples(60), 64, world_size=2)
        expected = epoch_of(dataset, 2)
        for rank in (0, 1):
            shard = self.shard(dataset, rank, 2)
            shard.set_epoch(2)
            assert list(shard) == expected[rank::2]
            skipping = skip_first_batches(self.shard(dataset, rank, 2), 3)
            dataset.set_epoch(0)
            skipping.set_epoch(2)
            assert list(skipping) == expected[rank::2][3:]

    def test_workers_with_an_old_copy(self):
        dataset = PackDataset(make_samples(60), 64)
        shard = self.shard(dataset, num_workers=1, persistent_workers=True)
        assert [list(shard) for _ in range(2)] == [epoch_of(dataset, epoch) for epoch in range(2)]

    def test_a_copy_packs_the_same(self):
        dataset = PackDataset(make_samples(60), 64)
        assert epoch_of(pickle.loads(pickle.dumps(dataset)), 5) == epoch_of(dataset, 5)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "there is no sample"),
        ([sample([1, 2], 1), sample([], 0)], r"sample 1 \(0 tokens\) has no token"),
        ([sample([1] * 9, 1)], r"sample 0 \(9 tokens\) is longer than the 8 tokens of a pack; truncate or drop it"),
        ([TokenizedSample(np.ones(3), np.ones(2))], "has not as many labels as tokens"),
    ],
)
def test_bad_samples(samples, message):
    with pytest.raises(InputError, match=message):
        PackDataset(samples, 8)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("switches", "shared"), [((20,), None), ((8, 40), None), ((), 25), ((10,), 30)])
def test_samples_that_may_not_share_a_pass_do_not(switches, shared, world_size):
    rule, samples = PassRule(switches=switches, shared=shared), make_samples(203)
    keys = rule.keys([len(one.input_ids) for one in samples])
    dataset = PackDataset(samples, 64, world_size=world_size, apart=keys, shared=shared)
    for epoch in range(2):
        items = epoch_of(dataset, epoch)
        assert sorted(number for item in items for number in item) == list(range(203))
        assert all(len(set(keys[item])) <= 1 for item in items)
        tokens = [(len(item), sum(len(samples[number].input_ids) for number in item)) for item in items]
        assert all(total <= (64 if count == 1 else shared or 64) for count, total in tokens)
    assert len(epoch_of(dataset, 0)) < 203


def test_unknown_scope_and_item():
    with pytest.raises(InputError, match="pack scope 'epochs' is unknown; choose one of: epoch"):
        PackDataset([sample([1], 0)], 8, "epochs")
    with pytest.raises(IndexError, match="item 1 of 1"):
        PackDataset([sample([1], 0)], 8)[1]


A, B, C = sample([5, 6, 7, 8], 2), sample([9], 0), sample([10, 11, 12], 0)


def test_pack_collator():
    batch = PackCollator()([[A, B], [C]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    for side in "qk":
        assert batch[f"cu_seq_lens_{side}"].tolist() == [0, 4, 5, 8]
        assert batch[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert batch[f"max_length_{side}"] == 4
    assert batch["use_cache"] is False
    assert "attention_mask" not in batch  # it would switch the isolation off
    # C's labels start at its first token, which nothing before it may predict.
    assert batch["logits_to_keep"].tolist() == [False, True, True, False, False, True, True, False]
    assert batch["labels"].tolist() == batch["shift_labels"].tolist() == [7, 8, 11, 12]


def test_pack_collator_with_all_rows():
    batch = PackCollator(supervised_only=False)([[A, B], [C]])
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, -100, -100, 11, 12]]
    assert batch["shift_labels"].tolist() == [[-100, 7, 8, -100, -100, 11, 12, -100]]
    assert "logits_to_keep" not in batch


@pytest.mark.parametrize(("length", "width"), [(None, 4), (6, 6)])
def test_pad_collator(length, width):
    batch = PadCollator(pad_id=0, length=length)([[A], [C], [sample([0, 0], 1)]])  # 0 is a token here as well
    pad = [0] * (width - 4)
    none = [-100] * (width - 4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, *pad], [10, 11, 12, 0, *pad], [0, 0, 0, 0, *pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, *pad], [1, 1, 1, 0, *pad], [1, 1, 0, 0, *pad]]
    assert batch["labels"].tolist() == [
        [-100, -100, 7, 8, *none],
        [-100, 11, 12, -100, *none],
        [-100, 0, -100, -100, *none],
    ]
    assert batch["shift_labels"][0].tolist() == [-100, 7, 8, -100, *none]


@pytest.mark.parametrize("collator", [PackCollator(), PadCollator()])
def test_a_dummy_has_no_targets(collator):
    dataset = PackDataset([A, C], 4, world_size=4)
    batches = [collator([dataset[number]]) for number in range(4)]
    assert sorted(int((batch["shift_labels"] != -100).sum()) for batch in batches) == [0, 0, 2, 2]
