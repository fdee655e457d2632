"""Rows whose answers are programs -> what share of its tests each passes; no row is left out for that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codeact.base.console import Progress, percent
from codeact.base.errors import InputError
from codeact.base.stage import Lines
from codeact.data.forms import form_columns
from codeact.data.records import Record, RecordSet, jsonable, write_jsonl
from codeact.evaluation.own_tests import Tests, read_tests
from codeact.evaluation.rewards import Result, run_programs
from codeact.evaluation.sanitize import last_block
from codeact.evaluation.settings import VerifySettings
from codeact.evaluation.tasks import tests_of

_BLOCK = 512  # rows that are run and written at a time


def verify_rows(records: RecordSet, settings: VerifySettings, output: Path, unsafe: bool = False) -> Lines:
    """Run the last block of code of every answer on the tests of its row.

    Args:
        records: the rows; the tests are in a column of each, as ``codeact.evaluation.tasks.tests_of`` reads them.
        settings: which column, and limits.
        output: JSON lines to write: the conversation, its tests, ``pass_share`` (tests before the first failure, of
            all; null where there are none that can be run), ``verdict``, ``failed`` (the test) and ``message``.
        unsafe: also where nothing isolates.

    Returns:
        Lines for the summary.

    Raises:
        InputError: nothing isolates here, or no row has such tests.
    """
    verdicts: Counter[str] = Counter()

    def rows(step: Any) -> Iterator[dict[str, Any]]:
        for start in range(0, len(records), _BLOCK):
            block = records.rows(start, start + _BLOCK)
            kept = [row for row in block if isinstance(row, Record)]
            verdicts["no record"] += len(block) - len(kept)
            read = [_tests_of(row, settings.tests) for row in kept]
            runnable = [(row, tests) for row, tests in zip(kept, read, strict=True) if not isinstance(tests, Result)]
            results = iter(
                run_programs(
                    [last_block(row.answer) for row, _ in runnable],
                    [tests for _, tests in runnable],
                    limits=settings.limits(),
                    parallel=settings.parallel,
                    unsafe=unsafe,
                    own_tests=True,
                )
            )
            for row, tests in zip(kept, read, strict=True):
                result = tests if isinstance(tests, Result) else next(results)
                verdicts[result.kind] += 1
                yield {
                    "id": row.id,
                    **form_columns(row.turns, row.context, "messages"),
                    "pass_share": result.passed / result.tests if result.tests else None,
                    "verdict": result.kind,
                    "failed": result.failed,
                    "message": result.message,
                    settings.tests: jsonable(row.extra.get(settings.tests)),
                    "extra": jsonable({name: value for name, value in row.extra.items() if name != settings.tests}),
                }
            step(len(block))

    with Progress(len(records), "rows", "verifying") as step:
        write_jsonl(output, rows(step))
    run = sum(count for kind, count in verdicts.items() if kind not in ("no record", "no tests", "not run"))
    if not run:
        raise InputError(
            f"{records.source}: no row has tests in column {settings.tests!r} that can be run; {output} says why"
        )
    lines = [("rows", f"{len(records):,}"), ("run", f"{run:,}"), ("pass", percent(verdicts["pass"] / run))]
    return lines + [(kind, f"{count:,}") for kind, count in verdicts.most_common() if count and kind != "pass"]


def _tests_of(row: Record, column: str) -> Tests | Result:
    """The tests of a row, or why there are none."""
    given = row.extra.get(column)
    if given in (None, "", []):
        return Result(kind="no tests", passed=0, tests=0)
    try:
        tests = tests_of(given)
        read_tests(tests)
    except ValueError as error:
        return Result(kind="not run", passed=0, tests=0, message=" ".join(str(error).split())[:300])
    return tests
