"""A few kilobytes of brackets, read where something has raised Python's recursion limit: refused, and nobody dies."""

from __future__ import annotations

import json
import sys

import pytest

from codeact.base.errors import InputError
from codeact.base.parsing import MOST_DEPTH, TooDeepError, check_depth, parse_json, read_json, safe_recursion
from codeact.base.yaml_files import read_value, read_yaml
from codeact.data.harvest import write_harvest
from codeact.data.records import BadRow, open_records, open_rows, write_jsonl
from codeact.evaluation.compare import Judge
from codeact.evaluation.programs import read_rows
from codeact.evaluation.rewards import run_program
from codeact.evaluation.sanitize import sanitize
from tests.evaluation.test_compare import a_problem

DEEP = 200_000


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth - 1):
        value = [value]
    return value


def dismantle(value: list) -> None:
    while value:
        value = value.pop()


@pytest.fixture(autouse=True)
def raised_limit():
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize("text", ["[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP, '{"a":[' * DEEP + "]}" * DEEP])
def test_json_is_refused_before_it_is_parsed(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    for read in (lambda: parse_json(text), lambda: parse_json(text.encode()), lambda: read_json(path)):
        with pytest.raises(TooDeepError):
            read()


def test_the_depth_is_that_of_brackets_outside_texts():
    for value in (nested(MOST_DEPTH), {"a": "[" * DEEP}, {"a": '\\"[{' * DEEP}, [[]] * DEEP, None, 1.5, "x"):
        check_depth(value)
        assert parse_json(json.dumps(value)) == value
    with pytest.raises(TooDeepError):
        parse_json(json.dumps(nested(MOST_DEPTH + 1)))
    with pytest.raises(TooDeepError):
        check_depth(nested(MOST_DEPTH + 1))


def test_what_holds_itself_is_too_deep():
    value: list = []
    value += [value, value]
    with pytest.raises(TooDeepError):
        check_depth({"a": value})


def test_the_limit_is_as_it_was_afterwards():
    with safe_recursion():
        assert sys.getrecursionlimit() < 10_000
    assert sys.getrecursionlimit() == 10**6


def test_rows(tmp_path):
    deep = '{"instruction": "a", "output": ' + "[" * DEEP + "]" * DEEP + "}"
    good = '{"instruction": "a", "output": "b"}'
    for name, text in (("a.jsonl", f"{deep}\n{good}\n"), ("a.json", f"[{deep}, {good}]")):
        (tmp_path / name).write_text(text)
        first, second = open_records(tmp_path / name)
        assert isinstance(first, BadRow)
        assert (first.reason, second.answer) == ("broken_json", "b")


def test_rows_of_memory(tmp_path):
    value = nested(DEEP)
    row, _ = open_rows([{"instruction": "a", "output": "b", "more": more} for more in (value, 1)])
    assert isinstance(row, BadRow)
    with pytest.raises(InputError, match=r"row 0 .* nested too deeply"):
        write_jsonl(tmp_path / "x.jsonl", [{"more": value}])
    dismantle(value)


def test_programs(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"task_id": ' + "[" * DEEP)
    with pytest.raises(InputError, match=r"line 1: no JSON .it is nested too deeply"):
        read_rows(path)


@pytest.mark.parametrize(
    "statement",
    [
        *(before * DEEP + "1" for before in ("(", "-", "not ", "lambda: ", "1 if a else ")),
        *("a" + after * DEEP for after in (".b", "[0]", "()", "+1")),
    ],
)
def test_python(tmp_path, statement):
    program = "def f(x):\n    return 1"
    assert sanitize(f"x = {statement}\n{program}", "f") == program
    (tmp_path / "deep.py").write_text(f"x = {statement}\n")
    (tmp_path / "fine.py").write_text(
        'def first(values):\n    """Return the first of some values, or None."""\n'
        "    for value in values:\n        return value\n    return None\n"
    )
    assert write_harvest(str(tmp_path), tmp_path / "rows.jsonl").kept == 1
    with pytest.raises(InputError, match=r"is no Python|cannot be kept from the program"):
        run_program(program, f"assert f(1) == {statement}", unsafe=True)


@pytest.mark.parametrize("text", ["a: " + "[" * 2000, "a: " + "{b: " * DEEP])
def test_yaml(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="nested too deeply"):
        read_yaml(path)
    assert read_value(text) == text


def test_results_of_programs():
    line = b'{"value": ' + b"[" * 4000
    assert not Judge(a_problem("f")).passes([1], line, b'{"value": [[1, 2, 3]]}', False)
