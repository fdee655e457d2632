"""Files of generated programs: ours, evalplus' and the paper's, all JSON lines; evalplus' folders too."""

from __future__ import annotations

import codecs
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from codeact.base.console import counted, say, visible
from codeact.base.errors import InputError
from codeact.base.files import atomic_path
from codeact.base.parsing import parse_json, read_file
from codeact.evaluation.problems import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program for a task. ``place``: where it was read, for messages."""

    task_id: str
    solution: str
    place: str


def read_samples(path: str | Path, problems: Mapping[str, Problem]) -> tuple[list[Program], Counter[str]]:
    """Read the programs of a file of JSON lines, or of a folder with files like ``HumanEval_0/0.py``.

    A row has ``task_id``, and ``solution`` or ``completion`` (what follows the prompt).

    Returns:
        The programs, and how many there are of each task that is not in ``problems``.

    Raises:
        InputError: the file cannot be read, or a row is no sample; the message names the row.
    """
    path = Path(path)
    samples = []
    left_out: Counter[str] = Counter()
    for place, row in _folder_rows(path) if path.is_dir() else _placed_rows(path):
        task_id, program, completion = row["task_id"], row.get("solution"), row.get("completion")
        if task_id not in problems:
            left_out[task_id] += 1
            continue
        if program is None and isinstance(completion, str):
            program = problems[task_id].prompt + completion
        if not isinstance(program, str):
            raise InputError(f"{place}: {task_id} has neither a text solution nor a text completion")
        samples.append(Program(task_id=task_id, solution=program, place=place))
    return samples, left_out


def as_code(text: str) -> str:
    """A stranger's text for a page of Markdown, where nothing in it is a link, HTML or a line of its own."""
    words = " ".join(visible(text).split())
    return "`" + words.replace("`", "'").replace("|", "\\|") + "`"


def left_out_note(tasks: Counter[str]) -> str:
    """What is said of samples of tasks that the data set, or what is asked of it, has not."""
    names = sorted(as_code(task[:80]) for task in tasks)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
    return (
        f"{counted(tasks.total(), 'sample')} left out, of tasks that the problems lack or that are not asked: {shown}"
    )


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read JSON lines of samples as they are. A sample whose number is there twice counts once, which is told.

    Raises:
        InputError: the file cannot be read, or a line is no sample.
    """
    return [row for _, row in _placed_rows(Path(path))]


def _placed_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        content = read_file(path)
        content.decode()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a file of codeact generate") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is no UTF-8 text; give a file of codeact generate") from None
    rows = []
    for number, row in _once(path, content):
        if not isinstance(row.get("task_id"), str):
            raise InputError(f"{path}, line {number}: no JSON object with a task_id; mend or remove it")
        rows.append((f"{path}, line {number}", row))
    return rows


def _once(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSON lines with their numbers. What two writers wrote, or one twice, counts once."""
    keys, repeated = set(), 0
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:  # a ValueError too: a number of 5,000 digits
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).split(";")[0]
            raise InputError(f"{path}, line {number}: no JSON ({reason}); mend or remove it") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: no JSON object; mend or remove it")
        key = row.get("key", (row.get("task_id"), row.get("sample")))
        if repr(key) in keys:
            repeated += 1
            continue
        if "key" in row or "sample" in row:
            keys.add(repr(key))
        yield number, row
    if repeated:
        say(f"{path}: {counted(repeated, 'line')} left out whose sample stands further up already")


def _folder_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(folder.glob("*/*.py"), key=lambda p: (p.parent.name, len(p.name), p.name)):
        try:
            text = read_file(path).decode(errors="replace")
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; take it away") from None
        yield str(path), {"task_id": path.parent.name.replace("_", "/"), "solution": text}


def write_samples(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def discard_samples(path: Path) -> None:
    """Empty a file of samples.

    Raises:
        InputError: it cannot be written, or another process writes to it.
    """
    with _locked(path) as file:
        file.truncate(0)


def _locked(path: Path) -> BinaryIO:
    """Open a file to read and append; until it is closed no other process can have it so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    with suppress(ImportError, OSError):  # Windows, and file systems without locks
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(f"another process writes to {path}; wait for it, or choose another file") from None
    return file


class SampleLog:
    """A file of JSON lines that grows by one fsync'd line at a time; a line that a kill cut short is removed.

    Raises:
        InputError: it cannot be written, another process writes to it, or a line before the last is no JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file = _locked(self._path)
        try:
            self._file.seek(0)
            content = self._file.read()
            whole = content.rfind(b"\n") + 1
            self.rows = [row for _, row in _once(self._path, content[:whole])]
            self._file.truncate(whole)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row and wait until it is on the disk."""
        try:
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror or error}") from None
