"""The YAML file of a run: what it may hold, and what is said about a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from codeact.base.errors import InputError
from codeact.run.flow import open_flow
from codeact.run.settings import shipped, shipped_configs

GOOD = """\
output: o
data: {source: s}
score:
  model: m
"""


@pytest.fixture
def complaint(tmp_path):
    """What is said about a file with this content."""

    def about(content: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(content)
        with pytest.raises(InputError) as caught:
            open_flow(path)
        text = str(caught.value)
        assert text.startswith(str(path)) or text.startswith(f"cannot read {path}")
        assert "\n" not in text
        return text.replace(str(path), "FILE")

    return about


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("sorce: {}\n", "FILE, line 5: sorce: unknown key; did you mean score?"),
        ("  max_lenght: 5\n", "FILE, line 5: score.max_lenght: unknown key; did you mean max_length?"),
        ("  max_length: long\n", "FILE, line 5: score.max_length: input should be a valid integer"),
        (
            "select:\n  clusters: 10\n  ratio: 2\n",
            "FILE, line 7: select.ratio: input should be less than or equal to 1",
        ),
        ("train: {}\ngenerate:\n  datset: mbpp\n", "FILE, line 7: generate.datset: unknown key; did you mean dataset?"),
        (
            "train: {}\ngenerate: {dataset: apps}\n",
            "FILE, line 6: generate.dataset: input should be 'humaneval', 'mbpp' or",
        ),
        (f"  max_length: {2**63}\n", "FILE, line 5: score.max_length: the number is too large"),
        ("select: {ratio: .nan}\n", "FILE, line 5: select.ratio: input should be a finite number"),
        ('  template: "a\\0"\n', "FILE, line 5: score.template: the text holds a zero byte"),
        ("forecast: {parameters: .inf}\n", "FILE, line 5: forecast.parameters: input should be a finite number"),
        ("embed: all-minilm\n", "FILE, line 5: embed: it holds keys of its own, such as model: ..., below it"),
        ("select: 0.4\n", "FILE, line 5: select: it holds keys of its own, such as ratio: ..., below it"),
        ("generate: {}\n", "FILE: generate needs a section train"),
        ("evaluate: {}\n", "FILE: evaluate needs a section generate"),
        ("score: {model: other}\n", "FILE, line 5: the key score is there twice"),
        ("  model: other\n", "FILE, line 5: the key model is there twice"),
    ],
)
def test_a_mistake_is_named_with_its_line(complaint, more, message):
    assert message in complaint(GOOD + more)


def test_a_missing_key_is_named_with_the_line_of_its_section(complaint):
    assert complaint("output: o\ndata: {source: s}\nscore: {}\n") == "FILE, line 3: score.model: field required"


def test_every_mistake_is_named(complaint):
    text = complaint(GOOD + "  max_length: 1\n  dtyp: auto\n")
    assert "line 5: score.max_length" in text
    assert "line 6: score.dtyp" in text


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "\x00", "? [a]\n: 1\n"])
def test_a_file_that_holds_no_settings(complaint, content):
    complaint(content)


def test_the_old_word_for_the_papers_protocol_is_taken_and_said_to_be_old(tmp_path, caplog):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "  protocol: seed\nselect: {protocol: seed}\n")
    settings = open_flow(path).settings
    assert (settings.score.protocol, settings.select.protocol) == ("paper", "paper")
    assert caplog.text.count("protocol seed is now called paper") == 2


def test_what_codeact_brings_is_found_by_name(tmp_path, monkeypatch):
    assert "demo" in shipped_configs()
    for name in shipped_configs():
        assert open_flow(name).model
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert shipped(Path("demo")).is_file(), "a folder of that name stands in nobody's way"
    (tmp_path / "mine").write_text("output: here\n")
    assert shipped(Path("mine")) == Path("mine")
    with pytest.raises(InputError, match="no such file: dmo; codeact brings demo"):
        open_flow("dmo")


def test_what_is_said_on_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "select: {ratio: 0.5, clusters: 3}\n")
    settings = open_flow(path, changes=["select.ratio=0.25", "output=x=y", "train.learning_rate=5e-5"]).settings
    assert (settings.select.ratio, settings.select.clusters, str(settings.output)) == (0.25, 3, "x=y")
    assert settings.train == {"learning_rate": "5e-5"}  # as YAML reads it, and as training takes it
    for change, message in {
        "select.ratio": "write section.key=value",
        "=3": "write section.key=value",
        "select.ratio=2": "select.ratio: input should be less than or equal to 1",
        "select.rato=1": "select.rato: unknown key; did you mean ratio?",
    }.items():
        with pytest.raises(InputError) as caught:
            open_flow(path, changes=[change])
        assert message in str(caught.value)
