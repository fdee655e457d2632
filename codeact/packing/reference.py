"""The packing algorithms as one would explain them: O(items * packs), the same packs as `codeact.packing.packs.pack`.

The lengths must be valid (1 to `capacity`); only `codeact.packing.packs` checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Pack:
    space: int
    last_placed: int = -1
    items: list[int] = field(default_factory=list)


def pack_reference(
    lengths: Sequence[int], capacity: int, algorithm: str = "bfd", max_items: int | None = None
) -> list[list[int]]:
    """Packs in the order in which they were opened, each the positions of its items in the order of placement."""
    limit = len(lengths) if max_items is None else max_items
    algorithms = {"bfd": _best_fit_decreasing, "ffd": _first_fit_decreasing, "next_fit": _next_fit}
    return [pack.items for pack in algorithms[algorithm](lengths, capacity, limit)]


def lower_bound_reference(lengths: Sequence[int], capacity: int, max_items: int | None = None) -> int:
    """The largest of tokens / capacity, items / max_items, and Martello and Toth's L2, each rounded up."""
    bounds = [-(-sum(lengths) // capacity)]
    if max_items is not None:
        bounds.append(-(-len(lengths) // max_items))
    # `shortest` is the length from which on small items are counted; 0 counts them all.
    for shortest in {0, *(length for length in lengths if 2 * length <= capacity)}:
        alone = [length for length in lengths if length > capacity - shortest]
        big = [length for length in lengths if capacity < 2 * length and length <= capacity - shortest]
        small = [length for length in lengths if shortest <= length and 2 * length <= capacity]
        too_much = sum(small) - sum(capacity - length for length in big)
        bounds.append(len(alone) + len(big) + max(0, -(-too_much // capacity)))
    return max(bounds)


def _best_fit_decreasing(lengths: Sequence[int], capacity: int, limit: int) -> list[_Pack]:
    """Into the pack with the least space that still holds the item; of equals, the one that has waited longest."""
    return _fit_decreasing(lengths, capacity, limit, lambda fits: min(fits, key=lambda p: (p.space, p.last_placed)))


def _first_fit_decreasing(lengths: Sequence[int], capacity: int, limit: int) -> list[_Pack]:
    """Into the pack opened first of those that hold the item."""
    return _fit_decreasing(lengths, capacity, limit, lambda fits: fits[0])


def _fit_decreasing(
    lengths: Sequence[int], capacity: int, limit: int, choose: Callable[[list[_Pack]], _Pack]
) -> list[_Pack]:
    packs: list[_Pack] = []
    # Python's sort is stable: equal lengths keep their positions' order.
    for step, item in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fits = [pack for pack in packs if pack.space >= lengths[item] and len(pack.items) < limit]
        if fits:
            chosen = choose(fits)
        else:
            chosen = _Pack(space=capacity)
            packs.append(chosen)
        chosen.items.append(item)
        chosen.space -= lengths[item]
        chosen.last_placed = step
    return packs


def _next_fit(lengths: Sequence[int], capacity: int, limit: int) -> list[_Pack]:
    """Shortest item first, into the last pack or, where that does not hold it, a new one."""
    packs: list[_Pack] = []
    for item in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not packs or packs[-1].space < lengths[item] or len(packs[-1].items) == limit:
            packs.append(_Pack(space=capacity))
        packs[-1].items.append(item)
        packs[-1].space -= lengths[item]
    return packs
