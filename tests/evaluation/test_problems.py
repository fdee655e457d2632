"""Where problems come from, and that no way of not having them is a hang or a traceback."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from codeact.base.errors import InputError
from codeact.evaluation import problems as eval_data
from codeact.evaluation.problems import DATASETS, load_problems

ROW = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "base_input": [[1], [[1, 2]]],
    "plus_input": [[None]],
    "atol": 0,
}


def write(path: Path, *rows: dict) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("CODEACT_EVAL_DATA", raising=False)


@pytest.mark.parametrize("name", ["HumanEvalPlus.jsonl", "HumanEvalPlus.jsonl.gz"])
def test_a_file_and_a_folder(name: str, tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / name, ROW, {**ROW, "task_id": "HumanEval/1"})
    given = load_problems("humaneval", path)
    monkeypatch.setenv("CODEACT_EVAL_DATA", str(tmp_path))
    found = load_problems("humaneval")
    assert given == found
    assert given.plus
    assert given.problems[0].base_input == ((1,), ([1, 2],))
    assert len(load_problems("humaneval", path, 1).problems) == 1


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    plain, packed = write(tmp_path / "a.jsonl", ROW), write(tmp_path / "a.jsonl.gz", ROW)
    other = write(tmp_path / "b.jsonl", {**ROW, "atol": 1})
    prints = [load_problems("humaneval", path).fingerprint for path in (plain, packed, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no task"),
        (b"{", "line 1: no task of humaneval"),
        (b"\xff\xff", "cannot read"),
        (b"\x1f\x8b\x00", "cannot read"),
        (json.dumps({**ROW, "task_id": "Mbpp/2"}).encode(), "another data set"),
        (json.dumps({k: v for k, v in ROW.items() if k != "base_input"}).encode(), "base_input"),
        (b"[1]", "line 1"),
    ],
)
def test_bad_files_are_one_line_that_says_what_to_do(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_problems("humaneval", tmp_path / "a")
    assert "CODEACT_EVAL_DATA" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_an_empty_folder(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match=r"cannot read .*HumanEvalPlus.jsonl.gz into a folder"):
        load_problems("humaneval", tmp_path / "none")
    monkeypatch.setenv("CODEACT_EVAL_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"holds no MbppPlus.jsonl.gz; put it there"):
        load_problems("mbpp")
    with pytest.raises(InputError, match="choose one of: humaneval, mbpp"):
        load_problems("human")


@pytest.fixture
def release(tmp_path: Path, monkeypatch):
    """A local server in the place of evalplus' releases: it answers what a test says; (answers, requests)."""
    answers: dict[str, bytes | int | None] = {}
    requests: list[str] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            answer = answers["body"]
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            if answer is None:
                over.wait(30)
            elif isinstance(answer, bytes):
                self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/v0.1.10/HumanEvalPlus.jsonl.gz"
        digest = hashlib.sha256((json.dumps(ROW) + "\n").encode()).hexdigest()
        monkeypatch.setattr(eval_data, "_RELEASES", {"humaneval": (url, digest)})
        monkeypatch.setenv("CODEACT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "*")
        yield answers, requests
        over.set()
        server.shutdown()
        thread.join()


def test_problems_are_downloaded_once(release, tmp_path: Path) -> None:
    answers, requests = release
    answers["body"] = gzip.compress((json.dumps(ROW) + "\n").encode())
    problems = load_problems("humaneval")
    assert [problem.task_id for problem in problems.problems] == ["HumanEval/0"]
    assert problems.source == str(tmp_path / "cache" / "problems" / "v0.1.10-HumanEvalPlus.jsonl.gz")
    assert load_problems("humaneval") == problems
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (gzip.compress(b'{"task_id": "HumanEval/0"}', mtime=0), r"has sha256 .*, expected .*: refused"),
        (b"<html>Sign in to this network</html>", "cannot download the problems of humaneval"),
        (gzip.compress(json.dumps(ROW).encode() + b"\n", mtime=0)[:-9], "cannot download the problems of humaneval"),
        (b"", "refused|cannot download"),
        (404, "HTTP Error 404"),
        (503, "HTTP Error 503"),
        (None, "timed out"),
    ],
)
def test_a_bad_download_is_one_line_and_leaves_nothing(release, tmp_path: Path, monkeypatch, body, message) -> None:
    release[0]["body"] = body
    monkeypatch.setattr(eval_data, "_DOWNLOAD_SECONDS", 0.5)
    with pytest.raises(InputError, match=message) as error:
        load_problems("humaneval")
    assert "put evalplus' HumanEvalPlus.jsonl.gz into a folder" in str(error.value)
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_without_a_network_it_is_one_line(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CODEACT_CACHE", str(tmp_path))
    monkeypatch.setattr(eval_data, "_RELEASES", {"mbpp": ("http://127.0.0.1:9/v0.2.0/MbppPlus.jsonl.gz", "")})
    with pytest.raises(InputError, match=r"cannot download the problems of mbpp .*; put evalplus' MbppPlus.jsonl.gz"):
        load_problems("mbpp")


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_pinned_text_is_that_of_the_shared_file(shared_data: Path, dataset: str) -> None:
    url, digest = eval_data._RELEASES[dataset]
    assert load_problems(dataset, shared_data / url.rpartition("/")[2]).fingerprint == digest


def test_openais_file_has_a_test_program_instead_of_inputs(human_eval_path: Path) -> None:
    problems = load_problems("humaneval", human_eval_path)
    assert len(problems.problems) == 164
    assert not problems.plus
    assert all(problem.test and problem.base_input is None for problem in problems.problems)
    assert problems.by_id()["HumanEval/32"].tolerance == 1e-4


def test_the_plus_data(shared_data: Path) -> None:
    human = load_problems("humaneval", shared_data / "HumanEvalPlus.jsonl.gz")
    mbpp = load_problems("mbpp", shared_data / "MbppPlus.jsonl.gz")
    assert (len(human.problems), len(mbpp.problems)) == (164, 378)
    assert human.plus
    assert mbpp.plus
    tasks = mbpp.by_id()
    assert tasks["Mbpp/2"].base_input[0] == ((3, 4, 5, 6), (5, 7, 4, 10))
    assert tasks["Mbpp/252"].base_input[0] == (1 + 0j,)
    assert tasks["Mbpp/124"].base_input[0] == (0.0, 1j)


def test_arguments_of_mbpp_are_those_of_evalplus(shared_data: Path) -> None:
    folder = Path(os.environ.get("CODEACT_EVALPLUS") or Path(__file__).parents[2] / "build" / "evalplus")
    if not (folder / "evalplus").is_dir():
        pytest.skip("evalplus is not in build/evalplus; python -m benchmarks.evaluation installs it there")
    import subprocess

    script = (
        "import json, sys\nfrom evalplus.data.mbpp import mbpp_deserialize_inputs as d\n"
        "for row in map(json.loads, sys.stdin):\n"
        " print(json.dumps([row['task_id'], *(repr([tuple(i) for i in d(row['task_id'], row[k])]) for k in "
        "('base_input', 'plus_input'))]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=gzip.decompress((shared_data / "MbppPlus.jsonl.gz").read_bytes()).decode(),
        env={**os.environ, "PYTHONPATH": str(folder), "MBPP_OVERRIDE_PATH": os.devnull},
        capture_output=True,
        text=True,
        check=True,
    )
    tasks = load_problems("mbpp", shared_data / "MbppPlus.jsonl.gz").by_id()
    for task_id, base, plus in map(json.loads, result.stdout.splitlines()):
        assert repr(list(tasks[task_id].base_input)) == base, task_id
        assert repr(list(tasks[task_id].plus_input)) == plus, task_id
