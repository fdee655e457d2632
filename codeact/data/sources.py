"""Raw rows and where they stand: JSON lines and arrays, Parquet, folders of these, data sets on the hub.

    open_local(path, columns), open_hub(name, columns, ...) -> Source -> parts -> raw(start, stop) -> object or RowError

Here a row is an object of JSON or Arrow; what its columns mean is for `codeact.data.records` to say. What cannot be
read as an object is handed on in its place, as the reason why.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from codeact.base.errors import InputError

_SUFFIXES = (".json", ".jsonl", ".parquet")
_OTHER_SUFFIXES = (".csv", ".tsv", ".txt", ".gz", ".zst", ".zip", ".ndjson", ".arrow", ".yaml")  # never a hub name
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CHUNK = 1 << 24  # bytes of a file looked at in one go
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"  # JSON's own white space; bytes.strip() would also take \v and \f
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_JSON_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]|[-+.\deE]+', re.DOTALL)
_JSON_SPACE = re.compile(r"[ \t\r\n]*")

_Int64 = npt.NDArray[np.int64]


class RowError(Exception):
    """Why a row is no record; raised while a row is read, or handed on in the row's place."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(reason, text)
        self.reason, self.text = reason, text


Raw = dict[str, Any] | RowError


class Part(Protocol):
    """One file, or one hub data set."""

    def __len__(self) -> int: ...
    def where(self, index: int) -> str: ...
    def raw(self, start: int, stop: int, only: str | None) -> Iterable[Raw]:
        """Rows ``start`` to ``stop``; of Arrow the column ``only`` alone, if one is named."""
        ...


@dataclass(frozen=True)
class Source:
    """The parts in order, the name to print, and what the data is known by: its files or a digest."""

    name: str
    parts: Sequence[Part]
    identity: list[Path] | str

    @cached_property
    def fingerprint(self) -> str:
        return self.identity if isinstance(self.identity, str) else _digest(self.identity)


def open_local(path: Path, columns: Sequence[str]) -> Source:
    """A file, or the files of a folder; Parquet is refused if one of ``columns`` is absent."""
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in walk(path, _SUFFIXES)}
        if not files:
            raise refusal(f"{path} holds no {', '.join(_SUFFIXES)} file; give a folder that does")
    elif path.is_file():
        files = {path.name: path}
        if path.suffix.lower() not in _SUFFIXES:
            raise refusal(f"{path} is of no kind that is read; convert it to one of {', '.join(_SUFFIXES)}")
    else:
        raise refusal(f"{path} is no regular file; save it to one first")
    names = {files[name]: one_line(name) for name in sorted(files)}
    parquet = {file: name for file, name in names.items() if file.suffix.lower() == ".parquet"}
    tables = _open_parquet(parquet, columns) if parquet else {}
    parts = [tables[file] if file in tables else _JsonPart(file, name) for file, name in names.items()]
    return Source(str(path), parts, list(names))


def walk(folder: Path, suffixes: Collection[str], skip: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """The files of these suffixes, but none that is hidden or lies in a folder that is hidden or to ``skip``."""

    def refuse(error: OSError) -> None:
        raise refusal(f"cannot read {error.filename}: {error.strerror}")

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and not skip(Path(here, name))]
        found = (Path(here, name) for name in files if not name.startswith("."))
        yield from (file for file in found if file.suffix.lower() in suffixes)


def refuse_missing_path(data: str) -> None:
    """Refuse what can only be meant as a path and is not there; anything else may be a name on the hub."""
    known = data.lower().endswith((*_SUFFIXES, *_OTHER_SUFFIXES))
    if not known and not data.startswith((".", "/", "~")) and _HUB_NAME.fullmatch(data):
        return
    path = Path(os.path.expanduser(data))
    remedy = f"there is no folder {path.parent}"
    if path.parent.is_dir():
        close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
        remedy = f"did you mean {path.parent / close[0]}?" if close else "check the path"
    raise refusal(f"no such file: {path}; {remedy}")


def _digest(files: Iterable[Path]) -> str:
    """Of the content of the files in order; their names do not count, so a copy elsewhere is the same data."""
    total = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as handle:
                total.update(hashlib.file_digest(handle, "sha256").digest())
        except OSError as error:
            raise refusal(f"cannot read {file}: {error.strerror or error}") from None
    return total.hexdigest()


class _JsonPart:
    """JSON rows found by their byte offsets, row i being the bytes ``bounds[i]`` to ``bounds[i + 1]``.

    Not the JSON reader of ``datasets``: that one gives up a whole file for one broken row, and silently makes the
    types of a column one. Not a memory map either: a thousand files would hold a thousand descriptors, and a file
    that someone cuts short would kill the process with SIGBUS instead of raising an error.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._stamp = _stamp(path)
        self._is_array = _first_byte(path) == b"[" and path.suffix.lower() == ".json"
        if self._is_array:
            self._bounds, self._blank = _index_array(path), np.empty(0, np.int64)
        else:
            self._bounds, self._blank = _index_lines(path)
            if path.suffix.lower() == ".json":
                _refuse_single_object(path, self)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def where(self, index: int) -> str:
        line = index + 1 + int(np.searchsorted(self._blank, index, side="right"))
        return f"{self._name} row {index}" + ("" if self._is_array else f" (line {line})")

    def raw(self, start: int, stop: int, only: str | None) -> Iterator[Raw]:
        return map(_parse, self.spans(start, stop))

    def spans(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of each row, without what separates it from the next."""
        try:
            with self._path.open("rb") as handle:
                if _stamp(self._path) != self._stamp:
                    raise refusal(f"{self._path} has changed since it was opened; start again")
                handle.seek(int(self._bounds[start]))
                for size in np.diff(self._bounds[start : stop + 1]).tolist():
                    span = handle.read(size).strip(_BLANK)
                    yield span.removesuffix(b",") if self._is_array else span
        except OSError as error:
            raise refusal(f"cannot read {self._path}: {error.strerror or error}") from None


def _parse(span: bytes) -> Raw:
    try:
        row = json.loads(span.decode())
        if _ESCAPED_SURROGATE.search(span):  # rare, so the row is only encoded again where an escape asks for it
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"byte {error.start} of the row is not UTF-8")
    except UnicodeEncodeError:
        return RowError("invalid_utf8", "the row holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    except RecursionError:
        return RowError("broken_json", "the row is nested too deeply")
    except json.JSONDecodeError as error:
        return RowError("broken_json", f"not JSON: {error.msg} at character {error.pos + 1} of the row")
    except ValueError:  # Python refuses to read a number of more than 4300 digits
        return RowError("broken_json", "the row holds a number with too many digits")
    return row if isinstance(row, dict) else RowError("not_an_object", f"the row is {kind(row)}, not an object")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as handle:
        while block := handle.read(1 << 16):
            if block.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise refusal(f"{path} is UTF-16; save it as UTF-8")
            if text := block.removeprefix(_BOM).lstrip(_BLANK):
                return text[:1]
    return b""


def _index_lines(path: Path) -> tuple[_Int64, _Int64]:
    """Bounds of the lines that are not blank; and for every blank line the number of the row after it."""
    starts, blank_lines, rows = [], [np.empty(0, np.int64)], 0
    with path.open("rb") as handle:
        offset = len(_BOM) if handle.read(len(_BOM)) == _BOM else 0
        handle.seek(offset)
        while chunk := handle.read(_CHUNK):
            if not chunk.endswith(b"\n"):
                chunk += handle.readline()  # so that every line lies in one chunk
            data = np.frombuffer(chunk, np.uint8)
            begins = np.concatenate([[0], np.flatnonzero(data == ord("\n")) + 1])
            begins = begins[begins < len(data)]
            blank = data[begins] == ord("\n")
            for line in np.flatnonzero(np.isin(data[begins], list(b" \t\r"))):
                begin = int(begins[line])
                end = chunk.find(b"\n", begin)
                blank[line] = not chunk[begin : None if end < 0 else end].strip(_BLANK)
            starts.append(begins[~blank] + offset)
            blank_lines.append(np.cumsum(~blank)[blank] + rows)
            rows += len(starts[-1])
            offset += len(chunk)
    return np.concatenate([*starts, [offset]]).astype(np.int64), np.concatenate(blank_lines).astype(np.int64)


def _index_array(path: Path) -> _Int64:
    """Bounds of the elements of the one array that the file holds; the objects read on the way are let go at once."""
    # Bytes that are not UTF-8 become single surrogates here and are found again in their own row.
    data = path.read_bytes()
    text = data.removeprefix(_BOM).decode(errors="surrogateescape")
    starts: list[int] = []
    try:
        position = _skip_space(text, text.index("[") + 1)
        while not text.startswith("]", position):
            if starts:
                if not text.startswith(",", position):
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
                position = _skip_space(text, position + 1)
            starts.append(position)
            position = _skip_space(text, _value_end(text, position))
        if (rest := _skip_space(text, position + 1)) < len(text):
            raise json.JSONDecodeError("Nothing may follow the array", text, rest)
    except json.JSONDecodeError as error:
        remedy = "mend it there, or convert the file to JSON lines, where only the broken row is lost"
        place = f"line {error.lineno} column {error.colno} (row {max(len(starts) - 1, 0)})"
        raise refusal(f"{path} {place}: {error.msg}; {remedy}") from None
    sizes = [len(text[a:b].encode(errors="surrogateescape")) for a, b in pairwise([0, *starts, position])]
    return np.cumsum(sizes, dtype=np.int64) + (len(_BOM) if data.startswith(_BOM) else 0)


def _skip_space(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    return match.end() if match else position


def _value_end(text: str, position: int) -> int:
    """Where the JSON value at ``position`` ends, also when it is too deep or too long for Python to read."""
    try:
        return json.JSONDecoder().raw_decode(text, position)[1]
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError):
        depth = 0
        for token in _JSON_TOKEN.finditer(text, position):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
            if depth == 0:
                return token.end()
        raise json.JSONDecodeError("A bracket is not closed", text, position) from None


def _refuse_single_object(path: Path, part: _JsonPart) -> None:
    """``.json`` files of lines and of one object on many lines both begin with a brace."""
    first, *others = part.spans(0, min(2, len(part))) if len(part) else [b""]
    if first.endswith((b"{", b"[", b",", b":")) and others and isinstance(_parse(others[0]), RowError):
        raise refusal(f"{path} is one JSON object on many lines, not rows; give an array of rows, or one row a line")


# -------------------------------------------------------------------------------------------------- Parquet and the hub


class _TablePart:
    """Rows ``base`` to ``base + length`` of a ``datasets.Dataset``, whose Arrow file is memory-mapped."""

    def __init__(self, dataset: Any, base: int, length: int, name: str) -> None:
        # As Arrow, because plain indexing would decode images and sound, and would fail where their libraries are not.
        self._dataset, self._base, self._length, self._name = dataset.with_format("arrow"), base, length, name

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        return f"{self._name} row {index}"

    def raw(self, start: int, stop: int, only: str | None) -> list[Raw]:
        table = self._dataset[self._base + start : self._base + stop]
        table = table if only is None else table.select([only])
        try:
            return list(table.to_pylist())
        except (ValueError, OverflowError):  # some value of some row; find out whose
            return [_arrow_row(table.slice(index, 1)) for index in range(len(table))]


def _arrow_row(table: Any) -> Raw:
    try:
        return dict(table.to_pylist()[0])
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"byte {error.start} of a text column is not UTF-8")
    except (ValueError, OverflowError) as error:
        return RowError("wrong_type", f"a column cannot be read: {error}")


def _open_parquet(names: Mapping[Path, str], columns: Sequence[str]) -> dict[Path, _TablePart]:
    """One memory-mapped data set for all files of the same schema, a part of it for each file."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    groups: dict[Any, dict[Path, int]] = {}
    for file in names:
        try:
            metadata = pq.read_metadata(file)
            schema = metadata.schema.to_arrow_schema().remove_metadata()
        except (pa.ArrowException, OSError) as error:
            raise refusal(f"{file} is no readable Parquet file: {error}; write it again") from None
        require(columns, schema.names, str(file))
        groups.setdefault(schema, {})[file] = metadata.num_rows

    parts: dict[Path, _TablePart] = {}
    for schema, group in groups.items():
        filled = [file for file, rows in group.items() if rows]  # `datasets` cannot read a Parquet file without rows
        dataset, base = _load_parquet(filled) if filled else datasets.Dataset(schema.empty_table()), 0
        for file, rows in group.items():
            parts[file] = _TablePart(dataset, base, rows, names[file])
            base += rows
    return parts


def _load_parquet(files: list[Path]) -> Any:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the one line of the error below says it
    try:
        # The cache of `datasets` knows a local file by path and time; a copy or a fast rewrite can keep both. Named by
        # its content, a changed file is read again. A path is taken for a pattern, hence the escape.
        patterns = [glob.escape(str(file.resolve())) for file in files]
        return datasets.load_dataset("parquet", name=_digest(files)[:32], data_files=patterns, split="train")
    except Exception as error:  # `datasets` wraps its causes in many types
        cause = error.__cause__ or error
        raise refusal(f"{files[0]}{' and others' * (len(files) > 1)}: no readable Parquet: {cause}") from None
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def open_hub(name: str, columns: Sequence[str], split: str, config_name: str | None) -> Source:
    """A data set on the hub, refused if one of ``columns`` is absent."""
    import datasets

    try:
        dataset = datasets.load_dataset(name, name=config_name, split=split)
    except Exception as error:  # offline, not found, gated, no such split: each with types and texts of its own
        text = f"{type(error).__name__} {error}".lower()
        if "gated" in text:
            remedy = f"is gated: accept its terms at https://huggingface.co/datasets/{name}, then `hf auth login`"
        elif isinstance(error, FileNotFoundError):
            remedy = "is neither a local path nor a data set on the hub; check the name, or `hf auth login` if private"
        elif isinstance(error, OSError) or "offline" in text:
            remedy = "cannot be fetched from the hub; check the network and HF_HUB_OFFLINE, or give a local path"
        else:
            remedy = f"cannot be loaded from the hub: {error}; check split and configuration, or give a local path"
        raise refusal(f"{show(name)} {remedy}") from None
    source = f"{name} ({split if config_name is None else f'{config_name}, {split}'})"
    require(columns, dataset.column_names, source)
    identity = json.dumps([name, config_name, split, dataset._fingerprint])  # made of the revision by `datasets`
    part = _TablePart(dataset, 0, len(dataset), source)
    return Source(source, [part], hashlib.sha256(identity.encode()).hexdigest())


# ------------------------------------------------------------------------------------------- messages of bounded length


def absolute_name(name: str) -> str:
    """A file or folder by its absolute path, so that it means the same from elsewhere; a name on the hub as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def require(columns: Sequence[str], seen: Sequence[str], where: str) -> None:
    for column in columns:
        if column not in seen:
            close = difflib.get_close_matches(column, seen, n=3, cutoff=0.3)
            there = listing([*close, *(name for name in seen if name not in close)]) or "none"
            raise refusal(f"{where}: no column {show(column)}; name one of those there: {there}")


def kind(value: object) -> str:
    if isinstance(value, str):
        return "text" if value.strip() else "blank"
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def show(text: str) -> str:
    """``repr``, which escapes what cannot be printed, cut: rows hold megabytes and terminal codes."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def listing(names: Collection[str]) -> str:
    shown = [name if name.isprintable() and len(name) <= 60 else show(name) for name in list(names)[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def refusal(text: str) -> InputError:
    return InputError(one_line(text))


def one_line(text: str) -> str:
    text = text[:2000]
    printable = "".join(char if char.isprintable() else " " if char.isspace() else repr(char)[1:-1] for char in text)
    line = " ".join(printable.split())
    return line if len(line) <= 600 else line[:597] + "..."
