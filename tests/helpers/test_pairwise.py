"""The helper keeps its word, or tests that use it test less than they say."""

from __future__ import annotations

import itertools

import pytest

from tests.helpers.pairwise import pairwise

AXES = ("abc", range(4), [True, False], "xyzw")


@pytest.mark.parametrize("forbidden", [(), ("a", 3), ("c", 0)])
def test_every_pair_of_the_product_is_there_and_nothing_else(forbidden):
    def valid(*case):
        return not (forbidden and case[:2] == forbidden)

    everything = [case for case in itertools.product(*AXES) if valid(*case)]
    cases = pairwise(*AXES, valid=valid)
    assert {*cases} <= {*everything}
    assert len(cases) < len(everything) / 3

    def pairs(these):
        return {pair for case in these for pair in itertools.combinations(enumerate(case), 2)}

    assert pairs(cases) == pairs(everything)
