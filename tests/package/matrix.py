"""Run the tests with the lowest and with the newest libraries that pyproject.toml allows (``make test-matrix``).

No test module, as it installs from the package index: a nightly job runs all of it, CI the cells without PyTorch. Each
cell is a copy of the tree and an environment of its own; local wheels and the machine's own settings of pip and uv are
left out, as a user has none. ``CELL...`` runs these only, ``--tests PATH...`` other tests in them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWN = (
    "numpy",
    "pydantic",
    "typer",
    "torch",
    "triton",
    "transformers",
    "datasets",
    "pyarrow",
    "peft",
    "trl",
    "pandas",
)
PYTHONS = ("3.14", "3.13", "3.12", "3.11")


@dataclass(frozen=True, slots=True)
class Cell:
    """An environment. ``resolution``: of uv, for ``extras``; the tests' tools come on top, as new as these let."""

    name: str
    python: str
    resolution: str
    extras: tuple[str, ...]
    tests: tuple[str, ...]
    tools: tuple[str, ...] = ("pytest", "hypothesis", "packaging")


BASE = ("--noconftest", "tests/packing", "tests/package/test_base_install.py")  # conftest.py imports torch
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "import-linter", "setuptools", "pybind11", "cmake", "ninja", "uv")
CELLS = (
    Cell("base-lowest", "3.11", "lowest-direct", (), BASE),
    Cell("base-newest", "newest", "highest", (), BASE),
    # The peers of the benchmarks and TRL want newer data sets than the stages do: they have a cell of their own.
    Cell("lowest", "3.11", "lowest-direct", ("demo", "deepspeed", "sandbox"), ("tests",), TOOLS),
    Cell("lowest-peers", "3.11", "lowest-direct", ("dev", "bench"), ("tests/integrations", "tests/package"), TOOLS),
    Cell("newest", "newest", "highest", ("dev", "bench"), ("tests",)),
)


def environment() -> dict[str, str]:
    """This one without what the machine has set for pip and uv."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "PYTHONPATH"))}
    return {**own, "PIP_CONFIG_FILE": os.devnull, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def quiet(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command with the public index alone, and return what it printed."""
    result = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError((result.stderr.strip() or result.stdout.strip())[-3000:])
    return result.stdout


def newest_python(uv: str) -> str:
    """The newest Python that is here or that uv can fetch."""
    for version in PYTHONS:
        for command in ("find", "install"):
            with suppress(RuntimeError):
                quiet(uv, "--no-config", "python", command, version)
                return version
    raise SystemExit(f"codeact: no Python of {', '.join(PYTHONS)} is here")


def run(cell: Cell, uv: str, newest: str, folder: Path, tests: list[str]) -> tuple[str, dict[str, str]]:
    """Make the cell's environment, run its tests in it; what came of it in a few words, and the versions."""
    home = folder / cell.name
    shutil.rmtree(home, ignore_errors=True)
    tree, python = home / "tree", home / "venv" / "bin" / "python"
    for name in quiet("git", "ls-files", "-co", "--exclude-standard", "-z").split("\0")[:-1]:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    version = (newest or newest_python(uv)) if cell.python == "newest" else cell.python
    pip = (uv, "--no-config", "pip")
    try:
        quiet(uv, "--no-config", "venv", "--python", version, home / "venv")
        extras = [f"--extra={extra}" for extra in cell.extras]
        wanted = ("install", "--python", python, "--resolution", cell.resolution, "-r", "pyproject.toml", *extras)
        quiet(*pip, *wanted, cwd=tree)
        lines = quiet(*pip, "freeze", "--python", python).splitlines()
        pins = home / "pins.txt"  # the tools must not lift what is to be tried
        pins.write_text("\n".join(lines))
        quiet(*pip, "install", "--python", python, "-c", pins, *cell.tools)
        quiet(*pip, "install", "--python", python, "--no-deps", "-e", ".", cwd=tree)
        if "demo" in cell.extras or "dev" in cell.extras:
            quiet(python, "-m", "codeact.run.demo_models", cwd=tree)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return "cannot be installed", {}
    found = quiet(python, "-c", "import platform; print(platform.python_version())").strip()
    versions = {"python": found, **dict(line.split("==", 1) for line in lines if "==" in line)}
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    shared = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile") if cell.tests != BASE else ()
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", *shared, *(tests or cell.tests)]
    with (home / "tests.log").open("w") as log:
        told = {**environment(), "PATH": path, "CODEACT_ALL_CHIPS": "1"}
        subprocess.run(command, cwd=tree, env=told, stdout=log, stderr=subprocess.STDOUT, check=False)
    text = (home / "tests.log").read_text()
    print(*re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE), sep="\n", file=sys.stderr)
    ends = re.findall(r"^(?=.*\d (?:passed|failed|error)).* in .*$", text, re.MULTILINE)
    return (ends[-1].strip("= ") if ends else "no result"), versions


def main() -> None:
    """Run the cells one after another, and print the table of what was tried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=", ".join(cell.name for cell in CELLS))
    parser.add_argument("--tests", nargs="+", default=[], help="instead of the cell's own")
    parser.add_argument("--newest", metavar="PYTHON", default="", help="version or path of the newest Python here")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix")
    options = parser.parse_args()
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        raise SystemExit("codeact: uv is needed for the lowest versions: pip install uv")
    if unknown := set(options.cells) - {cell.name for cell in CELLS}:
        parser.error(f"no cell {', '.join(unknown)}; there are {', '.join(cell.name for cell in CELLS)}")
    rows, failed = [], False
    for cell in CELLS:
        if options.cells and cell.name not in options.cells:
            continue
        began = time.monotonic()
        said, versions = run(cell, uv, options.newest, options.folder.resolve(), options.tests)
        failed |= not re.match(r"\d+ passed", said)
        tried = ", ".join(f"{name} {versions[name]}" for name in ("python", *SHOWN) if name in versions)
        rows.append(f"| {cell.name} | {tried} | {said} | {time.monotonic() - began:.0f} s |")
        print(rows[-1], flush=True)
    print("\n| cell | versions | tests | |\n|:--|:--|:--|--:|", *rows, sep="\n")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
