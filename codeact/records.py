"""JSON, JSON lines, Parquet, a folder of them or a hub data set -> records; every bad row is named, none is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One instruction row.

    ``row`` is the position in the whole data set, bad rows included, from 0. ``id`` is the value of the id column, or
    ``str(row)``. ``history`` holds the turns before the question as ``(role, text)``; ``extra`` every other column.
    """

    id: str
    row: int
    question: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that holds no record. ``reason`` is a short code, ``message`` one line with file, row and what is wrong."""

    id: str
    row: int
    reason: str
    message: str
