"""generate, sanitize and evaluate as a person types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def data(tmp_path: Path, monkeypatch) -> Path:
    """Three tasks."""
    monkeypatch.setenv("CODEACT_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f'def f{n}(x):\n    """Add {n}."""\n',
            "entry_point": f"f{n}",
            "canonical_solution": f"    return x + {n}\n",
            "base_input": [[1]],
            "plus_input": [[2], [2.5]],
            "atol": 0,
        }
        for n in range(3)
    ]
    path = tmp_path / "HumanEvalPlus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_generate_sanitize_evaluate(codeact, data, tiny_model_path, isolated, tmp_path):
    raw = tmp_path / "s.jsonl"
    options = ("--dataset", "humaneval", "--data", data)
    generating = (*options, "--model", tiny_model_path, "--output", raw, "--max-new-tokens", 8, "--instruct")
    code, out, err = codeact("generate", *generating)
    assert code == 0, err
    assert "3 samples" in out
    assert "all samples were in" in codeact("generate", *generating)[1]
    code, out, err = codeact("sanitize", raw)
    assert code == 0, err
    assert "3 samples" in out
    code, out, err = codeact("evaluate", *options, "--samples", tmp_path / "s-sanitized.jsonl", "--parallel", 2)
    assert code == 0, err
    assert "| humaneval+ | 0.0 % |" in out
    assert (tmp_path / "s-sanitized_eval.md").is_file()


def test_samples_of_other_tools(codeact, data, isolated, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEACT_EVAL_DATA", str(tmp_path))
    rows = [
        {"task_id": "HumanEval/0", "solution": "Sure:\n```python\ndef f0(x):\n    return x\n```"},
        {"task_id": "HumanEval/1", "completion": "    return x + 1\n\nprint(f1(1))"},
        {"task_id": "HumanEval/2", "completion": "    return 2 if x < 2 else x + 2"},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = codeact("sanitize", tmp_path / "samples.jsonl", "--output", tmp_path / "clean.jsonl")
    assert code == 0, err
    code, out, err = codeact("evaluate", "--dataset", "humaneval", "--samples", tmp_path / "clean.jsonl")
    assert code == 0, err
    assert "| humaneval | 66.7 % |" in out
    assert "| humaneval+ | 66.7 % |" in out
    code, out, err = codeact("evaluate", "--dataset", "humaneval", "--samples", tmp_path / "clean.jsonl", "--base-only")
    assert code == 0, err
    assert "humaneval+" not in out


def test_k_and_limits_are_asked_for(codeact, data, isolated, tmp_path):
    slow = "def f0(x):\n    import time\n    time.sleep(1.5)\n    return x"
    solutions = [*["def f{0}(x):\n    return x + {0}"] * 4, "def f{0}(x):\n    return [None] * 50_000_000"]
    rows = [{"task_id": f"HumanEval/{n}", "solution": text.format(n)} for n in range(3) for text in solutions]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--dataset", "humaneval", "--data", data, "--base-only", "--samples", tmp_path / "s.jsonl")
    code, out, err = codeact("evaluate", *options, "--k", "5,1,9", "--memory-mb", 256)
    assert code == 0, err
    assert "| tests | pass@1 | pass@5 |\n" in out
    assert "| humaneval | 80.0 % | 100.0 % |" in out
    assert "| memory | 3 |" in out
    (tmp_path / "s.jsonl").write_text(json.dumps({"task_id": "HumanEval/0", "solution": slow}) + "\n")
    assert "| time | 1 |" in codeact("evaluate", *options, "--limit", 1)[1]
    assert "| pass | 1 |" in codeact("evaluate", *options, "--limit", 1, "--min-seconds", 20)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--dataset", "humaneval", "--samples", "x", "--k", "1,x"), "--k 1,x is no list of whole numbers"),
        (("evaluate", "--dataset", "humaneval", "--samples", "none.jsonl"), "cannot read none.jsonl"),
        (("evaluate", "--dataset", "human", "--samples", "x"), "choose one of: humaneval, mbpp"),
        (("evaluate", "--dataset", "mbpp", "--samples", "x"), "holds no MbppPlus.jsonl.gz"),
        (("sanitize", "none.jsonl"), "cannot read none.jsonl"),
        (("generate", "--dataset", "humaneval", "--model", "./none", "--output", "o.jsonl"), "no such folder"),
        (
            ("generate", "--dataset", "humaneval", "--model", "./none", "--adapter", "./no", "--output", "o"),
            "no such adapter",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, codeact, data, isolated, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEACT_EVAL_DATA", str(tmp_path))
    code, _, err = codeact(*arguments)
    assert code == 2
    assert message in err
    (line,) = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert line.startswith("codeact: error: ")


def test_without_a_sandbox_it_refuses_loudly(codeact, data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (tmp_path / "s.jsonl").write_text('{"task_id": "HumanEval/0", "solution": "def f0(x): return x"}\n')
    arguments = ("evaluate", "--dataset", "humaneval", "--data", data, "--samples", tmp_path / "s.jsonl")
    code, out, err = codeact(*arguments)
    assert (code, out) == (2, "")
    assert "refusing to run generated programs without isolation" in err
    code, out, err = codeact(*arguments, "--unsafe-no-sandbox")
    assert code == 0
    assert "WARNING: generated programs run without isolation" in err
    assert "| humaneval | 33.3 % |" in out
    assert "WITHOUT isolation" in out
