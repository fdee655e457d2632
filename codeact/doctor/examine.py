"""``codeact doctor``: what is here and works, and what to install for the rest.

It imports nothing that may be broken: libraries are tried in other processes (`codeact.doctor.probes`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from codeact import __version__
from codeact.base.console import aligned
from codeact.base.parsing import parse_json
from codeact.doctor.probes import ITEMS, Item

SECONDS = 120.0  # fresh from a slow disk, the libraries take over a minute; from memory, six seconds
_FOLDER = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. ``state``: "yes", "no", "idle" (installed, of no use here), "broken" (``detail`` says why), "unknown".

    ``vital``: codeact cannot run where this is broken. Where a stage's libraries are not installed, it packs.
    """

    name: str
    state: str
    purpose: str
    detail: str = ""
    command: str = ""
    vital: bool = False


def examine(seconds: float = SECONDS) -> list[Finding]:
    """Look at everything; no library that crashes or hangs (for longer than ``seconds``) ends it."""
    results = _run_probes(list(ITEMS), seconds)
    return [_finding(item, results[name]) for name, item in ITEMS.items()]


def _finding(item: Item, result: dict[str, str]) -> Finding:
    command = {"no": item.command, "broken": item.mend or item.command}.get(result["state"], "")
    return Finding(item.name, result["state"], item.purpose, result["detail"], command, item.vital)


def _run_probes(names: list[str], seconds: float) -> dict[str, dict[str, str]]:
    """Run probes in a process; where one kills it, go on behind that one in a new process."""
    results: dict[str, dict[str, str]] = {}
    left = list(names)
    until = time.monotonic() + seconds
    while left:
        lines, ended = _run_process(left, until - time.monotonic())
        results |= {line["probe"]: line for line in lines}
        left = [name for name in left if name not in results]
        if left:  # slow is not broken: the first import after an installation, from a busy disk, may take minutes
            state = "unknown" if time.monotonic() >= until else "broken"
            crashed = left.pop(0)  # they are tried in order
            results[crashed] = {"probe": crashed, "state": state, "detail": ended}
    return results


def _run_process(names: list[str], seconds: float) -> tuple[list[dict[str, str]], str]:
    """Return the lines that a process of probes wrote, and how it ended."""
    if seconds <= 0:
        return [], "not tried, as what came before took too long; try again"
    # Let it find this codeact, however this process found it.
    path = os.pathsep.join(filter(None, (str(_FOLDER.parent), os.environ.get("PYTHONPATH"))))
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-m", "codeact.doctor.probes", *names],  # -P: not what lies in the current folder
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
    except OSError as error:
        return [], f"cannot start Python: {error}"
    except subprocess.TimeoutExpired as error:
        return _lines(error.stdout), f"no answer in {seconds:.0f} s; try again"
    if process.returncode < 0:
        return _lines(process.stdout), f"crashed with signal {-process.returncode}"
    told = process.stderr.decode(errors="replace").strip().splitlines()
    return _lines(process.stdout), (told or [f"ended Python with exit code {process.returncode}"])[-1][:200]


def _lines(out: bytes | None) -> list[dict[str, str]]:
    lines = []
    for line in (out or b"").splitlines():
        with suppress(ValueError):
            lines.append(parse_json(line))
    return lines


def run(as_json: bool = False) -> int:
    """Print what is found; returns the exit code: 1 where codeact itself cannot run, else 0."""
    findings = examine()
    broken = [finding for finding in findings if finding.state == "broken"]
    vital = ", ".join(finding.name for finding in broken if finding.vital)
    if as_json:
        report = {"codeact": __version__, "folder": str(_FOLDER), "works": not vital}
        print(json.dumps({**report, "findings": [*map(asdict, findings)]}, indent=1))
        return 1 if vital else 0
    conclusion = "codeact works here; yes: works, idle: installed, but of no use on this machine"
    if vital:
        conclusion = f"codeact cannot run: mend {vital}"
    elif broken:
        conclusion += f"; broken: {', '.join(finding.name for finding in broken)}"
    rows = [(f.state, f.name, f.purpose, ": ".join(filter(None, (f.detail, f.command)))) for f in findings]
    print(f"codeact {__version__}, {_FOLDER}", "", aligned(rows, 4), "", conclusion, sep="\n")
    return 1 if vital else 0
