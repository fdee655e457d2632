"""What the pages of the documentation hold: blocks of code with what stands above them, tables, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[a-z]*)\s*$")
_COMMENT = re.compile(r"^\s*<!-- (?P<what>not run|output not compared): (?P<reason>.*\S) -->\s*$")


def name_of(page: Path) -> str:
    """Its path in the repository."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of code; ``marks`` are the comments directly above it: {"not run": "needs 8 GPUs"}."""

    page: Path
    line: int
    language: str
    text: str
    marks: dict[str, str]

    @property
    def place(self) -> str:
        """For messages."""
        return f"{name_of(self.page)}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A line after ``$``, continuation lines joined, and the lines that are shown below it."""

    block: Block
    text: str
    output: list[str]

    def words(self) -> list[str]:
        """As a shell splits it, without what it would put in for variables."""
        return shlex.split(self.text, comments=True)


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page."""
    found = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    marks: dict[str, str] = {}
    for number, line in lines:
        if comment := _COMMENT.match(line):
            marks[comment["what"]] = comment["reason"]
        elif fence := _FENCE.match(line):
            content = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                content.append(inner.removeprefix(fence["indent"]))
            text = "\n".join(content) + "\n"
            found.append(Block(page=page, line=number, language=fence["language"], text=text, marks=marks))
            marks = {}
        elif marks and line.strip():
            raise AssertionError(f"{name_of(page)}:{number}: a comment about a block must stand directly above it")
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a console block."""
    found: list[Command] = []
    lines = iter(block.text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            text = line.removeprefix("$ ")
            while text.endswith("\\"):
                text = text[:-1].rstrip() + " " + next(lines).strip()
            found.append(Command(block=block, text=text, output=[]))
        else:
            assert found, f"{block.place}: a console block begins with '$ ' and a command"
            found[-1].output.append(line)
    return found


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    kept, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


def sections(page: Path) -> dict[str, str]:
    """Prose below every heading, up to the next one of any level."""
    parts = re.split(r"^#+ +(.*)$", prose(page), flags=re.M)
    return {title.strip(): body for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def anchors(page: Path) -> set[str]:
    """What a link to a heading of this page may end with, as GitHub makes it."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.*)$", prose(page), flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()).strip().replace(" ", "-")
        number, unique = 0, slug
        while unique in found:
            number += 1
            unique = f"{slug}-{number}"
        found.add(unique)
    return found


def links(page: Path) -> Iterator[str]:
    """Targets of links and pictures."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def rows(section: str) -> list[list[str]]:
    """The cells of all tables of a section, without heads and rules."""
    found: list[list[str]] = []
    for table in re.findall(r"(?:^\|.*\|\n?)+", section + "\n", flags=re.M):
        body = table.strip().splitlines()[2:]
        found += [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in body]
    return found


def inline_code(text: str) -> list[str]:
    """Everything between single backticks."""
    return re.findall(r"`([^`\n]+)`", text)
