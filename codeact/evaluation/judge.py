"""Run programs on the tests of a problem: the reference once, for what is expected; samples for a verdict."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeact.base.console import visible
from codeact.base.errors import InputError
from codeact.base.files import atomic_path, cache_path
from codeact.base.parsing import parse_json
from codeact.evaluation.compare import Judge, is_floats, result_form
from codeact.evaluation.problems import Problem, ProblemSet
from codeact.evaluation.sandbox.runner import decode, encode
from codeact.evaluation.sandbox.sandbox import Sandbox

KINDS = ("pass", "syntax", "wrong", "exception", "time", "memory", "crash")
"""What can become of a program. ``crash``: its process ended before its tests did, or wrote no results."""

VERDICT_FORMAT = 3
"""Of the cached truth and of verdicts: both are made anew where it differs."""

_REFERENCE_SECONDS = 60.0
_REFERENCE_TOTAL = 600.0
_REFERENCE_BYTES = 1 << 30
_SPARE_BYTES = 1 << 20
_DONE = b'{"done":true}'
_DIGEST = b'{"value":{"digest":'
_LONGEST_MESSAGE = 10_000
_LONGEST_INPUT = 500
_KILLED, _CPU_TIME = 128 + 9, 128 + 24  # SIGKILL, SIGXCPU
_UNTOLD = {
    "time": ("time", "no result in time"),
    "flood": ("crash", "it wrote more results than any right ones need"),
    "files": ("memory", "it made more files than any right program needs"),
    "lingering": ("crash", "it closed its results before its tests were done"),
}
"""What became of a program that does not say so itself, by how its run ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``base`` and ``plus`` are of ``KINDS``; ``plus`` (base and plus tests together) is None where there are none.

    ``test``: number of the first failed test, base tests first; None if none was run. ``input``: what it was, the call
    or the standard input; ``message``: one line about it.
    """

    base: str
    plus: str | None
    test: int | None = None
    message: str = ""
    input: str = ""

    @property
    def late(self) -> bool:
        """Whether it failed by a time-out."""
        return "time" in (self.base, self.plus)

    @property
    def starved(self) -> bool:
        """Whether it failed for want of memory, or was killed: a machine that is short of it can be the reason."""
        return "memory" in (self.base, self.plus) or self.message.endswith(f"exit code {_KILLED}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTests:
    """The tests of a problem with what is expected of each.

    ``base``: how many are base tests; they are the first. ``inputs``: arguments; ``wires``: the same as they enter the
    sandbox; ``expected``: the reference's lines of results; ``seconds``: what it took; ``floats``: whether a float is
    expected, or was in an earlier test of the same kind. ``told``: how each test is named to a person, if not as a
    call with its arguments; ``wrap``: what is run for a program, if not it itself.
    """

    problem: Problem
    base: int
    inputs: Sequence[Sequence[Any]]
    wires: Sequence[Any]
    expected: Sequence[bytes]
    seconds: Sequence[float]
    floats: Sequence[bool]
    told: Sequence[str] | None = None
    wrap: Callable[[str], str] | None = None

    def shown(self, number: int) -> str:
        """A test in one line, cut where it is long."""
        if self.told is not None:
            return visible(self.told[number][:_LONGEST_INPUT])
        try:
            arguments = ", ".join(repr(one)[:_LONGEST_INPUT] for one in self.inputs[number])
        except ValueError:  # a number of more digits than Python writes
            arguments = "..."
        return visible(f"{self.problem.entry_point}({arguments})"[:_LONGEST_INPUT])


class GroundTruth:
    """What the canonical solutions return. Computed once a data set and kept as JSON, a file a problem."""

    def __init__(self, problems: ProblemSet, sandbox: Sandbox) -> None:
        name = f"{problems.dataset}-{problems.fingerprint[:32]}-{VERDICT_FORMAT}"
        self._folder = cache_path(f"ground-truth/{name}", grows=True)
        self._sandbox = sandbox

    def _compute(self, problem: Problem) -> None:
        header, lines = _reference(problem, self._sandbox)
        with (
            atomic_path(self._path(problem)) as temporary,
            temporary.open("wb") as raw,
            gzip.GzipFile("", "wb", 1, raw, mtime=0) as file,
        ):
            for line in (json.dumps(header).encode(), *lines):
                file.write(line + b"\n")

    def tests(self, problem: Problem) -> TaskTests:
        """Return the tests of a problem; the canonical solution is run for them if they are not in the cache.

        Raises:
            InputError: the canonical solution fails.
        """
        try:
            with gzip.open(self._path(problem)) as file:
                first, *expected = file.read().splitlines()
            header = parse_json(first)
        except (OSError, EOFError, ValueError, zlib.error):
            self._compute(problem)
            return self.tests(problem)
        base = problem.base_input if problem.base_input is not None else [decode(wire) for wire in header["inputs"]]
        inputs = [*base, *(problem.plus_input or ())]
        return TaskTests(
            problem=problem,
            base=len(base),
            inputs=inputs,
            wires=[encode(tuple(arguments)) for arguments in inputs],
            expected=expected,
            seconds=header["seconds"],
            floats=header["floats"],
        )

    def _path(self, problem: Problem) -> Path:
        return self._folder / f"{problem.task_id.replace('/', '-')}.json.gz"


def _reference(problem: Problem, sandbox: Sandbox) -> tuple[dict[str, Any], list[bytes]]:
    """Run the reference on all tests; where the file has only a test program, find out first what that calls it with.

    Returns a header and the lines of results, one a test.
    """
    lines: list[bytes] = []

    def keep(line: bytes) -> bool:
        lines.append(line)
        return True

    request = {"program": problem.reference, "entry_point": problem.entry_point}
    header: dict[str, Any] = {}
    if problem.base_input is None:
        check = {**request, "check": problem.test, "seconds": [_REFERENCE_TOTAL]}
        sandbox.run(check, keep, total=_REFERENCE_TOTAL, most_bytes=_REFERENCE_BYTES)
        if lines[-1:] != [_DONE]:
            raise InputError(f"{problem.task_id}: its test program fails on the canonical solution: {lines[-1:]}")
        header["inputs"] = inputs = [parse_json(line)["arguments"] for line in lines[:-1]]
        lines.clear()
    else:
        inputs = [encode(arguments) for arguments in problem.base_input]
    base = len(inputs)
    inputs = [*inputs, *(encode(arguments) for arguments in problem.plus_input or ())]
    form = result_form(problem)
    sandbox.run(
        {
            **request,
            "inputs": inputs,
            "seconds": [_REFERENCE_SECONDS] * len(inputs),
            "form": "reference not none" if form == "not none" else form,
            "timed": True,
        },
        keep,
        total=_REFERENCE_TOTAL,
        most_bytes=_REFERENCE_BYTES,
    )
    if len(lines) != 2 * len(inputs) + 1 or lines[-1] != _DONE:
        last = lines[-1][:200] if lines else b"nothing"
        raise InputError(f"{problem.task_id}: the canonical solution fails in the sandbox: {last!r}")
    expected, seconds = lines[:-1:2], lines[1:-1:2]
    floats = [not line.startswith(_DIGEST) and is_floats(decode(parse_json(line)["value"])) for line in expected]
    header["seconds"] = [round(parse_json(line)["seconds"], 6) for line in seconds]
    header["floats"] = [*itertools.accumulate(floats[:base], max), *itertools.accumulate(floats[base:], max)]
    return header, expected


def judge_program(program: str, tests: TaskTests, sandbox: Sandbox, base_only: bool = False) -> Verdict:
    """Run a program on the tests of its problem; the first failure ends it."""
    problem, limits = tests.problem, sandbox.limits
    plus = problem.plus_input is not None and not base_only
    count = len(tests.inputs) if plus else tests.base
    allowed = [max(limits.min_seconds, limits.factor * seconds) for seconds in tests.seconds[:count]]
    passed = 0
    failure: tuple[str, str] | None = None
    judge = Judge(problem)

    def consume(line: bytes) -> bool:
        nonlocal passed, failure
        if not line.startswith(b'{"value":'):
            failure = _told_failure(line)
            return False
        if not judge.passes(tests.inputs[passed], line, tests.expected[passed], tests.floats[passed]):
            failure = ("wrong", "")
            return False
        passed += 1
        return passed < count

    ended = sandbox.run(
        {
            "program": program if tests.wrap is None else tests.wrap(program),
            "entry_point": problem.entry_point,
            "inputs": tests.wires[:count],
            "seconds": allowed,
            "form": result_form(problem),
            "timed": False,
        },
        consume,
        total=min(sum(allowed), max(limits.total_seconds, limits.factor * sum(tests.seconds[:count]))),
        most_bytes=_SPARE_BYTES + 4 * sum(map(len, tests.expected[:count])),
    )
    if failure is None and passed < count:
        failure = _UNTOLD.get(ended.how) or (
            ("memory", "it was killed when memory ran out")
            if ended.status == _KILLED and ended.starved
            else ("time", "it used up its CPU time")
            if ended.status == _CPU_TIME
            else ("crash", f"its process ended with exit code {ended.status}")
        )
    return _verdict(passed, failure, tests, plus)


def _told_failure(line: bytes) -> tuple[str, str]:
    """What the program's own process says about its failure."""
    try:
        row = parse_json(line[:_LONGEST_MESSAGE])
        kind = row.get("load", row.get("error"))
        if kind in KINDS[1:]:
            return kind, visible(str(row.get("message"))[:300])
    except (ValueError, AttributeError):
        pass
    return "crash", "its results cannot be read"


def _verdict(passed: int, failure: tuple[str, str] | None, tests: TaskTests, plus: bool) -> Verdict:
    kind, message = failure or ("pass", "")
    return Verdict(
        base="pass" if passed >= tests.base else kind,
        plus=kind if plus else None,
        test=None if failure is None else passed,
        message=message,
        input="" if failure is None else tests.shown(passed),
    )
