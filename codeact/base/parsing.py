"""Text that anyone may have written is parsed within bounds that hold whatever else the process has set.

Parsers call themselves for every bracket in a bracket, and what holds them back is Python's recursion limit alone.
Where a library or a notebook has raised that, as some do and leave it so, a few kilobytes of ``[`` end the process. So
the depth of JSON is checked before it is parsed, and what has no such check is parsed under ``safe_recursion``.
"""

from __future__ import annotations

import ast
import errno
import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SAFE_RECURSION = 3000  # a limit under which no parser runs out of stack; Python's own is 1000
MOST_DEPTH = 100  # brackets in brackets: no file of ours comes near, and what walks a value afterwards can bear it
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]|[-+.\deE]+', re.DOTALL)


class TooDeepError(ValueError):
    """Brackets in brackets beyond what is read."""


def parse_json(text: str | bytes) -> Any:
    """What JSON holds.

    Raises:
        TooDeepError: more than ``MOST_DEPTH`` brackets lie in each other.
        ValueError: it is no JSON (a ``json.JSONDecodeError``), no UTF-8, or holds a number of too many digits.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    if text.count("[") + text.count("{") > MOST_DEPTH and any(depth > MOST_DEPTH for depth, _ in json_depths(text)):
        raise TooDeepError("it is nested too deeply")
    return json.loads(text)


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        OSError: it cannot be read.
        ValueError: as of ``parse_json``.
    """
    return parse_json(read_file(path))


def refuse_pipes(path: Path) -> None:
    """Refuse what may not end, or would wait for ever, and cannot be read twice.

    Raises:
        OSError: it is a pipe, as of ``<(...)``, a socket, a device or a folder.
    """
    if path.is_dir():
        raise OSError(errno.EISDIR, "it is a folder, not a file", str(path))
    if path.exists() and not path.is_file():
        raise OSError(
            errno.EINVAL, "it is a pipe or a device, not a file: save what it gives, and name that", str(path)
        )


def read_file(path: Path) -> bytes:
    """The bytes of a file that anyone may have put there.

    Raises:
        OSError: it cannot be read, or ``refuse_pipes`` refuses it.
    """
    refuse_pipes(path)
    return path.read_bytes()


def json_depths(text: str, position: int = 0) -> Iterator[tuple[int, int]]:
    """After every token of JSON from ``position`` on: how many brackets are open, and where the token ends."""
    depth = 0
    for token in _TOKEN.finditer(text, position):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        yield depth, token.end()


def check_depth(value: Any) -> None:
    """What ``parse_json`` checks, of a value that is to become JSON.

    Raises:
        TooDeepError: more than ``MOST_DEPTH`` dicts, lists and tuples lie in each other, or one in itself.
    """
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        holders = {id(item): item for item in level if isinstance(item, (dict, list, tuple))}.values()
        level = [part for item in holders for part in (item.values() if isinstance(item, dict) else item)]
        if not holders:
            return
    raise TooDeepError("it is nested too deeply")


@contextmanager
def safe_recursion() -> Iterator[None]:
    """Parse in here with a recursion limit at which a RecursionError comes before the stack ends."""
    limit = sys.getrecursionlimit()
    if limit > _SAFE_RECURSION:
        sys.setrecursionlimit(_SAFE_RECURSION)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


@safe_recursion()
def parse_python(source: str) -> ast.Module:
    """The syntax tree of a program of anyone.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: it is no Python, or nested too deeply.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's escapes
        return ast.parse(source)


UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What ``parse_python`` raises."""
