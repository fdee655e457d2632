"""The program in an answer: the entry point with the helpers and imports it needs, without chat, tests and examples.

evalplus takes the longest run of lines that parses, by trying all of them. Here the text is cut into top-level
statements by one pass of a scanner, and each is parsed once, so time grows with the length of the answer.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""(?P<triple>\"{3}|'{3})|(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|(?P<comment>\#[^\n]*)"""
    r"""|(?P<open>[\[({])|(?P<close>[\])}])|(?P<joined>\\\n)|(?P<newline>\n)|(?P<stray>["'])""",
    re.DOTALL,
)
_TRIPLE_END = {quotes: re.compile(r"(?:\\.|[^\\])*?" + quotes, re.DOTALL) for quotes in ('"""', "'''")}
_NEVER_IN_BRACKETS = re.compile(r"(def|class|async def|@\w|```)")
_CONTINUES = re.compile(r"(else|elif|except|finally)\b")
_SPARE = 20  # how often the text may be scanned or parsed again because something in it is broken
_SHORT = 40  # lines that are looked at together after that
_CUTS = 30


@dataclass(frozen=True, slots=True)
class _Statement:
    """A top-level statement. ``binds``: names that it defines; ``uses``: all names in it."""

    text: str
    node: ast.stmt
    binds: frozenset[str]
    uses: frozenset[str]


@dataclass(slots=True)
class _Region:
    """Statements with nothing between them that is no Python."""

    statements: list[_Statement] = field(default_factory=list)
    lines: int = 0

    def defines(self, name: str) -> int:
        """2: it does; 1: by a stub only; 0: it does not."""
        found = [2 - _is_stub(statement.node) for statement in self.statements if name in statement.binds]
        return max(found, default=0)


def sanitize(text: str, entry_point: str) -> str:
    """Return the program in an answer.

    The run of statements that defines ``entry_point`` is taken (the longest, if several do; a helper or import that it
    lacks may come from elsewhere in the text). Imports stand first, then what the entry point needs, in the order of
    the text. Of two definitions of a name the first counts that is more than a stub, as in evalplus. Without an entry
    point the longest run is returned as it is, so that its failure can be seen.
    """
    regions = [region for region in _regions(text.replace("\r\n", "\n")) if region.statements]
    if not regions:
        return ""
    defining = [region for region in regions if region.defines(entry_point)]
    main = max(defining or regions, key=lambda region: (region.defines(entry_point), region.lines))
    if not defining:
        return "\n".join(statement.text for statement in main.statements)
    others = [statement for region in regions if region is not main for statement in region.statements]
    kept = _needed(main.statements, others, entry_point)
    return "\n".join(statement.text for statement in sorted(kept, key=_imports_first))


def _imports_first(statement: _Statement) -> int:
    node = statement.node
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return 0
    return 1 if isinstance(node, (ast.Import, ast.ImportFrom)) else 2


def _needed(main: list[_Statement], others: list[_Statement], entry_point: str) -> list[_Statement]:
    """All imports of the main run, and what the entry point reaches by name."""
    chosen: dict[str, list[_Statement]] = {}
    for statements in (main, others):  # a name of the main run is never taken from elsewhere
        found: dict[str, list[_Statement]] = {}
        for statement in statements:
            for name in statement.binds - chosen.keys():
                found.setdefault(name, []).append(statement)
        chosen |= {name: _defining(candidates) for name, candidates in found.items()}
    reached, queue = {entry_point}, [entry_point]
    wanted: set[int] = {id(s) for s in main if isinstance(s.node, (ast.Import, ast.ImportFrom))}
    while queue:
        for statement in chosen.get(queue.pop(), ()):
            if id(statement) in wanted:
                continue
            wanted.add(id(statement))
            new = (statement.uses | statement.binds) - reached
            reached |= new
            queue += sorted(new)
    return [statement for statement in [*main, *others] if id(statement) in wanted]


def _defining(candidates: list[_Statement]) -> list[_Statement]:
    """Of the statements that bind a name, those that count: the first definition that does something, else all."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    definitions = [statement for statement in candidates if isinstance(statement.node, kinds)]
    if not definitions:
        return candidates
    return [next((statement for statement in definitions if not _is_stub(statement.node)), definitions[0])]


def _is_stub(node: ast.stmt) -> bool:
    body: list[ast.stmt] = getattr(node, "body", [])
    return bool(body) and all(
        isinstance(item, ast.Pass) or (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))
        for item in body
    )


# ------------------------------------------------------------------------------------------------- text -> statements


def _regions(text: str) -> Iterator[_Region]:
    """Cut a text into runs of statements."""
    lines = _dedent_fences(text).split("\n")
    source = _Source(lines)
    region = _Region()
    at = 0
    while at < len(lines):
        line = lines[at]
        if not line.strip() or line.startswith("#"):
            at += 1
            continue
        end = at if line[0].isspace() else source.statement_end(at)
        parsed, used = source.parse(at, end)
        if parsed:
            region.statements += parsed
            region.lines += sum(1 for item in lines[at : at + used] if item.strip())
        if not parsed or used < end - at:
            yield region
            region = _Region()
        at += max(used, 1)
    yield region


def _dedent_fences(text: str) -> str:
    """Move a code block that is indented (as part of a list, say) to the margin."""
    lines = text.split("\n")
    indent: str | None = None
    for number, line in enumerate(lines):
        stripped = line.lstrip()
        if stripped.startswith("```"):
            indent = line[: len(line) - len(stripped)] if indent is None else None
            lines[number] = stripped
        elif indent:
            lines[number] = line.removeprefix(indent)
    return "\n".join(lines)


class _Source:
    """The lines of a text, and how much more work may be spent on what is broken in it."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self._text = "\n".join(lines) + "\n"
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line) + 1)
        self._spare = _SPARE * len(self._text)

    def statement_end(self, first: int) -> int:
        """Return the line after the statement that begins in ``first``, its block included; ``first`` if none does."""
        end = self._logical_end(first)
        decorated = self._lines[first].startswith("@")
        last = len(self._lines) if self._spare > 0 else min(first + _SHORT, len(self._lines))
        while first < end < last:
            line = self._lines[end]
            inside = not line.strip() or line[0].isspace() or line[0] == "#"
            if not (inside or decorated or _CONTINUES.match(line)):
                break
            decorated = decorated and (inside or line.startswith("@"))
            following = self._logical_end(end) if line.strip() else end + 1
            if following == end:
                break
            end = following
        while end > first and not self._lines[end - 1].strip():
            end -= 1
        return end

    def _logical_end(self, first: int) -> int:
        """Return the line after the logical line that begins in ``first``; ``first`` itself if it never ends well."""
        position, depth, line = self._starts[first], 0, first
        # What is broken again and again is looked at less far.
        limit = len(self._text) if self._spare > 0 else self._starts[min(first + _SHORT, len(self._lines))]
        while (match := _TOKEN.search(self._text, position, limit)) is not None:
            position, kind = match.end(), match.lastgroup
            if kind == "triple":
                closing = _TRIPLE_END[match[0]].match(self._text, position)
                if closing is None:
                    break
                position = closing.end()
            elif kind == "open":
                depth += 1
            elif kind == "close":
                depth -= 1
                if depth < 0:
                    break
            elif kind == "stray":
                break
            elif kind == "newline":
                while self._starts[line + 1] < position:
                    line += 1
                if depth == 0:
                    return line + 1
                if _NEVER_IN_BRACKETS.match(self._text, position):
                    break
        self._spare -= position - self._starts[first]
        return first

    def parse(self, first: int, end: int) -> tuple[list[_Statement], int]:
        """Parse the lines of a statement; where its end is broken, without it. Returns statements and lines used."""
        cut = end
        for _ in range(_CUTS):
            while cut > first and not self._lines[cut - 1].strip():
                cut -= 1
            if cut <= first:
                break
            source = "\n".join(self._lines[first:cut])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(source)
                return [_statement(source, node, len(tree.body) == 1) for node in tree.body], cut - first
            except SyntaxError as error:
                broken = first + (error.lineno or 1) - 1
                cut = min(cut - 1, max(broken, first))
            except (ValueError, MemoryError, RecursionError):
                break
            self._spare -= len(source)
            if self._spare <= 0:
                break
        return [], 0


def _statement(source: str, node: ast.stmt, alone: bool) -> _Statement:
    binds, uses = set(), set()
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        binds.add(node.name)
    else:
        binds |= _bound(node)
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            uses.add(inner.id)
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str) and inner.value.isidentifier():
            uses.add(inner.value)  # an annotation in quotes
    text = source if alone else ast.get_source_segment(source, node) or ""
    return _Statement(text, node, frozenset(binds), frozenset(uses))


def _bound(node: ast.AST) -> set[str]:
    """Names that a statement defines at the top level, also inside its ``if``, ``try`` and loops."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    if isinstance(node, ast.If) and _is_main_guard(node):
        return set()
    if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return set()
    return {name for child in ast.iter_child_nodes(node) for name in _bound(child)}


def _is_main_guard(node: ast.If) -> bool:
    return any(isinstance(inner, ast.Name) and inner.id == "__name__" for inner in ast.walk(node.test))
