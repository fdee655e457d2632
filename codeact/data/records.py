"""Files, folders, hub data sets or rows in memory -> records; every bad row is named, none is lost.

    open_records(data) -> RecordSet -> rows(start, stop) -> [Record | BadRow, ...]

Built for 100 million rows: JSON lines cost eight bytes of memory a row (where the row starts), tables and hub data stay
in memory-mapped Arrow, and only the rows that are asked for become Python objects. A JSON array is read as a whole
once, to find its rows: prefer lines for large data.

What counts as a row of JSON: a line that is not blank, or an element of the file's one array. Of a key that a row holds
twice the last one counts; NaN and Infinity are accepted in columns that are only carried along.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np

from codeact.base.files import atomic_path
from codeact.base.parsing import check_depth
from codeact.data.forms import Columns, Turn, read_id, read_talk
from codeact.data.kept import Arrays, kept_of_rows
from codeact.data.remote import fetched, is_address
from codeact.data.sources import (
    Part,
    Raw,
    RowError,
    Source,
    listing,
    one_line,
    open_hub,
    open_local,
    open_memory,
    refusal,
    refuse_missing_path,
    require_columns,
    show,
)

_BLOCK = 4096  # rows of one step of a pass over the whole set
_MANY = 1 << 18  # rows whose ids take seconds to compare
_SAMPLE = 100  # rows that show whether a column exists at all

logger = logging.getLogger("codeact")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One instruction row.

    ``row`` is the position in the whole data set, bad rows included, from 0. ``id`` is the value of the id column, or
    ``str(row)``. ``history`` holds the turns before the question as ``(role, text)``; ``context`` numbers those of its
    answers that are not to be learnt; ``extra`` is every other column.
    """

    id: str
    row: int
    question: str
    answer: str
    history: tuple[Turn, ...] = ()
    context: frozenset[int] = frozenset()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All of them, the question and its answer last."""
        return (*self.history, ("user", self.question), ("assistant", self.answer))


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that holds no record. ``reason`` is a short code, ``message`` one line with file, row and what is wrong.

    Codes: broken_json, invalid_utf8, not_an_object, missing_column, wrong_type, bad_conversation, tool_use,
    duplicate_id, empty_question, empty_answer. ``id`` is ``str(row)`` where the row has no readable one.
    """

    id: str
    row: int
    reason: str
    message: str


class RecordSet:
    """Rows in a fixed order, parsed when they are asked for. Made by `open_records`.

    ``source`` is what to print, ``reading`` one line about the columns and files that are read and those that are not;
    ``fingerprint`` changes when the content or the columns do.

    Raises:
        InputError: there are no rows, in a file none can be read, or no row has one of the columns.
    """

    def __init__(self, source: Source, columns: Columns) -> None:
        self.source = source.name
        self._source = source
        self._starts = [0, *accumulate(len(part) for part in source.parts)]
        if not len(self):
            raise refusal(f"{self.source} holds no rows; give a file with at least one")
        filled = [(part, start) for part, start in zip(source.parts, self._starts, strict=False) if len(part)]
        samples = {start: self._sample(part) for part, start in filled}
        first = list(chain(*samples.values()))
        self.columns = columns.found_in(first)
        for part, start in filled:
            if start == 0 or part.uniform or len(samples[start]) == _SAMPLE:  # what a few rows lack, others may have
                there = list(dict.fromkeys(name for raw in samples[start] for name in raw))
                require_columns(self.columns.required(columns), there, f"{self.source}: {self._where(start)} and after")
        self._consumed = frozenset(self.columns.names())
        read, unused = self.columns.told(first)
        self.reading = f"{self.source}: {len(self):,} row{'s' * (len(self) > 1)}, read as {read}"
        self.reading += f"; columns not used: {listing(unused)}" if unused else ""
        self.reading += f"; files not read: {listing(source.unread)}" if source.unread else ""

    def _sample(self, part: Part) -> list[dict[str, Any]]:
        """The first rows of a part that are objects; refused if none of all its rows is."""
        first: RowError | None = None
        for begin in range(0, len(part), _BLOCK if first else _SAMPLE):
            rows = list(part.raw(begin, begin + (_BLOCK if first else _SAMPLE), None))
            if objects := [raw for raw in rows if isinstance(raw, dict)]:
                return objects[:_SAMPLE]
            first = first or next(raw for raw in rows if isinstance(raw, RowError))
        if first:
            raise refusal(f"{self.source}: no row can be read; {part.where(0)}: {first.text}; mend it, or take it away")
        return []

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
        name = str(row)
        try:
            if isinstance(raw, RowError):
                raise raw
            if self.columns.id is not None:
                name = read_id(raw, self.columns.id)
                if row in self._duplicates:
                    original = self._where(self._duplicates[row])
                    raise RowError("duplicate_id", f"the id {show(name)} is already that of {original}")
            talk = read_talk(raw, self.columns)
        except RowError as fault:
            message = one_line(f"{self._where(row)}: {fault.text}")
            return BadRow(id=name, row=row, reason=fault.reason, message=message)
        *history, (_, question), (_, answer) = talk.turns
        extra = {column: value for column, value in raw.items() if column not in self._consumed}
        return Record(
            id=name,
            row=row,
            question=question,
            answer=answer,
            history=tuple(history),
            context=talk.context,
            extra=extra,
        )

    def _ids(self, start: int, stop: int) -> Iterator[tuple[int, str]]:
        assert self.columns.id is not None
        for row, raw in self._raw(start, stop, only=self.columns.id):
            if not isinstance(raw, RowError):
                try:
                    yield row, read_id(raw, self.columns.id)
                except RowError:
                    continue  # the row is bad for that; it can be nobody's duplicate

    @cached_property
    def _duplicates(self) -> dict[int, int]:
        """For every row whose id an earlier row has the first such row."""
        if len(self) < _MANY:
            return self._find_duplicates()

        def make() -> Arrays:
            found = self._find_duplicates()
            return {"rows": np.array([*found], np.int64), "firsts": np.array([*found.values()], np.int64)}

        pairs = kept_of_rows(self.fingerprint, "twice", make)
        return dict(zip(pairs["rows"].tolist(), pairs["firsts"].tolist(), strict=True))

    def _find_duplicates(self) -> dict[int, int]:
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
    data: Any, columns: Columns | None = None, *, split: str | None = None, config_name: str | None = None
) -> RecordSet:
    """Open a file, a folder, a hub data set, or what is in memory already.

    Args:
        data: a JSON (``.json``, ``.jsonl``, ``.ndjson``), ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow`` file, packed
            or not; a folder of these, in the order of their relative paths, hidden ones left out, or one that
            ``save_to_disk`` wrote or that was downloaded from the hub; either at an address, see
            `codeact.data.remote`; where no such path exists, the name of a data set on the hub; or a list of
            dictionaries, a ``datasets.Dataset``, a table of Arrow, pandas or polars.
        columns: which columns hold what; None: found by their usual names.
        split: of a hub data set (default: train) or of a folder that has several.
        config_name: likewise.

    Raises:
        InputError: nothing there, nothing in it, unreadable as a whole, or no row has one of the columns.
    """
    if isinstance(data, RecordSet):
        return data
    if not isinstance(data, str | os.PathLike):
        records = RecordSet(open_memory(data, split), columns or Columns())
    else:
        path = Path(os.path.expanduser(data))  # pathlib would raise for a user that is not there
        try:
            if is_address(str(data)):
                source = replace(open_local(fetched(str(data)), split, config_name), name=str(data))
            elif str(data).strip() and path.exists():
                source = open_local(path, split, config_name)
            else:
                refuse_missing_path(str(data))
                source = open_hub(str(data), split, config_name)
            records = RecordSet(source, columns or Columns())
        except OSError as error:
            raise refusal(f"cannot read {error.filename or path}: {error.strerror or error}") from None
    _tell(records.reading)
    return records


def open_rows(data: Any) -> Iterable[Record | BadRow]:
    """The rows of whatever `open_records` opens; records that were read already as they are."""
    if isinstance(data, RecordSet):
        return data
    if isinstance(data, str | os.PathLike | Mapping) or hasattr(data, "__arrow_c_stream__") or hasattr(data, "map"):
        return open_records(data)
    rows = list(data)
    if not rows or all(isinstance(row, Record | BadRow) for row in rows):
        return rows
    return open_records(rows)


@cache  # a run opens its data for every stage
def _tell(line: str) -> None:
    logger.info(line)


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
                plain = dict(row)
                check_depth(plain)
                handle.write(json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            except (TypeError, ValueError) as error:
                raise refusal(f"row {count} for {path} cannot be written as JSON: {error}") from None
            count += 1
    return count
