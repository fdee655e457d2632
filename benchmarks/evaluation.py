"""Sanitizing and evaluation against evalplus.

    python -m benchmarks.evaluation [--quick | --full] [--data FOLDER] [--samples FILE] [--json FILE]

Verdicts: canonical solutions of HumanEval+ and mutants of them (one node of the syntax tree changed) are judged by
codeact, isolated, and by evalplus, with the expected values computed before the clock starts; every verdict that
differs is listed. The default run takes 24 tasks, evenly over the set; ``--full`` takes all of HumanEval+ and MBPP+,
and as many programs of a model as ``--samples`` holds. ``--data`` (default: CODEACT_EVAL_DATA) is a folder with
HumanEvalPlus.jsonl.gz and MbppPlus.jsonl.gz; without it only sanitizing is measured. evalplus is installed into
build/evalplus, without the libraries that it would bring for hosted models. Memory is the peak of the process that
judges, all of it, without the programs that it runs.

Rewards: ``run_programs`` on asserts, as TRL's GRPOTrainer calls it by ``pass_share``; its throughput.

The floor of verdicts is a bare interpreter, started once a program; that of sanitizing, one ``ast.parse`` of an answer
that is all code.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Line, Report, Timing, digits, interleave, main, resident, table
from benchmarks.mutants import mutate
from codeact.evaluation.judge import GroundTruth
from codeact.evaluation.problems import ProblemSet, load_problems
from codeact.evaluation.programs import Program, read_rows, write_samples
from codeact.evaluation.results import evaluate
from codeact.evaluation.rewards import run_programs
from codeact.evaluation.sandbox.sandbox import Limits, Sandbox
from codeact.evaluation.sanitize import sanitize

EVALPLUS = (
    "evalplus==0.3.1 wget==3.2 tempdir==0.7.1 appdirs==1.4.4 multipledispatch==1.0.0 termcolor==3.3.0 fire==0.7.1 "
    "tree-sitter==0.26.1 tree-sitter-python==0.25.0 stop-sequencer==1.2.3"
).split()
FILES = {"humaneval": "HumanEvalPlus", "mbpp": "MbppPlus"}
TASKS, ROUNDS = 24, 2


def evalplus_folder() -> Path:
    """Where evalplus is installed, apart from everything else."""
    folder = ROOT / "build" / "evalplus"
    if not (folder / "evalplus").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *EVALPLUS]
        subprocess.run(command, check=True)
    return folder


def evalplus_sanitize() -> Callable[[str, str], str]:
    """evalplus' own function."""
    sys.path.append(str(evalplus_folder()))
    try:
        from evalplus.sanitize import sanitize as theirs
    finally:
        sys.path.remove(str(evalplus_folder()))
    return theirs


def answers(lines: int) -> dict[str, str]:
    """Answers of a model that are so many lines long, of six kinds."""
    body = "".join(f"def helper_{n}(x):\n    return helper_{n + 1}(x) + 1\n\n" for n in range(lines // 3))
    chat = "This isn't (quite) code, it's text: see \"above\".\n"
    return {
        "code": f"Sure!\n\n```python\n{body}\ndef f(x):\n    return helper_0(x)\n```\nDone.",
        "one function": "def f(x):\n" + "    x = (x + 1) * 2\n" * lines + "    return x\n",
        "chat": chat * lines,
        "chat and code": (chat * 10 + "```python\ndef f(x):\n    return x\n```\n") * (lines // 13),
        "cut off": "def f(x):\n" + "    x = (x + 1) * 2\n" * lines + "    if x > (",
        "never closed": "x = (\n" * lines,
    }


def measure_sanitize(lines: int, theirs_at: int) -> list[dict[str, Any]]:
    """Times for every kind of answer; evalplus, cubic in the lines, takes shorter ones."""
    long, short = answers(lines), answers(theirs_at)
    theirs = evalplus_sanitize()
    calls: dict[str, Callable[[], Any]] = {}
    for kind in long:
        if kind in ("code", "one function", "cut off"):
            assert "def f(x):" in sanitize(short[kind], "f"), kind
        calls[f"codeact, {kind}"] = functools.partial(sanitize, long[kind], "f")
        calls[f"short, {kind}"] = functools.partial(sanitize, short[kind], "f")
        calls[f"evalplus, {kind}"] = functools.partial(theirs, short[kind], "f")
    parse = functools.partial(ast.parse, sanitize(short["code"], "f"))
    times = interleave({**calls, "parse": parse}, 3, warm=False)
    return [
        {
            "kind": kind,
            "lines": lines,
            "short_lines": theirs_at,
            "timing": times[f"codeact, {kind}"],
            "short": times[f"short, {kind}"],
            "evalplus": times[f"evalplus, {kind}"],
            "floor": times["parse"].median if kind == "code" else None,
        }
        for kind in long
    ]


def samples_of(problems: ProblemSet, mutants: int) -> list[Program]:
    """Canonical solutions, then mutants of them."""
    found = [Program(task_id=p.task_id, solution=p.reference, place="canonical") for p in problems.problems]
    for problem in problems.problems:
        for text in mutate(problem.reference, mutants, problem.task_id):
            found.append(Program(task_id=problem.task_id, solution=text, place="mutant"))
    return found


def some_of(problems: ProblemSet, count: int | None, data: Path, folder: Path) -> tuple[ProblemSet, Path]:
    """So many tasks evenly over the set, and a file of them alone; all for None."""
    if count is None:
        return problems, data
    lines = gzip.decompress(data.read_bytes()).splitlines()
    chosen = folder / f"{problems.dataset}-{count}.jsonl"
    chosen.write_bytes(b"\n".join(lines[:: len(lines) // count][:count]) + b"\n")
    return load_problems(problems.dataset, chosen), chosen


def evalplus_verdicts(dataset: str, data: Path, samples: list[Program], parallel: int, scratch: Path) -> dict[str, Any]:
    """Seconds and verdicts of evalplus, in the order of the samples, and its peak of memory."""
    plain = data
    if data.suffix == ".gz":
        plain = scratch / f"{FILES[dataset]}.jsonl"
        plain.write_bytes(gzip.decompress(data.read_bytes()))
    source, target = scratch / "samples.jsonl", scratch / "verdicts.json"
    write_samples(source, ({"task_id": s.task_id, "solution": s.solution} for s in samples))
    environment = {
        **os.environ,
        "PYTHONPATH": str(evalplus_folder()),
        f"{dataset.upper()}_OVERRIDE_PATH": str(plain),
        "XDG_CACHE_HOME": str(ROOT / "build" / "evalplus-cache"),
    }
    script = ROOT / "benchmarks" / "evalplus_verdicts.py"
    command = [sys.executable, str(script), dataset, str(source), str(target), str(parallel)]
    subprocess.run(command, env=environment, check=True, cwd=scratch, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(target.read_text())
    return result


def compare(dataset: str, data: Path, tasks: int | None, mutants: int, programs: Path | None) -> dict[str, Any]:
    """Judge samples with codeact and with evalplus, in turns; times, and every difference."""
    parallel = max(1, (os.cpu_count() or 2) // 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problems, data = some_of(load_problems(dataset, data), tasks, data, folder)
        samples = samples_of(problems, mutants)
        if programs:
            rows = read_rows(programs)
            samples += [Program(task_id=r["task_id"], solution=r["solution"], place="model") for r in rows]
        sandbox = Sandbox(Limits())
        truth = GroundTruth(problems, sandbox)
        for problem in problems.problems:  # warm, as for evalplus
            truth.tests(problem)
        seconds: dict[str, list[float]] = {"codeact": [], "evalplus": []}
        shuffle = random.Random(0)
        for number in range(ROUNDS):
            for arm in shuffle.sample(["codeact", "evalplus"], 2):
                if arm == "codeact":
                    begin = time.perf_counter()
                    report = evaluate(problems, samples, sandbox, folder / f"{number}.jsonl", parallel=parallel)
                    seconds[arm].append(time.perf_counter() - begin)
                else:
                    theirs = evalplus_verdicts(dataset, data, samples, parallel, folder)
                    seconds[arm].append(theirs["seconds"])
    judged = {(i.sample.task_id, i.sample.solution): i.verdict for group in report.samples.values() for i in group}
    differences = []
    for sample, (base, plus) in zip(samples, theirs["verdicts"], strict=True):
        verdict = judged[sample.task_id, sample.solution]
        ours = (verdict.base == "pass", verdict.plus == "pass")
        if ours != (base == "pass", base == plus == "pass"):
            differences.append(
                {
                    "task": sample.task_id,
                    "sample": sample.place,
                    "codeact": [verdict.base, verdict.plus],
                    "evalplus": [base, plus],
                    "message": verdict.message,
                    "solution": sample.solution,
                }
            )
    # evalplus fails the one or two tasks whose own oracle is broken or slow; more would be another judge.
    assert len(differences) <= 2 + len(samples) // 100, differences
    interpreter = interleave(
        {"start": lambda: subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)}, 5
    )["start"].median
    return {
        "dataset": dataset,
        "tasks": len(problems.problems),
        "samples": len(samples),
        "parallel": parallel,
        "passed": sum(judged[s.task_id, s.solution].plus == "pass" for s in samples),
        "timing": Timing(tuple(seconds["codeact"])),
        "evalplus": Timing(tuple(seconds["evalplus"])),
        "floor": len(samples) * interpreter / parallel,
        "peak_bytes": resident("VmHWM") if sys.platform == "linux" else None,
        "evalplus_peak_bytes": theirs["peak_bytes"],
        "differences": differences,
    }


def measure_rewards(count: int) -> dict[str, Any]:
    """``run_programs`` on so many programs, as a reward function calls it, beside a bare interpreter for each."""
    programs = [f"def f(x):\n    return x + {number % 2}" for number in range(count)]
    tests = ["assert f(1) == 2", "assert f([1]) == [1]", "assert f(5) == 6"]
    parallel = max(1, (os.cpu_count() or 2) // 2)
    judged = run_programs(programs, tests, parallel=parallel)
    assert [result.kind for result in judged] == ["wrong", "exception"] * (count // 2)
    bare = [sys.executable, "-I", "-S", "-c", "pass"]
    times = interleave(
        {
            "codeact": lambda: run_programs(programs, tests, parallel=parallel),
            "start": lambda: subprocess.run(bare, check=True),
        },
        3,
    )
    floor = count * times["start"].median / parallel
    return {"programs": count, "parallel": parallel, "timing": times["codeact"], "floor": floor}


def verdicts_section(results: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    parts = []
    for r in results:
        parts.append(
            f"{r['dataset']}+: {r['samples']} programs of {r['tasks']} tasks, {r['passed']} pass; {r['parallel']} at a "
            f"time: codeact {r['timing']}, evalplus {r['evalplus']}; {len(r['differences'])} verdicts differ."
        )
        parts += [
            f"- {d['task']} ({d['sample']}): codeact {d['codeact']} ({d['message']}), evalplus {d['evalplus']}"
            for d in r["differences"]
        ]
    return "\n".join(parts)


def run(options: argparse.Namespace) -> Report:
    by_kind = measure_sanitize(200 if options.quick else 2000, 20 if options.quick else 100)
    short_lines = by_kind[0]["short_lines"]
    sanitized = table(
        f"answer |> codeact, {by_kind[0]['lines']:,} lines |> codeact, {short_lines} lines |> "
        f"evalplus, {short_lines} lines |> x evalplus' speed",
        (
            (r["kind"], r["timing"], r["short"], r["evalplus"], digits(r["evalplus"].median / r["short"].median))
            for r in by_kind
        ),
    )
    lines = [
        Line(
            what=f"sanitize {r['short_lines']} lines of {r['kind']}",
            ours=r["short"],
            peer="evalplus",
            theirs=r["evalplus"],
            floor=r["floor"],
        )
        for r in by_kind
        if r["kind"] in ("code", "chat and code")
    ]
    results = []
    data = options.data or os.environ.get("CODEACT_EVAL_DATA")
    if data and not options.quick:
        for dataset in FILES if options.full else ("humaneval",):
            programs = options.samples if dataset == "humaneval" else None
            tasks, mutants = (None, 2 if dataset == "humaneval" else 1) if options.full else (TASKS, 2)
            results.append(compare(dataset, Path(data) / f"{FILES[dataset]}.jsonl.gz", tasks, mutants, programs))
    lines += [
        Line(
            what=f"verdicts of {r['samples']} programs, {r['dataset']}+",
            ours=r["timing"],
            peer="evalplus",
            theirs=r["evalplus"],
            floor=r["floor"],
            memory=r["peak_bytes"],
            peer_memory=r["evalplus_peak_bytes"],
        )
        for r in results
    ]
    rewards = measure_rewards(8 if options.quick else 24)
    count, taken = rewards["programs"], rewards["timing"]
    told = (
        f"run_programs: {count} programs on 3 asserts, {rewards['parallel']} at a time: {taken}, "
        f"{count / taken.median:.0f} a second (a bare interpreter for each: {rewards['floor']:.2f} s)"
    )
    judged = verdicts_section(results) or "Verdicts were not compared: no folder with evalplus' data sets was named."
    plain = [
        {name: value.seconds if isinstance(value, Timing) else value for name, value in r.items()}
        for r in [*by_kind, *results, rewards]
    ]
    sections = ["## Sanitizing", sanitized, "## Verdicts", judged, "## Rewards", told]
    return Report(sections=sections, lines=lines, figures={"records": plain})


if __name__ == "__main__":
    main(
        run,
        __doc__,
        data="folder of evalplus' data sets",
        full="all tasks of both data sets: half an hour",
        files={"--samples": "programs of a model for HumanEval, to be judged too"},
    )
