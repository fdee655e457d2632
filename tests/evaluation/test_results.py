"""Verdicts of real programs, what is kept of them, and the report."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from codeact.base.errors import InputError
from codeact.evaluation import judge as programs
from codeact.evaluation import results as evaluation
from codeact.evaluation.judge import GroundTruth, Verdict, judge_program
from codeact.evaluation.problems import load_problems
from codeact.evaluation.programs import Program, SampleLog, read_rows, read_samples, write_samples
from codeact.evaluation.results import evaluate, pass_at_k, results_path, write_results
from codeact.evaluation.sandbox.sandbox import Limits, Sandbox


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(Limits(min_seconds=0.5, load_seconds=5.0, total_seconds=5.0, memory_mb=512))
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CODEACT_CACHE", str(tmp_path / "cache"))


def row(number: int, body: str, base: list, plus: list | None) -> dict:
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def f{number}(x):\n",
        "entry_point": f"f{number}",
        "canonical_solution": f"    return {body}\n",
        "base_input": base,
        "atol": 0,
        **({} if plus is None else {"plus_input": plus}),
    }


@pytest.fixture
def problems(tmp_path: Path):
    rows = [
        row(0, "x + 1", [[1], [2]], [[10**20], [-5]]),
        row(1, "[x, str(x)]", [[1], [2.5]], [[None]]),
        row(2, "x / 3", [[1], [2]], []),
    ]
    path = tmp_path / "problems.jsonl"
    write_samples(path, rows)
    return load_problems("humaneval", path)


def samples(*solutions: str) -> list[Program]:
    return [Program(task_id="HumanEval/0", solution=text, place="") for text in solutions]


PROGRAMS = {
    "def f0(x): return x + 1": ("pass", "pass"),
    "def f0(x): return x + 1 if x > 0 else 0": ("pass", "wrong"),
    "def f0(x): return x + 1.0": ("pass", "wrong"),  # 1e20 is not 10**20 + 1
    "def f0(x): return x": ("wrong", "wrong"),
    "def f0(x): return [][x]": ("exception", "exception"),
    "def f0(x: List[int]): return x + 1": ("exception", "exception"),  # the import is the program's business
    "def f0(x)": ("syntax", "syntax"),
    "def g(x): return x + 1": ("exception", "exception"),
    "def f0(x):\n while x: pass": ("time", "time"),
    "def f0(x): return x + 1 if x < 9 else [0] * 10**9": ("pass", "memory"),
    "import os\ndef f0(x): os._exit(3)": ("crash", "crash"),
}


def test_the_kinds_of_verdicts(problems, sandbox: Sandbox) -> None:
    tests = GroundTruth(problems, sandbox).tests(problems.problems[0])
    assert {text: (v.base, v.plus) for text in PROGRAMS for v in [judge_program(text, tests, sandbox)]} == PROGRAMS


def test_canonical_solutions_pass_and_missing_tasks_fail(problems, sandbox: Sandbox, tmp_path: Path) -> None:
    found = [Program(task_id=p.task_id, solution=p.reference, place="") for p in problems.problems]
    assert evaluate(problems, found, sandbox, tmp_path / "a.jsonl").pass_at("plus") == {1: 1.0}
    report = evaluate(problems, found[1:], sandbox, tmp_path / "b.jsonl")
    assert report.pass_at("base") == {1: pytest.approx(2 / 3)}
    assert report.missing == ["HumanEval/0"]
    assert "HumanEval/0" in report.summary()
    assert "| HumanEval/0 | 0 | 0 | 0 | missing |" in report.table()


def test_a_rerun_runs_nothing_and_new_limits_everything(
    problems, sandbox: Sandbox, tmp_path: Path, monkeypatch
) -> None:
    found = samples(*list(PROGRAMS)[:5], next(iter(PROGRAMS)))
    first = evaluate(problems, found, sandbox, tmp_path / "v.jsonl")
    ran: list[str] = []
    judge = evaluation.judge_program
    monkeypatch.setattr(evaluation, "judge_program", lambda text, *rest: ran.append(text) or judge(text, *rest))
    again = evaluate(problems, found, sandbox, tmp_path / "v.jsonl")
    assert not ran
    assert again.samples == first.samples
    assert (first.reused, again.reused) == (1, 6)  # the same program twice is run once
    other = Sandbox(Limits(min_seconds=0.6, load_seconds=5.0, total_seconds=5.0, memory_mb=512))
    evaluate(problems, found, other, tmp_path / "v.jsonl")
    evaluate(problems, found[:1], sandbox, tmp_path / "v.jsonl", base_only=True)
    assert len(ran) == 6


def test_a_verdict_that_a_kill_cut_short_is_made_again(problems, sandbox: Sandbox, tmp_path: Path) -> None:
    found = samples("def f0(x): return x + 1", "def f0(x): return x")
    first = evaluate(problems, found, sandbox, tmp_path / "v.jsonl")
    text = (tmp_path / "v.jsonl").read_bytes()
    (tmp_path / "v.jsonl").write_bytes(text[:-20])
    again = evaluate(problems, found, sandbox, tmp_path / "v.jsonl")
    assert again.samples == first.samples
    assert again.reused == 1
    assert sorted((tmp_path / "v.jsonl").read_bytes().splitlines()) == sorted(text.splitlines())


def test_a_time_out_counts_only_when_it_comes_twice(problems, sandbox: Sandbox, tmp_path: Path, monkeypatch) -> None:
    late = Verdict(base="time", plus="time", test=0)
    answers = {"slow once": [late, Verdict(base="pass", plus="pass")], "slow": [late, late]}
    monkeypatch.setattr(evaluation, "judge_program", lambda text, *rest: answers[text].pop(0))
    report = evaluate(problems, samples("slow once", "slow"), sandbox, tmp_path / "v.jsonl")
    assert [item.verdict.base for item in report.samples["HumanEval/0"]] == ["pass", "time"]
    assert answers == {"slow once": [], "slow": []}


def test_damaged_truth_is_computed_again(problems, sandbox: Sandbox, tmp_path: Path) -> None:
    first = GroundTruth(problems, sandbox).tests(problems.problems[1])
    (path,) = (tmp_path / "cache").rglob("HumanEval-1.json.gz")
    path.write_bytes(path.read_bytes()[:-9])
    again = GroundTruth(problems, sandbox).tests(problems.problems[1])
    assert (again.expected, again.inputs, again.floats) == (first.expected, first.inputs, first.floats)
    assert first.expected[1] == b'{"value":[2.5,"2.5"]}'


def test_after_a_float_later_results_may_be_near(tmp_path: Path, sandbox: Sandbox) -> None:
    write_samples(tmp_path / "p.jsonl", [row(0, "x", [[1.5], [10**9]], [[10**9]])])
    problem = load_problems("humaneval", tmp_path / "p.jsonl")
    tests = GroundTruth(problem, sandbox).tests(problem.problems[0])
    assert list(tests.floats) == [True, True, False]
    verdict = judge_program("def f0(x): return x + 1 if x > 2 else x", tests, sandbox)
    assert (verdict.base, verdict.plus, verdict.test) == ("pass", "wrong", 2)


def test_results_too_long_for_a_line_are_compared_by_digest(tmp_path: Path, sandbox: Sandbox, monkeypatch) -> None:
    write_samples(tmp_path / "p.jsonl", [row(0, "[x] * 200_000", [["a" * 100]], [])])
    problem = load_problems("humaneval", tmp_path / "p.jsonl")
    tests = GroundTruth(problem, sandbox).tests(problem.problems[0])
    assert tests.expected[0].startswith(b'{"value":{"digest":[20')
    assert judge_program("def f0(x): return [x for _ in range(200_000)]", tests, sandbox).plus == "pass"
    assert judge_program("def f0(x): return [x] * 200_001", tests, sandbox).base == "wrong"
    assert judge_program("def f0(x): return None", tests, sandbox).base == "wrong"


def test_a_broken_reference_is_named(tmp_path: Path, sandbox: Sandbox) -> None:
    write_samples(tmp_path / "p.jsonl", [row(7, "1 / x", [[0]], [])])
    problem = load_problems("humaneval", tmp_path / "p.jsonl")
    with pytest.raises(InputError, match=r"HumanEval/7: the canonical solution fails .*ZeroDivisionError"):
        evaluate(problem, [Program(task_id="HumanEval/7", solution="", place="")], sandbox, tmp_path / "v.jsonl")


def test_openais_tests_become_inputs(human_eval_path: Path, sandbox: Sandbox) -> None:
    """Their test programs are run on the reference only; a program under test never meets them."""
    problems = load_problems("humaneval", human_eval_path)
    truth = GroundTruth(problems, sandbox)
    for number in (0, 2, 32, 38):
        problem = problems.by_id()[f"HumanEval/{number}"]
        tests = truth.tests(problem)
        assert tests.base == len(tests.inputs) == len(tests.expected) > 2
        assert judge_program(problem.reference, tests, sandbox) == Verdict(base="pass", plus=None)
        wrong = problem.prompt + "    return None\n"
        assert judge_program(wrong, tests, sandbox).base == "wrong"


def test_some_canonical_solutions_of_both_sets(shared_data: Path, sandbox: Sandbox, monkeypatch) -> None:
    """All of them are run by benchmarks/evaluation.py."""
    chosen = {"humaneval": (1, 32, 53, 87, 161), "mbpp": (2, 115, 124, 252, 581, 737, 558, 164)}
    for dataset, name in (("humaneval", "HumanEvalPlus"), ("mbpp", "MbppPlus")):
        problems = load_problems(dataset, shared_data / f"{name}.jsonl.gz")
        truth = GroundTruth(problems, sandbox)
        for problem in problems.problems:
            if int(problem.task_id.split("/")[1]) in chosen[dataset]:
                verdict = judge_program(problem.reference, truth.tests(problem), sandbox)
                assert verdict == Verdict(base="pass", plus="pass"), problem.task_id


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 5), (6, 1, 6), (10, 3, 4)])
def test_pass_at_k_counts_the_draws_with_a_pass(n: int, c: int, k: int) -> None:
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_only_where_every_task_has_so_many(problems, sandbox: Sandbox, tmp_path: Path) -> None:
    good, bad = "def f0(x): return x + 1", "def f0(x): return x"
    report = evaluate(problems, samples(*[good] * 5, *[bad] * 5), sandbox, tmp_path / "v.jsonl")
    assert report.pass_at("base") == {1: pytest.approx(0.5 / 3), 10: pytest.approx(1 / 3)}


def test_the_report_is_written_beside_the_samples(problems, sandbox: Sandbox, tmp_path: Path) -> None:
    report = evaluate(problems, samples(*list(PROGRAMS)[:4]), sandbox, results_path(tmp_path / "s.jsonl"))
    target, page = write_results(report, tmp_path / "s.jsonl")
    content = json.loads(target.read_text())
    assert content["outcomes"] == {"pass": 1, "wrong": 3}
    assert content["missing"] == ["HumanEval/1", "HumanEval/2"]
    assert content["pass_at"]["base"]["pass@1"] == pytest.approx(3 / 4 / 3)
    assert "| HumanEval/0 | 4 | 3 | 1 | wrong, test 3 |" in page.read_text()


def test_every_form_of_samples_is_read(problems, tmp_path: Path) -> None:
    by_id = problems.by_id()
    write_samples(
        tmp_path / "s.jsonl",
        [
            {"task_id": "HumanEval/0", "solution": "a"},
            {"task_id": "HumanEval/0", "completion": "    return 1"},
            {"task_id": "HumanEval/1", "solution": "b", "_identifier": "of evalplus"},
            {"task_id": "HumanEval/99", "solution": "of another set"},
        ],
    )
    found = read_samples(tmp_path / "s.jsonl", by_id)
    assert [sample.solution for sample in found] == ["a", "def f0(x):\n    return 1", "b"]
    folder = tmp_path / "folder"
    for number in (0, 1, 10):
        (folder / "HumanEval_0").mkdir(parents=True, exist_ok=True)
        (folder / "HumanEval_0" / f"{number}.py").write_text(str(number))
    assert [sample.solution for sample in read_samples(folder, by_id)] == ["0", "1", "10"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: no JSON"),
        ("[]", "line 1: no JSON object with a task_id"),
        ('{"task_id": 3}', "line 1: no JSON object with a task_id"),
        ('{"task_id": "HumanEval/0", "solution": 3}', "neither a text solution"),
    ],
)
def test_bad_samples_are_named(text: str, message: str, problems, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_samples(tmp_path / "s.jsonl", problems.by_id())


def test_a_log_keeps_whole_lines_only(tmp_path: Path) -> None:
    with SampleLog(tmp_path / "l.jsonl") as log:
        log.append({"a": 1})
        log.append({"a": "é"})
    with (tmp_path / "l.jsonl").open("ab") as file:
        file.write(b'{"a": 3')
    with SampleLog(tmp_path / "l.jsonl") as log:
        assert log.rows == [{"a": 1}, {"a": "é"}]
        log.append({"a": 4})
    assert [row["a"] for row in map(json.loads, (tmp_path / "l.jsonl").read_text().splitlines())] == [1, "é", 4]
    (tmp_path / "l.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="line 1: no JSON object"):
        SampleLog(tmp_path / "l.jsonl")


def test_the_format_of_verdicts_is_part_of_their_key(problems, sandbox: Sandbox, tmp_path: Path, monkeypatch) -> None:
    found = samples("def f0(x): return x + 1")
    evaluate(problems, found, sandbox, tmp_path / "v.jsonl")
    monkeypatch.setattr(evaluation, "VERDICT_FORMAT", programs.VERDICT_FORMAT + 1)
    assert evaluate(problems, found, sandbox, tmp_path / "v.jsonl").reused == 0
    assert read_rows(tmp_path / "v.jsonl")[0]["task_id"] == "HumanEval/0"
