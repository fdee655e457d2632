"""The model card of a training, and what reaches the hub: a stand-in on this machine, which takes what it is sent."""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import ModelCard

from codeact.base.cards import write_card
from codeact.training.flags import parse_mapping
from tests.helpers import forked

FEW = ("--max_length", 256, "--max_steps", 2, "--disable_tqdm", "True", "--save_strategy", "no", "--use_cpu", "True")


def settings_of(card):
    return yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])


def test_it_holds_the_figures_and_the_flags_that_train_the_same_again(train, selected, tiny_model_path, tmp_path):
    write_card(selected.parent, {"source_datasets": ["org/rows"]}, ["# Rows"])
    options = ("--eval_ratio", 0.2, "--eval_on_start", "True", "--warmup_steps", 0.5, "--hub_token", "hf_secret")
    code, _, err = train("--data_path", selected, "--output_dir", tmp_path / "out", *FEW, *options)
    assert code == 0, err
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "datasets": ["org/rows"],
        "pipeline_tag": "text-generation",
        "tags": ["codeact", "instruction-tuning"],
        "metrics": ["loss"],
        "library_name": "transformers",
    }
    result = json.loads((tmp_path / "out" / "training.json").read_text())
    for name in ("held_out_loss_before", "held_out_loss_after", "train_loss"):
        assert f"{result['result'][name]:.4f}" in text
    assert f"| {result['trained_on_tokens']:,} |" in text
    assert "hf_secret" not in text
    assert str(tmp_path) not in text
    assert str(selected.parent) not in text

    flags = settings_of(card)
    assert flags["model_name_or_path"] == tiny_model_path.name
    places = {"model_name_or_path": str(tiny_model_path), "data_path": str(selected), "output_dir": str(tmp_path)}
    again = parse_mapping({**flags, **places}, "card")
    assert (again.trainer.max_steps, again.trainer.warmup_steps) == (2, 0.5)
    assert (again.packs.max_length, again.data.eval_ratio) == (256, 0.2)
    said = {"model_name_or_path", "data_path", "max_length", "eval_ratio", "max_steps", "warmup_steps"}
    assert set(flags) == {*said, "per_device_train_batch_size"}


@pytest.mark.parametrize("own", [None, "---\nlicense: mit\n---\n# Mine\n"])
def test_adapters_have_one_and_one_of_the_users_stays(train, selected, tmp_path, own):
    if own:
        (tmp_path / "README.md").write_text(own)
    options = ("--lora", "True", "--merge", "True")
    code, _, err = train("--data_path", selected, "--output_dir", tmp_path, *FEW, *options)
    assert code == 0, err
    if own:
        assert (tmp_path / "README.md").read_text() == own
    else:
        card = ModelCard.load(tmp_path / "README.md")
        assert (card.data.library_name, "lora" in card.data.tags) == ("peft", True)
        assert settings_of(card)["lora"] is True
    assert ModelCard.load(tmp_path / "merged" / "README.md").data.library_name == "transformers"


class _Hub(BaseHTTPRequestHandler):
    """Of the hub's interface what an upload of small files asks for; every file is taken as a plain one."""

    def do_POST(self):
        length = int(self.headers["Content-Length"] or 0)
        body = self.rfile.read(length) if length else self._chunks()
        server = self.server
        if "Authorization" not in self.headers:
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            server.created.append((json.loads(body), self.headers["Authorization"]))
            self._answer({"url": f"http://{self.headers['Host']}/someone/model", "name": "someone/model"})
        elif self.path == "/api/validate-yaml":  # of a card, before it is sent
            server.checked.append(json.loads(body))
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            server.commits += 1
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"commitOid": "0" * 40, "commitUrl": f"http://{self.headers['Host']}/someone/model/commit/0"}
            self._answer(commit)
        else:
            self._answer({"error": "not here"}, 404)

    def do_GET(self):
        known = self.path.startswith("/api/models/someone/model") and "Authorization" in self.headers
        self._answer({"id": "someone/model", "sha": "0" * 40, "siblings": []} if known else {}, 200 if known else 404)

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.created, server.checked, server.files, server.commits = [], [], {}, 0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def push(hub, selected, model, out, *more):
    """In a process of its own, which is told where the hub is: its library has read that as it was loaded."""
    command = ["train", "--model_name_or_path", model, "--data_path", selected]
    command += ["--output_dir", out, *FEW, "--push_to_hub", "True", "--hub_model_id", "someone/model", *more]
    place = {"ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    place |= {"HF_TOKEN_PATH": str(out.parent / "no token"), "HF_HUB_DISABLE_TELEMETRY": True}
    code = f"""
from huggingface_hub import constants
from codeact.cli import main
vars(constants).update({place!r})
main()
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    command = [sys.executable, "-c", code, *command]
    return forked.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_whole_folder_is_pushed_with_our_card(hub, selected, tiny_model_path, tmp_path):
    done = push(hub, selected, tiny_model_path, tmp_path / "out", "--hub_token", "hf_secret")
    assert done.returncode == 0, done.stderr
    assert [token for _, token in hub.created] == ["Bearer hf_secret"]
    for name in ("README.md", "training.json", "cost.json", "model.safetensors", "config.json"):
        assert hub.files[name] == (tmp_path / "out" / name).read_bytes()
    assert b"codeact train" in hub.files["README.md"]
    assert hub.commits == 1
    assert {asked["content"].encode() for asked in hub.checked} == {hub.files["README.md"]}


def test_without_a_token_it_ends_before_anything_is_trained(hub, selected, tiny_model_path, tmp_path):
    done = push(hub, selected, tiny_model_path, tmp_path / "out")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("codeact: error: --push_to_hub True: ")
    assert "401" in line
    assert line.endswith("log in with: hf auth login; nothing was trained yet")
    assert not list((tmp_path / "out").glob("*.safetensors"))
