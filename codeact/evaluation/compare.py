"""Whether what a program returned is what was expected: evalplus' rules, on values that are not trusted.

A result arrives in the form of ``codeact.evaluation.sandbox.runner.encode`` from a process that may write anything. It
is never turned into objects and asked whether it is equal: it is walked along the expected value, which bounds the
work by the size of that, and no code of the program takes part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from codeact.base.parsing import parse_json
from codeact.evaluation.problems import Problem
from codeact.evaluation.sandbox.runner import decode

_RELATIVE = 1e-7
_FLOAT_TOLERANCE = 1e-6
_SPARE_BYTES = 1 << 16
_SPARE_VALUES = 1 << 12
_LONGEST_RATIO = 1000  # digits: reducing a fraction takes time that grows with their square

_NUMBERS = {"int", "float", "complex", "ratio"}
_JSON_TYPES = {type(None), bool, int, float, str}

# The tests of these compare otherwise, as in evalplus: the order of a result does not count, ...
_SET_TASKS = {
    "similar_elements",
    "find_char_long",
    "common_in_nested_lists",
    "extract_singly",
    "larg_nnum",
    "intersection_array",
    "find_dissimilar",
    "Diff",
}
# ... or only whether there is a result.
_NOT_NONE_TASKS = {"check_str", "text_match_three", "text_starta_endb"}


def result_form(problem: Problem) -> str:
    """The form in which results of a problem leave the sandbox: "" (as they are), "set" or "not none"."""
    if problem.dataset == "mbpp" and problem.entry_point in _SET_TASKS:
        return "set"
    return "not none" if problem.dataset == "mbpp" and problem.entry_point in _NOT_NONE_TASKS else ""


class Judge:
    """Judges the results of the tests of one problem."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def passes(self, arguments: Sequence[Any], line: bytes, expected: bytes, after_floats: bool) -> bool:
        """Whether a result passes.

        Args:
            arguments: what the function was called with.
            line: the line of results, from the sandbox.
            expected: the line of the reference.
            after_floats: a float was expected in this test or in an earlier one of its kind (base or plus). The order
                matters, as in evalplus: later results may then be off by 1e-6 too.
        """
        if line == expected and b'"nan"' not in expected and not self._special:
            return True
        if len(line) > _SPARE_BYTES + 8 * len(expected) or _values(line) > _SPARE_VALUES + 8 * _values(expected):
            return False  # no right result holds so much more, and reading it would cost memory
        try:
            wire, wanted = parse_json(line)["value"], decode(parse_json(expected)["value"])
            return self._passes(arguments, wire, wanted, self._problem.tolerance or (_FLOAT_TOLERANCE * after_floats))
        except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError):
            return False  # no result that a decent program writes

    @property
    def _special(self) -> bool:
        return self._problem.dataset == "humaneval" and self._problem.entry_point == "find_zero"

    def _passes(self, arguments: Sequence[Any], wire: Any, expected: Any, tolerance: float) -> bool:
        if self._problem.dataset == "output":
            return isinstance(wire, str) and same_output(wire, expected)
        name = self._problem.entry_point if self._problem.dataset == "mbpp" else ""
        if self._special:
            return abs(_polynomial(arguments[0], _real(wire))) <= tolerance
        exact = equal(wire, expected)
        if name == "are_equivalent":
            exact = True
        elif name == "sum_div":
            exact = exact or _is_number(wire, 0)
        elif name == "surface_Area":
            # (base_edge, height) with the height from the base's centre, where the reference takes the slant height
            exact = exact or bool(abs(_real(wire) - _pyramid(*arguments)) <= tolerance)
        elif name == "digit_distance_nums":
            exact = exact or _is_number(wire, _digit_distance(*arguments))
        if exact or tolerance == 0:
            return exact
        return _same_type(wire, expected) and _close(wire, expected, tolerance)


def same_output(found: str, expected: str) -> bool:
    """Whether two texts say the same line by line, white space at their ends aside; numbers by their value."""
    lines, wanted = ([line.strip() for line in text.strip().split("\n")] for text in (found, expected))
    return len(lines) == len(wanted) and all(
        one == other or list(map(Decimal, one.split())) == list(map(Decimal, other.split()))
        for one, other in zip(lines, wanted, strict=True)
    )


def _values(line: bytes) -> int:
    """About how many objects a line of JSON becomes."""
    return line.count(b",") + line.count(b"[") + line.count(b"{")


def equal(wire: Any, expected: Any) -> bool:  # noqa: PLR0911 - a line for every type
    """What ``result == expected`` says in Python for the built-in types; ``expected`` is a value, ``wire`` is not."""
    wire = _without_subclass(wire)
    if expected is None or isinstance(expected, str):
        return type(wire) is type(expected) and bool(wire == expected)
    if isinstance(expected, (bool, int, float, complex, Fraction)):
        return _is_number(wire, expected)
    if isinstance(expected, list):
        if set(map(type, expected)) <= _JSON_TYPES and wire == expected:
            return True  # by far the quickest way through a long list
        return isinstance(wire, list) and _all_equal(wire, expected)
    if not isinstance(wire, dict):
        return False
    ((kind, content),) = wire.items()
    if isinstance(expected, bytes):
        return bool(kind == "bytes" and content == expected.hex())
    if isinstance(expected, tuple):
        return kind == "tuple" and _all_equal(content, expected)
    if isinstance(expected, (set, frozenset)):
        return bool(kind == "set" and len(content) == len(expected) and {_key(item) for item in content} == expected)
    if isinstance(expected, dict) and kind == "dict" and len(content) == len(expected):
        found = {_key(key): item for key, item in content}
        return found.keys() == expected.keys() and all(equal(found[key], item) for key, item in expected.items())
    return False


def _all_equal(wires: Sequence[Any], expected: Sequence[Any]) -> bool:
    return len(wires) == len(expected) and all(map(equal, wires, expected))


def _without_subclass(wire: Any) -> Any:
    if isinstance(wire, dict) and "sub" in wire:
        _, wire = wire["sub"]
    return wire


def _key(wire: Any) -> Any:
    """A member of a set or a key. Of sets in sets and the like there are none among the expected values."""
    wire = _without_subclass(wire)
    if wire is None or isinstance(wire, str):
        return wire
    if isinstance(wire, dict) and "tuple" in wire:
        return tuple(map(_key, wire["tuple"]))
    if isinstance(wire, dict) and "bytes" in wire:
        return bytes.fromhex(wire["bytes"])
    return _number(wire)


def _number(wire: Any) -> Any:
    """Read a number; raises a TypeError or ValueError for anything else."""
    wire = _without_subclass(wire)
    if isinstance(wire, (bool, int, float)):
        return wire
    ((kind, content),) = wire.items()
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float(content)
    if kind == "complex":
        return complex(_number(content[0]), _number(content[1]))
    if kind == "ratio" and max(map(len, content)) <= _LONGEST_RATIO:
        return Fraction(int(content[0], 16), int(content[1], 16))
    raise TypeError(f"{kind} is no number")


def _is_number(wire: Any, expected: Any) -> bool:
    wire = _without_subclass(wire)
    if not isinstance(wire, (bool, int, float, dict)) or (isinstance(wire, dict) and not wire.keys() <= _NUMBERS):
        return False
    return bool(_number(wire) == expected)


def _real(wire: Any) -> Any:
    number = _number(wire)
    if isinstance(number, complex):
        raise TypeError("a complex number has no order")
    return number


def is_floats(value: Any) -> bool:
    """Whether it is a float, or a list or tuple of nothing but floats, of one at least."""
    if isinstance(value, (list, tuple)) and value:
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def _same_type(wire: Any, expected: Any) -> bool:
    """Whether the result is of exactly the expected type, no subclass."""
    if isinstance(wire, dict):
        ((kind, _),) = wire.items()
        return bool(kind == type(expected).__name__)
    return type(wire) is type(expected)


def _close(wire: Any, expected: Any, tolerance: float) -> bool:
    """Whether numbers, or nested sequences of numbers of one shape, are as close as ``numpy.allclose`` wants them."""
    wire = _without_subclass(wire)
    if isinstance(expected, (list, tuple)):
        items = wire if isinstance(wire, list) else wire["tuple"]
        pairs = zip(items, expected, strict=True)
        return len(items) == len(expected) and all(_close(item, wanted, tolerance) for item, wanted in pairs)
    if not isinstance(expected, (bool, int, float, complex)):
        return False
    found = _number(wire)
    if found == expected:
        return True
    return bool(abs(found - expected) <= tolerance + _RELATIVE * abs(expected) and math.isfinite(abs(expected)))


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    return sum(coefficient * math.pow(x, power) for power, coefficient in enumerate(coefficients))


def _pyramid(base_edge: float, height: float) -> float:
    slant = math.sqrt((base_edge / 2) ** 2 + height**2)
    return round(base_edge**2 + 4 * (base_edge * slant) / 2)


def _digit_distance(first: int, second: int) -> int:
    one, other = str(first), str(second)
    width = max(len(one), len(other))
    return sum(abs(int(a) - int(b)) for a, b in zip(one.zfill(width), other.zfill(width), strict=True))
