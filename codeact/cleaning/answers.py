"""What of an answer cannot be read: Python that does not parse, and a code block that is not closed.

Only what says that it is Python is parsed: a block marked as such, or an answer without blocks that begins as a
program. Nothing is run.
"""

from __future__ import annotations

import re
import textwrap

from codeact.base.parsing import parse_python

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n`]*$", re.MULTILINE)
_PYTHON = frozenset({"python", "py", "python3", "py3"})
# With its colon at the end of a line: in Ruby and Groovy there is none, and in Scala and Swift a type comes after it.
_DEFINES = re.compile(
    r"^(?:(?:async )?def \w+ ?\((?:[^()]|\([^()]*\)){0,2000}\)\s*(?:->[^:\n]+)?|class \w+ ?(?:\([^\n]*\))?) ?"
    r":[ \t]*(?:#.*|(?:return|pass|raise|yield|print)\b.*|\.\.\.)?$",
    re.MULTILINE,
)
_BEFORE = re.compile(r"(?:[ \t]*(?:#.*|@[\w.]+.*)?\n)*")
_IMPORTS = re.compile(r"from [\w.]+ import |import [\w.]+")
_SESSION = re.compile(r"^\s*(?:>>>|In \[\d+\]:|\$ )", re.MULTILINE)


def answer_fault(question: str, answer: str) -> str | None:
    """Why the answer cannot be read; None where nothing is wrong with it.

    Args:
        question: what the answer is to; an answer that begins with an import counts as Python where one of the two
            says so, or where the answer defines a function as Python does.
        answer: its text.
    """
    blocks, unclosed = _blocks(answer)
    if unclosed:
        return "a code block is not closed"
    if blocks:
        sources = [source for language, source in blocks if language in _PYTHON and not _SESSION.search(source)]
    else:
        answer = textwrap.dedent(answer) if answer[0].isspace() else answer
        sources = [answer] if _is_program(question, answer) else []
    return next((fault for source in sources if (fault := _syntax_fault(source)) is not None), None)


def _blocks(answer: str) -> tuple[list[tuple[str, str]], bool]:
    """The fenced blocks, language and text of each, and whether the last one is open."""
    blocks = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(answer):
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2]:
            blocks.append((opened[2].lower(), textwrap.dedent(answer[opened.end() + 1 : fence.start()])))
            opened = None
    return blocks, opened is not None


def _is_program(question: str, answer: str) -> bool:
    before = _BEFORE.match(answer)
    start = before.end() if before else 0
    if _DEFINES.match(answer, start):
        return True
    if not _IMPORTS.match(answer, start):
        return False
    return "python" in f"{question}\n{answer}".lower() or _DEFINES.search(answer) is not None


def _syntax_fault(source: str) -> str | None:
    try:
        parse_python(source)
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}"
    except (RecursionError, MemoryError):
        return "it is nested too deeply"
    except ValueError as error:  # a zero byte, half of a surrogate pair
        return str(error)
    return None
