"""Fewer cases that find what the full product finds where a fault takes two conditions at most."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any


def pairwise(*axes: Sequence[Any], valid: Callable[..., bool] = lambda *_: True) -> list[tuple[Any, ...]]:
    """Cases that hold every pair of values of two axes that some valid case of the full product holds.

    Greedy: of the full product, again and again the case with most pairs that are not there yet; always the same ones.
    """
    product = [places for places in itertools.product(*map(range, map(len, axes))) if valid(*_values(axes, places))]
    pairs = {places: {*itertools.combinations(enumerate(places), 2)} for places in product}
    missing = set().union(*pairs.values())
    cases = []
    while missing:
        best = max(product, key=lambda places: len(pairs[places] & missing))
        cases.append(_values(axes, best))
        missing -= pairs[best]
    return cases


def _values(axes: Sequence[Sequence[Any]], places: Sequence[int]) -> tuple[Any, ...]:
    return tuple(axis[place] for axis, place in zip(axes, places, strict=True))
