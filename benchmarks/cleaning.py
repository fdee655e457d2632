"""codeact clean: rows a second and memory, as the data grows and where it is hostile.

    python -m benchmarks.cleaning [--quick | --full] [--json FILE]

Rows are functions of Python's standard library with their docstrings (``codeact harvest``), every name of more than
three letters followed by a number drawn for the row, so that rows share no more than the language. Of them 5 % are
copies of an earlier row and 5 % an earlier row with one name in fifty drawn anew. Hostile: all rows equal; all rows
equal but for one number.

Every copy has to be marked; of the changed rows the share that is found is told, and how many rows are marked that are
neither. Time is that of ``mark_rows`` on a file of JSON lines, with 542 tasks (other functions), by the wall and of the
CPU; memory is the peak of a process of its own over what it took before. There is no peer: what others offer finds
duplicates only.
"""

from __future__ import annotations

import argparse
import json
import keyword
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Report, growth_exponent, in_fresh_process, main, mebibytes, resident, table
from codeact.cleaning.contamination import EvaluationTask
from codeact.cleaning.marks import Thresholds, counts_of, mark_rows
from codeact.data.harvest import harvest
from codeact.data.records import open_records

TASKS = 542
_NAME = re.compile(r"[^\W\d_]\w{3,}")
KINDS = ("mixed", "equal", "one number")


def renamed(text: str, generator: np.random.Generator, share: float = 1.0) -> str:
    """Names with a number behind them, drawn for each name."""
    numbers: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        if keyword.iskeyword(match[0]):
            return match[0]
        if match[0] not in numbers:
            new = f"{match[0]}{generator.integers(10**6)}" if generator.random() < share else match[0]
            numbers[match[0]] = new
        return numbers[match[0]]

    return _NAME.sub(name, text)


def rows_of(kind: str, count: int, functions: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Question, answer, and what the row is: new, copy or changed."""
    generator = np.random.default_rng(0)
    earlier: list[tuple[str, str]] = []
    for number in range(count):
        question, answer = functions[number % len(functions)]
        if kind != "mixed":
            text = f"{functions[0][0]} {number}" if kind == "one number" else functions[0][0]
            yield text, functions[0][1], "copy" if number else "new"
            continue
        draw = generator.random() if earlier else 1.0
        if draw < 0.1:
            question, answer = earlier[generator.integers(len(earlier))]
            if draw >= 0.05:
                question, answer = renamed(question, generator, 0.02), renamed(answer, generator, 0.02)
            yield question, answer, "copy" if draw < 0.05 else "changed"
            continue
        question, answer = renamed(question, generator), renamed(answer, generator)
        if len(earlier) < 10_000:
            earlier.append((question, answer))
        yield question, answer, "new"


def measured(kind: str, count: int, functions: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """In a process of its own."""
    tasks = [EvaluationTask(id=f"task/{n}", question=q, solution=a) for n, (q, a) in enumerate(functions[:TASKS])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        made = np.empty(count, "U7")
        with path.open("w") as file:
            for number, (question, answer, what) in enumerate(rows_of(kind, count, functions[TASKS:])):
                file.write(json.dumps({"instruction": question, "output": answer}) + "\n")
                made[number] = what
        size = path.stat().st_size
        small = Path(folder, "small.jsonl")
        small.write_text('{"instruction": "a question", "output": "an answer"}\n')
        mark_rows(open_records(small), Thresholds(), tasks, scratch=Path(folder))  # loads what is loaded
        Path("/proc/self/clear_refs").write_text("5")
        before, begin, used = resident("VmRSS"), time.perf_counter(), time.process_time()
        marks = mark_rows(open_records(path), Thresholds(), tasks, scratch=Path(folder))
        seconds, memory = time.perf_counter() - begin, resident("VmHWM") - before
        used = time.process_time() - used
    status = np.array(marks["status"].to_pylist(), object)
    repeats = np.isin(status, ["exact_duplicate", "near_duplicate"])
    assert (status[made == "copy"] != "ok").all()
    return {
        "kind": kind,
        "rows": count,
        "bytes": size,
        "seconds": seconds,
        "cpu_seconds": used,
        "memory": memory,
        "changed_found": float(repeats[made == "changed"].mean()) if (made == "changed").any() else None,
        "new_marked": int(repeats[made == "new"].sum()),
        "counts": counts_of(marks),
    }


def run(options: argparse.Namespace) -> Report:
    sizes = (1_000, 3_000) if options.quick else (10_000, 30_000)
    cases = [(kind, size) for kind in KINDS for size in sizes]
    cases += [(kind, 1_000_000) for kind in KINDS] if options.full else []
    functions = [(row["instruction"], row["output"]) for row in harvest("stdlib")]
    records = [in_fresh_process(measured, *case, functions, preload=("numpy",)) for case in cases]
    rows = (
        (
            r["kind"],
            f"{r['rows']:,}",
            f"{r['bytes'] / 2**20:,.0f}",
            f"{r['seconds']:.1f}",
            f"{r['cpu_seconds']:.1f}",
            mebibytes(r["memory"]),
            "" if r["changed_found"] is None else f"{r['changed_found']:.1%}",
            r["new_marked"],
        )
        for r in records
    )
    columns = (
        "rows are |> rows |> MiB |> seconds |> of the CPU |> added memory |> changed rows found |> new rows marked"
    )
    mixed = [r for r in records if r["kind"] == "mixed"]
    power = growth_exponent([r["rows"] for r in mixed], [r["cpu_seconds"] for r in mixed])
    return Report(
        sections=["## Cleaning", table(columns, rows), f"Time of the CPU grows as rows to the power of {power:.2f}."],
        lines=[],
        figures={"growth_exponent": power, "records": records},
    )


if __name__ == "__main__":
    main(run, __doc__, full="a million rows of each kind: half an hour")
