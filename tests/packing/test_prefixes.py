"""Beginnings that sequences share: they are as long as they can be, and nothing of a sequence is lost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeact.packing import prefixes
from codeact.packing.prefixes import SharedPrefixes, pieces, shared_prefixes

ROOM = 10_000


def saved(heads, groups):
    """What partition ``groups`` (lists of sequences) saves where each shares all that its members have in common."""
    return sum(common(heads, members) * (len(members) - 1) for members in groups)


def common(heads, members):
    some = [heads[i] for i in members]
    same = [len(set(tokens)) == 1 for tokens in zip(*some, strict=False)]
    return len(list(itertools.takewhile(bool, same)))


def best(heads, members, depth=0):
    """What ``members``, which begin with the same ``depth`` tokens, save: all as one, or by their next token."""
    whole = depth * (len(members) - 1)
    longer = [i for i in members if len(heads[i]) > depth]
    if not longer:
        return whole
    by_next = [[i for i in longer if heads[i][depth] == token] for token in {heads[i][depth] for i in longer}]
    return max(whole, sum(best(heads, some, depth + 1) for some in by_next))


def members_of(found):
    groups = {}
    for i, number in enumerate(found.group.tolist()):
        groups.setdefault((number, i if number < 0 else None), []).append(i)
    return list(groups.values())


@given(st.lists(st.lists(st.integers(0, 1), max_size=7), max_size=6))
def test_the_best_of_each_subtree(heads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "SHORTEST", 1)
        found = shared_prefixes(heads, [len(head) + 2 for head in heads], ROOM)
    groups = members_of(found)
    for members in groups:
        shared = {heads[i][: found.depth[i]].__repr__() for i in members}
        assert len(shared) == 1
        assert {found.depth[i] for i in members} == {common(heads, members) if len(members) > 1 else 0}
    assert saved(heads, groups) == best(heads, list(range(len(heads))))


def test_a_long_beginning_of_all_or_longer_ones_of_a_few():
    """The five examples before every question, or each question before its four answers: what saves more."""
    examples = list(range(100))
    for question, shares in ((20, "examples"), (400, "questions")):
        heads = [[*examples, *([1000 + q] * question)] for q in range(3) for _ in range(4)]
        found = shared_prefixes(heads, [len(head) + 9 for head in heads], ROOM)
        assert len(set(found.group.tolist())) == (1 if shares == "examples" else 3)
        assert set(found.depth.tolist()) == {100 if shares == "examples" else 500}


def test_what_saves_nothing():
    one = list(range(50))
    assert not shared_prefixes([one], [60], ROOM).depth.any()
    assert not shared_prefixes([one[:7]] * 9, [60] * 9, ROOM).depth.any(), "too short to pay"
    assert not shared_prefixes([one] * 2, [60] * 2, 69).depth.any(), "each in a pack of its own, so computed twice"
    assert shared_prefixes([one] * 2, [60] * 2, 70).depth.tolist() == [50, 50]
    assert shared_prefixes([one] * 3, [60, 60, 71], 70).group.tolist() == [0, 0, -1], "the longest fills a pass"
    assert not len(shared_prefixes([], [], 70).group)


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(2, 30)), max_size=30), st.integers(50, 90))
def test_items_hold_every_sequence_once_and_fit(drawn, capacity):
    group = np.array([number for number, _ in drawn], np.int64)
    depth = np.where(group < 0, 0, 10 + group)
    lengths = depth + np.array([own for _, own in drawn], np.int64)
    items, sizes = SharedPrefixes(group=group, depth=depth).items(lengths, capacity)
    assert sorted(np.concatenate([np.empty(0, int), *items]).tolist()) == list(range(len(drawn)))
    for members, size in zip(items, sizes.tolist(), strict=True):
        assert len(set(group[members])) == 1
        assert len(members) == 1 or group[members[0]] >= 0
        assert size == depth[members[0]] + (lengths - depth)[members].sum()
        assert size <= max(capacity, lengths[members].max())


@given(st.lists(st.tuples(st.integers(-1, 2), st.lists(st.integers(0, 9), min_size=1, max_size=5)), max_size=8))
def test_pieces_are_the_sequences(drawn):
    heads = {-1: [], 0: [7] * 3, 1: [8] * 4, 2: [9]}
    sequences = [[*heads[number], *rest] for number, rest in drawn]
    group = [number for number, _ in drawn]
    parts, goes_on, rests = pieces(sequences, group, [len(heads[number]) for number in group])
    assert len(parts) == len(drawn) + len({*group} - {-1})
    for sequence, rest in zip(sequences, rests, strict=True):
        before = goes_on[rest]
        assert before < rest
        assert [*(parts[before] if before >= 0 else []), *parts[rest]] == sequence
        assert before < 0 or goes_on[before] == -1
