"""YAML that people write: read whole and safely, with the line of every key for what is said about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from codeact.base.errors import InputError
from codeact.base.parsing import read_file, safe_recursion

_MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML without its dates: a folder may be called 2026-01-01, and a day that no calendar has is text as well."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@safe_recursion()
def read_yaml(path: Path) -> tuple[Any, Any]:
    """Return what a file holds, and its tree of nodes for ``line_of``. JSON is YAML.

    Raises:
        InputError: it cannot be read, a key is in one mapping twice, or its values are too many or nested too deeply.
    """
    try:
        text = read_file(path).decode("utf-8-sig")
        tree = yaml.compose(text, Loader=_Loader)
        _check(tree, path)
        return yaml.load(text, Loader=_Loader), tree
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"cannot read {path}: its values are nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: of UTF-8, and of numbers without end
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None


@safe_recursion()
def read_value(text: str) -> Any:
    """A value as it stands in a file, of one line; text that is no YAML is itself."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, RecursionError, yaml.YAMLError):
        return text


def line_of(node: Any, keys: Sequence[str]) -> int:
    """The line of the last of ``keys`` that is there, one below the other from ``node`` on; the first line is 1."""
    line: int = node.start_mark.line + 1
    for key in keys:
        pairs = [pair for pair in getattr(node, "value", []) if isinstance(pair, tuple) and pair[0].value == key]
        if not pairs:
            break
        line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
    return line


def located(message: str, path: str | Path, tree: Any, *sections: str) -> str:
    """Put the file and a line before ``message``: of the key in these nested sections that it names, or of the section.

    A message that is about nothing in the file stays as it is.
    """
    node = tree
    for name in sections:
        node = next((value for key, value in getattr(node, "value", ()) if key.value == name), None)
    keys = [str(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    named = [key for key in keys if re.search(rf"(--|: ){re.escape(key)}\b", message)]
    if node is None or not (sections or named):
        return message
    return f"{path}, line {line_of(tree, [*sections, *named[:1]])}: {message}"


def _check(tree: Any, path: Path) -> None:
    """Refuse aliases that repeat values without end, and a key that is in a mapping twice: YAML would keep the last."""
    nodes, count = [tree], 0
    while nodes:
        node, count = nodes.pop(), count + 1
        if count > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values, aliases written out")
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if str(key.value) in seen:
                    where = f"{path}, line {key.start_mark.line + 1}"
                    raise InputError(f"{where}: the key {key.value} is there twice; remove one")
                seen.add(str(key.value))
                nodes.append(value)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
