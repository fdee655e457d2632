"""Files of generated programs: ours, evalplus' and the paper's, all JSON lines; evalplus' folders too."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from codeact.base.errors import InputError
from codeact.base.files import atomic_path
from codeact.evaluation.problems import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program for a task. ``place``: where it was read, for messages."""

    task_id: str
    solution: str
    place: str


def read_samples(path: str | Path, problems: Mapping[str, Problem]) -> list[Program]:
    """Read the programs of a file of JSON lines, or of a folder with files like ``HumanEval_0/0.py``.

    A row has ``task_id``, and ``solution`` or ``completion`` (what follows the prompt). Rows of tasks that are not in
    ``problems`` are left out.

    Raises:
        InputError: the file cannot be read, or a row is no sample; the message names the row.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, problems)
    samples = []
    for number, row in enumerate(read_rows(path), 1):
        place = f"{path}, sample {number}"
        task_id, program, completion = row["task_id"], row.get("solution"), row.get("completion")
        if task_id not in problems:
            continue
        if program is None and isinstance(completion, str):
            program = problems[task_id].prompt + completion
        if not isinstance(program, str):
            raise InputError(f"{place}: {task_id} has neither a text solution nor a text completion")
        samples.append(Program(task_id=task_id, solution=program, place=place))
    return samples


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read JSON lines of samples as they are.

    Raises:
        InputError: the file cannot be read, or a line is no sample.
    """
    path = Path(path)
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not (isinstance(row, dict) and isinstance(row.get("task_id"), str)):
                        raise InputError(f"{path}, line {number}: no JSON object with a task_id; mend or remove it")
                    rows.append(row)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a file of codeact generate") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is no UTF-8 text; give a file of codeact generate") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: no JSON ({error.msg}); mend or remove it") from None
    return rows


def _read_folder(folder: Path, problems: Mapping[str, Problem]) -> list[Program]:
    samples = []
    for path in sorted(folder.glob("*/*.py"), key=lambda p: (p.parent.name, len(p.name), p.name)):
        task_id = path.parent.name.replace("_", "/")
        if task_id in problems:
            text = path.read_text(encoding="utf-8", errors="replace")
            samples.append(Program(task_id=task_id, solution=text, place=str(path)))
    return samples


def write_samples(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


class SampleLog:
    """A file of JSON lines that grows by one fsync'd line at a time; a line that a kill cut short is removed.

    Raises:
        InputError: it cannot be written, or a line before the last is no JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self.rows: list[dict[str, Any]] = []
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as file:
                file.seek(0)
                content = file.read()
                whole = content.rfind(b"\n") + 1
                for number, line in enumerate(content[:whole].splitlines(), 1):
                    if line.strip():
                        self.rows.append(self._row(line, number))
                file.truncate(whole)
            self._file: TextIO = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{self._path}, line {number}: no JSON object; remove the line or the file")
        return row

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row and wait until it is on the disk."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror or error}") from None
