"""Lengths to packs: which samples share a row, so that little of a row is padding.

The plan is made by the compiled core (csrc/packing/sorting.cpp, then csrc/packing/packing.cpp);
`codeact.packing.reference` is its readable twin and gives the same packs.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import codeact._native as _native
from codeact.base.errors import InputError

ALGORITHMS = ("bfd", "ffd", "next_fit")
MAX_CAPACITY = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packs:
    """A plan: every item in exactly one pack, no pack over `capacity`.

    Attributes:
        indices: (items,) int64, the items' positions in `lengths`, pack after pack.
        offsets: (packs + 1,) int64, rising from 0; pack i holds `indices[offsets[i]:offsets[i + 1]]`.
        capacity: most tokens that one pack may hold.
        tokens: sum of all lengths.
        lower_bound: no packing whatever has fewer packs. The largest of tokens / capacity, items / max_items and
            Martello and Toth's bound L2, which knows that two items over half the capacity never share a pack.
    """

    indices: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    capacity: int
    tokens: int
    lower_bound: int

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> npt.NDArray[np.int64]:
        """The positions of the items of one pack, (items of the pack,) int64: a view of `indices`."""
        number = operator.index(pack)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"pack {pack} of {len(self)} packs")
        return self.indices[self.offsets[number] : self.offsets[number + 1]]

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        """Every pack in order, as `packs[i]` gives it."""
        return map(self.__getitem__, range(len(self)))

    @property
    def padding(self) -> int:
        """Tokens of padding if every pack were padded to `capacity`."""
        return len(self) * self.capacity - self.tokens

    @property
    def fill(self) -> float:
        """tokens / (packs * capacity): 1.0 where nothing is padding, as it also is where there is no pack."""
        return self.tokens / (len(self) * self.capacity) if len(self) else 1.0


def pack(
    lengths: Sequence[int] | npt.ArrayLike, capacity: int, algorithm: str = "bfd", max_items: int | None = None
) -> Packs:
    """Put items into packs of at most `capacity` tokens, few packs and always the same ones.

    - "bfd", best-fit decreasing: longest item first, into the pack with the least space that still holds it; of
      equally full packs the one that has waited longest since an item was put into it.
    - "ffd", first-fit decreasing: longest item first, into the first pack that holds it.
    - "next_fit": shortest item first, into the last pack, or a new one where it does not fit.

    Items of one length go by position. Packs stand in the order in which they were opened, and a pack's items in the
    order in which they were placed. Time O(n log n) at worst, and close to that of counting the lengths where many are
    equal; memory O(n), whatever the capacity. The GIL is released.

    Args:
        lengths: (items,) tokens of each item, 1 to `capacity`: an array of any integer dtype, byte order and stride,
            or a sequence of integers. It is not changed.
        capacity: most tokens in a pack, 1 to 2**31 - 1.
        algorithm: "bfd", "ffd" or "next_fit".
        max_items: most items in a pack, at least 1; a pack that has so many is closed. None: no limit.

    Raises:
        InputError: a length is below 1 or over `capacity` (the message names its position and value), `lengths` has
            not one dimension, or another argument is out of its range.
        TypeError: `lengths` holds no integers (booleans are none), or `capacity` or `max_items` is none.

    Examples:
        >>> packs = pack([5, 3, 2, 8, 1], capacity=8)
        >>> [p.tolist() for p in packs]
        [[3], [0, 1], [2, 4]]
        >>> len(packs), packs.tokens, packs.padding, packs.lower_bound
        (3, 19, 5, 3)
        >>> [p.tolist() for p in pack([5, 3, 2, 8, 1], capacity=8, max_items=1)]
        [[3], [0], [1], [2], [4]]
    """
    if algorithm not in ALGORITHMS:
        raise InputError(f"algorithm {algorithm!r} is unknown; choose {', '.join(_closest_first(algorithm))}")
    capacity = _integer("capacity", capacity)
    if not 1 <= capacity <= MAX_CAPACITY:
        raise InputError(f"capacity is {capacity}; it must be in 1..{MAX_CAPACITY}")
    if max_items is not None:
        max_items = _integer("max_items", max_items)
        if max_items < 1:
            raise InputError(f"max_items is {max_items}; it must be at least 1, or None for no limit")
        max_items = min(max_items, MAX_CAPACITY)  # a pack never has more items than tokens
    array = _integer_array(lengths)
    try:
        indices, offsets, tokens, lower_bound = _native.pack(array, capacity, algorithm, max_items)
    except ValueError as error:
        raise InputError(str(error)) from None
    return Packs(indices=indices, offsets=offsets, capacity=capacity, tokens=tokens, lower_bound=lower_bound)


def token_places(starts: npt.NDArray[np.integer[Any]], sizes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """Where the tokens of items laid end to end stand: ``starts[i]``, ``starts[i] + 1``, ... for each of ``sizes[i]``.

    Args:
        starts: (items,) where each begins.
        sizes: (items,) tokens of each, 0 or more.

    Returns:
        (sum of sizes,) int64.
    """
    ends = np.cumsum(sizes)
    places: npt.NDArray[np.int64] = np.arange(sizes.sum(), dtype=np.int64) + np.repeat(starts - (ends - sizes), sizes)
    return places


def _closest_first(name: str) -> list[str]:
    def likeness(valid: str) -> float:
        return difflib.SequenceMatcher(None, str(name).lower(), valid).ratio()

    return sorted(ALGORITHMS, key=likeness, reverse=True)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, not {value}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None


def _integer_array(lengths: Any) -> npt.NDArray[np.integer[Any]]:
    try:
        array = np.asarray(lengths)
    except ValueError:  # numpy's own message speaks of "an inhomogeneous shape"
        raise InputError("lengths must be a flat sequence of integers; it holds sequences of unequal sizes") from None
    if array.ndim != 1:
        raise InputError(f"lengths must have one dimension, not shape {array.shape}")
    if array.size == 0 and not isinstance(lengths, np.ndarray):
        return np.empty(0, np.int64)  # numpy takes an empty list for floats
    if array.dtype.kind not in "iu":
        raise TypeError(f"lengths must hold integers, not {array.dtype}; convert them with numpy.asarray(..., 'int64')")
    return array.astype(array.dtype.newbyteorder("="), copy=False)
