"""A Jinja file in the place of a template's name: the same text, the same guards, and the content decides."""

from __future__ import annotations

import copy
import json

import pytest
from transformers import AutoTokenizer

from codeact.base.errors import InputError
from codeact.data.records import Record, write_jsonl
from codeact.evaluation.problems import load_problems
from codeact.evaluation.prompts import PromptWriter
from codeact.evaluation.settings import GenerationSettings
from codeact.padding.stage import Padding
from codeact.scoring.stage import ScoreSettings
from codeact.text import chat
from codeact.text.conversations import encode_conversations
from codeact.text.template_files import template_text
from codeact.text.templates import ConversationTemplate, PromptBuilder
from codeact.training.stage import Train
from tests.conftest import make_records

OWN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] | upper }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>ASSISTANT\n{% endif %}"
)
TALK = [("user", "Q"), ("assistant", "A")]


@pytest.fixture
def file(tmp_path):
    """A function that writes a template and returns its path."""

    def write(text: str = OWN, name: str = "own.jinja") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_it_is_what_a_tokenizer_with_that_template_writes(file, tokenizer, human_eval_path):
    theirs = copy.deepcopy(tokenizer)
    theirs.chat_template = OWN
    path, records = file(), make_records(20)
    given, known = ConversationTemplate(tokenizer, path), ConversationTemplate(theirs, "chat")
    assert given.render([TALK]) == known.render([TALK])
    assert given.render([TALK])[0].text == "<|im_start|>USER\nQ<|im_end|>\n<|im_start|>ASSISTANT\nA<|im_end|>\n"
    for one, other in zip(
        encode_conversations(records, tokenizer, path), encode_conversations(records, theirs), strict=True
    ):
        assert (one.input_ids.tolist(), one.labels.tolist()) == (other.input_ids.tolist(), other.labels.tolist())
    prompts = PromptBuilder(tokenizer, path)
    record = Record(id="0", row=0, question="Q", answer="A")
    assert prompts.render(record) == PromptBuilder(theirs, "chat").render(record)
    assert (
        prompts.fingerprint == PromptBuilder(theirs, "chat").fingerprint != PromptBuilder(tokenizer, "chat").fingerprint
    )
    problem = load_problems("humaneval", human_eval_path).problems[0]
    writer = PromptWriter(tokenizer, path)
    assert writer.write(problem).ids == PromptWriter(theirs, "chat").write(problem).ids
    assert writer.end_ids() == PromptWriter(theirs, "chat").end_ids()


def test_scoring_takes_a_file_of_plain_text_too(file, tokenizer):
    path = file("Q: {question}\nA: ", "plain.txt")
    assert PromptBuilder(tokenizer, path).render(Record(id="0", row=0, question="x", answer="y")) == "Q: x\nA: "
    with pytest.raises(InputError, match=r"model type .* is unknown"):
        ConversationTemplate(tokenizer, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + OWN,
            "does not end within 0.3",
        ),
        ("{{ messages | length ** 9 }}", r"computes powers \(\*\*\)"),
        ("{% for m in messages %}", "cannot be trained on: .*Unexpected end of template"),
        ("{{ messages.__class__.__mro__ }}", "cannot be trained on: .*unsafe"),
        ("{% set messages = ''.__class__.__base__.__subclasses__() %}" + OWN, "cannot be trained on: .*unsafe"),
        ("{% include '/etc/passwd' %}" + OWN, "cannot be trained on"),
        ("no template", "is no chat template: it has to loop over messages"),
    ],
)
def test_a_file_that_cannot_be_used(file, tokenizer, text, message, monkeypatch):
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.3)
    with pytest.raises(InputError, match=message):
        encode_conversations(make_records(2), tokenizer, file(text))


def test_no_file(tmp_path, tokenizer):
    for name in ("nowhere.jinja", str(tmp_path), str(tmp_path / "binary.jinja")):
        (tmp_path / "binary.jinja").write_bytes(b"\xff")
        with pytest.raises(InputError, match=r"cannot read the template .*; give a file with a Jinja template"):
            ConversationTemplate(tokenizer, name)
    assert template_text("chat") == "chat"
    assert template_text("llama-3") == "llama-3"  # no file's name: an unknown template, later


def test_settings_hold_the_content(file, tmp_path):
    path = file()
    assert ScoreSettings(model="m", template=path).template == OWN
    assert GenerationSettings(template=path).chat == OWN

    class Run:
        model, output = "m", tmp_path

        def digest(self, *_):
            return {}

        def identity(self, name):
            return name

        def section(self, _):
            return {"chat_template": path, "max_length": 64}

    before = [stage.inputs(Run()) for stage in (Train(), Padding())]
    file(OWN.replace("upper", "lower"))
    after = [stage.inputs(Run()) for stage in (Train(), Padding())]
    assert before[0]["flags"]["chat_template"] == before[1]["model_type"] == OWN
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_in_every_command(file, tmp_path, tiny_model_path, human_eval_path, codeact):
    path = file()
    rows = [{"instruction": record.question, "output": record.answer} for record in make_records(8)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    model = ("--model", tiny_model_path)
    score = ("score", tmp_path / "rows.jsonl", *model, "--output", tmp_path / "scores", "--max-length", 256)
    code, _, err = codeact(*score, "--chat_template", path)
    assert code == 0, err
    file(OWN + " ")
    code, _, err = codeact(*score, "--template", path)
    assert (code, "other settings" in err or "template" in err) == (2, True), err
    file()
    train = ("train", "--data_path", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "model", "--max_length", 128)
    more = ("--max_steps", 1, "--save_strategy", "no", "--bf16", "False", "--disable_tqdm", "True")
    code, _, err = codeact(*train, *more, "--model_name_or_path", tiny_model_path, "--chat-template", path)
    assert code == 0, err
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == OWN
    assert json.loads((tmp_path / "model/training.json").read_text())["settings"]["model_type"] == OWN
    code, _, err = codeact(*train, *more, "--model_name_or_path", tiny_model_path)
    assert code == 2
    assert "holds a run with another model_type (" in err
    assert len(err) < 400
    stats = ("pack-stats", tmp_path / "rows.jsonl", "--tokenizer", tiny_model_path, "--max-length", 256)
    assert codeact(*stats, "--chat_template", path)[0] == 0
    generate = (
        "generate",
        *model,
        "--limit",
        1,
        "--max-new-tokens",
        2,
        "--output",
        tmp_path / "samples.jsonl",
        "--data",
        human_eval_path,
    )
    code, _, err = codeact(*generate, "--chat_template", path)
    assert code == 0, err
    code, _, err = codeact(*generate, "--chat_template", tmp_path / "Nowhere.jinja")
    assert code == 2
    assert "Nowhere.jinja: No such file or directory; give a file with a Jinja template" in err
