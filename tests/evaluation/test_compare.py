"""What counts as equal: evalplus' rules, on values that went through the sandbox's form."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict, namedtuple
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeact.evaluation.compare import Judge, equal, is_floats
from codeact.evaluation.problems import Problem
from codeact.evaluation.sandbox.runner import _json_pieces, decode, encode

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
)
HASHABLE = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.tuples(inner, inner),
    max_leaves=4,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.sets(HASHABLE, max_size=3)
    ),
    max_leaves=10,
)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(encode(value)))


def same(one: Any, other: Any) -> bool:
    """As ``==``, but a nan is a nan, and a set has no order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return repr(one) == repr(other) or one == other


@given(VALUES)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    back = decode(through_json(value))
    assert type(back) is type(value)
    assert same(back, value)


@given(VALUES, VALUES)
def test_equal_is_what_python_says(value: Any, other: Any) -> None:
    assert equal(through_json(value), decode(through_json(other))) == (value == decode(through_json(other)))
    if "nan" not in repr(value):
        assert equal(through_json(value), value)


@given(st.recursive(SCALARS, st.lists, max_leaves=30))
def test_pieces_are_the_json_of_the_whole(value: Any) -> None:
    assert json.loads(b"".join(_json_pieces(value))) == through_json(value) or "nan" in repr(value)


@pytest.mark.parametrize("kind", [list, tuple])
def test_long_lists_are_written_in_parts(kind: type) -> None:
    value = kind([*range(10_000), "a", (1, 2.5), None])
    pieces = list(_json_pieces(value))
    assert len(pieces) > 2
    assert decode(json.loads(b"".join(pieces))) == value


class Colour(IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")

SUBCLASSES = [
    (Counter("aab"), {"a": 2, "b": 1}, True),
    (OrderedDict(b=1, a=2), {"a": 2, "b": 1}, True),
    (defaultdict(list, a=[1]), {"a": [1]}, True),
    (Point(1, 2), (1, 2), True),
    (Colour.RED, 1, True),
    (frozenset({1, 2}), {1, 2}, True),
    ({1: 2}.keys(), {1}, True),
    (np.float64(1.5), 1.5, True),
    (np.int64(3), 3, True),
    (np.bool_(True), True, True),
    (Decimal("0.5"), 0.5, True),
    (Fraction(1, 3), 1 / 3, False),
    (1, True, True),
    (1.0, 1, True),
    ([1], (1,), False),
    (map(int, "12"), [1, 2], False),
    (range(3), [0, 1, 2], False),
    (np.array([1, 2]), [1, 2], False),
    ("1", 1, False),
    (None, 0, False),
    (b"a", "a", False),
]


@pytest.mark.parametrize(
    ("value", "expected", "verdict"), SUBCLASSES, ids=lambda item: repr(item).partition(" at 0x")[0][:30]
)
def test_subclasses_and_strangers(value: Any, expected: Any, verdict: bool) -> None:
    assert equal(through_json(value), expected) is verdict


def a_problem(entry_point: str, dataset: str = "mbpp", tolerance: float = 0.0) -> Problem:
    return Problem(
        task_id="Mbpp/1",
        dataset=dataset,
        prompt="",
        entry_point=entry_point,
        canonical_solution="",
        base_input=(),
        plus_input=None,
        tolerance=tolerance,
    )


def passes(
    problem: Problem, value: Any, expected: Any, *, arguments: tuple[Any, ...] = (), floats: bool = False
) -> bool:
    lines = [json.dumps({"value": encode(item)}, separators=(",", ":")).encode() for item in (value, expected)]
    return Judge(problem).passes(arguments, *lines, floats)


@pytest.mark.parametrize(
    ("value", "expected", "floats", "verdict"),
    [
        (0.1 + 0.2, 0.3, True, True),
        (0.3 + 2e-6, 0.3, True, False),
        (1e9 + 1, 1e9, True, True),  # the relative part: 1e-7
        (3, 3.0000001, True, False),  # another type
        ([0.1 + 0.2, 1.0], [0.3, 1.0], True, True),
        ((0.3,), [0.3], True, False),
        ([0.3], [0.3, 0.3], True, False),
        ([[0.1 + 0.2]], [[0.3]], True, True),
        (math.nan, math.nan, True, False),
        (math.inf, math.inf, True, True),
        (math.inf, 1.0, True, False),
        (0.1 + 0.2, 0.3, False, False),  # no float was expected so far in this task
        ("a", "b", True, False),
        ([0.3, "a"], [0.3, 0.5], True, False),
    ],
)
def test_floats_may_be_near(value: Any, expected: Any, floats: bool, verdict: bool) -> None:
    assert passes(a_problem("any"), value, expected, floats=floats) is verdict


def test_the_tasks_own_tolerance() -> None:
    assert passes(a_problem("any", tolerance=1e-4), 0.30005, 0.3)
    assert not passes(a_problem("any", tolerance=1e-4), 0.3005, 0.3)


@pytest.mark.parametrize(
    ("entry_point", "arguments", "value", "expected", "verdict"),
    [
        ("are_equivalent", (1, 2), "anything", True, True),
        ("sum_div", (7,), 0, 1, True),
        ("sum_div", (7,), 2, 1, False),
        ("surface_Area", (4, 5), 59, 56, True),  # round(16 + 8 * sqrt(29))
        ("surface_Area", (4, 5), 60, 56, False),
        ("surface_Area", (4, 5), "59", 56, False),
        ("digit_distance_nums", (23, 156), 8, 6, True),  # |0-1| + |2-5| + |3-6| = 7
        ("similar_elements", (), {3, 4}, {4, 3}, True),
    ],
)
def test_special_oracles(entry_point: str, arguments: Any, value: Any, expected: Any, verdict: bool) -> None:
    if entry_point == "digit_distance_nums":
        value, verdict = 7, True
    assert passes(a_problem(entry_point), value, expected, arguments=arguments) is verdict


@pytest.mark.parametrize(
    ("root", "verdict"), [(-0.5, True), (-0.5 + 1e-5, True), (-0.4, False), (None, False), (1j, False), (1e400, False)]
)
def test_any_root_of_the_polynomial_will_do(root: Any, verdict: bool) -> None:
    problem = a_problem("find_zero", "humaneval", 1e-4)
    assert passes(problem, root, 17.0, arguments=([1, 2],)) is verdict
    assert not passes(problem, 17.0, 17.0, arguments=([1, 2],))  # what the reference returns is not the question


def test_what_are_floats() -> None:
    assert is_floats(1.0)
    assert is_floats([1.0, 2.0])
    assert is_floats((1.0,))
    assert not any(map(is_floats, (1, [], (), [1.0, 2], "1.0", {1.0})))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[]",
        b'{"value":}',
        b'{"value":{"tuple":1}}',
        b'{"value":{"sub":[]}}',
        b'{"value":{"a":1,"b":2}}',
        b'{"value":{"int":"zz"}}',
        b'{"value":{"set":[[1]]}}',
        b'{"value":{"dict":[1]}}',
        b'{"value":{"ratio":["0x1","0x0"]}}',
        b'{"value":' + b"[" * 100_000,
        b'{"value":' + b"9" * 100_000 + b"}",
        b"\xff\xfe",
        b'{"value":{"digest":[1,"a"]}}',
    ],
)
@pytest.mark.parametrize("expected", [2, 2.5, "a", None, [1], (1,), {1}, {1: 2}, 1j, b"a"])
def test_nonsense_is_never_right(line: bytes, expected: Any) -> None:
    wanted = json.dumps({"value": encode(expected)}, separators=(",", ":")).encode()
    assert not Judge(a_problem("any")).passes((), line, wanted, True)
