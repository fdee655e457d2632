"""What all benchmarks share: interleaved rounds, peaks of memory and of the machine, the report and its two forms.

A benchmark is a module with a ``run(options) -> Report`` that ends in ``main(run, __doc__)``. Its arms, codeact's and
those of others, get the same input, and agree to a stated tolerance before anything is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from codeact.base.machine import cpu_name

ROOT = Path(__file__).parent.parent


def digits(number: float) -> str:
    """Three digits that count, or all of those before the point."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of every repetition."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        """Median, and in brackets the least and the most, in a unit that fits."""
        scale, unit = next(
            (s, u) for s, u, least in ((1, "s", 1), (1e3, "ms", 1e-3), (1e6, "us", 0)) if self.median >= least
        )
        low, middle, high = (digits(scale * x) for x in (min(self.seconds), self.median, max(self.seconds)))
        return f"{middle} ({low} to {high}) {unit}" if len(self.seconds) > 1 else f"{middle} {unit}"


def interleave(
    functions: Mapping[str, Callable[[], Any]], rounds: int, fewer: Mapping[str, int] | None = None, warm: bool = True
) -> dict[str, Timing]:
    """Time every function once a round, each round in another (seeded) order, so that all see the same machine.

    Args:
        functions: what to call, by name.
        rounds: how often each is timed.
        fewer: functions that are too slow for that, with how often they are.
        warm: call each once before, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    shuffle = random.Random(0)
    for number in range(0 if warm else 1, rounds + 1):
        for name in shuffle.sample(list(functions), len(functions)):
            if number > (fewer or {}).get(name, rounds):
                continue
            begin = time.perf_counter()
            functions[name]()
            if number:
                times[name].append(time.perf_counter() - begin)
    return {name: Timing(tuple(values)) for name, values in times.items()}


def in_fresh_process(function: Callable[..., Any], *arguments: Any, preload: Sequence[str] = ("torch",)) -> Any:
    """Call a function of a module where nothing ran before but the imports of ``preload``."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(preload))  # the first call decides
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def added_memory(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int | None:
    """Most bytes that a call adds to a fresh process.

    ``prepare(*arguments)`` runs there: it makes the operands, makes a first small call, so that code is loaded and
    threads are started, and returns the call that counts. None where there is no /proc.
    """
    if sys.platform != "linux":
        return None
    grown: int = in_fresh_process(_added_memory, prepare, arguments)
    return grown


def resident(field: str) -> int:
    """Bytes of this process that /proc/self/status counts: "VmRSS" now, "VmHWM" at most (ru_maxrss is inherited)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def _added_memory(prepare: Callable[..., Callable[[], Any]], arguments: Sequence[Any]) -> int:
    call = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    kept = call()
    peak = resident("VmHWM")
    del kept
    return max(peak - before, 0)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second that one thread reads and writes of arrays far larger than a core's own caches."""
    source, target = np.ones(2**22), np.ones(2**22)
    return 2 * source.nbytes / min(interleave({"copy": lambda: np.copyto(target, source)}, 9)["copy"].seconds)


@functools.cache
def multiplier_peak() -> dict[str, float]:
    """FLOP/s of this machine's multipliers for each dtype (matmul_peak.cpp); empty without a compiler for x86-64."""
    import torch

    compiler = next(filter(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")), None)
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        return {}
    source = Path(__file__).parent / "matmul_peak.cpp"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        command = [compiler, "-std=c++20", "-O2", "-march=native", "-pthread", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        lines = subprocess.check_output([str(program), str(torch.get_num_threads())], text=True).splitlines()
    return {name: float(rate) for name, rate in (line.split() for line in lines)}


def growth_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """b of seconds = a * size^b between the two largest sizes."""
    return float(np.log(seconds[-1] / seconds[-2]) / np.log(sizes[-1] / sizes[-2]))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the summary: codeact beside its strongest peer."""

    what: str
    ours: Timing
    peer: str
    theirs: Timing
    floor: float | None = None
    """Seconds below which no program can do this work here; the module's docstring says why."""
    memory: int | None = None
    """Bytes that a call adds, or of the whole process where the part says so."""
    peer_memory: int | None = None

    @property
    def ratio(self) -> float:
        """How many times as fast as the peer; below 1 the peer wins."""
        return self.theirs.median / self.ours.median


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a benchmark found: Markdown, lines for the summary, and all figures as JSON can hold them."""

    sections: Sequence[str]
    lines: Sequence[Line]
    figures: dict[str, Any]


def table(columns: str, rows: Iterable[Sequence[object]]) -> str:
    """Markdown. ``columns`` are separated by |; the first ones, until one that begins with >, are left-aligned."""
    names = [name.strip() for name in columns.split("|")]
    first = next((i for i, name in enumerate(names) if name.startswith(">")), len(names))
    head = [name.removeprefix(">") for name in names]
    rules = [":--" if i < first else "--:" for i in range(len(names))]
    lines = [head, rules, *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mebibytes(count: float | None) -> str:
    """For a cell of a table."""
    return "" if count is None else f"{count / 2**20:,.1f} MiB" if count < 100 * 2**20 else f"{count / 2**20:,.0f} MiB"


def share(floor: float | None, timing: Timing) -> str:
    """Share of the floor, for a cell of a table."""
    if floor is None:
        return ""
    part = floor / timing.median
    return f"{part:.0%}" if part >= 0.01 else f"{100 * part:.1g}%" if part >= 1e-4 else "under 0.01%"


def summary(lines: Iterable[Line]) -> str:
    """The table that the README shows."""
    return table(
        "what | codeact | strongest peer |> its time |> x the peer's speed |> share of the floor |> added memory |> "
        "peer's",
        (
            (
                line.what,
                line.ours,
                line.peer,
                line.theirs,
                f"**{digits(line.ratio)}**" if line.ratio >= 1 else f"{line.ratio:.2f}, **the peer wins**",
                share(line.floor, line.ours),
                mebibytes(line.memory),
                mebibytes(line.peer_memory),
            )
            for line in lines
        ),
    )


def machine() -> dict[str, Any]:
    """Where and when this is measured."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def main(
    run: Callable[[argparse.Namespace], Report],
    description: str | None,
    *,
    data: str = "",
    full: str = "",
    files: Mapping[str, str] | None = None,
) -> None:
    """Parse the arguments that every benchmark has, run it, print its report, write its figures.

    Args:
        run: the benchmark.
        description: its docstring.
        data: what ``--data`` names; without, there is no such option.
        full: what ``--full`` does; without, there is no such option.
        files: more options that name a file, and what they are.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    size = parser.add_mutually_exclusive_group()
    parser.set_defaults(full=False, data=None)
    size.add_argument("--quick", action="store_true", help="small sizes: does it still work?")
    if full:
        size.add_argument("--full", action="store_true", help=full)
    if data:
        parser.add_argument("--data", type=Path, metavar="PATH", help=data)
    for name, meaning in (files or {}).items():
        parser.add_argument(name, type=Path, metavar="FILE", help=meaning)
    options = parser.parse_args()
    begin = time.perf_counter()
    report = run(options)
    seconds = time.perf_counter() - begin
    print("\n\n".join([*report.sections, summary(report.lines)] if report.lines else report.sections))
    if options.json:
        lines = [dataclasses.asdict(line) for line in report.lines]
        options.json.write_text(json.dumps({"seconds": seconds, "lines": lines, **report.figures}, indent=1) + "\n")


def read_lines(figures: Mapping[str, Any]) -> list[Line]:
    """The summary's lines of a file that ``main`` wrote."""
    return [
        Line(**{**line, **{name: Timing(tuple(line[name]["seconds"])) for name in ("ours", "theirs")}})
        for line in figures["lines"]
    ]
