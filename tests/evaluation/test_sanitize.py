"""Programs out of answers. Those in model_answers.jsonl were written by SmolLM2-135M-Instruct for tasks of HumanEval."""

# ruff: noqa: E501 - programs on one line

from __future__ import annotations

import ast
import decimal
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeact.base.errors import InputError
from codeact.evaluation.sanitize import sanitize
from codeact.evaluation.stage import sanitize_file

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


FENCED_DOC = 'def f(x):\n    """Say.\n\n    ```python\n    f(1)\n    ```\n    """\n    return x'
USAGE = "x = int(input('x: '))\nresult = f(x)\nprint(result)"
LOCAL = "def f(x):\n    result = [a for a in x]\n    return result"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (FENCED.format(code=FENCED_DOC), FENCED_DOC),
        (FENCED_DOC, FENCED_DOC),
        (FENCED.format(code=FENCED_DOC.replace("    ```", "```")), FENCED_DOC.replace("    ```", "```")),
        (FENCED.format(code=FENCED_DOC.replace('"""', "'''")), FENCED_DOC.replace('"""', "'''")),
        (
            FENCED.format(code=FENCED_DOC.replace('    ```\n    "', '    "')),
            FENCED_DOC.replace('    ```\n    "', '    "'),
        ),
        ("- So:\n\n  ```\n" + "\n".join(f"  {line}" for line in MAIN.split("\n")) + "\n  ```\n- " + USAGE, MAIN),
    ],
)
def test_a_fence_in_a_docstring_is_text(text: str, program: str) -> None:
    assert sanitize(text, "f") == program


@pytest.mark.parametrize(
    "usage",
    [
        USAGE,
        "a = input()\nx = [a]\nresult = f(x)",
        "for x in range(9):\n    result = f(x)\n    print(result)",
        "with open('x') as x:\n    result = f(x.read())",
        "x, result = 1 / 0, None",
        "x = []\nx.append(input())\nx[0] = 1\nf(x).sort()\nresult = x",
        "def main():\n    global x\n    x = input()\n    print(f(x))\nmain()",
        "import sys\nimport unittest\nsys.exit(f(1))\nunittest.main()",
        "if __name__ == '__main__':\n    x = input()",
        "try:\n    x = int(input())\nexcept ValueError:\n    x = 0",
        "a: int = int(input())\nx = a",
        "class T:\n    x = input()",
    ],
)
def test_an_example_of_use_is_left_out(usage: str) -> None:
    """Also where its names are those of a parameter, a local, or a variable of a comprehension."""
    for text in (
        FENCED.format(code=f"{LOCAL}\n\n{usage}"),
        FENCED.format(code=f"{usage}\n\n{LOCAL}"),
        FENCED.format(code=LOCAL) + "\nUse it:\n\n" + FENCED.format(code=usage),
        FENCED.format(code=usage) + "\nwith\n\n" + FENCED.format(code=LOCAL),
    ):
        program = sanitize(text, "f")
        assert program.endswith(LOCAL)
        assert "input" not in program
        assert "exit" not in program


@pytest.mark.parametrize(
    "filling",
    [
        "M = []\nM.append(1)",
        "M = {}\nM[0] = 1",
        "M = [0]\nM[0] += 1",
        "M = {0: 2}\ndel M[0]",
        "M = []\nfor i in range(3):\n    M.append(i)",
        "M = set()\nwhile len(M) < 3:\n    M.add(len(M))",
        "M = {}\nM.setdefault(1, []).append(2)",
        "import heapq\nM = []\nheapq.heappush(M, 1)",
        "M = []\nif not M:\n    M.extend([1])",
        "M = []\ndef fill():\n    M.append(2)\nfill()",
        "M = 0\ndef fill(n):\n    global M\n    M = n\nfill(3)",
        "class C:\n    pass\nM = C()\nM.x = 1",
        "class C:\n    x = [0]\nC.x[0] = 1\nC.y = 2\nM = C",
        "import sys\nsys.setrecursionlimit(10**6)\nM = 1",
        "from decimal import getcontext\ngetcontext().prec = 50\nM = 1",
    ],
)
def test_what_fills_a_global_is_kept(filling: str, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    request.addfinalizer(partial(decimal.setcontext, decimal.getcontext().copy()))
    code = f"{filling}\ndef f(x):\n    return M"
    unused = "N = []\nN.append(input())\nprint(f(1))"
    state = {}
    exec(code, state)
    kept: dict[str, object] = {}
    program = sanitize(FENCED.format(code=f"{code}\n{unused}"), "f")
    exec(program, kept)
    if isinstance(state["M"], (list, dict, set, int)):
        assert kept["M"] == state["M"]
    assert {line.strip() for line in code.split("\n")} == {line.strip() for line in program.split("\n")}


@pytest.mark.parametrize(
    "code",
    [
        "from functools import singledispatch\n@singledispatch\ndef g(x):\n    return None\n@g.register\n"
        "def _(x: int):\n    return x + 1\n@g.register\ndef _(x: str):\n    return 0\ndef f(x):\n    return g(x)",
        "T = {}\ndef kept(h):\n    T[h.__name__] = h\n    return h\n@kept\ndef one(x):\n    return x + 1\n"
        "def f(x):\n    return T['one'](x)",
        "class R(dict):\n    def add(self, name):\n        return lambda h: self.setdefault(name, h)\nW = R()\n"
        "@W.add('one')\ndef one(x):\n    return x + 1\ndef f(x):\n    return W['one'](x)",
        "def f(x):\n    return globals()['one'](x)\ndef one(x):\n    return x + 1",
        "import sys\ndef f(x):\n    return getattr(sys.modules[__name__], 'one', one)(x)\ndef one(x):\n    return x + 1",
    ],
)
def test_what_is_reached_by_a_decorator_or_a_text_is_kept(code: str) -> None:
    scope: dict[str, object] = {"__name__": "builtins"}
    program = sanitize(FENCED.format(code=f"{code}\nprint(f(1))"), "f")
    exec(program, scope)
    assert scope["f"](1) == 2  # type: ignore[operator]
    assert "print" not in program
    unused = "import functools\n@functools.lru_cache\ndef other(x):\n    return 1\n"
    assert "other" not in sanitize(unused + code, "f")


@pytest.mark.parametrize(
    "thought",
    [
        "<think>\n{}\n</think>",
        "{}</think>",
        "<thinking>{}</thinking>",
        "<seed:think>{}</seed:think>",
        "[THINK]{}[/THINK]",
    ],
)
def test_the_answer_stands_after_what_was_thought(thought: str) -> None:
    draft = "```python\ndef f(x):\n" + "    x += 1\n" * 30 + "    return x\n```\n"
    assert sanitize(thought.format(draft) + "\n\n" + FENCED.format(code=LOCAL), "f") == LOCAL
    assert sanitize(thought.format(FENCED.format(code=LOCAL)) + "\nThat is it.", "f") == LOCAL  # nowhere else
    tag = f"def f(x):\n    return x.split({thought.split('{}')[1].strip()!r})"
    assert sanitize(tag, "f") == tag


def test_shared_answers_stay_right(shared_cases: Path) -> None:
    for name in ("docstring_fence", "usage_block", "s_input"):
        row = json.loads((shared_cases / "programs" / f"{name}.jsonl").read_text())
        scope: dict[str, object] = {}
        exec(sanitize(row["solution"], "add"), scope)
        assert scope["add"](2, 3) == 5


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
        "@f\n",
        "@f\nx = 1",
        "@f(",
        "@f\n def g",
        "if x:",
        "if x:\nelse:",
        "if x:\n y\nelse:",
        "else:",
        "elif x:",
        "except:",
        "finally:",
        "class A:",
        "x = [1,",
        "'",
        "```",
        "  ```",
        "\\",
    ],
)
def test_what_is_broken_2000_times_takes_time_that_grows_with_it(line: str, monkeypatch) -> None:
    text = f"{line}\n" * 2000
    read = [0]
    parse = ast.parse

    def counting(source: str) -> ast.Module:
        read[0] += len(source)
        return parse(source)

    monkeypatch.setattr("codeact.evaluation.sanitize.ast.parse", counting)
    for answer in (text, f"```python\n{MAIN}\n{HELPER}\n```\n{text}"):
        program = sanitize(answer, "f")
        assert read[0] < 150 * len(answer)
        parse(program)


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


@pytest.mark.parametrize("content", ["", "\n\n", '{"task_id": "HumanEval/999", "solution": "x = 1"}\n'])
def test_a_file_without_a_known_sample_is_refused(tmp_path, human_eval_path, content):
    (tmp_path / "s.jsonl").write_text(content)
    with pytest.raises(InputError, match="holds no sample of a task that is known"):
        sanitize_file(tmp_path / "s.jsonl", data=human_eval_path)
    assert not (tmp_path / "s-sanitized.jsonl").exists()
