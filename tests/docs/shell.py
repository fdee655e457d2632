"""A shell for the blocks of the documentation, and how what it prints is compared with what the pages show."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from codeact.base.errors import InputError
from codeact.cli import main
from codeact.evaluation.sandbox.sandbox import Limits, Sandbox
from tests.docs.markdown_pages import Block, Command, commands

# What is written in the pages, and what stands there in a test.
MODEL, EMBEDDER = "~/.cache/codeact/smollm2-135m-instruct", "~/.cache/codeact/all-minilm-l6-v2"
FEWER = {"limit": 24, "rows": 24, "max-new-tokens": 8}
SMALLER = {"harvest stdlib": "harvest email"}
PROGRAMS = {"head", "cat", "ls"}  # run as they are


class Shell:
    """Runs the blocks of one page in a folder of its own: codeact and python in this process."""

    def __init__(self, monkeypatch: Any, capsys: Any, caplog: Any, places: dict[str, str]) -> None:
        self._monkeypatch, self._capsys, self._caplog = monkeypatch, capsys, caplog
        self._places = places
        self._names: dict[str, Any] = {"__name__": "docs"}
        self.left_out: list[str] = []

    def run(self, block: Block) -> None:
        if block.language == "python":
            exec(compile(self._placed(block.text), block.place, "exec"), self._names)
        elif block.language == "yaml":
            name = file_name(block)
            assert name, f"{block.place}: begin a yaml block that is run with '# NAME.yaml'"
            Path(name).write_text(self._placed(block.text))
        elif block.language == "console":
            for command in commands(block):
                self._command(command)

    def _placed(self, text: str) -> str:
        for written, real in self._places.items():
            text = text.replace(written, real)
        return text

    def _command(self, command: Command) -> None:
        place, text = f"{command.block.place}: $ {command.text}", self._placed(command.text)
        for large, small in SMALLER.items():
            text = text.replace(large, small)
        text = re.sub(rf"--({'|'.join(FEWER)}) (\d+)", lambda m: f"--{m[1]} {min(FEWER[m[1]], int(m[2]))}", text)
        words = shlex.split(text, comments=True)
        words = [os.path.expandvars(word) for word in words]
        settings, words = without_settings(words)
        if not words:
            for name, value in settings:
                if name != "CODEACT_EVAL_DATA":
                    self._monkeypatch.setenv(name, value)
            return
        with pytest.MonkeyPatch.context() as only_here:
            for name, value in settings:
                only_here.setenv(name, value)
            if words[0] == "codeact":
                if words[1] == "evaluate" and not isolated():
                    self.left_out.append(place)
                    return
                code, shown = self._codeact(words)
            else:
                assert words[0] in PROGRAMS, f"{place}: this cannot be run; say why above it: <!-- not run: ... -->"
                done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
                code, shown = done.returncode, done.stdout + done.stderr
        errors = [line for line in command.output if line.startswith("codeact: error: ")]
        assert code == (2 if errors else 0), f"{place}\nended with {code}:\n{shown}"
        if "output not compared" not in command.block.marks:
            compare(place, command.output, shown)

    def _codeact(self, words: list[str]) -> tuple[int, str]:
        self._monkeypatch.setattr(sys, "argv", words)
        self._caplog.clear()
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        shown = self._capsys.readouterr()
        return code, f"{shown.out}\n{shown.err}\n{self._caplog.text}"


def without_settings(words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Variables that stand before a command, and the command."""
    rest = words[1:] if words[0] == "export" else words
    count = next((i for i, word in enumerate(rest) if not re.match(r"[A-Z_]+=", word)), len(rest))
    pairs = [word.partition("=") for word in rest[:count]]
    return [(name, value) for name, _, value in pairs], rest[count:]


def isolated() -> bool:
    """Whether generated programs can be run here."""
    try:
        return Sandbox(Limits()).isolated
    except InputError:
        return False


def compare(place: str, expected: list[str], shown: str) -> None:
    """Every line that is shown must come, in its first words, whatever the numbers; an error as a whole."""
    lines = re.split(r"[\n\r]+", shown)
    for line in expected:
        if not line.strip() or line.strip() == "...":
            continue
        if line.startswith("codeact: error: "):
            number, anything = "\ue000", "\ue001"  # which re.escape leaves as they are
            form = re.escape(re.sub(r"\d+(?:[.,]\d+)*", number, line.replace("...", anything)))
            form = form.replace(number, r"[\d.,]+").replace(anything, ".*")
            found = any(re.fullmatch(form, known) for known in lines)
        else:
            start = label(line)[:3]
            found = any(label(known)[: len(start)] == start for known in lines)
        assert found, f"{place}\nshows: {line}\nwhat came:\n{shown}"


def label(line: str) -> list[str]:
    """The words of a line, numbers and widths of tables wild."""
    return re.sub(r"\d[\d,.:/%e+\-]*", "#", re.sub(r"-{3,}", "--", line)).split()


def file_name(block: Block) -> str | None:
    found = re.match(r"# ([\w.-]+\.ya?ml)\b", block.text)
    return found and found[1]
