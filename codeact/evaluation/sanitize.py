"""The program in an answer: the entry point with the helpers and imports it needs, without chat, tests and examples.

evalplus takes the longest run of lines that parses, by trying all of them. Here the text is cut into top-level
statements by one pass of a scanner, and each is parsed once, so time grows with the length of the answer.
"""

from __future__ import annotations

import ast
import re
import symtable
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field

from codeact.base.parsing import parse_python, safe_recursion

_TOKEN = re.compile(
    r"""(?P<triple>\"{3}|'{3})|(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|(?P<comment>\#[^\n]*)"""
    r"""|(?P<open>[\[({])|(?P<close>[\])}])|(?P<joined>\\\n)|(?P<newline>\n)|(?P<stray>["'])""",
    re.DOTALL,
)
_TRIPLE_END = {quotes: re.compile(r"(?:\\.|[^\\])*?" + quotes, re.DOTALL) for quotes in ('"""', "'''")}
_NEVER_IN_BRACKETS = re.compile(r"(def|class|async def|@\w|```)")
_CONTINUES = re.compile(r"(else|elif|except|finally)\b")
_DEFINES = re.compile(r"(def|class|async\s+def)\b")
_THOUGHT = re.compile(r"</(?:\w+:)?think(?:ing)?>|\[/THINK\]|<\|end_of_thought\|>")
_SETTING = re.compile(r"set|seed|stack_size|filterwarnings|simplefilter")  # of a module: sys.setrecursionlimit
_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_SPARE = 20  # how often the text may be scanned or parsed again because something in it is broken
_SHORT = 40  # lines that are looked at together after that
_CUTS, _SHORT_CUTS = 30, 3


@dataclass(frozen=True, slots=True)
class _Statement:
    """A top-level statement. ``binds``: names that it defines; ``uses``: names outside of it that it needs.

    ``sets``: names of which it changes what they hold, as ``x[0] = 1`` and ``x.y = 1`` do, or a call of the function
    that it defines would; ``calls``: names of which it calls a method, as ``x.append(1)`` does, or which it calls or
    hands to a function.
    """

    text: str
    node: ast.stmt
    binds: frozenset[str]
    uses: frozenset[str]
    sets: frozenset[str]
    calls: frozenset[str]


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
    text = text.replace("\r\n", "\n")
    answer = _THOUGHT.split(text)[-1]  # what was thought before holds drafts
    for part in dict.fromkeys((answer, text)):
        regions = [region for region in _regions(part) if region.statements]
        if any(region.defines(entry_point) for region in regions):
            break
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
    """All imports of the main run, and what the entry point reaches by name, with what fills that."""
    chosen: dict[str, list[_Statement]] = {}
    for statements in (main, others):  # a name of the main run is never taken from elsewhere
        candidates: dict[str, list[_Statement]] = {}
        for statement in statements:
            for name in statement.binds - chosen.keys():
                candidates.setdefault(name, []).append(statement)
        binding = {name: _defining(those) for name, those in candidates.items()}
        for statement in statements:
            for name in statement.sets & binding.keys():
                binding[name].append(statement)
        for statement in statements:
            for name in statement.calls & binding.keys():
                if _may_fill(binding[name][0], statement, entry_point):
                    binding[name].append(statement)
        chosen |= binding
    imports = {id(statement): statement for statement in main if isinstance(statement.node, _IMPORTS)}
    imported = frozenset().union(*(statement.binds for statement in imports.values()))
    reached = {entry_point}
    queue = [entry_point, *sorted(imported)]
    kept = set(imports)
    while queue:
        for statement in chosen.get(queue.pop(), ()):
            if id(statement) in kept:
                continue
            kept.add(id(statement))
            new = (statement.uses | statement.binds) - reached
            reached |= new
            queue += sorted(new)
    return [statement for statement in [*main, *others] if id(statement) in kept]


def _defining(candidates: list[_Statement]) -> list[_Statement]:
    """Of the statements that bind a name, those that count: the first definition that does something, else all."""
    definitions = [statement for statement in candidates if isinstance(statement.node, _DEFINITIONS)]
    if not definitions:
        return list(candidates)
    return [next((statement for statement in definitions if not _is_stub(statement.node)), definitions[0])]


def _may_fill(definition: _Statement, caller: _Statement, entry_point: str) -> bool:
    """Whether a call of what a statement defines can be more than an example of use."""
    if isinstance(definition.node, _IMPORTS):
        return False
    if isinstance(caller.node, _DEFINITIONS):  # it is decorated by it; but of the entry point there is one
        return entry_point not in caller.binds
    shows = {entry_point, "print", "input"} & (definition.uses | definition.binds)
    return not isinstance(definition.node, _DEFINITIONS) or bool(definition.sets and not shows)


def _is_stub(node: ast.stmt) -> bool:
    body: list[ast.stmt] = getattr(node, "body", [])
    return bool(body) and all(
        isinstance(item, ast.Pass) or (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))
        for item in body
    )


# ------------------------------------------------------------------------------------------------- text -> statements


def _regions(text: str) -> Iterator[_Region]:
    """Cut a text into runs of statements."""
    lines = text.split("\n")
    source = _Source(lines)
    region = _Region()
    at = 0
    while at < len(lines):
        line = lines[at]
        if not line.strip() or line.startswith("#"):
            at += 1
            continue
        if line[0].isspace() and line.lstrip().startswith("```"):  # a block in a list, say: moved to the margin
            closing = next((n for n in range(at + 1, len(lines)) if lines[n].lstrip().startswith("```")), len(lines))
            yield region
            yield from _regions(textwrap.dedent("\n".join(lines[at + 1 : closing])))
            region, at = _Region(), closing + 1
            continue
        end, skipped = source.statement_end(at)
        parsed, used = source.parse(at, end)
        if parsed:
            region.statements += parsed
            region.lines += sum(1 for item in lines[at : at + used] if item.strip())
        if not parsed or used < end - at:
            yield region
            region = _Region()
        at += used or skipped
    yield region


class _Source:
    """The lines of a text, and how much more work may be spent on what is broken in it."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self._text = "\n".join(lines) + "\n"
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line) + 1)
        self._spare = _SPARE * len(self._text)

    def statement_end(self, first: int) -> tuple[int, int]:
        """Find the line after the statement that begins in ``first``, its block included; ``first`` if none does.

        Returns it, and how many lines to go on if it turns out to be no statement.
        """
        if self._lines[first][0].isspace() or _CONTINUES.match(self._lines[first]):
            return first, 1
        end = head = first
        last = len(self._lines) if self._spare > 0 else min(first + _SHORT, len(self._lines))
        while head < len(self._lines) and self._lines[head].startswith("@"):  # decorators, and what they decorate
            following = self._logical_end(head)
            if following == head:
                return first, max(head - first, 1)
            head = following
        if head > first:
            if head == len(self._lines) or not _DEFINES.match(self._lines[head]):
                return first, head - first
            last = max(last, min(head + _SHORT, len(self._lines)))
        end = self._logical_end(head)
        if end == head:
            return first, max(head - first, 1)
        while end < last:
            line = self._lines[end]
            inside = not line.strip() or line[0].isspace() or line[0] == "#"
            if not (inside or _CONTINUES.match(line)):
                break
            following = self._logical_end(end) if line.strip() else end + 1
            if following == end:
                break
            end = following
        while end > first and not self._lines[end - 1].strip():
            end -= 1
        return end, max(head - first, 1)

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
        for _ in range(_CUTS if self._spare > 0 else _SHORT_CUTS):
            while cut > first and not self._lines[cut - 1].strip():
                cut -= 1
            if cut <= first:
                break
            source = "\n".join(self._lines[first:cut])
            try:
                tree = parse_python(source)
                return [_statement(source, node, len(tree.body) == 1) for node in tree.body], cut - first
            except SyntaxError as error:
                broken = first + (error.lineno or 1) - 1
                cut = min(cut - 1, max(broken, first))
            except (ValueError, MemoryError, RecursionError):
                break
            self._spare -= len(source)
        return [], 0


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_IMPORTS = (ast.Import, ast.ImportFrom)


def _statement(source: str, node: ast.stmt, alone: bool) -> _Statement:
    text = source if alone else ast.get_source_segment(source, node) or ""
    if isinstance(node, ast.If) and any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test)):
        return _Statement(text, node, *[frozenset()] * 4)
    binds, uses, assigned = _names(text, node)
    sets, calls = _filled(node.body if isinstance(node, _DEFINITIONS) else [node])
    if isinstance(node, _DEFINITIONS):
        # What a definition is decorated by may keep it: f.register, a table of handlers.
        sets, calls = assigned | uses & (sets | calls), {_root(decorator) for decorator in node.decorator_list}
    uses |= _quoted(node)
    if uses & {"getattr", "globals", "eval"}:  # names may be told as texts
        texts = (item.value for item in ast.walk(node) if isinstance(item, ast.Constant))
        uses |= {text for text in texts if isinstance(text, str) and text.isidentifier()}
    return _Statement(text, node, frozenset(binds), frozenset(uses), frozenset(sets), frozenset(calls))


@safe_recursion()
def _names(text: str, node: ast.stmt) -> tuple[set[str], set[str], set[str]]:
    """What a statement binds at the top level, what it needs of others, and what a function in it binds there."""
    try:
        top = symtable.symtable(text, "", "exec")
    except (SyntaxError, ValueError, RecursionError):  # what parses and does not compile
        return {getattr(node, "name", "")}, set(), set()
    assigned = set()
    symbols = top.get_symbols()
    binds = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    uses = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
    scopes = top.get_children()
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            if symbol.is_global() or (scope.get_type() == "class" and symbol.is_referenced()):
                uses.add(symbol.get_name())
            if symbol.is_declared_global() and symbol.is_assigned():
                assigned.add(symbol.get_name())
    return binds - assigned, uses, assigned


def _quoted(node: ast.stmt) -> set[str]:
    """Names in annotations that are written as texts."""
    names = set()
    for inner in ast.walk(node):
        for annotation in (getattr(inner, "annotation", None), getattr(inner, "returns", None)):
            for text in ast.walk(annotation) if isinstance(annotation, ast.AST) else ():
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    names |= set(re.findall(r"[^\W\d]\w*", text.value))
    return names


def _filled(statements: list[ast.stmt]) -> tuple[set[str], set[str]]:
    """Names of which statements change what they hold, and those that they may change by a call."""
    sets: set[str] = set()
    calls: set[str] = set()
    nodes: list[ast.AST] = [*statements]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (*_DEFINITIONS, ast.Lambda)):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            sets.add(_root(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            function = node.value.func
            setting = isinstance(function, ast.Attribute) and _SETTING.match(function.attr)
            (sets if setting else calls).add(_root(function))
            calls |= {argument.id for argument in node.value.args if isinstance(argument, ast.Name)}
    return sets, calls


def _root(node: ast.AST) -> str:
    """The name that ``x.y[0]`` or ``x.y().z`` begins with; nothing where there is none."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def last_block(text: str) -> str:
    """The last fenced block of code in a text; all of it where there is none."""
    blocks = _FENCED.findall(text)
    return blocks[-1] if blocks else text
