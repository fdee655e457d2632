"""Every public name has its place on the site of `make docs`, and what is wrong there fails it."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import codeact
from tests.docs.markdown_pages import ROOT, inline_code, rows, sections

API = "\n".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
SHOWN = set(re.findall(r"^::: (\S+)$", API, re.M))
PUBLIC = sorted(set(codeact.__all__) - {"__version__"})


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_place_and_a_docstring(name):
    assert f"codeact.{name}" in SHOWN, f"in which page of docs/api is codeact.{name}?"
    value = getattr(codeact, name)
    members = [member for key, member in vars(value).items() if key[0] != "_" and callable(member)]
    for member in [value, *(members if inspect.isclass(value) else [])]:
        assert inspect.getdoc(member), f"{member.__qualname__} has no docstring"


def test_what_the_page_of_python_names_has_a_place():
    named = {
        re.match(r"[\w.]+", code)[0]
        for row in rows(sections(ROOT / "docs/python.md")["From Python"])
        for code in inline_code(row[0])
    }
    assert {name if name.startswith("codeact.") else f"codeact.{name}" for name in named} <= SHOWN


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """What the site is made of."""
    if not importlib.util.find_spec("mkdocs"):
        pytest.skip("mkdocs is in the extra docs")
    folder = tmp_path_factory.mktemp("site")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("docs", "codeact", "examples", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": ""}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def test_the_site_is_made_and_fetches_nothing(tree):
    result = build(tree)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    made = tree / "build" / "docs"
    assert "best-fit decreasing" in (made / "docs/api/packing/index.html").read_text()
    for page in made.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*", page.read_text())
        assert [tag for tag in loaded if 'rel="canonical"' not in tag] == [], page


def test_what_is_wrong_is_seen(tree):
    wrong = {
        "README.md": ("# codeact", "# codeact\n\n[gone](docs/gone.md)"),
        "docs/score.md": ("](select.md)", "](select.md#gone)"),
        "docs/api/losses.md": ("# Losses", "# A heading\n\n::: codeact.ops.gone\n\n# Losses"),
        "codeact/packing/packs.py": ("        algorithm: ", "        algoritm: "),
    }
    for page, (right, text) in wrong.items():
        path = tree / page
        assert right in path.read_text()
        path.write_text(path.read_text().replace(right, text, 1))
    (tree / "docs/more.md").write_text("# A page of no chapter\n")
    result = build(tree)
    assert result.returncode == 1
    assert "codeact.ops.gone could not be found" in result.stderr
    (tree / "docs/api/losses.md").unlink()  # the others are warnings, and that one ends it before they are counted
    result = build(tree)
    assert result.returncode == 1
    for said in ("docs/gone.md", "#gone", "docs/more.md", "'algoritm'", "docs/api/losses.md"):
        assert said in result.stderr
