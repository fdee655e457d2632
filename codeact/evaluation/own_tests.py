"""Tests of one's own: what a program is run on in the sandbox, and what has to come of it outside.

    asserts, check(candidate)   taken apart: left sides are evaluated in the sandbox, right sides compared outside
    input and output            the program is a script, run anew for every input
    calls                       a function, or a method of ``Solution``, with arguments and its result

So a program can neither read nor overwrite what it is held against. What cannot be taken apart (unittest, an assert of
two computed values) can only be run beside the program, which could then forge its verdict; ``beside`` says so.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from codeact.base.errors import InputError, require
from codeact.base.parsing import UNPARSABLE, parse_python
from codeact.evaluation.judge import TaskTests
from codeact.evaluation.problems import Problem
from codeact.evaluation.sandbox.runner import encode

Tests = str | Sequence[str | tuple[str, str]]
"""Text with asserts, or a list of asserts, or of (standard input, standard output)."""

ENTRY_POINT = "__codeact_test__"
"""The function that the sandbox calls with a test's number."""

_SETUP = (ast.Import, ast.ImportFrom)
_CALLS = """

def {name}(number):
    return ({thunks})[number]()
"""
# A program that reads and writes: a new one for every input.
_SCRIPT = """
def {name}(number):
    import io, sys
    text = {inputs}[number]
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    raw = io.BytesIO()
    sys.stdout = io.TextIOWrapper(raw, encoding="utf-8", newline="")
    try:
        exec(compile({code}, "program.py", "exec", dont_inherit=True), {{"__name__": "__main__"}})
    except SystemExit:
        pass
    sys.stdout.flush()
    return raw.getvalue().decode(errors="replace")
"""
# setUpClass and its like belong to a suite.
_CASE = """
def __codeact_case__(kind, name):
    import unittest
    result = unittest.TestResult()
    unittest.TestSuite([kind(name)]).run(result)
    for _, text in result.errors + result.failures:
        raise AssertionError(text.strip().split("\\n")[-1])
    return True
"""
_METHOD = """
def __codeact_call__(name, *arguments):
    owner = globals().get("Solution")
    value = (globals()[name] if owner is None else getattr(owner(), name))(*arguments)
    return list(value) if isinstance(value, tuple) else value
"""


@dataclass(frozen=True, slots=True)
class OwnTest:
    """``told``: as it was given; ``left``: the expression to evaluate, or the input; ``expected``: a value."""

    told: str
    left: str
    expected: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnTests:
    """``before`` and ``behind``: code around the program; ``script``: the program reads and writes."""

    tests: tuple[OwnTest, ...]
    before: str = ""
    behind: str = ""
    script: bool = False
    beside: bool = False

    def program(self, code: str) -> str:
        """What is run for a program: it, and ``ENTRY_POINT``."""
        if self.before and "from __future__" not in code:  # which has to stand first
            code = f"{self.before}\n{code}"
        if self.script:
            return _SCRIPT.format(name=ENTRY_POINT, inputs=repr([test.left for test in self.tests]), code=repr(code))
        thunks = "".join(f"lambda: {test.left}, " for test in self.tests)
        return f"{code}\n{self.behind}{_CALLS.format(name=ENTRY_POINT, thunks=thunks)}"

    def task_tests(self) -> TaskTests:
        """As the judge takes them; floats may be off by 1e-6."""
        numbers = [(number,) for number in range(len(self.tests))]
        problem = Problem(
            task_id="", dataset="output" if self.script else "own", prompt="", entry_point=ENTRY_POINT,
            canonical_solution="", base_input=tuple(numbers), plus_input=None, tolerance=0.0,
        )  # fmt: skip
        values = [json.dumps(encode(test.expected), separators=(",", ":")).encode() for test in self.tests]
        return TaskTests(
            problem=problem, base=len(numbers), inputs=numbers, wires=[encode(one) for one in numbers],
            expected=[b'{"value":%s}' % value for value in values], seconds=[0.0] * len(numbers),
            floats=[True] * len(numbers), told=[test.told for test in self.tests], wrap=self.program,
        )  # fmt: skip


def read_tests(tests: Tests, beside: bool = False) -> OwnTests:
    """Read asserts, or pairs of input and output.

    Args:
        tests: asserts are ``assert CALL == LITERAL``, ``is LITERAL``, ``assert CALL`` or ``assert not CALL`` (of
            literals); imports before them are made.
        beside: take others too, with whatever stands between them, to be run beside the program.

    Raises:
        InputError: there is none, one is no Python, or cannot be taken apart without ``beside``; it is named.
    """
    if isinstance(tests, str):
        return _read(tests, beside)
    require("tests", tests, "__iter__", "asserts, or pairs of input and output")
    for one in tests:
        if not isinstance(one, str) and [*map(type, one if isinstance(one, list | tuple) else ())] != [str, str]:
            raise InputError(f"test {str(one)[:100]!r} is neither an assert nor a pair of input and output")
    return _read(tuple(one if isinstance(one, str) else (one[0], one[1]) for one in tests), beside)


@functools.lru_cache(maxsize=1024)
def _read(tests: str | tuple[str | tuple[str, str], ...], beside: bool) -> OwnTests:
    listed = (tests,) if isinstance(tests, str) else tests
    pairs = [one for one in listed if isinstance(one, tuple)]
    if pairs and len(pairs) < len(listed):
        raise InputError("asserts and pairs of input and output are mixed; a program is run in one way or the other")
    if pairs:
        return OwnTests(tests=tuple(OwnTest(given, given, expected) for given, expected in pairs), script=True)
    setup: list[str] = []
    found: list[OwnTest] = []
    opaque = False
    for statement in (statement for one in listed for statement in _parsed(str(one))):
        told = ast.unparse(statement)
        if isinstance(statement, _SETUP):
            setup.append(told)
            continue
        test = _apart(statement, told)
        if test is None and not beside:
            raise InputError(
                f"test {told[:100]!r} cannot be kept from the program; write assert CALL == LITERAL, or assert CALL"
            )
        if test is not None:
            found.append(test)
            continue
        opaque = True
        if isinstance(statement, ast.Assert):
            name = f"__codeact_assert_{len(found)}__"
            setup.append(f"def {name}():\n    {told}\n    return True")
            found.append(OwnTest(told, f"{name}()", True))
        else:
            setup.append(told)
    if not found:
        raise InputError("there is no test; give asserts, or pairs of input and output")
    return OwnTests(tests=tuple(found), behind="\n".join(setup), beside=opaque)


def read_calls(name: str, cases: Sequence[tuple[Sequence[Any], Any]], before: str = "") -> OwnTests:
    """Calls of a function, or of a method of a class ``Solution``, with arguments and results of JSON."""
    tests = []
    for arguments, expected in cases:
        texts = ", ".join(map(repr, arguments))
        tests.append(OwnTest(f"{name}({texts})", f"__codeact_call__({name!r}, {texts})", expected))
    return OwnTests(tests=tuple(tests), before=before, behind=_METHOD)


def read_scripts(cases: Sequence[tuple[str, str]], before: str = "") -> OwnTests:
    """Input and output of scripts that find ``before`` done."""
    return replace(read_tests(cases), before=before)


def read_program(text: str, entry_point: str, reference: bool) -> OwnTests | None:
    """Read a program of tests: unittest classes, ``check(candidate)``, or asserts.

    Args:
        text: the program.
        entry_point: the function that ``check`` is called with.
        reference: whether there is a canonical solution.

    Returns:
        None: ``check`` cannot be taken apart, but what the canonical solution returns can be compared instead.

    Raises:
        InputError: it is no Python, or holds no test.
    """
    statements = _parsed(text)
    classes = [node for node in statements if isinstance(node, ast.ClassDef) and _is_case(node)]
    if classes:
        cases = [
            OwnTest(f"{kind.name}.{node.name}", f"__codeact_case__({kind.name}, {node.name!r})", True)
            for kind in classes
            for node in kind.body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
        ]
        if not cases:
            raise InputError("there is no test; a unittest class has methods whose names begin with test")
        return OwnTests(tests=tuple(cases), behind=text + _CASE, beside=True)
    check = next((node for node in statements if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    if check is None:
        return read_tests(text, beside=True)
    apart = _of_check(statements, check, entry_point)
    if apart is not None or reference:
        return apart
    told = f"check({entry_point})"
    return OwnTests(tests=(OwnTest(told, f"({told}, True)[1]", True),), behind=text, beside=True)


def _of_check(statements: list[ast.stmt], check: ast.FunctionDef, entry_point: str) -> OwnTests | None:
    """The asserts of ``check``, if it and what is around it is nothing else."""
    for node in statements:
        about = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METADATA"
        if node is not check and not about and not isinstance(node, _SETUP):
            return None
    if len(check.args.args) != 1:
        return None
    body = [_Renamed(check.args.args[0].arg, entry_point).visit(node) for node in check.body]
    lines = [ast.unparse(node) for node in [*(n for n in statements if isinstance(n, _SETUP)), *body]]
    try:
        return read_tests(lines)
    except InputError:
        return None


class _Renamed(ast.NodeTransformer):
    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self._new, node.ctx) if node.id == self._old else node


def _is_case(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).rpartition(".")[2] == "TestCase" for base in node.bases)


def _parsed(text: str) -> list[ast.stmt]:
    try:
        return parse_python(text).body
    except UNPARSABLE as error:
        raise InputError(f"test {text[:100]!r} is no Python: {error}") from None


def _apart(statement: ast.stmt, told: str) -> OwnTest | None:
    """An assert whose right side can be kept outside."""
    if not isinstance(statement, ast.Assert):
        return None
    test, right = statement.test, True
    try:
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.Is):
            return OwnTest(told, ast.unparse(test.left), ast.literal_eval(test.comparators[0]))
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test, right = test.operand, False
        if not isinstance(test, ast.Call):
            return None
        for argument in (*test.args, *(keyword.value for keyword in test.keywords)):
            ast.literal_eval(argument)  # else what is expected might stand in there, such as isclose(f(1), 2)
        return OwnTest(told, f"bool({ast.unparse(test)})", right)
    except (ValueError, TypeError):
        return None
