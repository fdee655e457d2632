"""Rows keep their order and their number; each gets what share of its tests its answer passes."""

from __future__ import annotations

import json

import pytest

from codeact.data.records import write_jsonl
from codeact.evaluation import verify

ROWS = [
    {"instruction": "add", "output": "So:\n```python\ndef f(x): return x + 1\n```", "tests": ["assert f(1) == 2"]},
    {"instruction": "add", "output": "def f(x): return 2", "tests": "assert f(1) == 2\nassert f(2) == 3", "more": 1},
    {"instruction": "sum", "output": "print(sum(map(int, input().split())))", "tests": [["1 2", "3"], ["4", "4"]]},
    {
        "instruction": "sum",
        "output": "print(3)",
        "tests": [{"input": "1 2", "output": "3"}, {"input": "4", "output": "4"}],
    },
    {"instruction": "none", "output": "def f(): pass", "tests": None},
    {"instruction": "opaque", "output": "def f(x): return x", "tests": ["assert f(1) == f(2)"]},
    {"instruction": "", "output": "no question", "tests": ["assert f(1) == 2"]},
    {"instruction": "broken", "output": "def f(", "tests": ["assert f(1) == 2"]},
]


@pytest.mark.usefixtures("isolated")
def test_every_row_gets_its_share(codeact, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_BLOCK", 3)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    code, out, err = codeact("verify", tmp_path / "rows.jsonl", "--output", tmp_path / "v.jsonl", "--min-seconds", 2)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4", "5", "7"]  # row 6 holds no record
    assert [row["pass_share"] for row in rows] == [1.0, 0.5, 1.0, 0.5, None, None, 0.0]
    verdicts = [row["verdict"] for row in rows]
    assert verdicts == ["pass", "wrong", "pass", "wrong", "no tests", "not run", "syntax"]
    assert [row["failed"] for row in rows[:4]] == [None, "assert f(2) == 3", None, "4"]
    assert "cannot be kept from the program" in rows[5]["message"]
    assert rows[1]["messages"][1] == {"role": "assistant", "content": ROWS[1]["output"]}
    assert (rows[1]["tests"], rows[1]["extra"]) == (ROWS[1]["tests"], {"more": 1})
    told = {line.rpartition("  ")[0].strip(): line.rpartition("  ")[2] for line in out.splitlines()[:-1]}
    assert told == {"rows": "8", "run": "5", "pass": "40.0 %", "wrong": "2", "no record": "1", "no tests": "1"} | {
        "not run": "1", "syntax": "1",
    }  # fmt: skip
    # What comes out goes in again.
    code, again, _ = codeact("verify", tmp_path / "v.jsonl", "--output", tmp_path / "w.jsonl", "--min-seconds", 2)
    assert (code, "40.0 %" in again) == (0, True)
    code, _, err = codeact("verify", tmp_path / "v.jsonl", "--tests-column", "x", "--output", tmp_path / "w.jsonl")
    assert code == 2
    assert "no row has tests in column 'x' that can be run" in err
