"""The problems of HumanEval(+) and MBPP(+): where their files are found, and what a row of them means."""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.parse
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeact.base.console import say
from codeact.base.errors import InputError, one_of
from codeact.base.files import atomic_path, cache_path, download
from codeact.base.parsing import parse_json, read_file

DATASETS = ("humaneval", "mbpp")
_FILES = {"humaneval": ("HumanEvalPlus", "HumanEval"), "mbpp": ("MbppPlus",)}
_RELEASES = {
    "humaneval": (
        "https://github.com/evalplus/humanevalplus_release/releases/download/v0.1.10/HumanEvalPlus.jsonl.gz",
        "42526ec0e7d5f3ee0b06d6ced98f8c8bae3d76519151bfb3d36f79010645bd7f",
    ),
    "mbpp": (
        "https://github.com/evalplus/mbppplus_release/releases/download/v0.2.0/MbppPlus.jsonl.gz",
        "b54e762755248ca411b523c917fa9f93c07b5ff2966bf60b3917b853926a3dad",
    ),
}
"""Where evalplus 0.3.1 takes a data set from, and the sha256 of its text."""
_DOWNLOAD_SECONDS = 180.0
_MOST_BYTES = 1 << 26
_TOLERANCES = {"HumanEval/2": 1e-6, "HumanEval/4": 1e-6, "HumanEval/32": 1e-4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One task.

    ``base_input`` and ``plus_input`` hold one tuple of arguments a test; None where the file has none (the original
    HumanEval has ``test``, a program that defines ``check(candidate)``, instead). ``tolerance``: the absolute error
    that a float may have, 0 for "equal" (a float is then allowed 1e-6, as by evalplus). ``own``: tests of a task of
    one's own, an ``OwnTests``, and ``question``, what a chat is asked there.
    """

    task_id: str
    dataset: str
    prompt: str
    entry_point: str
    canonical_solution: str
    base_input: tuple[tuple[Any, ...], ...] | None
    plus_input: tuple[tuple[Any, ...], ...] | None
    tolerance: float
    test: str | None = None
    question: str = ""
    own: Any = None

    @property
    def reference(self) -> str:
        """The program of the canonical solution."""
        return self.prompt + self.canonical_solution


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSet:
    """The problems of one file, in its order. ``fingerprint``: sha256 of its text."""

    dataset: str
    problems: tuple[Problem, ...]
    fingerprint: str
    source: str

    @property
    def plus(self) -> bool:
        """Whether there are plus tests."""
        return all(problem.plus_input is not None for problem in self.problems)

    def by_id(self) -> dict[str, Problem]:
        """Problems by task id."""
        return {problem.task_id: problem for problem in self.problems}


def load_problems(
    dataset: str, data: str | Path | None = None, limit: int | None = None, tasks: Sequence[str] | None = None
) -> ProblemSet:
    """Read the problems of a data set.

    Args:
        dataset: "humaneval" or "mbpp".
        data: HumanEvalPlus.jsonl or MbppPlus.jsonl of evalplus, or HumanEval.jsonl of OpenAI, plain or gz. By default
            it is looked for in the folder that CODEACT_EVAL_DATA names, else in the cache, else it is downloaded.
        limit: only so many, from the first.
        tasks: only these task ids.

    Raises:
        InputError: the file cannot be had or read; says what to put where.
    """
    one_of("dataset", dataset, DATASETS)
    path = Path(data).expanduser() if data is not None else _find(dataset)
    try:
        raw = read_file(path)
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}; {remedy_for(dataset)}") from None
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            problems.append(read_problem(parse_json(line), dataset))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number}: no task of {dataset} ({type(error).__name__}: {error}); {remedy_for(dataset)}"
            ) from None
    if not problems:
        raise InputError(f"{path} holds no task; {remedy_for(dataset)}")
    if tasks is not None:
        known = [problem.task_id for problem in problems]
        wanted = {one_of("task", task, known) for task in tasks}
        problems = [problem for problem in problems if problem.task_id in wanted]
    return ProblemSet(
        dataset=dataset,
        problems=tuple(problems[:limit]),
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        source=str(path),
    )


def remedy_for(dataset: str, flag: str = "--data FILE") -> str:
    """What to do where the file of a data set is not found."""
    name = _FILES[dataset][0]
    return f"put evalplus' {name}.jsonl.gz into a folder and set CODEACT_EVAL_DATA to it, or say {flag}"


def find_in_folder(dataset: str, folder: str | Path) -> Path | None:
    """The file of a data set's problems in a folder; None where there is none."""
    for name in _FILES[dataset]:
        for ending in (".jsonl.gz", ".jsonl"):
            path = Path(folder).expanduser() / f"{name}{ending}"
            if path.is_file():
                return path
    return None


def file_at_hand(dataset: str) -> Path | None:
    """The file of a data set's problems where it need not be downloaded: where CODEACT_EVAL_DATA says, or the cache."""
    if folder := os.environ.get("CODEACT_EVAL_DATA"):
        return find_in_folder(dataset, folder)
    path = downloaded_file(dataset)
    return path if path.is_file() else None


def _find(dataset: str) -> Path:
    folder = os.environ.get("CODEACT_EVAL_DATA")
    if folder:
        path = find_in_folder(dataset, folder)
        if path is not None:
            return path
        raise InputError(f"CODEACT_EVAL_DATA={folder} holds no {_FILES[dataset][0]}.jsonl.gz; put it there")
    path = downloaded_file(dataset)
    if not path.is_file():
        content = _download(dataset)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return path


def downloaded_file(dataset: str) -> Path:
    """Where the file of a data set is kept once it was downloaded; its name holds the release."""
    version, name = _RELEASES[dataset][0].rsplit("/", 2)[1:]
    return cache_path(f"problems/{version}-{name}")


def _download(dataset: str) -> bytes:
    """Take the file from where evalplus publishes it, and refuse any other text than the one known."""
    url, expected = _RELEASES[dataset]
    host = urllib.parse.urlsplit(url).hostname
    say(f"downloading the problems of {dataset} from {host} ...")
    try:
        content = download(url, most=_MOST_BYTES, seconds=_DOWNLOAD_SECONDS)
        digest = hashlib.sha256(gzip.decompress(content)).hexdigest()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot download the problems of {dataset} ({error}); {remedy_for(dataset)}") from None
    if digest != expected:
        raise InputError(f"{url} has sha256 {digest}, expected {expected}: refused; {remedy_for(dataset)}")
    return content


def read_problem(row: Mapping[str, Any], dataset: str) -> Problem:
    """A row of evalplus' or OpenAI's file of a data set.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    task_id = str(row["task_id"])
    prefix, number = task_id.split("/")
    if prefix.lower() != dataset:
        raise ValueError(f"task {task_id} is of another data set")
    shape = _MBPP_SHAPES.get(int(number)) if dataset == "mbpp" else None
    inputs = {
        name: tuple(tuple(shape(test) if shape else test) for test in row[name]) if name in row else None
        for name in ("base_input", "plus_input")
    }
    if inputs["base_input"] is None and "test" not in row:
        raise KeyError("base_input")
    return Problem(
        task_id=task_id,
        dataset=dataset,
        prompt=str(row["prompt"]),
        entry_point=str(row["entry_point"]),
        canonical_solution=str(row["canonical_solution"]),
        tolerance=float(row["atol"] if "atol" in row else _TOLERANCES.get(task_id, 0)),
        test=row.get("test"),
        base_input=inputs["base_input"],
        plus_input=inputs["plus_input"],
    )


# ------------------------------------------------------------- what JSON cannot say about the arguments of MBPP's tests

_Shape = Callable[[list[Any]], Any]


def _all_tuples(value: Any) -> Any:
    return tuple(map(_all_tuples, value)) if isinstance(value, list) else value


_MBPP_SHAPES: dict[int, _Shape] = {
    # every argument is a tuple
    **dict.fromkeys(
        (2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809),
        lambda args: [tuple(arg) for arg in args],
    ),
    # every argument is a list of tuples
    **dict.fromkeys(
        (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780),
        lambda args: [[tuple(item) for item in arg] for arg in args],
    ),
    # the first argument is a list of tuples
    **dict.fromkeys((75, 413, 444, 753), lambda args: [[tuple(item) for item in args[0]], args[1]]),
    # the last, or the first, argument is a tuple
    **dict.fromkeys((106, 750), lambda args: [args[0], tuple(args[1])]),
    **dict.fromkeys((250, 405, 446, 617, 720, 763, 808), lambda args: [tuple(args[0]), args[1]]),
    307: lambda args: [tuple(args[0]), args[1], args[2]],
    # tuples of tuples
    **dict.fromkeys((259, 401, 445), lambda args: [tuple(tuple(item) for item in arg) for arg in args]),
    278: lambda args: [tuple(tuple(item) if isinstance(item, list) else item for item in args[0])],
    **dict.fromkeys((580, 615, 791), _all_tuples),
    722: lambda args: [{key: tuple(value) for key, value in args[0].items()}, *args[1:]],
    # an empty set is written as an empty dictionary there
    115: lambda args: [[set(item) if isinstance(item, list) and item else {} for item in args[0]]],
    124: lambda args: (float(args[0]), complex(args[1])),
    252: lambda args: [complex(args[0])],
}
