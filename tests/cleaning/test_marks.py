"""Marks: answers that do not parse, tasks that are given away, and the table, the command and the run of it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from codeact.base.errors import InputError
from codeact.base.ledger import Ledger
from codeact.cleaning import marks as cleaning
from codeact.cleaning.answers import answer_fault
from codeact.cleaning.contamination import EvaluationTask, TaskIndex, question_of_prompt
from codeact.cleaning.marks import MARKS_SCHEMA, Thresholds, counts_of, mark_rows
from codeact.cleaning.shingles import HashBlock
from codeact.cleaning.stage import evaluation_tasks
from codeact.data.records import open_records, write_jsonl
from tests.cleaning.test_duplicates import grams, tokens
from tests.conftest import make_records

PROGRAM = "def f(x):\n    return x\n"
TASKS = [
    EvaluationTask(id="HumanEval/0", question="Return the greatest common divisor of two integers a and b.",
                   solution="    while b:\n        a, b = b, a % b\n    return a\n"),
    EvaluationTask(id="Mbpp/90", question="Write a function to count the vowels of a given string, y among them.",
                   solution="def vowels(s):\n    return sum(c in 'aeiouy' for c in s.lower())\n"),
    EvaluationTask(id="Mbpp/91", question="漢字", solution="x"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def rensa():
    pytest.importorskip("rensa", reason="rensa is in the extra clean")


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (PROGRAM, None),
        ("def f(x):\nreturn x", "line 2: expected an indented block after function definition on line 1"),
        ("def f(x):", "line 1: expected an indented block after function definition on line 1"),
        ("def f(x): return x", None),
        ("# it\n@cache\ndef f(x) -> int:  # adds\n  return (x", "line 4: '(' was never closed"),
        ("    def f(x):\n        return x\n", None),  # indented as a whole
        ("class A:\n    x = 1\n\nA // a comment here", "line 4: invalid syntax"),
        ("import random\nx = 1 // Output: 1", None),  # nothing says that it is Python
        ("import random\n\ndef f(x):\n    return random.random( // it", "line 4: invalid syntax"),
        ("from x import y\nso it is not", None),
        ("Call it:\n\n    f(x", None),  # prose
        ("def f(x)\n  x + 1\nend", None),  # Ruby
        ("def f(x: Int): Int = x + 1", None),  # Scala
        ("class A: B {\n  let x = 1\n}", None),  # Swift
        ("import java.util.*;\nclass A { }", None),
        (f"Like this:\n```python\n{PROGRAM}```\nThat is all.", None),
        ("Like this:\n```python\nf(\n```", "line 1: '(' was never closed"),
        (f"```python\n{PROGRAM}", "a code block is not closed"),
        (f"```\n{PROGRAM}f(\n```", None),  # of a language that is not told
        ("```js\nf(\n```\n~~~py\nf(\n~~~", "line 1: '(' was never closed"),
        ("- so\n  ```python\n  x = 1\n  y = 2\n  ```", None),
        ("```python\n>>> f(1)\n1\n```", None),
        ("````md\n```python\n```\n````", None),
        ("def f():\n    return " + "(" * 5000, "line 2: too many nested parentheses"),
        ("def f():\n    return " + "-" * 100_000 + "1", "it is nested too deeply"),
        ("数を返す関数です。", None),
    ],
)
def test_what_does_not_parse(answer, fault):
    assert answer_fault("Write it.", answer) == fault


def test_a_zero_byte_is_a_fault():
    assert "null byte" in answer_fault("Write it.", "def f():\n    x = '\0'")  # its type is another from 3.12 on


def test_an_import_is_python_where_the_question_says_so():
    assert answer_fault("Write it in Python.", "import x\nx = = 1") == "line 2: invalid syntax"


@pytest.mark.parametrize(
    "text", ["def f(\n" * 20_000, "```\n" * 20_001, "#\n" * 200_000, "@a\n" * 100_000, "(" * 10**6]
)
def test_long_answers_take_no_square(text):
    answer_fault("python", text)


# ------------------------------------------------------------------------------------------------------- contamination


def measures(row: str, question: str, task: EvaluationTask) -> dict[str, float]:
    """The three measures of a row and a task among ``TASKS``, from sets of tuples and of words."""

    def words(text: str) -> set[str]:
        return {token for token in tokens(text) if re.match(r"\w", token)}

    def share(text: str) -> float:
        return len(grams(row, 8) & grams(text, 8)) / max(1, len(grams(text, 8)))

    known = Counter(word for other in TASKS for word in words(other.question))
    weight = {word: math.log((1 + len(TASKS)) / max(1, known[word])) for word in words(question) | words(task.question)}

    def norm(some: set[str]) -> float:
        return math.sqrt(sum(weight[word] ** 2 for word in some)) or 1.0

    shared = sum(weight[word] ** 2 for word in words(question) & words(task.question))
    return {
        "question_ngrams": share(task.question),
        "solution_ngrams": share(task.solution),
        "question_words": shared / norm(words(question)) / norm(words(task.question)),
    }


def test_matches_are_those_of_the_reference():
    rows = [
        ("Find the greatest common divisor of two integers.", "Use Euclid."),
        ("Anything.", f"Some text before. {TASKS[0].question} And some after."),
        ("Anything at all", "import math\n" + TASKS[1].solution),
        ("Count vowels", "def vowels(s):\n    return sum(c in 'aeiou' for c in s)\n"),
        ("Sort a list.", "sorted(x)"),
        ("漢字", "字"),
        ("?!", "..."),
        (TASKS[1].question.upper(), "No."),
    ]
    limits = {"question_ngrams": 0.5, "solution_ngrams": 0.5, "question_words": 0.6}
    found = TaskIndex(TASKS, 0.5, 0.6).matches(
        HashBlock.tokens_of("\n".join(row) for row in rows), HashBlock.tokens_of(question for question, _ in rows)
    )
    for place, (question, answer) in enumerate(rows):
        expected = {
            (number, measure): value / limits[measure]
            for number, task in enumerate(TASKS)
            for measure, value in measures(f"{question}\n{answer}", question, task).items()
        }
        most = max(expected.values())
        assert found.excess[place] == pytest.approx(most, abs=1e-6)
        if most:
            assert expected[found.task[place], cleaning.MEASURES[found.measure[place]]] == pytest.approx(most, abs=1e-6)
    assert (found.excess >= 1).tolist() == [True, True, True, False, False, True, False, True]


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ('def f(x):\n    """ Add one.\n    to x\n    >>> f(1)\n    2\n    """\n', "Add one. to x"),
        ('"""\nWrite a function.\nassert f(1) == 2\n"""\n', "Write a function."),
        (
            "import x\n\ndef g():\n    '''Not this.'''\n\ndef f(x):\n    '''\n    This.\n    For example: 1\n    '''\n",
            "This.",
        ),
        ('def f(x):\n    """ Broken (\n', 'def f(x): """ Broken ('),
        ('def f(x):\n    """>>> f(1)\n    2"""\n', ">>> f(1) 2"),  # nothing but examples
        ("Say it in words.", "Say it in words."),
        ("", ""),
    ],
)
def test_the_question_of_a_prompt(prompt, question):
    assert question_of_prompt(prompt) == question


def test_sets_that_are_not_here_are_named_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CODEACT_EVAL_DATA", str(tmp_path))
    assert evaluation_tasks(None) == []
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("no row is compared with the tasks of") for line in said] == [True, True]
    assert "put evalplus' HumanEvalPlus.jsonl.gz into a folder and set CODEACT_EVAL_DATA to it" in said[0]
    with pytest.raises(InputError, match=r"holds no HumanEvalPlus.jsonl.gz; put it there"):
        evaluation_tasks("humaneval")
    assert evaluation_tasks("none") == []
    write_jsonl(tmp_path / "own.jsonl", [{"question": "Why?", "answer": "So."}])
    assert evaluation_tasks(str(tmp_path / "own.jsonl")) == [
        EvaluationTask(id="own/0", question="Why?", solution="So.")
    ]


# ----------------------------------------------------------------------------------------------- the table and its use

ROWS = [
    {
        "q": "Make a list of the squares of all whole numbers below ten, please.",
        "a": "```python\n[x * x for x in range(10)]\n```",
    },
    {
        "q": "Make a  list of the squares of all whole numbers below ten, please.\n",
        "a": "```python\n[x * x for x in range(10)]\n```",
    },
    {
        "q": "Make a list of the squares of all whole numbers below ten, please.",
        "a": "```python\n[x * x for x in range(11)]\n```",
    },
    {"q": "Find the greatest common divisor of two integers.", "a": "math.gcd"},
    {"q": "Find the greatest common divisor of two integers.", "a": "math.gcd"},  # a copy of what is marked itself
    {"q": "", "a": "no question"},
    {"q": "Open a block.", "a": "```python\nx = 1"},
    {"q": "Open a block.", "a": "```python\nx = 1"},
    {"q": "Something else entirely, about the weather.", "a": "It rains."},
]
STATUSES = ["ok", "exact_duplicate", "near_duplicate", "contaminated", "contaminated", "empty_question"]
STATUSES += ["unparsable_answer", "unparsable_answer", "ok"]


def test_every_row_has_a_status_and_its_partner(tmp_path):
    records = open_records([{"question": row["q"], "answer": row["a"]} for row in ROWS])
    marks = mark_rows(records, Thresholds(), TASKS, scratch=tmp_path)
    assert marks.schema.equals(MARKS_SCHEMA)
    assert marks["status"].to_pylist() == STATUSES
    assert marks["partner"].to_pylist()[1:8] == ["0", "0", "HumanEval/0", "HumanEval/0", None, None, None]
    assert marks["partner"][0].as_py() == "HumanEval/0"  # its nearest miss: "of" and "the"
    assert 0 < marks["similarity"][0].as_py() < 0.6
    assert marks["measure"].to_pylist()[1:4] == ["text", "row_ngrams", "question_words"]
    assert marks["similarity"][1].as_py() == 1
    assert "the question is blank" in marks["reason"][5].as_py()
    assert marks["reason"][6].as_py() == "a code block is not closed"
    assert marks.schema.metadata[b"fingerprint"].decode() == records.fingerprint
    nothing = Thresholds(near=0, overlap=0, words=0, similar=0)
    assert counts_of(mark_rows(records, nothing, TASKS, scratch=tmp_path)) == {
        "ok": 4, "exact_duplicate": 2, "empty_question": 1, "unparsable_answer": 2
    }  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_blocks_of_any_size_give_the_same(tmp_path, monkeypatch):
    rows = [{"question": row["q"], "answer": row["a"]} for row in ROWS] * 3
    talk = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}] * 3
    whole = mark_rows(open_records(rows), Thresholds(), TASKS, scratch=tmp_path)
    talks = mark_rows(open_records([{"messages": talk}] * 5), Thresholds(), TASKS, scratch=tmp_path)
    monkeypatch.setattr(cleaning, "_BLOCK_CHARACTERS", 60)
    assert mark_rows(open_records(rows), Thresholds(), TASKS, scratch=tmp_path).equals(whole)
    monkeypatch.setattr(cleaning, "MOST_TEXTS", 4)
    assert mark_rows(open_records(rows), Thresholds(), TASKS, scratch=tmp_path).equals(whole)
    assert mark_rows(open_records([{"messages": talk}] * 5), Thresholds(), TASKS, scratch=tmp_path).equals(talks)
    assert counts_of(talks) == {"ok": 1, "exact_duplicate": 4}


def test_on_code_alpaca(code_alpaca, shared_data, monkeypatch, tmp_path):
    monkeypatch.setenv("CODEACT_EVAL_DATA", str(shared_data))
    marks = mark_rows(code_alpaca, Thresholds(), evaluation_tasks(None), scratch=tmp_path)
    assert counts_of(marks) == {
        "ok": 1966, "unparsable_answer": 29, "contaminated": 18, "empty_answer": 2, "near_duplicate": 2
    }  # fmt: skip
    known = {row["id"]: row["partner"] for row in marks.to_pylist() if row["status"] == "contaminated"}
    assert (known["600"], known["709"], known["1247"]) == ("Mbpp/764", "HumanEval/13", "Mbpp/127")
    assert len(set(known.values())) == 14


@pytest.fixture
def here(tmp_path, monkeypatch, embedder_path) -> Path:
    monkeypatch.chdir(tmp_path)
    task = {"entry_point": "f", "base_input": [[1]], "plus_input": [[2]], "atol": 0}
    for name, one in (("HumanEvalPlus", TASKS[0]), ("MbppPlus", TASKS[1])):
        prompt = f'def f(a, b):\n    """{one.question}"""\n'
        row = {"task_id": one.id, "prompt": prompt, "canonical_solution": one.solution, **task}
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
    monkeypatch.setenv("CODEACT_EVAL_DATA", str(tmp_path))
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return tmp_path


DATA = ("rows.jsonl", "--question-column", "q", "--answer-column", "a")


def test_the_command(codeact, here):
    code, out, err = codeact("clean", *DATA, "--output", "c.jsonl")
    assert code == 0, err
    assert "contaminated       2" in out
    lines = [json.loads(line) for line in Path("c.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == [status for status in STATUSES if status != "empty_question"]
    assert lines[1]["partner"] == "0"
    code, _, err = codeact("clean", *DATA, "--output", "d.jsonl", "--drop")
    assert code == 0, err
    lines = [json.loads(line) for line in Path("d.jsonl").read_text().splitlines()]
    assert [(line["id"], set(line)) for line in lines] == [(id, {"id", "messages", "extra"}) for id in ("0", "8")]
    assert pq.read_table("d.rows.parquet").equals(pq.read_table("c.rows.parquet"))


def test_by_embeddings(codeact, here, embedder_path):
    rows = [
        *ROWS[:1],
        {"q": "Please make a list of the squares of all whole numbers below ten.", "a": "No."},
        *ROWS[8:],
    ]
    rows += [{"q": "Return the greatest common divisor of the integers a and b, please.", "a": "A number."}]
    write_jsonl(here / "rows.jsonl", rows)
    assert codeact("embed", *DATA, "--model", embedder_path, "--output", "e.npy")[0] == 0
    code, _, err = codeact("clean", *DATA, "--output", "c.jsonl", "--embeddings", "e.npy", "--similar", 0.75,
                            "--words", 0, "--near", 0, "--overlap", 0)  # fmt: skip
    assert code == 0, err
    found = pq.read_table("c.rows.parquet").to_pylist()
    assert [row["status"] for row in found] == ["ok", "similar_question", "ok", "contaminated"]
    assert (found[1]["partner"], found[3]["partner"]) == ("0", "HumanEval/0")
    assert {found[n]["measure"] for n in (1, 3)} == {"question_vector"}
    assert codeact("clean", "rows.jsonl", "--question-column", "a", "--answer-column", "q", "--output", "c.jsonl",
                   "--embeddings", "e.npy")[0] == 2  # fmt: skip


def test_in_a_run(codeact, here, tiny_model_path, embedder_path):
    more = [{"q": record.question, "a": record.answer} for record in make_records(20)]
    write_jsonl(here / "rows.jsonl", [*ROWS, *more])
    content = {
        "output": "run",
        "data": {"source": "rows.jsonl", "question": "q", "answer": "a"},
        "score": {"model": str(tiny_model_path), "max_length": 256},
        "embed": {"model": str(embedder_path)},
        "clean": {"similar": 0},
        "select": {"clusters": 2, "budget_rows": 28, "strategy": "random"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(content))
    code, out, err = codeact("run", "run.yaml")
    assert code == 0, err
    first = Ledger.read(Path("run/ledger.json"))
    assert first.complaints() == []
    entry = next(entry for entry in first.entries if entry.stage == "clean")
    lost = {change.reason: change.rows for change in entry.lost}
    assert (lost["exact_duplicate"], lost["contaminated"], lost["unparsable_answer"]) == (1, 2, 2)
    assert entry.rows_in - sum(lost.values()) == entry.rows_out
    assert next(entry for entry in first.entries if entry.stage == "select").rows_out == 28  # marked, not left out
    code, out, err = codeact("run", "run.yaml", "--set", "clean.drop=true", "--dry-run")
    assert code == 0, err
    assert re.search(r"clean +done already", out), out
    code, out, err = codeact("run", "run.yaml", "--set", "clean.drop=true")
    assert code == 0, err
    assert "clean: done already" in err
    second = Ledger.read(Path("run/ledger.json"))
    assert second.complaints() == []
    chosen = {json.loads(line)["id"] for line in Path("run/selected.jsonl").read_text().splitlines()}
    marks = pq.read_table("run/cleaned.rows.parquet")
    clean = {id for id, status in zip(*(marks[c].to_pylist() for c in ("id", "status")), strict=True) if status == "ok"}
    assert chosen == clean
    audit = pq.read_table("run/selected.rows.parquet").to_pylist()
    assert [row["reason"] for row in audit[:9]] == [None if status == "ok" else status for status in STATUSES]
    assert "contaminated" in Path("run/report.html").read_text()
    write_jsonl(
        here / "HumanEvalPlus.jsonl", [json.loads(Path("HumanEvalPlus.jsonl").read_text()) | {"prompt": "Sing"}]
    )
    code, _, err = codeact("run", "run.yaml", "--set", "clean.drop=true")
    assert code == 0, err
    assert "clean ..." in err  # other tasks, other marks


def test_marks_of_other_data_are_refused(codeact, here, tiny_model_path, tmp_path):
    assert codeact("score", *DATA, "--model", tiny_model_path, "--max-length", 256, "--output", "scores")[0] == 0
    assert codeact("clean", *DATA, "--output", "c.jsonl")[0] == 0
    for name, message in (
        ("none.parquet", "cannot use none.parquet as marks"),
        ("scores/scores.parquet", "cannot use scores/scores.parquet as marks"),
    ):
        code, _, err = codeact(
            "select", "--scores", "scores", "--strategy", "random", "--marks", name, "--output", "s.jsonl"
        )
        assert (code, message in err) == (2, True), err
    write_jsonl(here / "rows.jsonl", ROWS[1:])
    assert codeact("clean", *DATA, "--output", "d.jsonl")[0] == 0
    write_jsonl(here / "rows.jsonl", ROWS)
    code, _, err = codeact(
        "select", "--scores", "scores", "--strategy", "random", "--marks", "d.rows.parquet", "--output", "s.jsonl"
    )
    assert (code, "and the scores are of different data; clean and score the same file" in err) == (2, True)
    code, _, err = codeact(
        "select",
        "--scores",
        "scores",
        "--strategy",
        "random",
        "--ratio",
        1,
        "--marks",
        "c.rows.parquet",
        "--output",
        "s.jsonl",
    )
    assert code == 0, err
    assert [json.loads(line)["id"] for line in Path("s.jsonl").read_text().splitlines()] == ["0", "8"]
    assert np.array(pq.read_table("s.rows.parquet")["chosen"]).sum() == 2
