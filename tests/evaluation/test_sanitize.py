"""Programs out of answers. Those in model_answers.jsonl were written by SmolLM2-135M-Instruct for tasks of HumanEval."""

# ruff: noqa: E501 - programs on one line

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeact.evaluation.sanitize import sanitize

FENCED = "Sure, here it is:\n\n```python\n{code}\n```\n\nIt doesn't use recursion (see above)."
HELPER = "def g(y):\n    return y + 1"
MAIN = "def f(x):\n    return g(x)"


def names(program: str) -> list[str]:
    return [node.name for node in ast.parse(program).body if hasattr(node, "name")]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("def f(x): return x", "def f(x): return x"),  # one line, which evalplus loses
        ("f = lambda x: x", "f = lambda x: x"),
        (FENCED.format(code=MAIN + "\n\n" + HELPER), MAIN + "\n" + HELPER),
        (FENCED.format(code=HELPER + "\n\n" + MAIN), HELPER + "\n" + MAIN),
        (FENCED.format(code=f"{MAIN}\n\n{HELPER}\n\nprint(f(1))\nassert f(1) == 2"), MAIN + "\n" + HELPER),
        (MAIN + "\n" + HELPER + "\n\ndef unused():\n    return 1\n", MAIN + "\n" + HELPER),
        ("async def f(x):\n    return x", "async def f(x):\n    return x"),
        (
            "import functools\n\n@functools.cache\ndef f(x):\n    return x",
            "import functools\n@functools.cache\ndef f(x):\n    return x",
        ),
        (
            "class f:\n    def __call__(self, x):\n        return x",
            "class f:\n    def __call__(self, x):\n        return x",
        ),
        ("def f(x):\n    return M[x]\n\nM = {1: 2}\nN = 3", "def f(x):\n    return M[x]\nM = {1: 2}"),
        (
            "def f(x):\n    return M\n\nM = []\nfor i in range(3):\n    M += [i]",
            "def f(x):\n    return M\nM = []\nfor i in range(3):\n    M += [i]",
        ),
        (
            "try:\n    import numpy as np\nexcept ImportError:\n    np = None\n\ndef f(x):\n    return np",
            "try:\n    import numpy as np\nexcept ImportError:\n    np = None\ndef f(x):\n    return np",
        ),
        ("def f(x):\n    return x\n\nif __name__ == '__main__':\n    x = f(1)\n", "def f(x):\n    return x"),
        (
            "def f(x):\n    return x\nfrom __future__ import annotations\nimport math",
            "from __future__ import annotations\nimport math\ndef f(x):\n    return x",
        ),
        ("def f(x):\n    pass\n\nHere is the rest!\n\ndef f(x):\n    return 2", "def f(x):\n    return 2"),
        ("def f(x):\n    return 1\n\ndef f(x):\n    return 2", "def f(x):\n    return 1"),
        ("def f(x):\n    x.append(1)", "def f(x):\n    x.append(1)"),  # no return: evalplus drops it
        ("def f(x):\n    if x:\n        return 1\n    for i in range(", "def f(x):\n    if x:\n        return 1"),
        ("def f(x):\n    return 1\n        oops\n", "def f(x):\n    return 1"),
        (
            'def f(x):\n    """\n```\n(unclosed\n"""\n    return 1',
            'def f(x):\n    """\n```\n(unclosed\n"""\n    return 1',
        ),
        ("def f(\n    x,\n):\n    return x", "def f(\n    x,\n):\n    return x"),
        ("1. First:\n\n   ```python\n   def f(x):\n       return x\n   ```\n", "def f(x):\n    return x"),
        ("import math; import re\ndef f(x):\n    return x", "import math\nimport re\ndef f(x):\n    return x"),
        ("def f(x):\r\n    return x\r\n", "def f(x):\n    return x"),
        ("def f(x):\n\treturn x", "def f(x):\n\treturn x"),
        ("def f(x: 'T') -> 'T':\n    return x\n\nT = int", "def f(x: 'T') -> 'T':\n    return x\nT = int"),
        ("x = 1", "x = 1"),  # no entry point: its failure shall be seen
        ("just (some text", ""),
        ("", ""),
        ("def f(x):\n    return '\0'", ""),
    ],
)
def test_what_is_kept(text: str, program: str) -> None:
    assert sanitize(text, "f") == program


def test_a_helper_in_another_block() -> None:
    text = FENCED.format(code="import math\n\n" + MAIN) + "\nwith the helper\n\n```\n" + HELPER + "\n```\n"
    assert names(sanitize(text, "f")) == ["f", "g"]
    assert "import math" in sanitize(text, "f")


def test_the_main_block_wins_over_examples() -> None:
    example = "```python\ndef f(x):\n    return 0\n```\n"
    text = f"A first try:\n{example}\nBetter:\n```python\n{HELPER}\n\n{MAIN}\n```\n"
    assert names(sanitize(text, "f")) == ["g", "f"]


@given(st.text(alphabet='def f(x):\n return\'"""#[]{}()\\`@+1=class', max_size=200), st.text(max_size=50))
@settings(max_examples=300)
def test_any_text_gives_a_program_or_nothing(text: str, tail: str) -> None:
    for candidate in (text, text + "\n" + tail, f"def f(x):\n    {text}\n"):
        program = sanitize(candidate, "f")
        ast.parse(program)
        assert sanitize(program, "f").strip() == program.strip() or "f" not in program


@pytest.mark.parametrize(
    "line",
    [
        "(",
        "x = (",
        'x = """',
        "This isn't (a program",
        "def f(x",
        "a = b",
        "    try:",
        "@f",
        "if x:",
        "x = [1,",
        "'",
        "```",
        "\\",
    ],
)
def test_what_is_broken_2000_times_ends_and_parses(line: str) -> None:
    text = f"{line}\n" * 2000
    ast.parse(sanitize(text, "f"))
    ast.parse(sanitize(f"```python\n{MAIN}\n{HELPER}\n```\n{text}", "f"))


def test_a_block_among_2000_lines_of_talk_is_found() -> None:
    talk = "This isn't (quite) \"code\"; it's a remark: [see\n" * 1000
    assert names(sanitize(f"{talk}```python\n{MAIN}\n\n{HELPER}\n```\n{talk}", "f")) == ["f", "g"]


REAL = Path(__file__).with_name("model_answers.jsonl")


def real_answers() -> list[dict[str, str]]:
    return [json.loads(line) for line in REAL.read_text().splitlines()]


@pytest.mark.parametrize("row", real_answers(), ids=lambda row: row["task_id"] + " " + row["mode"])
def test_real_answers(row: dict[str, str]) -> None:
    """Written by the model, sanitized, and read by a person once: the programs must not change."""
    assert sanitize(row["answer"], row["entry_point"]) == row["program"]
    ast.parse(row["program"])


def test_real_answers_are_extracted_as_by_evalplus() -> None:
    """Where evalplus is installed; rows marked "differs" say why it takes something else."""
    folder = os.environ.get("CODEACT_EVALPLUS") or str(Path(__file__).parents[2] / "build" / "evalplus")
    if not (Path(folder) / "evalplus").is_dir():
        pytest.skip("evalplus is not in build/evalplus; python -m benchmarks.evaluation installs it there")
    rows = real_answers()
    script = (
        "import json, sys\nfrom evalplus.sanitize import sanitize\n"
        "print(json.dumps([sanitize(a, e) for a, e in json.load(sys.stdin)]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([[row["answer"], row["entry_point"]] for row in rows]),
        env={
            **os.environ,
            "PYTHONPATH": folder,
            "HUMANEVAL_OVERRIDE_PATH": os.devnull,
            "MBPP_OVERRIDE_PATH": os.devnull,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    for row, theirs in zip(rows, json.loads(result.stdout.splitlines()[-1]), strict=True):
        try:
            same = ast.dump(ast.parse(theirs)) == ast.dump(ast.parse(row["program"]))
        except SyntaxError:
            same = False
        assert same is ("differs" not in row), row["task_id"]
