"""Programs on tests of one's own, each alone in the sandbox: a verdict, or a reward for reinforcement learning.

What a test expects never enters the sandbox. An assert is taken apart: its left side is evaluated there, what came of
it is compared with its right side outside. So a program can neither read nor overwrite what it is held against.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from codeact.base.errors import InputError, require
from codeact.base.parsing import UNPARSABLE, parse_python
from codeact.evaluation.judge import TaskTests, Verdict, judge_program
from codeact.evaluation.problems import Problem
from codeact.evaluation.results import default_parallel
from codeact.evaluation.sandbox.runner import encode
from codeact.evaluation.sandbox.sandbox import Limits, Sandbox

Tests = str | Sequence[str | tuple[str, str]]
"""Text with asserts, or a list of asserts, of (standard input, standard output), or of both kinds."""

_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_SETUP = (ast.Import, ast.ImportFrom)
_NAME = "__codeact_test__"

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
    return "\\n".join(line.rstrip() for line in raw.getvalue().decode(errors="replace").rstrip().split("\\n"))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a program. ``kind``: one of ``codeact.evaluation.judge.KINDS``.

    ``passed``: tests before the first that failed, of ``tests``; ``failed``: that one as it was given, the assert or
    the input; ``message``: one line about it, from the program.
    """

    kind: str
    passed: int
    tests: int
    failed: str | None = None
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether it passed all tests."""
        return self.kind == "pass"


@dataclass(frozen=True, slots=True)
class _Test:
    """``told``: as it was given; ``left``: the expression to evaluate, or the input; ``expected``: a value."""

    told: str
    left: str
    expected: Any


def run_program(code: str, tests: Tests, *, limits: Limits | None = None, unsafe: bool = False) -> Result:
    """Run one program on tests.

    Args:
        code: Python. For tests of input and output it is run as a script, once for each.
        tests: asserts, as text or as a list, or pairs (standard input, standard output), of which white space at the
            ends of lines does not count. An assert is ``assert CALL == LITERAL``, ``is LITERAL``, ``assert CALL`` or
            ``assert not CALL`` (of literals); imports before it are made. Floats may be off by 1e-6.
        limits: seconds and memory; default: ``Limits()``, 1 s a test.
        unsafe: also where nothing isolates.

    Raises:
        InputError: nothing isolates here, or a test is none of these; the message names it.
    """
    return run_programs([code], tests, limits=limits, parallel=1, unsafe=unsafe)[0]


def run_programs(
    codes: Sequence[str],
    tests: Tests | Sequence[Tests],
    *,
    limits: Limits | None = None,
    parallel: int | None = None,
    unsafe: bool = False,
    own_tests: bool = False,
) -> list[Result]:
    """Run programs at the same time, all on the same tests, or with ``own_tests`` each on its own.

    Args:
        codes: the programs.
        tests: as of ``run_program``; with ``own_tests`` one of these a program.
        limits: of each.
        parallel: programs at a time; None: half the usable CPUs.
        unsafe: also where nothing isolates.
        own_tests: ``tests`` holds those of each program.

    Returns:
        One result a program, in order.

    Raises:
        InputError: as ``run_program``; or there are not as many tests as programs.
    """
    if own_tests and len(tests) != len(codes):
        raise InputError(f"{len(codes)} programs and the tests of {len(tests)}; give every program its own")
    listed: Any = tests if own_tests else [tests] * len(codes)
    sandbox = _sandbox(limits or Limits(), unsafe)
    read = [_read(_key(one)) for one in listed]
    with ThreadPoolExecutor(parallel or default_parallel()) as pool:
        return list(pool.map(_judge, codes, read, repeat(sandbox)))


def pass_share(completions: Sequence[Any], tests: Sequence[Tests], **columns: Any) -> list[float]:
    """A reward for TRL's GRPOTrainer: 1.0 for a program that passes all tests, else the share before the first failure.

    Args:
        completions: texts, or lists of messages, the last of which is read; the program is the last block of code in
            it, else all of it.
        tests: the column ``tests`` of the data set, as of ``run_program``.
        columns: what else TRL hands over; ``limits`` and ``parallel`` are read, by ``functools.partial``.
    """
    try:
        texts = [each if isinstance(each, str) else str(each[-1]["content"]) for each in completions]
    except (TypeError, LookupError):
        raise InputError("completions must be texts, or lists of messages with a content") from None
    more = {name: columns[name] for name in ("limits", "parallel") if name in columns}
    results = run_programs([last_block(text) for text in texts], tests, own_tests=True, **more)
    return [result.passed / result.tests for result in results]


def last_block(text: str) -> str:
    """The last fenced block of code in a text; all of it where there is none."""
    blocks = _FENCED.findall(text)
    return blocks[-1] if blocks else text


_sandbox = functools.cache(lambda limits, unsafe: Sandbox(limits, unsafe=unsafe))  # finding one runs a program


def _key(tests: Tests) -> str | tuple[str | tuple[str, str], ...]:
    if isinstance(tests, str):
        return tests
    require("tests", tests, "__iter__", "asserts, or pairs of input and output")
    for one in tests:
        if not isinstance(one, str) and [*map(type, one if isinstance(one, list | tuple) else ())] != [str, str]:
            raise InputError(f"test {str(one)[:100]!r} is neither an assert nor a pair of input and output")
    return tuple(one if isinstance(one, str) else (one[0], one[1]) for one in tests)


@functools.lru_cache(maxsize=1024)
def _read(tests: str | tuple[str | tuple[str, str], ...]) -> tuple[str, tuple[_Test, ...]]:
    """Imports, and tests."""
    imports: list[str] = []
    found: list[_Test] = []
    for one in (tests,) if isinstance(tests, str) else tests:
        if isinstance(one, tuple):
            lines = [line.rstrip() for line in one[1].rstrip().split("\n")]
            found.append(_Test(one[0], one[0], "\n".join(lines)))
            continue
        try:
            statements = parse_python(one).body
        except UNPARSABLE as error:
            raise InputError(f"test {one[:100]!r} is no Python: {error}") from None
        for statement in statements:
            if isinstance(statement, _SETUP):
                imports.append(ast.unparse(statement))
            else:
                found.append(_assert(statement))
    if not found:
        raise InputError("there is no test; give asserts, or pairs of input and output")
    if len({isinstance(one, tuple) for one in ((tests,) if isinstance(tests, str) else tests)}) > 1:
        raise InputError("asserts and pairs of input and output are mixed; a program is run in one way or the other")
    return "\n".join(imports), tuple(found)


def _assert(statement: ast.stmt) -> _Test:
    told = ast.unparse(statement)
    try:
        if not isinstance(statement, ast.Assert):
            raise ValueError
        test, right = statement.test, True
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.Is):
            return _Test(told, ast.unparse(test.left), ast.literal_eval(test.comparators[0]))
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test, right = test.operand, False
        if not isinstance(test, ast.Call):
            raise ValueError
        for argument in (*test.args, *(keyword.value for keyword in test.keywords)):
            ast.literal_eval(argument)  # else what is expected might stand in there, such as isclose(f(1), 2)
        return _Test(told, f"bool({ast.unparse(test)})", right)
    except (ValueError, TypeError):
        raise InputError(
            f"test {told[:100]!r} cannot be kept from the program; write assert CALL == LITERAL, or assert CALL"
        ) from None


def _judge(code: str, tests: tuple[str, tuple[_Test, ...]], sandbox: Sandbox) -> Result:
    imports, asked = tests
    if isinstance(asked[0].expected, str) and asked[0].told == asked[0].left:
        program = _SCRIPT.format(name=_NAME, inputs=repr([test.left for test in asked]), code=repr(code))
    else:
        thunks = "".join(f"lambda: {test.left}, " for test in asked)
        program = f"{code}\n{imports}{_CALLS.format(name=_NAME, thunks=thunks)}"
    numbers = [(number,) for number in range(len(asked))]
    problem = Problem(
        task_id="", dataset="own", prompt="", entry_point=_NAME, canonical_solution="", base_input=tuple(numbers),
        plus_input=None, tolerance=0.0,
    )  # fmt: skip
    expected = [b'{"value":%s}' % json.dumps(encode(test.expected), separators=(",", ":")).encode() for test in asked]
    prepared = TaskTests(
        problem=problem, base=len(asked), inputs=numbers, wires=[encode(one) for one in numbers], expected=expected,
        seconds=[0.0] * len(asked), floats=[True] * len(asked),
    )  # fmt: skip
    verdict: Verdict = judge_program(program, prepared, sandbox)
    passed = len(asked) if verdict.test is None else verdict.test
    failed = None if verdict.test is None else asked[verdict.test].told
    return Result(kind=verdict.base, passed=passed, tests=len(asked), failed=failed, message=verdict.message)
