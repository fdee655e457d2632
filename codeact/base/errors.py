"""The two ways a run stops because of something the user can mend; the command line prints them as one line."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Bad input or a bad setting. The message is one line: the file, the row where there is one, and the remedy."""


class MissingExtraError(ImportError):
    """An optional library is absent."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs {library}: pip install "codeact[{extra}]"', name=library)


def import_extra(library: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional library.

    Raises:
        MissingExtraError: it is absent.
    """
    try:
        return importlib.import_module(library)
    except ImportError:
        raise MissingExtraError(library, extra, purpose) from None


def one_of(what: str, name: str, choices: Iterable[str]) -> str:
    """Return ``name`` if it is one of ``choices``; else raise an InputError that lists them, the closest first."""
    choices = list(choices)
    if name in choices:
        return name
    ranked = difflib.get_close_matches(name, choices, n=max(len(choices), 1), cutoff=0.0)
    raise InputError(f"{what} {name!r} is unknown; choose one of: {', '.join(ranked)}")
