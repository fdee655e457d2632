"""Cards: the README.md beside a model or data set, with the hub's YAML front matter. One of the user's own stays."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from codeact import __version__
from codeact.base.files import atomic_path

CARD = "README.md"
MARK = "<!-- Written by codeact, and again by its next result here; without this line the file is yours and stays. -->"


def write_card(folder: str | Path, metadata: Mapping[str, Any], parts: Iterable[str]) -> bool:
    """Write ``folder/README.md``, unless one is there that codeact did not write; returns whether it was written.

    Args:
        folder: of the model or data set.
        metadata: of the front matter, by the hub's names; what is None or empty is left out.
        parts: Markdown, joined by blank lines.

    Raises:
        InputError: it cannot be written.
    """
    path = Path(folder) / CARD
    if (path.exists() or path.is_symlink()) and not is_ours(path):
        return False
    known = {key: value for key, value in metadata.items() if value not in (None, [], "")}
    front = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join([f"---\n{front}---", MARK, *parts]) + "\n", encoding="utf-8")
    return True


def is_ours(path: Path) -> bool:
    """Whether a README.md is a card that codeact wrote and nobody has taken over."""
    try:
        return path.is_file() and MARK in path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return False


def card_metadata(folder: str | Path) -> dict[str, Any]:
    """The front matter of a card that codeact wrote there; empty where there is none."""
    path = Path(folder) / CARD
    if not is_ours(path):
        return {}
    content = yaml.safe_load(path.read_text(encoding="utf-8").split("---\n", 2)[1])
    return dict(content) if isinstance(content, dict) else {}


def hub_name(name: str | None) -> str | None:
    """A model's or data set's name if it is one on the hub, and None for what lies on this machine."""
    known = name and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and not Path(name).exists()
    return name if known else None


def public_name(value: Any) -> Any:
    """A setting as others may read it: of a file or folder here the last name, not where it lies."""
    if not isinstance(value, str) or not value:
        return value
    path = Path(value).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else value


def settings_block(settings: Mapping[str, Any]) -> str:
    """Settings as YAML in Markdown, those left out that are None."""
    known = {key: public_name(value) for key, value in settings.items() if value is not None}
    return f"```yaml\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}```"


def figures_table(lines: Sequence[tuple[str, str]]) -> str:
    """Pairs of a name and what it came to as a table in Markdown."""
    rows = (" | ".join(text.strip().replace("|", "\\|").replace("\n", " ") for text in line) for line in lines)
    return "\n".join(["| | |", "|:--|:--|", *(f"| {row} |" for row in rows)])


def written_by(command: str) -> str:
    """The line that names what made it."""
    return f"Made by `codeact {command}`, version {__version__}."
