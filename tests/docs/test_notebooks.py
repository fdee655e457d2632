"""The notebooks run from a fresh kernel to their end, on smaller models and fewer rows."""

from __future__ import annotations

import re

import pytest

from tests.docs.markdown_pages import ROOT
from tests.docs.shell import EMBEDDER, MODEL

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra dev)")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra dev)")
pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra dev)")

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


@by_name
def test_it_runs(path, tmp_path, tiny_model_path, embedder_path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for written, real in ((MODEL, tiny_model_path), (EMBEDDER, embedder_path)):
            cell.source = cell.source.replace(written, str(real))
        cell.source = re.sub(r"^ROWS(.*) = \d+", r"ROWS\1 = 24", cell.source, flags=re.MULTILINE)
        cell.source = cell.source.replace('"stdlib"', '"email"')
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    assert last.outputs


@by_name
def test_it_is_kept_without_outputs_and_told_of(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []
    assert f"../examples/{path.name}" in (ROOT / "docs/python.md").read_text(encoding="utf-8")
