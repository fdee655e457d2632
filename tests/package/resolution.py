"""Whether the package index alone can give what `pip install -c constraints.txt "codeact[EXTRA]"` asks for.

No test module, as it asks the index: `make check` runs it; ``--write`` makes the files of constraints anew (``make
constraints``). Local wheels and the machine's own settings of pip and uv are left out: they are what a user has not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"  # the release that CI has
# The file of constraints -> the Pythons and platforms that it is for: what vLLM wants has wheels for no others.
PYTHONS = {"constraints.txt": ("3.11", "3.12", "3.13", "3.14"), "constraints-vllm.txt": ("3.11", "3.12")}
PLATFORMS = {
    "constraints.txt": ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin"),
    "constraints-vllm.txt": ("x86_64-manylinux_2_31",),
}
# What the index has no wheel of: pure Python all, built in a second.
SOURCES = {
    "deepspeed",
    "rouge-score",
    "word2number",
    "sqlitedict",
    "fire",
    "hjson",
    "stop-sequencer",
    "tempdir",
    "wget",
}


def read_extras(pyproject: Path = ROOT / "pyproject.toml") -> dict[str, list[str]]:
    """The file of constraints -> the extras that live together under it."""
    settings = tomllib.loads(pyproject.read_text())
    extras = list(settings["project"]["optional-dependencies"])
    pairs = [{side["extra"] for side in pair} for pair in settings["tool"]["uv"]["conflicts"]]
    apart = {extra for pair in pairs if "vllm" in pair for extra in pair - {"vllm"}}
    return {
        "constraints.txt": [extra for extra in extras if extra != "vllm"],
        "constraints-vllm.txt": [extra for extra in extras if extra not in apart],
    }


def compile_pins(arguments: Iterable[str], given: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``uv pip compile pyproject.toml ARGUMENTS`` against the public index alone."""
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        raise SystemExit("codeact: uv is needed to resolve: pip install uv")
    public = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    return subprocess.run(
        [uv, "--no-config", "pip", "compile", "--quiet", "pyproject.toml", *arguments],
        cwd=ROOT,
        env={**public, "MACOSX_DEPLOYMENT_TARGET": "14.0"},  # as the wheels of torch
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )


@dataclass(frozen=True, slots=True)
class Case:
    """Extras on one platform. ``offline``: ask nothing that was asked before, which takes seconds a case."""

    constraints: str
    extras: tuple[str, ...]
    python: str
    platform: str
    offline: bool = False

    def failure(self) -> str | None:
        """Why this cannot be installed, or None."""
        pins = (ROOT / self.constraints).read_text()
        names = {match[1] for match in re.finditer(r"^([\w.-]+)==", pins, re.MULTILINE)}
        arguments = ["-c", self.constraints, "--python-version", self.python, "--python-platform", self.platform]
        arguments += [f"--extra={extra}" for extra in self.extras]
        arguments += [f"--only-binary={name}" for name in sorted(names - SOURCES)]
        result = compile_pins([*arguments, "--offline"] if self.offline else arguments)
        return f"{self}\n{result.stderr.strip()}\n" if result.returncode else None


def cases() -> tuple[list[Case], list[Case]]:
    """All extras of a file together, everywhere; then each beside train and eval, where most users are."""
    together, alone = [], []
    homes = read_extras()
    for name, extras in homes.items():
        together += [Case(name, tuple(extras), p, platform) for p in PYTHONS[name] for platform in PLATFORMS[name]]
        own = [extra for extra in extras if name == "constraints.txt" or extra not in homes["constraints.txt"]]
        sets = [tuple(sorted({extra, "train", "eval"})) for extra in own]
        alone += [Case(name, each, p, PLATFORMS[name][0], offline=True) for each in sets for p in PYTHONS[name]]
    return together, alone


def write(upgrade: bool) -> None:
    """Resolve for all platforms and Pythons at once; a pin stays as it is where it can."""
    for name, extras in read_extras().items():
        arguments = ["--universal", "--python-version", "3.11", "--no-annotate"]
        arguments += ["--custom-compile-command", "make constraints", "-c", "-", "-o", name]
        arguments += [f"--extra={extra}" for extra in extras] + (["--upgrade"] if upgrade else [])
        result = compile_pins(arguments, given=TORCH if name == "constraints.txt" else "")
        if result.returncode:
            raise SystemExit(f"{name}: {result.stderr}")


def main() -> None:
    """Check every extra on every platform, or write the constraints."""
    if "--write" in sys.argv:
        write("--upgrade" in sys.argv)
        return
    failures, count = [], 0
    for some in cases():
        with ThreadPoolExecutor(4) as pool:
            failures += filter(None, pool.map(Case.failure, some))
        count += len(some)
    print(*failures, sep="\n", end="", file=sys.stderr)
    print(f"{count - len(failures)} of {count} resolve from the package index")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
