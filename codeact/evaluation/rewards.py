"""Programs on tests of one's own, each alone in the sandbox: a verdict, or a reward for reinforcement learning."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from codeact.base.errors import InputError
from codeact.evaluation.judge import judge_program
from codeact.evaluation.own_tests import OwnTests, Tests, read_tests
from codeact.evaluation.results import default_parallel
from codeact.evaluation.sandbox.sandbox import Limits, Sandbox
from codeact.evaluation.sanitize import last_block


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
    read = [read_tests(one) for one in listed]
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


_sandbox = functools.cache(lambda limits, unsafe: Sandbox(limits, unsafe=unsafe))  # finding one runs a program


def _judge(code: str, tests: OwnTests, sandbox: Sandbox) -> Result:
    verdict = judge_program(code, tests.task_tests(), sandbox)
    passed = len(tests.tests) if verdict.test is None else verdict.test
    failed = None if verdict.test is None else tests.tests[verdict.test].told
    return Result(kind=verdict.base, passed=passed, tests=len(tests.tests), failed=failed, message=verdict.message)
