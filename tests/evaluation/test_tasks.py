"""Tasks of one's own: the forms of other benchmarks, as their files have them, judged to the end."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import zlib

import pytest

from codeact.base.errors import InputError
from codeact.evaluation.compare import same_output
from codeact.evaluation.problems import load_problems
from codeact.evaluation.prompts import PromptWriter
from codeact.evaluation.tasks import load_tasks, open_problems

pytestmark = pytest.mark.usefixtures("isolated")

# openai/human-eval: data/example_problem.jsonl and data/example_samples.jsonl, of which 3 in 6 pass.
EXAMPLE = {
    "task_id": "test/0",
    "prompt": "def return1():\n",
    "canonical_solution": "    return 1",
    "test": "def check(candidate):\n    assert candidate() == 1",
    "entry_point": "return1",
}
EXAMPLE_SAMPLES = {
    "    import subprocess\n    subprocess.check_output('rm -rf tmp')": "exception",
    "    import time\n    time.sleep(10)\n    return 1": "time",
    "    return input('enter a number')": "exception",
    "    return 1": "pass",
    "  return 1": "pass",
    "\treturn 1": "pass",
}


def packed(cases: object) -> str:
    """As LiveCodeBench packs its private test cases."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def case(given: str, expected: str, kind: str = "stdin") -> dict:
    return {"input": given, "output": expected, "testtype": kind}


STDIN = {  # an AtCoder task of LiveCodeBench
    "question_id": "abc301_a",
    "question_content": "Add two numbers.",
    "starter_code": "",
    "public_test_cases": json.dumps([case("1 2\n", "3\n")]),
    "private_test_cases": packed([case("5 -5\n", "0\n"), case("1 0.5", "1.50\n")]),
    "metadata": "{}",
}
FUNCTIONAL = {  # a LeetCode task of LiveCodeBench
    "question_id": "2727",
    "question_content": "Count.",
    "starter_code": "class Solution:\n    def count(self, nums: List[int], k: int) -> List[int]:\n        ",
    "public_test_cases": json.dumps([case("[1, 2, 2]\n2", "[2, 1]", "functional")]),
    "private_test_cases": packed([case("[]\n1", "[0, 0]", "functional")]),
    "metadata": json.dumps({"func_name": "count"}),
}
UNITTEST = {  # BigCodeBench
    "task_id": "BigCodeBench/0",
    "complete_prompt": "import random\ndef task_func(values):\n    '''Shuffle.'''\n",
    "instruct_prompt": "Write task_func, which shuffles.",
    "canonical_solution": "    random.shuffle(values)\n    return values\n",
    "code_prompt": "import random\ndef task_func(values):\n",
    "test": """import unittest
from unittest.mock import patch
class TestCases(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.values = [1, 2, 3]
    def test_case_1(self):
        with patch('random.shuffle') as shuffle:
            task_func([1, 2])
        shuffle.assert_called_once()
    def test_case_2(self):
        self.assertCountEqual(task_func(list(self.values)), self.values)
""",
    "entry_point": "task_func",
    "libs": "['random']",
}
LOOP = {  # a check that no one can take apart, and a solution to compare with
    "task_id": "own/loop",
    "prompt": "def double(x):\n",
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    for x in (1, 2, 30):\n        assert candidate(x) == x + x",
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to add.",
    "code": "def add(a, b): return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(math.inf, 1) == float('inf')"],
    "test_setup_code": "import math",
}
PAIRS = {"task_id": "own/pairs", "question": "Echo.", "tests": [["a\n", "a"], {"input": "b", "output": "b\n"}]}
ASSERTS = {"task_id": "own/asserts", "tests": "assert f(1) == [1, 2]\nassert f('x') == 'x'"}
OPAQUE = {"task_id": "own/opaque", "tests": ["import math", "assert math.isclose(f(2), math.sqrt(2))"]}

RIGHT = {
    "abc301_a": "a, b = input().split()\nprint(float(a) + float(b))",
    "2727": "class Solution:\n    def count(self, nums: List[int], k):\n        return nums.count(k), Counter(nums)[1]",
    "BigCodeBench/0": UNITTEST["complete_prompt"] + UNITTEST["canonical_solution"],
    "own/loop": "def double(x): return x + x",
    "2": "def add(a, b): return a + b",
    "own/pairs": "import sys\nfor line in sys.stdin: print(line.strip())",
    "own/asserts": "def f(x): return [1, 2] if x == 1 else x",
    "own/opaque": "def f(x): return x ** 0.5",
}
WRONG = {  # the program, how it ends, and the test that it fails
    "abc301_a": ("a, b = map(int, input().split())\nprint(max(3, a + b))", "wrong", "5 -5\n"),
    "2727": ("def count(nums, k): return [2, 1]", "wrong", "count([], 1)"),
    "BigCodeBench/0": ("import random\ndef task_func(v):\n    random.shuffle(v)", "exception", "TestCases.test_case_2"),
    "own/loop": ("def double(x): return x * 2 if x < 9 else 0", "wrong", "double(30)"),
    "2": ("def add(a, b): return 3", "exception", "assert add(math.inf, 1) == float('inf')"),
    "own/pairs": ("print('a')", "wrong", "b"),
    "own/asserts": (
        "def f(x):\n    if x != 1: raise KeyError(x)\n    return [1, 2]",
        "exception",
        "assert f('x') == 'x'",
    ),
    "own/opaque": ("def f(x): return x", "exception", "assert math.isclose(f(2), math.sqrt(2))"),
}
ALL = (STDIN, FUNCTIONAL, UNITTEST, LOOP, MBPP, PAIRS, ASSERTS, OPAQUE)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def judged(tmp_path, codeact, monkeypatch):
    """Tasks and programs -> what the command says, and the verdicts of every task."""
    monkeypatch.setenv("CODEACT_CACHE", str(tmp_path / "cache"))

    def run(tasks, samples, *options):
        arguments = (
            "--tasks",
            write(tmp_path / "tasks.jsonl", tasks),
            "--samples",
            write(tmp_path / "s.jsonl", samples),
        )
        code, out, err = codeact("evaluate", *arguments, "--min-seconds", 2, "--parallel", 2, *options)
        assert code == 0, err
        return out, json.loads((tmp_path / "s_eval.json").read_text())

    return run


def test_human_evals_own_example(judged):
    samples = [{"task_id": "test/0", "completion": text} for text in EXAMPLE_SAMPLES]
    out, report = judged([EXAMPLE], samples)
    assert "| own | 50.0 % |" in out
    assert [verdict["base"] for verdict in report["samples"]["test/0"]] == list(EXAMPLE_SAMPLES.values())
    assert report["samples"]["test/0"][0]["input"] == "assert return1() == 1"


def test_every_form(judged, tmp_path):
    samples = [{"task_id": name, "solution": text} for name, text in RIGHT.items()]
    samples += [{"task_id": name, "solution": text} for name, (text, _, _) in WRONG.items()]
    out, report = judged(ALL, samples)
    found = {name: [(v["base"], v["input"]) for v in verdicts] for name, verdicts in report["samples"].items()}
    assert found == {name: [("pass", ""), (kind, failed)] for name, (_, kind, failed) in WRONG.items()}
    assert "3 tasks have tests that run beside the program, which could forge them." in out
    assert "wrong, test 1, `5 -5`" in (tmp_path / "s_eval.md").read_text()


EQUAL = "class E:\n    def __eq__(s, o): return True\n    def __bool__(s): return True\n"


@pytest.mark.parametrize(
    ("task", "cheat"),
    [
        (EXAMPLE, EQUAL + "return1 = lambda: E()"),
        (EXAMPLE, "def return1(): raise SystemExit(0)"),
        (FUNCTIONAL, EQUAL + "class Solution:\n    def count(self, *a): return E()"),
        (ASSERTS, EQUAL + "f = lambda x: E()"),
        (STDIN, "import sys\nsys.stdout.flush()\nprint(open(__file__).read() if '__file__' in globals() else 3)"),
        (LOOP, EQUAL + "double = lambda x: E()"),
    ],
)
def test_what_is_expected_cannot_be_met_by_a_trick(judged, task, cheat):
    name = task.get("task_id", task.get("question_id"))
    _, report = judged([task], [{"task_id": name, "solution": cheat}])
    assert report["samples"][name][0]["base"] != "pass"


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_id": None}, "no task: it has no 'task_id'"),
        ({"test": None}, "it has no 'tests, test, test_list or public_test_cases'"),
        ({"test": "def check(candidate"}, "is no Python"),
        ({"test": "x = 1"}, "there is no test"),
        ({"test": "import unittest\nclass T(unittest.TestCase): pass"}, "methods whose names begin with test"),
        ({"tests": [1]}, "tests are text, or a list of asserts or of pairs"),
        ({"tests": [["a", 1]]}, "tests are text, or a list of asserts or of pairs"),
        ({"tests": {"a": 1}}, "tests are text"),
        ({"tests": ["assert f(1)", ["a", "b"]]}, "mixed"),
        ({"public_test_cases": "[]"}, "there is no test case"),
        ({"public_test_cases": "[{]"}, "test cases cannot be read"),
        ({"public_test_cases": [case("1", "1", "functional")]}, "it has no 'func_name'"),
        ({"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()}, "not unpickled"),
        ({"private_test_cases": base64.b64encode(zlib.compress(b"\x80\x04no")).decode()}, "no task"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_task_is_named(change, message, tmp_path, capsys):
    row = {**EXAMPLE, **change}
    for name in [name for name, value in change.items() if value is None]:
        del row[name]
    path = write(tmp_path / "t.jsonl", [ASSERTS, row])
    with pytest.raises(InputError, match=r"t.jsonl, .*2.*no task: ") as error:
        load_tasks(path)
    assert message in str(error.value)
    assert "unpickled" not in capsys.readouterr().out


def test_what_else_is_refused(tmp_path, codeact):
    samples = write(tmp_path / "s.jsonl", [])
    for arguments, message in (
        ((), "say which tasks: --dataset humaneval, --dataset mbpp, or --tasks FILE"),
        (("--dataset", "mbpp", "--tasks", "x"), "say which tasks"),
        (("--tasks", tmp_path / "none.jsonl"), "no such file"),
        (("--tasks", write(tmp_path / "twice.jsonl", [PAIRS, PAIRS])), "task own/pairs is there twice"),
    ):
        code, _, err = codeact("evaluate", "--samples", samples, *arguments)
        assert code == 2
        assert message in err
    with pytest.raises(InputError, match="need their file: tasks FILE"):
        open_problems("own")
    assert [p.task_id for p in open_problems("own", write(tmp_path / "t.jsonl", ALL),
            2).problems] == ["abc301_a", "2727"]  # fmt: skip
    assert [p.task_id for p in load_tasks(tmp_path / "t.jsonl", None, ["2"]).problems] == ["2"]


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("1\n2", " 1 \n2\n\n", True),
        ("1.0 2", "1 2.00", True),
        ("50000000000000001", "50000000000000000", False),
        ("1\n\n2", "1\n2", False),
        ("1 2", "1 2 3", False),
        ("nan", "nan", True),
        ("", "\n", True),
    ],
)
def test_outputs_are_compared_by_line_and_number(found, expected, same):
    assert same_output(found, expected) == same


def test_a_model_is_asked_and_its_answers_judged(codeact, tmp_path, tiny_model_path, monkeypatch):
    """Scripts may print and have a main; the other answers end where they do for HumanEval."""
    monkeypatch.setenv("CODEACT_CACHE", str(tmp_path / "cache"))
    tasks, samples = write(tmp_path / "t.jsonl", ALL), tmp_path / "samples.jsonl"
    code, out, err = codeact(
        "generate", "--tasks", tasks, "--model", tiny_model_path, "--max-new-tokens", 4, "--output", samples
    )
    assert (code, "8 samples" in out) == (0, True), err
    code, _, err = codeact("sanitize", samples)
    assert code == 0, err
    code, out, err = codeact("evaluate", "--tasks", tasks, "--samples", tmp_path / "samples-sanitized.jsonl")
    assert (code, "| own | 0.0 % |" in out) == (0, True), err


def test_what_a_chat_is_asked(tmp_path, tokenizer):
    from codeact.evaluation.prompts import PromptWriter

    problems = load_tasks(write(tmp_path / "t.jsonl", ALL)).by_id()
    writer = PromptWriter(tokenizer, "chat")
    asked = {name: tokenizer.decode(writer.write(problem).ids) for name, problem in problems.items()}
    assert "Add two numbers.\n\nWrite a Python program that reads standard input" in asked["abc301_a"]
    assert "Count.\n\nBegin with:\n```python\nclass Solution:" in asked["2727"]
    assert "Write task_func, which shuffles." in asked["BigCodeBench/0"]
    assert (
        "complete the following Python function in a markdown style code block:\n```python\ndef double(x):"
        in asked["own/loop"]
    )
    stops = {name: writer.write(problem).stops for name, problem in problems.items()}
    assert stops["own/pairs"] == stops["abc301_a"] == ("\n```",)
    assert "\nassert" in stops["2727"]
    base = PromptWriter(tokenizer, None).write(problems["BigCodeBench/0"])
    assert tokenizer.decode(base.ids).endswith("'''Shuffle.'''\n")


def test_rows_that_give_them_away_are_found(tmp_path):
    from codeact.cleaning.stage import evaluation_tasks

    path = write(tmp_path / "t.jsonl", [LOOP, FUNCTIONAL])
    tasks = evaluation_tasks(None, ("own", path))
    assert [(task.id, task.solution) for task in tasks][-2:] == [("own/loop", "    return 2 * x\n"), ("2727", "")]
    assert tasks[-1].question.startswith("Count.")


def test_human_eval_itself_is_a_file_of_tasks(human_eval_path):
    """Most of its checks are taken apart; what the others call is compared with the canonical solution's results."""
    problems = load_tasks(human_eval_path).problems
    assert (len(problems), sum(problem.own is None for problem in problems)) == (164, 48)
    assert not any(problem.own.beside for problem in problems if problem.own is not None)


def test_a_release_of_evalplus_is_taken_as_it_is(judged, shared_data, tmp_path, tokenizer):
    """Its rows, and one of a task that only v0.1.0 has; the same problems as by the data set's own name."""
    lines = gzip.decompress((shared_data / "MbppPlus.jsonl.gz").read_bytes()).decode().splitlines()
    rows = [row for row in map(json.loads, lines) if row["task_id"] in ("Mbpp/2", "Mbpp/124", "Mbpp/252")]
    older = {"task_id": "Mbpp/115", "entry_point": "empty_dit", "base_input": [[[[1], []]]], "plus_input": [[[{}]]]}
    rows.append({**rows[0], **older, "prompt": "", "canonical_solution": "def empty_dit(x):\n    return not any(x)\n"})
    samples = [{"task_id": row["task_id"], "solution": row["prompt"] + row["canonical_solution"]} for row in rows]
    samples[0]["solution"] = "def similar_elements(a, b):\n    return tuple(a)"
    out, report = judged(rows, samples)
    assert "| mbpp+ | 75.0 % |" in out
    assert report["samples"]["Mbpp/2"][0]["base"] == "wrong"
    path = tmp_path / "MbppPlus-v0.1.0.jsonl.gz"
    path.write_bytes(gzip.compress((tmp_path / "tasks.jsonl").read_bytes()))
    own, named = load_tasks(path), load_problems("mbpp", path)
    assert repr(own.problems) == repr(named.problems)
    assert own.by_id()["Mbpp/115"].base_input == (([{1}, {}],),)
    asked = PromptWriter(tokenizer, "chat").write(own.problems[0]).ids
    assert "that comply with the following instruction" in tokenizer.decode(asked)
