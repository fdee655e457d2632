"""The example scripts run to their end, as a person starts them, on small models."""

from __future__ import annotations

import runpy
import sys

import pytest

from codeact.data.records import write_jsonl
from tests.conftest import make_records
from tests.docs.markdown_pages import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture
def places(tmp_path, tiny_model_path, embedder_path):
    """What stands in for a word of a script's usage line."""
    rows = [{"instruction": record.question, "output": record.answer} for record in make_records(24)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return {
        "MODEL": str(tiny_model_path),
        "EMBEDDER": str(embedder_path),
        "ROWS.jsonl": str(tmp_path / "rows.jsonl"),
        "OUTPUT": str(tmp_path / "output"),
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs(script, places, monkeypatch, capsys):
    text = (ROOT / "examples" / script).read_text(encoding="utf-8")
    usage = text.splitlines()[0].strip('"').partition(f"python {script}")[2].split()
    if script == "lightning_module.py":
        pytest.importorskip("lightning", reason="Lightning is not installed (extra dev)")
    if script == "trl_sft.py":
        data_utils = pytest.importorskip("trl.data_utils", reason="TRL is not installed (extra dev)")
        monkeypatch.setattr(data_utils, "_pack_bfd", data_utils._pack_bfd)  # its own again afterwards
    monkeypatch.setattr(sys, "argv", [script, *(places[word] for word in usage)])
    monkeypatch.chdir(ROOT / "examples")
    runpy.run_path(script, run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert len(text.splitlines()) < 60


def test_every_script_is_told_of():
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"../examples/{name}" not in page] == []
