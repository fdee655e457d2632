"""First-fit decreasing in numba, as the trainers that pack with it have it: peers for ``benchmarks.packing``.

Both give the packs of ``codeact.pack(lengths, capacity, "ffd")``, item by item. ``linear`` looks at one bin after the
other, which is axolotl's multipack; ``tree`` finds the first bin that fits in a tree of maxima and is what one would
write who wants it fast. Items are sorted by numpy, in 16 bits where the capacity fits: it then sorts by radix.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def tree(lengths: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Indices and offsets, as those of ``codeact.Packs``; O(n log n)."""
    order = _longest_first(lengths, capacity)
    # Two neighbouring bins of a first fit hold more than one capacity together.
    most_bins = 2 * int(lengths.sum()) // capacity + 2
    return _group(order, *_place_by_tree(lengths[order], capacity, most_bins))


def linear(lengths: Ints, capacity: int) -> tuple[Ints, Ints]:
    """The same by looking at every bin; O(n x bins)."""
    order = _longest_first(lengths, capacity)
    return _group(order, *_place_by_scan(lengths[order], capacity))


def _longest_first(lengths: Ints, capacity: int) -> Ints:
    keys: Any = capacity - lengths
    return np.argsort(keys.astype(np.uint16) if capacity < 2**16 else keys, kind="stable")


@numba.njit(cache=False)
def _place_by_tree(sizes, capacity, most_bins):
    leaves = 1
    while leaves < most_bins:
        leaves *= 2
    room = np.full(2 * leaves, capacity, np.int32)  # node i: most room of any bin below it; its children: 2i, 2i + 1
    places = np.empty(len(sizes), np.int64)
    bins = 0
    for item in range(len(sizes)):
        size = sizes[item]
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        place = node - leaves
        places[item] = place
        bins = max(bins, place + 1)
        room[node] -= size
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    return places, bins


@numba.njit(cache=False)
def _place_by_scan(sizes, capacity):
    room = np.empty(len(sizes), np.int64)
    places = np.empty(len(sizes), np.int64)
    bins = 0
    for item in range(len(sizes)):
        place = 0
        while place < bins and room[place] < sizes[item]:
            place += 1
        if place == bins:
            room[bins] = capacity
            bins += 1
        room[place] -= sizes[item]
        places[item] = place
    return places, bins


@numba.njit(cache=False)
def _group(order, places, bins):
    offsets = np.zeros(bins + 1, np.int64)
    for place in places:
        offsets[place + 1] += 1
    for i in range(bins):
        offsets[i + 1] += offsets[i]
    free = offsets[:-1].copy()
    indices = np.empty(len(order), np.int64)
    for item in range(len(order)):
        indices[free[places[item]]] = order[item]
        free[places[item]] += 1
    return indices, offsets
