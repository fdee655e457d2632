"""Sequences that begin alike: which of them share their beginning in a pack, so that it is computed once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from codeact.packing.packs import pack

SHORTEST = 8  # tokens of a prefix: below that the pieces cost more than they save


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedPrefixes:
    """What sequences share.

    ``group``: (N,) int64, those with one number begin with the same ``depth`` tokens; -1: with none that others share.
    ``depth``: (N,) int64, tokens of the shared beginning, 0 where there is none.
    """

    group: npt.NDArray[np.int64]
    depth: npt.NDArray[np.int64]

    @classmethod
    def none(cls, count: int) -> SharedPrefixes:
        """Of ``count`` sequences that share nothing."""
        return cls(group=np.full(count, -1), depth=np.zeros(count, np.int64))

    def items(
        self, lengths: npt.NDArray[np.int64], capacity: int
    ) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
        """What goes into a pack as a whole: sequences alone, and as many of a group as fit behind their beginning.

        Args:
            lengths: (N,) tokens of each sequence; of those in groups none is over ``capacity``.
            capacity: tokens that a pack holds.

        Returns:
            The sequences of every item, and (items,) its tokens, a beginning counted once.
        """
        order = np.argsort(self.group, kind="stable")
        bounds = np.flatnonzero(np.diff(self.group[order])) + 1
        own = lengths - self.depth
        items, sizes = [], []
        for members in np.split(order, bounds):
            depth = int(self.depth[members[0]]) if len(members) else 0
            if not depth:
                items += np.split(members, len(members)) if len(members) else []
                sizes += lengths[members].tolist()
                continue
            for some in pack(own[members], capacity - depth):
                items.append(members[some])
                sizes.append(depth + int(own[members[some]].sum()))
        return items, np.array(sizes, np.int64)


@dataclass(slots=True)
class _Node:
    """Sorted sequences ``left`` to ``right`` that begin with the same ``depth`` tokens."""

    depth: int
    left: int
    saved: int = 0
    groups: list[tuple[int, int, int]] = field(default_factory=list)  # left, right, depth: the best for its children


def shared_prefixes(heads: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> SharedPrefixes:
    """Find groups that save many tokens, where a sequence shares one beginning at most.

    Sequences that begin alike are a subtree of the trie of them all. In each, from the leaves up, what is saved if all
    of it shares its beginning is held against the best for its children.

    Args:
        heads: of each sequence the tokens that may be shared.
        lengths: tokens of each whole sequence; what is over ``capacity`` shares nothing.
        capacity: tokens that a pack holds: every pack of a group has the beginning once.
    """
    found = SharedPrefixes.none(len(heads))
    fit = [i for i, head in enumerate(heads) if len(head) >= SHORTEST and lengths[i] <= capacity]
    order = sorted(fit, key=lambda i: list(heads[i]))
    tokens = np.cumsum([0, *(lengths[i] for i in order)]).tolist()

    def close(node: _Node, right: int) -> None:
        count = right - node.left + 1
        own = tokens[right + 1] - tokens[node.left] - count * node.depth
        packs = max(1, -(-own // max(1, capacity - node.depth)))
        saved = node.depth * (count - packs)
        if node.depth >= SHORTEST and saved > node.saved:
            node.saved, node.groups = saved, [(node.left, right, node.depth)]

    for number, (left, right, depth) in enumerate(_walk([heads[i] for i in order], close)):
        members = order[left : right + 1]
        found.group[members], found.depth[members] = number, depth
    return found


def _walk(heads: list[Sequence[int]], close: Callable[[_Node, int], None]) -> list[tuple[int, int, int]]:
    """Close every node of the trie of sorted ``heads``, children first; the groups of its root."""
    stack = [_Node(0, 0)]
    for place in range(1, len(heads) + 1):
        depth = _common(heads[place - 1], heads[place]) if place < len(heads) else 0
        left = place - 1
        child = None
        while depth < stack[-1].depth:
            child = stack.pop()
            close(child, place - 1)
            left = child.left
            if depth <= stack[-1].depth:
                _adopt(stack[-1], child)
                child = None
        if depth > stack[-1].depth:
            stack.append(_Node(depth, left))
            if child is not None:
                _adopt(stack[-1], child)
    return stack[0].groups


def _adopt(parent: _Node, child: _Node) -> None:
    parent.saved += child.saved
    parent.groups += child.groups


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences have in common from their first on."""
    most = min(len(left), len(right))
    return bisect_left(range(1, most + 1), True, key=lambda n: left[:n] != right[:n])


def pieces(
    sequences: Sequence[Sequence[int]], group: Sequence[int], depth: Sequence[int]
) -> tuple[list[Sequence[int]], list[int], list[int]]:
    """Take the beginnings out of the sequences of a pack.

    Returns:
        The pieces, a beginning before the first that goes on it; of each the piece that it goes on, or -1; and of each
        sequence the piece that is the rest of it.
    """
    parts: list[Sequence[int]] = []
    goes_on: list[int] = []
    rests: list[int] = []
    beginnings: dict[int, int] = {-1: -1}
    for sequence, own, tokens in zip(sequences, group, depth, strict=True):
        if own not in beginnings:
            beginnings[own] = len(parts)
            parts.append(sequence[:tokens])
            goes_on.append(-1)
        rests.append(len(parts))
        parts.append(sequence[tokens:])
        goes_on.append(beginnings[own])
    return parts, goes_on, rests
