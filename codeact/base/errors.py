"""The two ways a run stops because of something the user can mend; the command line prints them as one line.

Messages are written with the flags of the command line (``lower --max-length``). Whoever comes from Python, or writes a
YAML file, knows the same settings as arguments and keys, so outside of a command they are told those.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_FLAG = re.compile(r"\b(?:(?:codeact|pip|python) [a-z][^;,:()]*|bwrap: [^;()]*)|(?<![^\s('])--([a-z][\w-]*)")
_in_command = False


@contextmanager
def in_command() -> Iterator[None]:
    """Within it messages name flags."""
    global _in_command  # noqa: PLW0603 - what an error's text is follows from who reads it
    _in_command = True
    try:
        yield
    finally:
        _in_command = False


@contextmanager
def in_file() -> Iterator[None]:
    """Within it messages name the keys of a file of settings; so do the errors that leave it, whoever reads them."""
    global _in_command  # noqa: PLW0603 - as above
    before, _in_command = _in_command, False
    try:
        yield
    except (InputError, MissingExtraError) as error:
        error.of_file = True
        raise
    finally:
        _in_command = before


def in_arguments(text: str) -> str:
    """A message with arguments for flags; commands in it stay."""
    return _FLAG.sub(lambda match: match[1].replace("-", "_") if match[1] else match[0], text)


def addressed(text: str) -> str:
    """A message for whoever reads it now: with flags within a command, with arguments elsewhere."""
    return text if _in_command else in_arguments(text)


class InputError(ValueError):
    """Bad input or a bad setting. The message is one line: the file, the row where there is one, and the remedy.

    ``of_file``: it is about a file of settings, and names its keys.
    """

    of_file = False

    def __str__(self) -> str:
        return in_arguments(super().__str__()) if self.of_file else addressed(super().__str__())


class NotHereError(InputError):
    """A model or a device that this machine lacks and another one may have."""


class MissingExtraError(ImportError):
    """An optional library is absent. ``of_file``: as of an InputError."""

    of_file = False

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs {library}: pip install "codeact[{extra}]"', name=library)

    def __str__(self) -> str:
        return in_arguments(super().__str__()) if self.of_file else addressed(super().__str__())


def import_extra(library: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional library.

    Raises:
        MissingExtraError: it is absent.
    """
    try:
        return importlib.import_module(library)
    except ImportError:
        raise MissingExtraError(library, extra, purpose) from None


def require(what: str, value: Any, has: str, kind: str) -> None:
    """Refuse an argument of another kind, known by an attribute that it lacks.

    Raises:
        InputError: it does.
    """
    if not hasattr(value, has):
        raise InputError(f"{what} must be {kind}, not {type(value).__name__}")


def one_of(what: str, name: str, choices: Iterable[str]) -> str:
    """Return ``name`` if it is one of ``choices``; else raise an InputError that lists them, the closest first."""
    choices = list(choices)
    if name in choices:
        return name
    ranked = difflib.get_close_matches(name, choices, n=max(len(choices), 1), cutoff=0.0)
    raise InputError(f"{what} {name!r} is unknown; choose one of: {', '.join(ranked)}")
