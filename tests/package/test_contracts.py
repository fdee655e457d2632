"""What `make check` demands of imports, includes and names holds, and what breaks it is seen."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_NAMES = {"main", "logger"}  # a program's door, and what every module calls its own


def shared_names(package: Path) -> dict[str, list[str]]:
    """Public names that several modules define (not: import) -> these modules.

    A command is named as what it does, so functions of ``cli.py`` are left out, and so are type variables.
    """
    homes = defaultdict(set)
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names = [node.name] if path != package / "cli.py" else []
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            for name in names:
                if len(name) > 1 and not name.startswith("_") and name not in SHARED_NAMES:
                    homes[name].add(path.relative_to(package).as_posix())
    return {name: sorted(modules) for name, modules in homes.items() if len(modules) > 1}


def test_a_public_name_is_defined_once():
    assert shared_names(ROOT / "codeact") == {}


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ("def clean(): ...", "def clean(): ...", "clean"),
        ("class Plan: ...", "Plan = object", "Plan"),
        ("LIMIT: int = 3", "FIRST, LIMIT = 1, 2", "LIMIT"),
        ("async def fetch(): ...", "fetch = None", "fetch"),
        ("def clean(): ...", "from base.one import clean", None),
        ("def _clean(): ...", "def _clean(): ...", None),
    ],
)
def test_a_name_defined_twice_is_seen(tmp_path, one, other, name):
    for module, text in (("base", one), ("text", other)):
        (tmp_path / module).mkdir()
        (tmp_path / module / "one.py").write_text(text)
    assert shared_names(tmp_path) == ({name: ["base/one.py", "text/one.py"]} if name else {})


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path[:0] = [{str(folder)!r}]; {program}", "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tree(tmp_path) -> Path:
    """The packages' Python files, with what checks them."""
    pytest.importorskip("importlinter", reason="import-linter is in the extra dev")
    python_only = shutil.ignore_patterns("__pycache__", "*.so", "configs")
    shutil.copytree(ROOT / "codeact", tmp_path / "codeact", ignore=python_only)
    (tmp_path / "tests" / "package").mkdir(parents=True)
    for name in ("pyproject.toml", "tests/package/contracts.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_imports_follow_the_flow():
    pytest.importorskip("importlinter", reason="import-linter is in the extra dev")
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("base/files.py", "import codeact.scoring.tokens", "further down"),
        ("base/files.py", "def late():\n    from codeact.ops import nll", "further down"),
        ("scoring/tokens.py", "from codeact.embedding import vectors", "further down"),
        ("ops/nll.py", "import codeact.packing.packs", "further down"),
        ("a_new_package/__init__.py", "", "further down"),
        ("text/spans.py", "import codeact.text.conversations", "import each other"),
        ("data/sources.py", "def late():\n    import codeact.data.records", "import each other"),
        ("evaluation/sandbox/runner.py", "import numpy", "standard library only"),
        ("evaluation/sandbox/runner.py", "def late():\n    from codeact.base import errors", "standard library only"),
        ("evaluation/sandbox/runner.py", "from codeact.evaluation.sandbox import seccomp", "standard library only"),
    ],
)
def test_what_breaks_them_is_seen(tree, module, line, broken):
    path = tree / "codeact" / module
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(f"\n{line}\n")
    result = lint(tree)
    assert result.returncode == 1
    summary = [said for said in result.stdout.splitlines() if "BROKEN" in said]
    assert any(broken.replace(" ", "") in said.replace(" ", "") for said in summary), result.stdout


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('#include "simd/product.inc.hpp"', 0),
        ("#include <immintrin.h>  // AVX", 0),
        ("#include <vector>", 2),
        ("  #  include<algorithm>", 2),
        ('#include "common/parallel.hpp"', 2),
        ("#include <cstdint> // not <cmath>\n#include <cmath>", 2),
    ],
)
def test_kernels_include_no_standard_library(tmp_path, line, code):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    with (tmp_path / "csrc" / "nll" / "linear_nll_kernel.inc.hpp").open("a") as file:
        file.write(f"\n{line}\n")
    result = subprocess.run(
        ["make", "-f", ROOT / "Makefile", "includes"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == code, result.stdout
