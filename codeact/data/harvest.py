"""Python source -> instruction rows: the signature and docstring of a function ask for it, its source answers.

    harvest("json") -> {"id", "instruction", "output", "path", "line"}, ...      write_harvest("json", "json.jsonl")

Nothing that is harvested is imported or run. Functions and methods count, functions inside functions do not. The answer
is the source as it was written, dedented, without the docstring, and only if it parses to the same tree.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import difflib
import hashlib
import importlib.util
import io
import os
import pkgutil
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from codeact.base.errors import InputError
from codeact.base.parsing import UNPARSABLE, parse_python, refuse_pipes
from codeact.data.records import write_jsonl
from codeact.data.sources import walk

# What is installed beside the standard library, its tests, and its applications.
STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"})

_STDLIB = Path(sysconfig.get_path("stdlib"))
_Row = dict[str, Any]
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class HarvestLimits:
    """Which functions are worth a row. Lines are neither blank nor comments only."""

    min_docstring: int = 20  # characters
    min_lines: int = 2  # of the answer
    max_lines: int = 120
    max_characters: int = 8000  # of the answer, and of signature and docstring


@dataclass(slots=True, kw_only=True)
class HarvestSummary:
    """What was found. ``functions`` is ``kept`` and all of ``skipped`` together, once every row has been taken.

    Reasons to skip: no_docstring, short_docstring, trivial_body, too_short, too_long, duplicate, limit, unfaithful (the
    answer would not be the same program). ``unreadable`` says which files could not be parsed, and why.
    """

    files: int = 0
    functions: int = 0
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line; usable is what nothing but the limit kept out."""
        skipped = self.skipped + Counter(unreadable_files=len(self.unreadable))
        usable = self.kept + skipped.pop("limit", 0)
        counts = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common()) or "none"
        found = f"{self.functions:,} in {self.files:,} files; skipped: {counts}".replace("no_", "without a ")
        return f"harvested {self.kept:,} of {usable:,} usable functions ({found.replace('_', ' ')})"


def harvest(
    target: str, *, limit: int | None = None, limits: HarvestLimits | None = None, summary: HarvestSummary | None = None
) -> Iterator[_Row]:
    """Rows of all functions that are worth one, sorted by path and line.

    Args:
        target: a folder or a ``.py`` file; else a module or package that Python could import, such as ``xml.dom``; or
            ``stdlib``, the standard library without its tests (`STDLIB_EXCLUDED`).
        limit: at most so many rows, spread evenly over all, which memory must hold.
        summary: filled while the rows are taken.

    Returns:
        Rows ``{"id": "json.decoder:JSONDecoder.decode", "instruction": ..., "output": ..., "path": ..., "line": ...}``,
        no two with equal outputs; ``:line`` is added to an id that is taken.

    Raises:
        InputError: at once: no such target, no Python source in it, or a ``limit`` below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; give 1 or more, or leave it out for all rows")
    files = _find(target)
    if not files:
        raise InputError(f"{target} holds no .py file; name a folder or package of Python source")
    summary = summary or HarvestSummary()
    rows = _scan(files, limits or HarvestLimits(), summary)
    return rows if limit is None else _spread(rows, limit, summary)


def write_harvest(target: str, output: str | Path, *, limit: int | None = None) -> HarvestSummary:
    """Harvest ``target`` into a file of JSON lines; see `harvest`.

    Raises:
        InputError: as `harvest`; also if no function is worth a row, or ``output`` cannot be written.
    """
    summary = HarvestSummary()
    rows = harvest(target, limit=limit, summary=summary)
    first = next(rows, None)
    if first is None:
        raise InputError(f"no function of {target} has a docstring and a body worth a row; choose other source")
    write_jsonl(output, chain([first], rows))
    return summary


def _spread(rows: Iterator[_Row], limit: int, summary: HarvestSummary) -> Iterator[_Row]:
    """Every (total / limit)-th row; 3 of 10 are rows 4, 7 and 10."""
    found = list(rows)
    summary.kept = min(limit, len(found))
    summary.skipped["limit"] = len(found) - summary.kept
    for number in range(1, summary.kept + 1):
        yield found[-(-number * len(found) // summary.kept) - 1]


def _find(target: str) -> list[tuple[Path, str, str]]:
    """(file, path, module) sorted by path, which is relative and of a package begins with its name."""
    path = Path(os.path.expanduser(target))
    excluded = {"__pycache__", *(STDLIB_EXCLUDED if target == "stdlib" else ())}
    if target == "stdlib":
        places, name = [_STDLIB], ""
    elif target.strip() and os.path.isdir(path):
        places, name = [path], path.resolve().name if (path / "__init__.py").exists() else ""
    elif path.suffix == ".py" and os.path.isfile(path):
        places, name = [path], path.stem
    else:
        places, name = _locate(target), target
    if places[0].is_file():
        return [(places[0], places[0].name, name)]
    files, prefix = [], name.replace(".", "/") + "/" if name else ""
    for place in places:
        # pyvenv.cfg marks a virtual environment inside a project.
        for file in walk(place, lambda inner: inner.name in excluded or (inner / "pyvenv.cfg").exists()):
            if file.suffix.lower() != ".py":
                continue
            relative = prefix + file.relative_to(place).as_posix()
            files.append((file, relative, relative[:-3].removesuffix("/__init__").replace("/", ".")))
    return sorted(files, key=lambda found: found[1])


def _locate(target: str) -> list[Path]:
    """The file of a module, or the folders of a package."""
    first, *inner = target.split(".")
    if not all(map(str.isidentifier, [first, *inner])):
        raise InputError(f"{target!r} is no folder, .py file or package name; name one of them, or stdlib")
    spec = None
    with contextlib.suppress(ImportError, ValueError):  # ValueError: a module such as __main__
        spec = importlib.util.find_spec(first)  # of a name without a dot; with one it would import the parent
    if spec is None:
        known = ["stdlib", *(module.name for module in pkgutil.iter_modules())]
        raise InputError(f"no folder or package {first!r}{_closest(first, known)}")
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if not places:  # a module; frozen ones, such as os, have their source in the standard library
        origin = spec.origin or ""
        places = [Path(origin)] if origin.endswith(".py") else [*_STDLIB.glob(f"{first}.py")]
    if not places:
        raise InputError(f"the module {first!r} has no Python source (it is compiled); choose another")
    for name in inner:
        known = [entry.name.removesuffix(".py") for place in places if place.is_dir() for entry in place.iterdir()]
        found = [place / f"{name}{suffix}" for suffix in ("", ".py") for place in places]
        places = [place for place in found if place.exists()][:1]
        if not places:
            raise InputError(f"no module {target!r}{_closest(name, known)}")
    return places


def _closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; give a folder, an installed package or stdlib"


def _scan(files: list[tuple[Path, str, str]], limits: HarvestLimits, summary: HarvestSummary) -> Iterator[_Row]:
    ids: set[str] = set()
    outputs: set[bytes] = set()
    for file, relative, module in files:
        summary.files += 1
        try:
            refuse_pipes(file)
            with tokenize.open(file) as handle:  # honours a coding comment, as Python does
                source = handle.read()
            tree = parse_python(source)
        except (OSError, *UNPARSABLE) as error:
            summary.unreadable.append(f"{relative}: {type(error).__name__} {error}".splitlines()[0][:200])
            continue
        # Positions count UTF-8 bytes, and only "\n" ends a line; splitlines() would also break at "\f".
        lines = source.encode().split(b"\n")
        for function, owners in _functions(tree):
            summary.functions += 1
            row = _row(function, owners, lines, limits, outputs)
            if isinstance(row, str):
                summary.skipped[row] += 1
                continue
            summary.kept += 1
            row_id = f"{module}:{'.'.join((*owners, function.name))}"
            while row_id in ids:
                row_id += f":{function.lineno}"
            ids.add(row_id)
            yield {"id": row_id, **row, "path": relative, "line": function.lineno}


def _functions(node: ast.AST, owners: tuple[str, ...] = ()) -> Iterator[tuple[_Function, tuple[str, ...]]]:
    """Functions and the classes around each, also under ``if`` and ``try``, not inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield child, owners
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _functions(child, (*owners, child.name) if isinstance(child, ast.ClassDef) else owners)


def _row(
    function: _Function, owners: tuple[str, ...], lines: list[bytes], limits: HarvestLimits, outputs: set[bytes]
) -> _Row | str:
    """Instruction and output, or why there are none; ``outputs`` are digests of the earlier ones."""
    if reason := _unfit(function, limits):
        return reason
    head, answer = _split(function, lines)
    code = len(re.findall(r"^\s*[^\s#]", answer, re.MULTILINE))
    if code < limits.min_lines:
        return "too_short"
    if code > limits.max_lines or max(len(answer), len(head)) > limits.max_characters:
        return "too_long"
    if not _is_faithful(answer, function):
        return "unfaithful"
    digest = hashlib.sha256(answer.encode()).digest()
    if digest in outputs:
        return "duplicate"
    outputs.add(digest)
    kind = f"method `{function.name}` of the class `{owners[-1]}`" if owners else f"function `{function.name}`"
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", head))])
    request = f"Write the Python {kind} that this signature and docstring describe.\n\n{fence}python\n{head}\n{fence}"
    return {"instruction": request, "output": answer}


def _unfit(function: _Function, limits: HarvestLimits) -> str | None:
    docstring = ast.get_docstring(function)
    if docstring is None:
        return "no_docstring"
    if len(docstring.strip()) < limits.min_docstring:
        return "short_docstring"
    return "trivial_body" if all(map(_is_trivial, function.body[1:])) else None


def _is_trivial(statement: ast.stmt) -> bool:
    """``pass``, a bare constant such as ``...``, or ``raise NotImplementedError``."""
    match statement:
        case ast.Pass() | ast.Expr(ast.Constant()):
            return True
        case ast.Raise(ast.Name(name) | ast.Call(ast.Name(name))):
            return name == "NotImplementedError"
    return False


def _split(function: _Function, lines: list[bytes]) -> tuple[str, str]:
    """The dedented source to the end of the docstring, and all of it without the docstring."""
    line = min(node.lineno for node in (function, *function.decorator_list))
    while function.decorator_list and not lines[line - 1].lstrip().startswith(b"@"):
        line -= 1  # a decorator in brackets begins below its "@"
    indent = lines[line - 1][: -len(lines[line - 1].lstrip())]
    margin = indent.rpartition(b"\f")[2]  # a form feed takes indentation back to nothing
    start, end = (line, len(indent)), _end(function)

    docstring, following = function.body[:2]
    above, newline, before = _cut(lines, start, (docstring.lineno, docstring.col_offset)).rpartition(b"\n")
    if before.strip() or following.lineno == docstring.end_lineno:  # def f(): "doc"; return 1
        rest = before + _cut(lines, (following.lineno, following.col_offset), end)
    else:
        rest = re.sub(rb"\A.*\n(\s*\n)?", b"", _cut(lines, _end(docstring), end))
    answer = _dedent(above + newline + rest, margin, keep_strings=True)
    return _dedent(_cut(lines, start, _end(docstring)), margin), answer


def _end(node: ast.stmt) -> tuple[int, int]:
    return node.end_lineno or 0, node.end_col_offset or 0


def _cut(lines: list[bytes], start: tuple[int, int], end: tuple[int, int]) -> bytes:
    """The source between two places, each a line, from 1, and a column."""
    cut = lines[start[0] - 1 : end[0]]
    cut[-1] = cut[-1][: end[1]]
    cut[0] = cut[0][start[1] :]
    return b"\n".join(cut)


def _dedent(source: bytes, margin: bytes, *, keep_strings: bool = False) -> str:
    """All lines but the first lose the margin, or as much of it as they have; ``keep_strings``: not inside strings."""
    kept: set[int] = set()
    if keep_strings and margin and re.search(rb"\"{3}|'{3}|\\\n", source):  # a string of several lines
        with contextlib.suppress(tokenize.TokenError, SyntaxError):  # it will not parse either, and be skipped
            for token in tokenize.tokenize(io.BytesIO(margin + source).readline):
                kept.update(range(token.start[0], token.end[0]))  # no other token goes over several lines
    lines = source.split(b"\n")
    for number, line in enumerate(lines[1:], 1):
        shared = b"" if number in kept else margin
        while not line.startswith(shared):
            shared = shared[:-1]
        lines[number] = line.removeprefix(shared)
    return b"\n".join(lines).decode()


def _is_faithful(answer: str, function: _Function) -> bool:
    """Whether the answer, parsed, is the function without its docstring, and has none itself."""
    bare = copy.copy(function)
    bare.body = function.body[1:]
    try:
        (parsed,) = parse_python(answer).body
    except UNPARSABLE:  # among them the ValueError of not being one statement
        return False
    return ast.dump(parsed) == ast.dump(bare) and ast.get_docstring(bare) is None
