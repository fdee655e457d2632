"""Tasks of one's own in a file: the forms of human-eval, MBPP, LiveCodeBench and BigCodeBench, and plain ``tests``."""

from __future__ import annotations

import base64
import binascii
import pickletools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codeact.base.errors import InputError
from codeact.base.parsing import parse_json
from codeact.data.sources import RowError, open_local
from codeact.evaluation.own_tests import OwnTests, Tests, read_calls, read_program, read_scripts, read_tests
from codeact.evaluation.problems import DATASETS, Problem, ProblemSet, load_problems, read_problem

_MOST_BYTES = 1 << 28
_NOT_RUN = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json"),
)
# What LiveCodeBench's own runner puts before every program.
_LIVE_CODE_BENCH = "".join(
    (
        *(f"from {name} import *\n" for name in (*_MODULES, "builtins", "typing")),
        *(f"import {name}\n" for name in _MODULES),
        "sys.setrecursionlimit(50000)\n",
    )
)


def open_problems(
    dataset: str, data: Path | None = None, limit: int | None = None, tasks: Sequence[str] | None = None
) -> ProblemSet:
    """``load_problems``, or for the data set "own" ``load_tasks``.

    Raises:
        InputError: as they do; or "own" has no file.
    """
    if dataset != "own":
        return load_problems(dataset, data, limit, tasks)
    if data is None:
        raise InputError("tasks of your own need their file: --tasks FILE")
    return load_tasks(data, limit, tasks)


def load_tasks(path: Path, limit: int | None = None, tasks: Sequence[str] | None = None) -> ProblemSet:
    """Read tasks, a row each: ``task_id`` (or ``question_id``), and tests in one of these columns.

    - ``tests``: asserts, as text or a list, or pairs ``[input, output]`` or ``{"input", "output"}``;
    - ``test``: a program with ``check(candidate)``, unittest classes or asserts (human-eval, BigCodeBench);
    - ``test_list``, with ``test_imports`` or ``test_setup_code``: asserts (MBPP);
    - ``public_test_cases`` and ``private_test_cases`` (LiveCodeBench);
    - ``base_input`` and ``plus_input``: a file of evalplus, of any release.

    ``prompt`` (or ``complete_prompt``) is code that a completion goes on from, ``entry_point`` the function that is
    tested, ``canonical_solution`` what follows the prompt; ``question``, ``instruct_prompt``, ``question_content`` or
    ``text`` is what a chat is asked.

    Args:
        path: JSON, CSV, Parquet or Arrow, packed or not.
        limit: only so many, from the first.
        tasks: only these ids.

    Raises:
        InputError: the file cannot be read, or a row is no task; the message names it.
    """
    if not path.expanduser().exists():
        raise InputError(f"no such file: {path}; give one with a task a row")
    source = open_local(path.expanduser(), None, None)
    problems: dict[str, Problem] = {}
    for part in source.parts:
        for number, row in enumerate(part.raw(0, len(part), None)):
            try:
                if isinstance(row, RowError):
                    raise ValueError(row.text)
                problem = _problem(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"it has no {error}" if isinstance(error, KeyError) else error
                raise InputError(f"{path}, {part.where(number)}: no task: {reason}; mend or remove it") from None
            if problem.task_id in problems:
                raise InputError(f"{path}, {part.where(number)}: task {problem.task_id} is there twice; rename one")
            problems[problem.task_id] = problem
    chosen = [problem for name, problem in problems.items() if tasks is None or name in tasks]
    if not chosen:
        raise InputError(f"{path} holds no task that is asked for")
    (dataset, *others) = {problem.dataset for problem in chosen}
    return ProblemSet(
        dataset="own" if others else dataset,
        problems=tuple(chosen[:limit]),
        fingerprint=source.fingerprint,
        source=str(path),
    )


def _problem(row: Mapping[str, Any]) -> Problem:
    task_id = row.get("task_id", row.get("question_id"))
    if task_id is None:
        raise KeyError("task_id")
    dataset = str(task_id).partition("/")[0].lower()
    if "base_input" in row and dataset in DATASETS:
        return read_problem(row, dataset)
    entry_point, canonical = _text(row, "entry_point"), _text(row, "canonical_solution")
    tests = _tests(row, entry_point, bool(canonical))
    return Problem(
        task_id=str(task_id),
        dataset="own",
        prompt=_text(row, "complete_prompt", "prompt"),
        entry_point=entry_point,
        canonical_solution=canonical,
        base_input=None,
        plus_input=None,
        tolerance=0.0,
        test=_text(row, "test") or None,
        question=_question(row, tests),
        own=tests,
    )


def _text(row: Mapping[str, Any], *names: str) -> str:
    """The first of these columns that holds something."""
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), "")


def _question(row: Mapping[str, Any], tests: OwnTests | None) -> str:
    question = _text(row, "question", "instruct_prompt", "question_content", "text")
    if question and tests is not None and tests.script:
        question += "\n\nWrite a Python program that reads standard input and writes standard output."
    if question and (starter := _text(row, "starter_code")):
        question += f"\n\nBegin with:\n```python\n{starter}\n```"
    return question


def _tests(row: Mapping[str, Any], entry_point: str, reference: bool) -> OwnTests | None:
    if "public_test_cases" in row or "private_test_cases" in row:
        return _live_code_bench(row)
    tests, program = row.get("tests"), row.get("test")
    if tests is None and isinstance(program, list):
        tests = program
    if tests is not None:
        return read_tests(tests_of(tests), beside=True)
    if (listed := row.get("test_list")) is not None:
        setup = row.get("test_imports") or row.get("test_setup_code") or []
        return read_tests([*([setup] if isinstance(setup, str) else setup), *listed], beside=True)
    if program is not None:
        return read_program(str(program), entry_point, reference)
    raise KeyError("tests, test, test_list or public_test_cases")


def tests_of(value: Any) -> Tests:
    """Tests as JSON has them: text, or a list of texts, of pairs, or of objects with ``input`` and ``output``.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, str):
        return value
    found: list[str | tuple[str, str]] = []
    for one in value if isinstance(value, list | tuple) else [None]:
        given, expected = (one.get("input"), one.get("output")) if isinstance(one, Mapping) else (None, None)
        if isinstance(one, list | tuple) and len(one) == 2:
            given, expected = one
        if isinstance(one, str):
            found.append(one)
        elif isinstance(given, str) and isinstance(expected, str):
            found.append((given, expected))
        else:
            raise ValueError("tests are text, or a list of asserts or of pairs of input and output")
    return found


def _live_code_bench(row: Mapping[str, Any]) -> OwnTests:
    cases = [*_cases(row.get("public_test_cases")), *_cases(row.get("private_test_cases"))]
    if not cases:
        raise ValueError("there is no test case")
    if any(case["testtype"] == "functional" for case in cases):
        metadata = row.get("metadata") or {}
        name = (parse_json(metadata) if isinstance(metadata, str) else metadata)["func_name"]
        calls = [
            ([parse_json(line) for line in case["input"].split("\n")], parse_json(case["output"])) for case in cases
        ]
        return read_calls(str(name), calls, _LIVE_CODE_BENCH)
    return read_scripts([(case["input"], case["output"]) for case in cases], _LIVE_CODE_BENCH)


def _cases(value: Any) -> list[Mapping[str, str]]:
    """Test cases: a list, JSON of it, or that JSON pickled, packed and in base64, of which nothing is unpickled."""
    if not isinstance(value, str):
        return list(value or [])
    try:
        return list(parse_json(value))
    except ValueError:
        pass
    try:
        unpack = zlib.decompressobj()
        packed = unpack.decompress(base64.b64decode(value, validate=True), _MOST_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"test cases cannot be read: {error}") from None
    if unpack.unconsumed_tail:
        raise ValueError(f"test cases hold more than {_MOST_BYTES:,} bytes")
    # A pickled text is that text between a few marks; anything else would make objects, and is refused.
    texts = []
    for operation, argument, _ in pickletools.genops(packed):
        if operation.name in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"):
            texts.append(str(argument))
        elif operation.name not in _NOT_RUN:
            raise ValueError(f"test cases are pickled, and no text alone ({operation.name}); they are not unpickled")
    return list(parse_json("".join(texts)))
