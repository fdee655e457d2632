"""Run every benchmark, one after the other, each in a process of its own; write the figures and a table of them.

    python -m benchmarks [--quick]

Writes ``benchmarks/results/<date>-<machine>.json`` and ``.md``; ``make bench`` calls this. The page begins with the
summary that the README shows: codeact beside the strongest peer of each part. ``--quick`` checks with small sizes that
everything runs, and writes nothing. A part that fails is named, the others still run, and the exit code is 1.

CODEACT_SHARED_DATA, if set, names a folder with code_alpaca_2k.json, which scoring and training then use instead of
harvested rows, and with evalplus' data sets, which evaluation needs for the comparison with evalplus.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROOT, machine, read_lines, summary, table

# Seconds that each part takes on two quiet cores with AVX512-BF16: under 20 minutes in all.
BUDGET = {
    "packing": 50,
    "primitives": 60,
    "nll": 190,
    "scoring": 165,
    "clustering": 45,
    "cleaning": 60,
    "coordination": 4,
    "stages": 110,
    "training": 370,
    "generation": 110,
    "evaluation": 30,
    "roofline": 5,
}
ON_A_DEVICE = "nll_cuda"


def data_of(part: str) -> Path | None:
    """What ``--data`` a part gets."""
    folder = os.environ.get("CODEACT_SHARED_DATA")
    if not folder or part not in ("scoring", "training", "evaluation"):
        return None
    wanted = Path(folder) / ("HumanEvalPlus.jsonl.gz" if part == "evaluation" else "code_alpaca_2k.json")
    return None if not wanted.is_file() else wanted.parent if part == "evaluation" else wanted


def run_part(part: str, quick: bool, folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The Markdown and the figures of one part; None where it failed."""
    output = folder / f"{part}.json"
    command = [sys.executable, "-m", f"benchmarks.{part}", "--json", str(output)]
    command += ["--quick"] if quick else []
    command += ["--data", str(data)] if (data := data_of(part)) else []
    print(f"{part} ...", file=sys.stderr, flush=True)
    # What libraries print of themselves would otherwise stand among the tables.
    with (folder / "output.md").open("w") as page:
        done = subprocess.run(command, cwd=ROOT, stdout=page, check=False)
    if done.returncode:
        return None
    text = (folder / "output.md").read_text()
    return text[max(text.find("## "), 0) :], json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it still work?")
    options = parser.parse_args()
    facts = machine()
    pages, figures, took, failed = [], {}, {}, []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for part in (*BUDGET, *([ON_A_DEVICE] if torch.cuda.is_available() else [])):
            start = time.perf_counter()
            done = run_part(part, options.quick, Path(folder))
            took[part] = time.perf_counter() - start
            if done is None:
                failed.append(part)
                pages.append(f"## {part}: failed\n")
            else:
                pages.append(done[0])
                figures[part] = done[1]
    total = time.perf_counter() - begin
    budget = {} if options.quick else BUDGET
    times = table(
        "part |> seconds |> budget",
        [*((part, f"{s:.0f}", budget.get(part, "")) for part, s in took.items()),
         ("all", f"{total:.0f}", sum(budget.values()) or "")],
    )  # fmt: skip
    lines = [line for part in figures.values() for line in read_lines(part)]
    text = "\n".join(
        [
            "# Benchmarks of {date}, commit {commit}, {cpus} cores of {cpu}, Python {python}\n".format(**facts),
            "The median of the repetitions, and in brackets the least and the most. Each part says below what its\n"
            "floor is; memory is what a call adds to a fresh process, unless the part says otherwise.\n",
            summary(lines) + "\n",
            *pages,
            f"## Time of the benchmarks\n\n{times}\n",
        ]
    )
    print(text)
    if not options.quick:
        results = ROOT / "benchmarks" / "results"
        results.mkdir(exist_ok=True)
        stem = f"{facts['date']}-{platform.machine()}"
        content = {**facts, "seconds": took, "total_seconds": total, "failed": failed, **figures}
        (results / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
        (results / f"{stem}.md").write_text(text)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
