"""The two ways a run stops because of something the user can mend; the command line prints them as one line."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input or a bad setting. The message is one line: the file, the row where there is one, and the remedy."""


class MissingExtraError(ImportError):
    """An optional library is absent."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs {library}: pip install "codeact[{extra}]"', name=library)
