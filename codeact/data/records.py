"""JSON, JSON lines, Parquet, a folder of them or a hub data set -> records; every bad row is named, none is lost.

    open_records(data, columns) -> RecordSet -> rows(start, stop) -> [Record | BadRow, ...]

Built for 100 million rows: JSON lines cost eight bytes of memory a row (where the row starts), Parquet and hub data
stay in memory-mapped Arrow, and only the rows that are asked for become Python objects. A JSON array is read as a whole
once, to find its rows: prefer lines for large data.

What counts as a row of JSON: a line that is not blank, or an element of the file's one array. Of a key that a row holds
twice the last one counts; NaN and Infinity are accepted in columns that are only carried along.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from codeact.base.files import atomic_path
from codeact.data.sources import (
    Part,
    Raw,
    RowError,
    Source,
    kind,
    listing,
    one_line,
    open_hub,
    open_local,
    refusal,
    refuse_missing_path,
    require,
    show,
)

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_BLOCK = 4096  # rows of one step of a pass over the whole set
_SAMPLE = 100  # rows that show whether a column exists at all


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns hold what.

    ``input`` is the Alpaca form's third column: where it is not blank the question becomes
    ``question + "\\n" + input``; absent, null and blank mean none. ``conversation`` holds a list of turns,
    ``{role, content}`` or ShareGPT's ``{from, value}``, and takes the place of ``question`` and ``answer``: the answer
    is the last turn, the question the user turn just before it, the history whatever came earlier.

    Raises:
        InputError: ``input`` beside ``conversation``, or two names for one column.
    """

    question: str = "instruction"
    answer: str = "output"
    input: str | None = None
    conversation: str | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        if self.conversation is not None and self.input is not None:
            raise refusal("an input column joins a question column, not a conversation; name one of the two")
        if len(set(self.names())) < len(self.names()):
            raise refusal(f"one column is named twice: {listing(self.names())}; every part needs its own column")

    def names(self) -> list[str]:
        """The columns that are read."""
        texts = [self.question, self.answer, self.input] if self.conversation is None else [self.conversation]
        return [name for name in (*texts, self.id) if name is not None]


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
    """A row that holds no record. ``reason`` is a short code, ``message`` one line with file, row and what is wrong.

    Codes: broken_json, invalid_utf8, not_an_object, missing_column, wrong_type, bad_conversation, duplicate_id,
    empty_question, empty_answer. ``id`` is ``str(row)`` where the row has no readable one.
    """

    id: str
    row: int
    reason: str
    message: str


class RecordSet:
    """Rows in a fixed order, parsed when they are asked for. Made by `open_records`.

    ``source`` is what to print, ``fingerprint`` changes when the content or the columns do.
    """

    def __init__(self, source: Source, columns: Columns) -> None:
        self.columns = columns
        self.source = source.name
        self._source = source
        self._starts = [0, *accumulate(len(part) for part in source.parts)]
        self._consumed = frozenset(columns.names())

    def __len__(self) -> int:
        """Rows, bad ones included."""
        return self._starts[-1]

    def __iter__(self) -> Iterator[Record | BadRow]:
        for start in range(0, len(self), _BLOCK):
            yield from self.rows(start, start + _BLOCK)

    def rows(self, start: int, stop: int) -> list[Record | BadRow]:
        """Rows ``start`` to ``stop`` (not included, cut at the end of the set), in order.

        With an id column the first call passes over all ids once, 16 bytes of memory a row, to find duplicates.

        Raises:
            IndexError: ``start`` is negative.
            InputError: a file has changed since it was opened, or can no longer be read.
        """
        return [self._read(row, raw) for row, raw in self._raw(start, stop)]

    @property
    def fingerprint(self) -> str:
        """64 hex digits: of the bytes of every file in order, or of hub name, configuration, split and revision.

        Of the columns as well: other columns make other questions of the same file.
        """
        identity = json.dumps([self._source.fingerprint, asdict(self.columns)])
        return hashlib.sha256(identity.encode()).hexdigest()

    def check_columns(self) -> None:
        """Refuse a column that no row has, which would make every row bad.

        The first rows of the set are looked at, and those of every file that is long enough to judge by.

        Raises:
            InputError: names the columns there are, the closest first.
        """
        long = [start for start, stop in pairwise(self._starts) if stop - start >= _SAMPLE]
        for start in sorted({0, *long}):
            objects = [raw for _, raw in self._raw(start, start + _SAMPLE) if isinstance(raw, dict)]
            if objects:
                seen = dict.fromkeys(name for raw in objects for name in raw)
                require(self.columns.names(), list(seen), f"{self.source}: {self._where(start)} and after")

    def _part(self, row: int) -> tuple[Part, int, int]:
        """The part that holds the row, and its bounds."""
        number = bisect_right(self._starts, row) - 1
        return self._source.parts[number], self._starts[number], self._starts[number + 1]

    def _where(self, row: int) -> str:
        part, first, _ = self._part(row)
        return part.where(row - first)

    def _raw(self, start: int, stop: int, only: str | None = None) -> Iterator[tuple[int, Raw]]:
        if start < 0:
            raise IndexError(f"row {start} is negative")
        while start < min(stop, len(self)):
            part, first, end = self._part(start)
            end = min(stop, end)
            yield from enumerate(part.raw(start - first, end - first, only), start)
            start = end

    def _read(self, row: int, raw: Raw) -> Record | BadRow:
        identifier = str(row)
        try:
            if isinstance(raw, RowError):
                raise raw
            if self.columns.id is not None:
                identifier = _identifier(raw, self.columns.id)
                if row in self._duplicates:
                    original = self._where(self._duplicates[row])
                    raise RowError("duplicate_id", f"the id {show(identifier)} is already that of {original}")
            history, question, answer = _texts(raw, self.columns)
            for text, reason in ((question, "empty_question"), (answer, "empty_answer")):
                if not text.strip():
                    raise RowError(reason, f"the {reason.removeprefix('empty_')} is blank")
            if self.columns.input is not None:
                question = _joined(question, raw, self.columns.input)
        except RowError as fault:
            message = one_line(f"{self._where(row)}: {fault.text}")
            return BadRow(id=identifier, row=row, reason=fault.reason, message=message)
        extra = {name: value for name, value in raw.items() if name not in self._consumed}
        return Record(id=identifier, row=row, question=question, answer=answer, history=history, extra=extra)

    def _ids(self, start: int, stop: int) -> Iterator[tuple[int, str]]:
        assert self.columns.id is not None
        for row, raw in self._raw(start, stop, only=self.columns.id):
            if not isinstance(raw, RowError):
                try:
                    yield row, _identifier(raw, self.columns.id)
                except RowError:
                    continue  # the row is bad for that; it can be nobody's duplicate

    @cached_property
    def _duplicates(self) -> dict[int, int]:
        """For every row whose id an earlier row has the first such row."""
        hashes, readable = np.zeros(len(self), np.int64), np.zeros(len(self), np.bool_)
        for start in range(0, len(self), _BLOCK):
            for row, identifier in self._ids(start, start + _BLOCK):
                hashes[row], readable[row] = hash(identifier), True
        rows = np.flatnonzero(readable)
        order = rows[np.argsort(hashes[rows], kind="stable")]
        equal = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        suspects = np.unique(np.concatenate([order[equal], order[equal + 1]]))
        # Equal hashes are not yet equal ids: only these few rows are read again and compared as text.
        first: dict[str, int] = {}
        duplicates = {}
        for block in np.split(suspects, np.flatnonzero(np.diff(suspects // _BLOCK)) + 1):
            wanted = set(block.tolist())
            for row, identifier in self._ids(min(wanted, default=0), max(wanted, default=-1) + 1):
                if row in wanted and first.setdefault(identifier, row) != row:
                    duplicates[row] = first[identifier]
        return duplicates


def open_records(
    data: str | Path, columns: Columns, *, split: str = "train", config_name: str | None = None
) -> RecordSet:
    """Open a file, a folder or a hub data set.

    Args:
        data: a ``.json`` (array or lines), ``.jsonl`` or ``.parquet`` file; a folder, whose files of these kinds are
            read in the order of their relative paths, hidden ones left out; or, where no such path exists, the name of
            a data set on the hub.
        split, config_name: of a hub data set; a local path has none.

    Raises:
        InputError: nothing there, nothing in it, unreadable as a whole, or no row has one of the columns.
    """
    path = Path(os.path.expanduser(data))  # pathlib would raise for a user that is not there
    try:
        if str(data).strip() and path.exists():
            if split != "train" or config_name is not None:
                raise refusal(f"{path} is a local path and has no split or configuration; leave these options out")
            source = open_local(path, columns.names())
        else:
            refuse_missing_path(str(data))
            source = open_hub(str(data), columns.names(), split, config_name)
    except OSError as error:
        raise refusal(f"cannot read {error.filename or path}: {error.strerror or error}") from None
    records = RecordSet(source, columns)
    if not len(records):
        raise refusal(f"{records.source} holds no rows; give a file with at least one")
    records.check_columns()
    return records


def jsonable(value: Any) -> Any:
    """Turn what a column may carry into what JSON can hold: dates to ISO 8601, bytes to base64, NaN to null."""
    match value:
        case dict():
            return {str(key): jsonable(item) for key, item in value.items()}
        case list() | tuple():
            return [jsonable(item) for item in value]
        case bytes():
            return base64.b64encode(value).decode()
        case float() if not math.isfinite(value):
            return None
        case None | str() | int() | float():
            return value
        case _:
            return value.isoformat() if hasattr(value, "isoformat") else str(value)


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line, UTF-8, whole or not at all; returns how many.

    Raises:
        InputError: the file cannot be written, or a row holds what JSON cannot (NaN, bytes, a lone surrogate).
    """
    count = 0
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        for row in rows:
            try:
                handle.write(json.dumps(dict(row), ensure_ascii=False, allow_nan=False).encode() + b"\n")
            except (TypeError, ValueError, RecursionError) as error:
                raise refusal(f"row {count} for {path} cannot be written as JSON: {error}") from None
            count += 1
    return count


# ----------------------------------------------------------------------------------------------------- what a row means


def _identifier(raw: Mapping[str, Any], column: str) -> str:
    value = _value(raw, column)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise RowError("wrong_type", f"the id column {show(column)} is {kind(value)}, not text or a whole number")
    return str(value)


def _texts(raw: Mapping[str, Any], columns: Columns) -> tuple[tuple[tuple[str, str], ...], str, str]:
    """History, question, answer."""
    if columns.conversation is not None:
        return _conversation(_value(raw, columns.conversation), columns.conversation)
    question, answer = (_text(_value(raw, name), name) for name in (columns.question, columns.answer))
    return (), question, answer


def _joined(question: str, raw: Mapping[str, Any], column: str) -> str:
    value = raw.get(column)
    text = "" if value is None else _text(value, column)
    return f"{question}\n{text}" if text.strip() else question


def _conversation(value: object, column: str) -> tuple[tuple[tuple[str, str], ...], str, str]:
    if not isinstance(value, list):
        raise RowError("wrong_type", f"column {show(column)} is {kind(value)}, not a list of turns")
    turns = tuple(_turn(turn, number) for number, turn in enumerate(value))
    if [role for role, _ in turns[-2:]] != ["user", "assistant"]:
        roles = listing([role for role, _ in turns[-2:]]) or "no turn"
        raise RowError("bad_conversation", f"the last two turns must be of user and assistant; here: {roles}")
    return turns[:-2], turns[-2][1], turns[-1][1]


def _turn(turn: object, number: int) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise RowError("bad_conversation", f"turn {number} is {kind(turn)}, not an object")
    # Arrow gives every turn of a mixed column all the keys, null where the row had none.
    role_key, text_key = ("from", "value") if turn.get("role") is None else ("role", "content")
    role, text = turn.get(role_key), turn.get(text_key)
    if not isinstance(role, str) or role not in _ROLES:
        shown = show(role) if isinstance(role, str) else kind(role)
        raise RowError("bad_conversation", f"the role of turn {number} is {shown}, not one of {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise RowError("bad_conversation", f"the {text_key} of turn {number} is {kind(text)}, not text")
    return _ROLES[role], text


def _value(raw: Mapping[str, Any], column: str) -> object:
    if column not in raw:
        raise RowError("missing_column", f"column {show(column)} is missing; the row has: {listing(raw) or 'nothing'}")
    return raw[column]


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong_type", f"column {show(column)} is {kind(value)}, not text")
    return value
