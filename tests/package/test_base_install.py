"""What `pip install codeact` alone gives: packing, the doctor, every --help, and one line for what needs an extra."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import codeact
from codeact.__main__ import EXTRAS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> Path:
    """A virtual environment with the base dependencies and what they need, as they are installed here."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home)
    (folder,) = home.glob("lib/python*/site-packages")
    left, seen = [Requirement(text) for text in PROJECT["dependencies"]], set()
    while left:
        requirement = left.pop()
        if requirement.name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(requirement.name)
        distribution = importlib.metadata.distribution(requirement.name)
        left += map(Requirement, distribution.requires or ())
        for name in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            (folder / name).symlink_to(distribution.locate_file(name))
    return home / "bin" / "python"


@pytest.fixture
def python(environment, tmp_path):
    """Run Python with the base dependencies only, in an empty folder."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [environment, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CODEACT_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_pack_needs_numpy_only(python):
    program = """
import importlib.util, sys, codeact
assert [p.tolist() for p in codeact.pack([5, 3, 2, 8, 1], 8)] == [[3], [0, 1], [2, 4]]
assert not list(filter(importlib.util.find_spec, ("torch", "pyarrow", "transformers", "sklearn", "tokenizers")))
print(*sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names - {"__main__"}))
"""
    result = python("-c", program)
    assert result.stdout.split() == ["codeact", "numpy"], result.stderr


def test_every_public_name_works_or_names_its_extra(python):
    program = """
import codeact
for name in codeact.__all__:
    try:
        getattr(codeact, name)
        print(name, "works")
    except ImportError as error:
        print(name, type(error).__name__, error)
"""
    lines = dict(line.split(" ", 1) for line in python("-c", program).stdout.splitlines())
    assert {name for name, said in lines.items() if said == "works"} == {
        *("open_records", "Columns", "Record", "pack", "Packs", "cluster", "InputError", "__version__"),
        *("run_program", "run_programs", "pass_share"),
    }
    for name in ("token_nll", "linear_cross_entropy", "score_ifd", "embed", "select"):
        extra = "select" if name in ("embed", "select") else "score"
        expected = rf'MissingExtraError codeact\.{name} needs \w+: pip install "codeact\[{extra}\]"'
        assert re.fullmatch(expected, lines[name]), lines[name]


def test_what_the_command_line_has_by_itself(python):
    for arguments in (["--version"], ["--help"], *([command, "--help"] for command in EXTRAS)):
        result = python("-m", "codeact", *arguments)
        assert (result.returncode, result.stderr) == (0, ""), arguments
    result = python("-m", "codeact", "harvest", "json", "--output", "rows.jsonl")
    assert result.returncode == 0, result.stderr
    result = python("-m", "codeact", "doctor")
    assert result.returncode == 0, result.stdout
    assert 'pip install "codeact[score]"' in result.stdout


@pytest.mark.parametrize(
    "line",
    [
        "score rows.jsonl --model m --output o",
        "merge o",
        "pack-stats rows.jsonl --tokenizer m --capacity 8",
        "embed rows.jsonl --model m --output o.npy",
        "select --scores o --output s.jsonl",
        "train --model_name_or_path m --data_path rows.jsonl --output_dir o",
        "generate --dataset humaneval --model m --output s.jsonl",
        "report o",
        "run demo",
        "run demo --dry-run",
        "demo",
    ],
)
def test_a_command_names_its_extra_in_one_line(python, tmp_path, line):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    result = python("-m", "codeact", *line.split())
    assert result.returncode == 2
    extra = EXTRAS[line.split()[0]]
    assert extra in PROJECT["optional-dependencies"]
    last = result.stderr.splitlines()[-1]  # above it pack-stats says how it reads the rows
    assert re.fullmatch(rf'codeact: error: .* needs \w+: pip install "codeact\[{extra}\]"', last)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "cache").exists()  # nothing is downloaded before


def test_a_server_needs_no_extra(python, tmp_path):
    task = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": " pass"}
    (tmp_path / "tasks.jsonl").write_text(json.dumps({**task, "base_input": [[]]}) + "\n")
    options = "--dataset humaneval --data tasks.jsonl --server http://127.0.0.1:9/v1 --output s.jsonl"
    result = python("-m", "codeact", "generate", *options.split())
    assert "no server answers at http://127.0.0.1:9/v1: " in result.stderr
    assert result.returncode == 2


def test_what_no_extra_mends_is_no_missing_extra(monkeypatch):
    """A module of codeact's own that is not there, and one inside an installed library, are faults and are seen."""
    monkeypatch.setattr(codeact, "_HOMES", {"pack": "packing.gone", "select": "packing.packs", "token_nll": "ops.gone"})
    for name in ("pack", "token_nll"):
        monkeypatch.delitem(vars(codeact), name, raising=False)
        with pytest.raises(ModuleNotFoundError, match=r"No module named 'codeact\.\w+\.gone'"):
            getattr(codeact, name)


@pytest.mark.parametrize("module", ["codeact.gone", "numpy.gone"])
def test_a_fault_is_not_told_as_a_missing_library(monkeypatch, module):
    from codeact import __main__ as door

    def broken():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("codeact.cli.main", broken)
    monkeypatch.setattr(sys, "argv", ["codeact", "score"])
    with pytest.raises(ModuleNotFoundError, match="gone"):
        door.main()
