"""Generation through a server that speaks OpenAI's HTTP API, over real connections on this machine."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from codeact.base.errors import InputError
from codeact.evaluation import server as servers
from codeact.evaluation.generate import generate
from codeact.evaluation.problems import load_problems
from codeact.evaluation.programs import read_rows
from codeact.evaluation.server import Server, ServerGenerator
from codeact.evaluation.settings import GenerationSettings
from codeact.evaluation.stage import Generate
from tests.helpers import forked

Answer = Callable[[str, dict], tuple[int, object, dict]]


class Serving:
    """A server of OpenAI's schema; ``answer`` may be replaced, ``seen`` holds (path, headers, body)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict, dict]] = []
        self.names = ["tiny"]
        self.answer: Answer = self.completes
        self.before: Callable[[], object] = lambda: None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_) -> None:
                pass

            def do_GET(self) -> None:
                data = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in outer.names]
                self.reply(200, {"object": "list", "data": data}, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, dict(self.headers), body))
                outer.before()
                self.reply(*outer.answer(self.path, body))

            def reply(self, code: int, value: object, headers: dict) -> None:
                if code == 0:  # no answer at all
                    self.connection.close()
                    return
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(code)
                for name, text in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(content)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_) -> None:
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    @staticmethod
    def completes(path: str, body: dict) -> tuple[int, object, dict]:
        usage = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
        if path == "/v1/chat/completions":
            (message,) = body["messages"]
            name = message["content"].split("def ")[1].split("(")[0]
            text = f"Here it is:\n```python\ndef {name}(*args):\n    return None\n```\nDone."
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            return 200, {"object": "chat.completion", "choices": [choice], "usage": usage}, {}
        assert path == "/v1/completions"
        text = f"    return {len(body['prompt'])}\n\ndef more():\n    pass\nprint(1)"
        choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": None}
        return 200, {"object": "text_completion", "choices": [choice], "usage": usage}, {}


@pytest.fixture
def serving(monkeypatch) -> Iterator[Serving]:
    monkeypatch.setattr(servers, "_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody there: this machine is asked without
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    serving = Serving()
    thread = threading.Thread(target=serving.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield serving
    serving.http.shutdown()
    serving.http.server_close()


@pytest.fixture
def problems(human_eval_path: Path):
    return load_problems("humaneval", human_eval_path, 6)


def run(serving: Serving, problems, path: Path, parallel: int = 3, **settings) -> list[dict]:
    chosen = GenerationSettings(server=serving.url, max_new_tokens=50, **settings)
    generate(problems, ServerGenerator(Server(serving.url), None, parallel), path, chosen)
    return sorted(read_rows(path), key=lambda row: (row["task_id"], row["sample"]))


def test_a_chat_is_asked_as_its_template_is_the_servers(serving, problems, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another service's")
    monkeypatch.delenv("CODEACT_API_KEY", raising=False)
    rows = run(serving, problems, tmp_path / "s.jsonl")
    asked = {row["task_id"]: row for row in rows}
    first = problems.problems[0]
    assert len(rows) == len(asked) == 6
    assert asked[first.task_id] == {
        "task_id": first.task_id,
        "sample": 0,
        "solution": f"Here it is:\n```python\ndef {first.entry_point}(*args):\n    return None\n```\nDone.",
        "entry_point": first.entry_point,
        "finish": "end",
        "tokens": 7,
    }
    question = (
        f"Please complete the following Python function in a markdown style code block:\n```python\n"
        f"{first.prompt.strip()}\n```"
    )
    messages = [{"role": "user", "content": question}]
    body = {"model": "tiny", "max_tokens": 50, "temperature": 0.0, "top_p": 1.0, "messages": messages}
    assert body in [body for _, _, body in serving.seen]
    assert not any("authorization" in map(str.lower, headers) for _, headers, _ in serving.seen)


def test_a_base_model_goes_on_and_is_cut_here(serving, problems, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CODEACT_API_KEY", "secret\n")
    options = {"instruct": False, "temperature": 0.5, "samples": 2}
    rows = run(serving, problems, tmp_path / "s.jsonl", **options)
    prompt = problems.problems[0].prompt.strip() + "\n"
    assert [row["solution"] for row in rows[:2]] == [f"{prompt}    return {len(prompt)}\n"] * 2
    assert {row["finish"] for row in rows} == {"stop"}
    bodies = [body for _, _, body in serving.seen]
    assert all(len(body["stop"]) == 4 for body in bodies)
    assert len({body["seed"] for body in bodies}) == len(bodies) == 12
    assert {headers["Authorization"] for _, headers, _ in serving.seen} == {"Bearer secret"}
    again = Serving.completes
    serving.seen.clear()
    run(serving, problems, tmp_path / "again.jsonl", **options)
    assert serving.answer == again
    assert sorted(body["seed"] for _, _, body in serving.seen) == sorted(body["seed"] for body in bodies)


def test_so_many_requests_are_under_way_at_a_time(serving, problems, tmp_path) -> None:
    all_there = threading.Barrier(3)
    serving.before = lambda: all_there.wait(30)  # breaks where fewer come
    assert len(run(serving, problems, tmp_path / "s.jsonl", parallel=3)) == 6


def test_a_run_that_stopped_asks_for_the_rest_alone(serving, problems, tmp_path) -> None:
    path = tmp_path / "s.jsonl"

    def refuses(path: str, body: dict):
        return Serving.completes(path, body) if len(serving.seen) < 3 else (400, {"error": "too long\x1b[2J"}, {})

    serving.answer = refuses
    with pytest.raises(InputError, match=r"answers 400 .*too long.*mend what it names") as refused:
        run(serving, problems, path, parallel=1)
    assert "\x1b" not in str(refused.value)
    kept = path.read_bytes()
    assert kept.count(b"\n") == 2
    serving.seen.clear()
    serving.answer = Serving.completes
    assert len(run(serving, problems, path)) == 6
    assert len(serving.seen) == 4
    assert path.read_bytes().startswith(kept)
    run(serving, problems, path)
    assert len(serving.seen) == 4
    serving.names = ["another"]
    with pytest.raises(InputError, match=r"other settings \(model\)"):
        run(serving, problems, path)


@pytest.mark.parametrize(
    "failure",
    [(503, {}, {}), (429, {}, {"Retry-After": "0"}), (0, {}, {}), (200, b"{", {"Content-Length": "50"})],
    ids=["busy", "too many", "cut off", "half an answer"],
)
def test_what_passes_is_tried_again(failure, serving, problems, tmp_path) -> None:
    def at_first(path: str, body: dict):
        return failure if len(serving.seen) <= 2 else Serving.completes(path, body)

    serving.answer = at_first
    assert len(run(serving, problems, tmp_path / "s.jsonl", parallel=1)) == 6
    assert len(serving.seen) == 8


@pytest.mark.parametrize(
    ("answer", "tries", "message"),
    [
        ((503, {"error": "full"}, {}), 4, "answers 503 .*full.*goes on where it was"),
        ((0, {}, {}), 4, "no answer from .*goes on where it was"),
        ((401, {"error": "no key"}, {}), 1, "answers 401 .*set CODEACT_API_KEY to the server's key"),
        ((307, {}, {"Location": "http://127.0.0.1:9/v1"}), 1, "points to http://127.0.0.1:9/v1: give that as --server"),
        ((200, {"choices": []}, {}), 1, "no answer of OpenAI's form"),
        ((200, b"<html>", {}), 1, "answered no JSON"),
    ],
)
def test_what_does_not_pass_is_named(answer, tries, message, serving, problems, tmp_path) -> None:
    serving.answer = lambda path, body: answer
    with pytest.raises(InputError, match=message.replace("--", "")):
        run(serving, problems, tmp_path / "s.jsonl", parallel=1)
    assert len(serving.seen) == tries


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a/v1", "http://", "http://a:x/v1", "http://[1/v1", "a?b"])
def test_no_address(url: str) -> None:
    with pytest.raises(InputError, match="no address of a server"):
        Server(url)


def test_names_and_mistakes_at_the_command_line(codeact, serving, human_eval_path, tmp_path, monkeypatch) -> None:
    options = ("--dataset", "humaneval", "--data", human_eval_path, "--limit", 2, "--output", tmp_path / "s.jsonl")
    asked = ("generate", *options, "--server", serving.url)
    code, out, err = codeact(*asked, "--parallel", 2)
    assert code == 0, err
    assert "2 samples, 14 tokens" in out
    assert f"asking tiny at {serving.url}" in err
    assert "all samples were in" in codeact(*asked, "--model", "tiny", "--server", serving.url.removesuffix("/v1"))[1]
    code, out, err = codeact("sanitize", tmp_path / "s.jsonl")
    assert code == 0, err
    programs = [row["solution"].split("(")[0] for row in read_rows(tmp_path / "s-sanitized.jsonl")]
    assert sorted(programs) == ["def has_close_elements", "def separate_paren_groups"]
    for more, message in (
        (("--adapter", "a"), "leave --adapter out"),
        (("--template", "deepseek"), "--template is decided by the server"),
        (("--batch-size", 3), "--batch-size is decided by the server"),
        (("--server", "http://u:p@h/v1"), "leave it out, and set CODEACT_API_KEY"),
        (("--server", "http://127.0.0.1:9/v1"), "no server answers at"),
    ):
        code, _, err = codeact(*asked, *more)
        assert (code, err.count("error")) == (2, 1)
        assert message in err
    serving.names = ["a", "b"]
    assert "lists a, b; say which by --model" in codeact(*asked)[2]
    assert "lists a, b, and is asked for c" in codeact(*asked, "--model", "c", "--overwrite")[2]
    assert "--model is needed" in codeact("generate", *options)[2]
    monkeypatch.setenv("CODEACT_API_KEY", "a\nsecret")
    code, _, err = codeact(*asked)
    assert code == 2
    assert "secret" not in err


@pytest.fixture(scope="module")
def real_server(tiny_model_path) -> Iterator[str]:
    """``transformers serve``, as far as it is here, with a model of ours."""
    for module in ("transformers.cli.serve", "fastapi", "uvicorn", "openai"):
        pytest.importorskip(module, reason="transformers serve is not here (extra dev)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("serve", str(tiny_model_path), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu")
    code = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    process = forked.Popen([sys.executable, "-c", code, *words, "--dtype", "float32"], stderr=forked.PIPE)
    try:
        for _ in range(1200):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("instruct", [False, True])
def test_a_real_server(instruct, real_server, codeact, human_eval_path, tiny_model_path, tmp_path) -> None:
    """What a base model goes on with is to the letter what it writes here; a chat is the server's to put together."""
    asked = ("generate", "--dataset", "humaneval", "--data", human_eval_path, "--limit", 2, "--max-new-tokens", 24)
    asked += ("--model", tiny_model_path, *([] if instruct else ["--no-instruct"]))
    found = {}
    for name, more in (("server", ("--server", real_server)), ("here", ("--dtype", "float32"))):
        code, _, err = codeact(*asked, *more, "--output", tmp_path / f"{name}.jsonl")
        assert code == 0, err
        found[name] = {row["task_id"]: row for row in read_rows(tmp_path / f"{name}.jsonl")}
    assert found["server"].keys() == found["here"].keys() == {"HumanEval/0", "HumanEval/1"}
    assert all(row["tokens"] > 0 for row in found["server"].values())
    if not instruct:
        for task, row in found["server"].items():
            assert row["solution"] == found["here"][task]["solution"]


def test_a_run_asks_for_the_trained_model_by_its_name(serving, human_eval_path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CODEACT_EVAL_DATA", str(human_eval_path.parent))
    made = []
    for part, more in (("before", {}), ("after", {}), ("after", {"served": "tuned"})):
        settings = GenerationSettings(server=serving.url, tasks=("HumanEval/0",), **more)
        run = SimpleNamespace(
            output=tmp_path / str(len(made)), model="base", of=lambda _, settings=settings: settings,
            identity=lambda model: "sha", digest=lambda *stages: {},
        )  # fmt: skip
        stage = Generate(part)
        stage.check(run)
        stage.work(run)
        made.append((stage, run, settings))
    asked = [body["model"] for _, _, body in serving.seen]
    assert asked == ["base", str(tmp_path / "1" / "model"), "tuned"]
    stage, run, settings = made[-1]
    key = stage.inputs(run)
    assert key["served"] == "tuned"
    run.of = lambda _: settings.model_copy(update={"server": "http://elsewhere/v1", "parallel": 2})
    assert stage.inputs(run) == key
    run.of = lambda _: GenerationSettings(tasks=("HumanEval/0",))
    assert stage.inputs(run).keys() == key.keys() - {"served"}
