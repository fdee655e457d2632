"""Run every benchmark, one after the other, each in a process of its own; write the figures and a table of them.

    python -m benchmarks [--quick]

Writes ``benchmarks/results/<date>-<machine>.json`` and ``.md``; ``make bench`` calls this. CODEACT_SHARED_DATA, if set,
names a folder with code_alpaca_2k.json, which scoring and training then use instead of harvested rows, and with
evalplus' data sets, which evaluation needs for the comparison with evalplus.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ("packing", "nll", "scoring", "training", "evaluation", "roofline")
ON_A_DEVICE = ("nll_cuda",)


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it still work?")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    facts = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    heading = "{date}, commit {commit}, {cpus} cores of {cpu}, Python {python}".format(**facts)
    page = [f"# Benchmarks of {heading}\n"]
    figures = {}
    alpaca = Path(os.environ.get("CODEACT_SHARED_DATA", "")) / "code_alpaca_2k.json"
    plus = alpaca.with_name("HumanEvalPlus.jsonl.gz")
    with tempfile.TemporaryDirectory() as folder:
        for name in BENCHMARKS + (ON_A_DEVICE if torch.cuda.is_available() else ()):
            output = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(output)]
            command += ["--quick"] if options.quick else []
            command += ["--data", str(alpaca)] if name in ("scoring", "training") and alpaca.is_file() else []
            command += ["--data", str(plus.parent)] if name == "evaluation" and plus.is_file() else []
            print(f"{name} ...", file=sys.stderr, flush=True)
            page.append(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)
            figures[name] = json.loads(output.read_text())
    text = "\n".join(page)
    print(text)
    if not options.quick:
        results = ROOT / "benchmarks" / "results"
        results.mkdir(exist_ok=True)
        stem = f"{facts['date']}-{platform.machine()}"
        (results / f"{stem}.json").write_text(json.dumps({**facts, **figures}, indent=1) + "\n")
        (results / f"{stem}.md").write_text(text)


if __name__ == "__main__":
    main()
