"""Samples -> verdicts -> pass@k: what is done already is kept, time-outs are tried again, nothing is left out."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from codeact.base.console import counted, visible
from codeact.base.files import atomic_path
from codeact.base.machine import usable_cpus
from codeact.evaluation.judge import VERDICT_FORMAT, GroundTruth, TaskTests, Verdict, judge_program
from codeact.evaluation.problems import Problem, ProblemSet
from codeact.evaluation.programs import Program, SampleLog, as_code, left_out_note
from codeact.evaluation.sandbox.sandbox import Sandbox


def default_parallel() -> int:
    """Programs at a time: half as many as CPUs may be used, so that none is late for want of one."""
    return max(1, usable_cpus() // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A sample and what became of it."""

    sample: Program
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """``samples``: by task id, in the order of the problems; a task without samples is there with none.

    ``left_out``: how many samples there were of each task that the problems lack. ``ks``: every k of pass@k.
    """

    problems: ProblemSet
    plus: bool
    isolated: bool
    samples: Mapping[str, Sequence[Judged]]
    reused: int
    left_out: Counter[str] = field(default_factory=Counter)
    ks: Sequence[int] = (1, 10, 100)

    @property
    def missing(self) -> list[str]:
        """Tasks without a sample; they count as failed."""
        return [task_id for task_id, judged in self.samples.items() if not judged]

    def pass_at(self, kind: str) -> dict[int, float]:
        """Pass@k of "base" or "plus", for every k that each attempted task has samples for."""
        counts = [(len(judged), self._passed(judged, kind)) for judged in self.samples.values()]
        fewest = min((n for n, _ in counts if n), default=1)
        return {
            k: sum(pass_at_k(n, passed, k) if n else 0.0 for n, passed in counts) / len(counts)
            for k in self.ks
            if k <= fewest
        }

    def failures(self) -> Counter[str]:
        """How many samples ended how (of base and plus tests together)."""
        kinds = (item.verdict.plus or item.verdict.base for judged in self.samples.values() for item in judged)
        return Counter(kinds)

    @staticmethod
    def _passed(judged: Sequence[Judged], kind: str) -> int:
        return sum(getattr(item.verdict, kind) == "pass" for item in judged)

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        kinds = ("base", "plus") if self.plus else ("base",)
        return {
            "dataset": self.problems.dataset,
            "fingerprint": self.problems.fingerprint,
            "isolated": self.isolated,
            "tasks": len(self.samples),
            "pass_at": {kind: {f"pass@{k}": value for k, value in self.pass_at(kind).items()} for kind in kinds},
            "missing": self.missing,
            "left_out": dict(self.left_out),
            "outcomes": dict(self.failures()),
            "samples": {
                task_id: [{**asdict(item.verdict), "solution": item.sample.solution} for item in judged]
                for task_id, judged in self.samples.items()
            },
        }

    def figures(self) -> dict[str, float]:
        """pass@k and outcomes, by names such as ``humaneval/plus/pass_at_1`` and ``humaneval/outcome/wrong``."""
        scores = {kind: self.pass_at(kind) for kind in (("base", "plus") if self.plus else ("base",))}
        figures = {f"{kind}/pass_at_{k}": value for kind, of in scores.items() for k, value in of.items()}
        figures |= {f"outcome/{kind}": count for kind, count in self.failures().items()}
        return {f"{self.problems.dataset}/{name}": value for name, value in figures.items()}

    def summary(self) -> str:
        """A Markdown table of pass@k, then what failed and how."""
        kinds = ("base", "plus") if self.plus else ("base",)
        scores = {kind: self.pass_at(kind) for kind in kinds}
        names = {"base": self.problems.dataset, "plus": f"{self.problems.dataset}+"}
        lines = ["| tests | " + " | ".join(f"pass@{k}" for k in scores["base"]) + " |"]
        lines.append("|:--|" + "--:|" * len(scores["base"]))
        for kind in kinds:
            values = " | ".join(f"{100 * value:.1f} %" for value in scores[kind].values())
            lines.append(f"| {names[kind]} | {values} |")
        lines += ["", "| outcome | samples |", "|:--|--:|"]
        lines += [f"| {kind} | {count} |" for kind, count in self.failures().most_common()]
        if self.missing:
            lines += ["", f"{len(self.missing)} tasks without a sample count as failed: {', '.join(self.missing)}"]
        if self.left_out:
            lines += ["", left_out_note(self.left_out)]
        beside = sum(problem.own is not None and problem.own.beside for problem in self.problems.problems)
        if beside:
            lines += ["", f"{counted(beside, 'task')} have tests that run beside the program, which could forge them."]
        if not self.isolated:
            lines += ["", "The programs were run WITHOUT isolation."]
        return visible("\n".join(lines))

    def table(self) -> str:
        """A Markdown table of every task."""
        lines = ["| task | samples | base | plus | first failure |", "|:--|--:|--:|--:|:--|"]
        for task_id, judged in self.samples.items():
            failed = next((item.verdict for item in judged if (item.verdict.plus or item.verdict.base) != "pass"), None)
            why = "" if failed is None else _why(failed)
            plus = str(self._passed(judged, "plus")) if self.plus else ""
            cells = (task_id, len(judged), self._passed(judged, "base"), plus, why if judged else "missing")
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return visible("\n".join(lines))


def _why(verdict: Verdict) -> str:
    kind = verdict.plus or verdict.base
    at = "" if verdict.test is None else f", test {verdict.test}, {as_code(verdict.input[:80])}"
    return f"{kind}{at}" + (f": {as_code(verdict.message[:80])}" if verdict.message else "")


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Estimate without bias the chance that one of k samples passes: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021).

    Args:
        samples: n.
        passed: c, how many of them passed.
        k: at most n.
    """
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(samples - passed + 1, samples + 1))


def evaluate(
    problems: ProblemSet,
    samples: Sequence[Program],
    sandbox: Sandbox,
    results: str | Path,
    *,
    parallel: int | None = None,
    base_only: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Results:
    """Judge every sample.

    Args:
        problems: the tasks; one without a sample counts as failed.
        samples: the programs.
        sandbox: where they run.
        results: JSON lines of verdicts, each under a key of all that decides it: a rerun takes from it what fits.
        parallel: programs at a time; default: as many as half the usable CPUs.
        base_only: leave out the plus tests.
        progress: called with the number of samples of each step.

    Raises:
        InputError: a canonical solution cannot be run, or a file not written.
    """
    parallel = parallel or default_parallel()
    base_only = base_only or not problems.plus
    groups: dict[str, list[Program]] = {problem.task_id: [] for problem in problems.problems}
    for sample in samples:
        groups[sample.task_id].append(sample)
    with SampleLog(results) as log:
        run = _Run(problems, sandbox, base_only, log, progress or (lambda count: None))
        # What a task expects can be 100 MB: its samples are judged by one thread, one after the other.
        run.in_parallel(parallel, run.judge, list(zip(problems.problems, groups.values(), strict=True)))
        run.in_parallel(min(parallel, default_parallel()), run.retry, run.late)
        run.in_parallel(1, run.retry, run.starved)
    return Results(
        problems=problems,
        plus=not base_only,
        isolated=sandbox.isolated,
        reused=run.reused,
        samples={
            task_id: [Judged(sample=sample, verdict=run.verdicts[run.key(sample)]) for sample in group]
            for task_id, group in groups.items()
        },
    )


class _Run:
    """Judges samples and notes every verdict at once."""

    def __init__(
        self,
        problems: ProblemSet,
        sandbox: Sandbox,
        base_only: bool,
        log: SampleLog,
        progress: Callable[[int], object],
    ) -> None:
        self._truth = GroundTruth(problems, sandbox)
        self._sandbox = sandbox
        self._base_only = base_only
        self._log = log
        self._progress = progress
        self._lock = threading.Lock()
        self.late: list[tuple[Problem, Program]] = []
        self.starved: list[tuple[Problem, Program]] = []
        self._settings = json.dumps(
            [VERDICT_FORMAT, problems.fingerprint, asdict(sandbox.limits), sandbox.isolated, base_only]
        )
        self.verdicts = {row["key"]: Verdict(**row["verdict"]) for row in log.rows if row.keys() >= {"key", "verdict"}}
        self.reused = 0

    def key(self, sample: Program) -> str:
        """Sha256 of everything that decides a verdict."""
        return hashlib.sha256(json.dumps([self._settings, sample.task_id, sample.solution]).encode()).hexdigest()

    def judge(self, problem: Problem, samples: Sequence[Program]) -> None:
        """Judge the samples of a task; what is known, or there twice, is not run again."""
        new = {self.key(sample): sample for sample in samples if self.key(sample) not in self.verdicts}
        with self._lock:
            self.reused += len(samples) - len(new)
            self._progress(len(samples) - len(new))
        if not new:
            return
        tests = self._tests(problem)
        for sample in new.values():
            verdict = judge_program(sample.solution, tests, self._sandbox, self._base_only)
            if verdict.late:
                self.late.append((problem, sample))
            elif verdict.starved:
                self.starved.append((problem, sample))
            else:
                self._note(sample, verdict)

    def retry(self, problem: Problem, sample: Program) -> None:
        """Run a program again: that the machine was busy, or short of memory, is no fault of it."""
        self._note(sample, judge_program(sample.solution, self._tests(problem), self._sandbox, self._base_only))

    def _tests(self, problem: Problem) -> TaskTests:
        return self._truth.tests(problem) if problem.own is None else problem.own.task_tests()

    def in_parallel(self, workers: int, function: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
        """Call a function with each of ``arguments``; the first error, and ^C, end all that runs at once."""
        pool = ThreadPoolExecutor(workers)
        try:
            for future in wait([pool.submit(function, *each) for each in arguments], return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            self._sandbox.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._sandbox.resume()

    def _note(self, sample: Program, verdict: Verdict) -> None:
        with self._lock:
            key = self.key(sample)
            self.verdicts[key] = verdict
            self._log.append({"key": key, "task_id": sample.task_id, "verdict": asdict(verdict)})
            self._progress(1)


def write_results(report: Results, samples: str | Path) -> tuple[Path, Path]:
    """Write the report beside the samples: ``NAME_eval.json``, and ``NAME_eval.md`` with the tables."""
    path = Path(samples)
    stem = path.name.removesuffix(".jsonl")
    target, page = path.with_name(f"{stem}_eval.json"), path.with_name(f"{stem}_eval.md")
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    with atomic_path(page) as temporary:
        temporary.write_text(f"{report.summary()}\n\n{report.table()}\n", encoding="utf-8")
    return target, page


def results_path(samples: str | Path) -> Path:
    """Where the verdicts of a samples file are kept."""
    path = Path(samples)
    return path.with_name(f"{path.name.removesuffix('.jsonl')}_verdicts.jsonl")
