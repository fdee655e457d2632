"""Plain texts: a file of text, or a column of any data that is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from codeact.base.parsing import read_file
from codeact.data.remote import fetched, is_address
from codeact.data.sources import (
    Part,
    Raw,
    RowError,
    kind,
    open_hub,
    open_local,
    refusal,
    refuse_missing_path,
    require_columns,
    show,
)

_BLOCK = 1024  # rows that are read at once


def read_texts(
    data: str, column: str = "text", split: str | None = None, config_name: str | None = None
) -> Iterator[str]:
    """Read the texts of a ``.txt`` file (one text), or of a column of a file, folder, hub data set or address.

    Raises:
        InputError: it cannot be read, or a row has no text there; the message names the row.
    """
    path = fetched(data) if is_address(data) else Path(os.path.expanduser(data))
    try:
        if path.suffix == ".txt":
            yield read_file(path).decode()
            return
        if not path.exists():
            refuse_missing_path(data)
        source = open_local(path, split, config_name) if path.exists() else open_hub(data, split, config_name)
        for part in source.parts:
            for index, raw in enumerate(chain.from_iterable(_blocks(part))):
                if isinstance(raw, RowError):
                    raise refusal(f"{part.where(index)}: {raw.text}")
                require_columns([column], list(raw), part.where(index))
                if not isinstance(raw[column], str):
                    raise refusal(f"{part.where(index)}: column {show(column)} is {kind(raw[column])}, not text")
                yield raw[column]
    except UnicodeDecodeError as error:
        raise refusal(f"{path} is no UTF-8 text: byte {error.start}; convert it") from None
    except OSError as error:
        raise refusal(f"cannot read {path}: {error.strerror or error}; give a file of text, or of rows") from None


def _blocks(part: Part) -> Iterator[Iterable[Raw]]:
    for begin in range(0, len(part), _BLOCK):
        yield part.raw(begin, min(begin + _BLOCK, len(part)), None)
