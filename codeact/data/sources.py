"""Raw rows and where they stand: JSON, CSV, Parquet, Arrow, folders of these, the hub, and what Python holds already.

    open_local(path), open_hub(name), open_memory(rows) -> Source -> parts -> raw(start, stop) -> object or RowError

Here a row is an object of JSON or Arrow; what its columns mean is for `codeact.data.forms` to say. What cannot be read
as an object is handed on in its place, as the reason why.
"""

from __future__ import annotations

import bz2
import difflib
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from codeact.base.errors import InputError
from codeact.base.files import atomic_path
from codeact.base.parsing import TooDeepError, check_depth, json_depths, parse_json, refuse_pipes, safe_recursion
from codeact.data.kept import Arrays, kept_of_file

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
_PACKED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")  # a file is unpacked by its first bytes, whatever its name
_OTHER_SUFFIXES = (".txt", ".zip", ".yaml", ".md", ".npy", ".pkl")  # never a hub name
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "config.json")  # what `datasets` does not read as rows either
_LFS_POINTER = b"version https://git-lfs"
_CHUNK = 1 << 24  # bytes of a file looked at in one go
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"  # JSON's own white space; bytes.strip() would also take \v and \f
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class RowError(Exception):
    """Why a row is no record; raised while a row is read, or handed on in the row's place."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(reason, text)
        self.reason, self.text = reason, text


Raw = dict[str, Any] | RowError


class Part(Protocol):
    """One file, one hub data set, or rows in memory; ``uniform``: every row has the same columns."""

    uniform: bool

    def __len__(self) -> int: ...
    def where(self, index: int) -> str:
        """Row ``index`` for messages: its file, and its line or row there."""
        ...

    def raw(self, start: int, stop: int, only: str | None) -> Iterable[Raw]:
        """Rows ``start`` to ``stop``; of Arrow the column ``only`` alone, if one is named."""
        ...


@dataclass(frozen=True)
class Source:
    """The parts in order, the name to print, what the data is known by (files or a digest), and the files not read."""

    name: str
    parts: Sequence[Part]
    identity: list[Path] | str
    unread: Sequence[str] = ()

    @cached_property
    def fingerprint(self) -> str:
        """The digest, of the files' content where they are files."""
        return self.identity if isinstance(self.identity, str) else _digest(self.identity)


@dataclass(frozen=True)
class _File:
    """A file of data: where it lies, what rows call it, and the bytes to read, which are other ones if it is packed."""

    path: Path
    name: str
    plain: Path

    @property
    def suffix(self) -> str:
        return _suffix(self.path)


# ---------------------------------------------------------------------------------------------------- files and folders


def open_local(path: Path, split: str | None, config_name: str | None) -> Source:
    """A file, or the files of a folder."""
    unread: list[str] = []
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _open_saved(path, split)
        files = {file.relative_to(path).as_posix(): file for file in walk(path)}
        names = sorted(n for n, file in files.items() if _suffix(file) in _SUFFIXES and file.name not in _ABOUT_DATA)
        if not names:
            raise refusal(f"{path} holds no {', '.join(_SUFFIXES)} file; give a folder that does")
        names = _of_split(path, names, split, config_name)
        _refuse_a_part(path, names)
        hidden = {file.name for file in path.iterdir() if file.name.startswith(".") and _suffix(file) in _SUFFIXES}
        unread = sorted({*files, *hidden} - set(names))
    else:
        refuse_pipes(path)
        files, names = {path.name: path}, [path.name]
        if _suffix(path) not in _SUFFIXES:
            raise refusal(f"{path} is of no kind that is read; convert it to one of {', '.join(_SUFFIXES)}")
        if split not in (None, "train") or config_name is not None:
            raise refusal(f"{path} is a file and has no split or configuration; leave these options out")
    opened = [_File(files[name], one_line(name), _unpacked(files[name])) for name in names]
    tables = _open_parquet([file for file in opened if file.suffix == ".parquet"])
    parts = [tables[file.path] if file.path in tables else _open_file(file) for file in opened]
    return Source(str(path), parts, [file.path for file in opened], unread)


def _refuse_a_part(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder in which files are missing, as their names say (train-00000-of-00002), or there twice."""
    found: dict[tuple[str, int], int] = {}
    there = set(names)
    for name in names:
        plain = next((name.removesuffix(packed) for packed in _PACKED_SUFFIXES if name.endswith(packed)), name)
        if plain != name and plain in there:
            raise refusal(f"{folder} holds {plain} and {name}, which is the same, packed; take one away, or rename it")
        if match := re.search(r"(.*)-\d{5}-of-(\d{5})", name):
            key = (match[1], int(match[2]))
            found[key] = found.get(key, 0) + 1
    for (stem, total), count in found.items():
        if count < total:
            raise refusal(f"{folder} holds {count} of the {total} files {stem}-...; fetch the rest, or rename them")


def _open_file(file: _File) -> Part:
    if file.suffix in (".csv", ".tsv", ".arrow"):
        dataset = _load("arrow", [file]) if file.suffix == ".arrow" else _read_csv(file)
        return _TablePart(dataset, 0, len(dataset), file.name)
    part = _JsonPart(file)
    rows = None if part.is_array or file.suffix != ".json" else _document(file, part)
    return part if rows is None else _ListPart(rows, file.name)


def walk(folder: Path, skip: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """Everything but folders that is not hidden, and lies in no folder that is hidden or to ``skip``.

    A link to a folder is not followed but yielded.
    """

    def refuse(error: OSError) -> None:
        raise refusal(f"cannot read {error.filename}: {error.strerror}")

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and not skip(Path(here, name))]
        links = [name for name in folders if Path(here, name).is_symlink()]
        yield from (Path(here, name) for name in (*files, *links) if not name.startswith("."))


def _suffix(file: Path) -> str:
    name = file.name.lower()
    packed = next((suffix for suffix in _PACKED_SUFFIXES if name.endswith(suffix)), "")
    return os.path.splitext(name.removesuffix(packed))[1]


def _of_split(folder: Path, names: list[str], split: str | None, config_name: str | None) -> list[str]:
    """The files of one split, as `datasets` finds them: by the folder's README.md, else by the files' names."""
    card = folder / "README.md"
    configured = card.is_file() and "configs:" in card.read_text(errors="replace")
    named = re.search("train|test|val|dev", " ".join(names), re.IGNORECASE)
    if not configured and (config_name is not None or (not named and split not in (None, "train"))):
        raise refusal(f"{folder} has no splits or configurations of its own; leave these options out")
    if not configured and not named:
        return names
    import datasets

    try:
        found = datasets.load_dataset_builder(str(folder), name=config_name).config.data_files
    except Exception as error:  # no such configuration, several, a broken card: each with types of its own
        reason = one_line(str(error).partition("Example of usage")[0])[:300].rstrip(".")
        raise refusal(f"{folder}: {reason}; choose a configuration, mend README.md, or give the files alone") from None

    def place(file: object) -> str:  # but not where a link leads: two files of the hub's cache can be one
        return os.path.join(os.path.realpath(os.path.dirname(str(file))), os.path.basename(str(file)))

    paths = {place(folder / name): name for name in names}
    splits = {str(key): [paths[file] for file in map(place, files) if file in paths] for key, files in found.items()}
    splits = {key: chosen for key, chosen in splits.items() if chosen}
    if len(splits) < 2 and split in (None, "train", *splits) and not configured:
        return names  # one split, with whatever lies beside it
    return splits[_choose(split, list(splits), str(folder))]


def _choose(split: str | None, splits: Sequence[str], where: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        given = "choose one as the split" if split is None else f"{show(split)} is not among them"
        raise refusal(f"{where} has the splits {listing(splits)}; {given}")
    return split


def _open_saved(folder: Path, split: str | None) -> Source:
    """What ``save_to_disk`` of `datasets` wrote."""
    import datasets

    files = sorted(file for file in walk(folder) if file.suffix == ".arrow")
    for file in files:
        _unpacked(file)
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # `datasets` passes on what its parts raise
        raise refusal(f"{folder} is no readable folder of save_to_disk: {error}; save it again") from None
    if isinstance(saved, datasets.DatasetDict):
        split = _choose(split, list(saved), str(folder))
        saved, files = saved[split], [file for file in files if folder / split in file.parents]
    elif split not in (None, "train", str(saved.split)):
        raise refusal(f"{folder} is one data set without splits; leave this option out")
    return Source(str(folder), [_TablePart(saved, 0, len(saved), folder.name)], files)


def _unpacked(file: Path) -> Path:
    """The file, or what it packs: in the cache of `datasets`, known by its content."""
    if not file.exists():
        raise refusal(f"cannot read {file}: it is gone or a link to nothing; take it away, or save the data there")
    refuse_pipes(file)
    with file.open("rb") as handle:
        head = handle.read(64)
    if head.startswith(_LFS_POINTER):
        raise refusal(f"{file} is a Git LFS pointer and not the data itself; fetch that with: git lfs pull")
    if head.startswith(b"PK\x03\x04"):
        raise refusal(f"{file} is a zip archive; unpack it")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise refusal(f"{file} is what a server answered (HTML or XML) and not the data; fetch that again")
    if head.startswith(b"PAR1") and _suffix(file) != ".parquet":
        raise refusal(f"{file} is a Parquet file; let its name end in .parquet")
    opener = next((opener for magic, opener in _UNPACKERS.items() if head.startswith(magic)), None)
    if opener is None:
        return file
    import datasets

    target = Path(datasets.config.HF_DATASETS_CACHE, "codeact", _digest([file]) + _suffix(file))
    if not target.exists():
        with atomic_path(target) as temporary:
            try:
                with opener(file) as packed, temporary.open("wb") as plain:
                    shutil.copyfileobj(packed, plain, _CHUNK)
            except Exception as error:  # of four libraries
                if isinstance(error, OSError) and error.errno:
                    raise  # the disk's
                raise refusal(f"{file} cannot be unpacked: {error}; copy it again") from None
    return target


def _zstd(file: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(file), compression="zstd")


_UNPACKERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd,
}


def refuse_missing_path(data: str) -> None:
    """Refuse what can only be meant as a path and is not there; anything else may be a name on the hub."""
    known = data.lower().endswith((*_SUFFIXES, *_PACKED_SUFFIXES, *_OTHER_SUFFIXES))
    if not known and not data.startswith((".", "/", "~")) and _HUB_NAME.fullmatch(data):
        return
    path = Path(os.path.expanduser(data))
    remedy = f"there is no folder {path.parent}"
    if path.parent.is_dir():
        close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
        remedy = f"did you mean {path.parent / close[0]}?" if close else "check the path"
    if "*" in path.name:
        remedy = "give the folder, of which all files are read"
    raise refusal(f"no such file: {path}; {remedy}")


def _digest(files: Iterable[Path]) -> str:
    """Of the content of the files in order; their names do not count, so a copy elsewhere is the same data."""
    total = hashlib.sha256()
    for file in files:
        try:
            total.update(kept_of_file(file, "sha256", partial(_file_digest, file))["digest"].tobytes())
        except OSError as error:
            raise refusal(f"cannot read {file}: {error.strerror or error}") from None
    return total.hexdigest()


def _file_digest(file: Path) -> Arrays:
    with file.open("rb") as handle:
        return {"digest": np.frombuffer(hashlib.file_digest(handle, "sha256").digest(), np.uint8)}


# ----------------------------------------------------------------------------------------------------------------- JSON


class _JsonPart:
    """JSON rows found by their byte offsets, row i being the bytes ``bounds[i]`` to ``bounds[i + 1]``.

    Not the JSON reader of ``datasets``: that one gives up a whole file for one broken row, and silently makes the
    types of a column one. Not a memory map either: a thousand files would hold a thousand descriptors, and a file
    that someone cuts short would kill the process with SIGBUS instead of raising an error.
    """

    uniform = False

    def __init__(self, file: _File) -> None:
        self._file = file
        self._stamp = _stamp(file.plain)
        self.is_array = _first_byte(file) == b"[" and file.suffix == ".json"
        index = partial(_index_array, file) if self.is_array else partial(_index_lines, file.plain)
        found = kept_of_file(file.plain, "array" if self.is_array else "lines", index)
        self._bounds, self._blank = found["bounds"], found["blank"]

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def where(self, index: int) -> str:
        line = index + 1 + int(np.searchsorted(self._blank, index, side="right"))
        return f"{self._file.name} row {index}" + ("" if self.is_array else f" (line {line})")

    def raw(self, start: int, stop: int, only: str | None) -> Iterator[Raw]:
        return map(_parse, self.spans(start, stop))

    def spans(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of each row, without what separates it from the next."""
        try:
            with self._file.plain.open("rb") as handle:
                if _stamp(self._file.plain) != self._stamp:
                    raise refusal(f"{self._file.path} has changed since it was opened; start again")
                handle.seek(int(self._bounds[start]))
                for size in np.diff(self._bounds[start : stop + 1]).tolist():
                    span = handle.read(size).strip(_BLANK)
                    yield span.removesuffix(b",") if self.is_array else span
        except OSError as error:
            raise refusal(f"cannot read {self._file.path}: {error.strerror or error}") from None


def _parse(span: bytes) -> Raw:
    try:
        text = span.decode()
        row = parse_json(text)
        if _ESCAPED_SURROGATE.search(span):  # rare, so the row is only encoded again where an escape asks for it
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"byte {error.start} of the row is not UTF-8")
    except UnicodeEncodeError:
        return RowError("invalid_utf8", "the row holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    except TooDeepError:
        return RowError("broken_json", "the row is nested too deeply")
    except json.JSONDecodeError as error:
        return RowError("broken_json", f"not JSON: {error.msg} at character {error.pos + 1} of the row")
    except ValueError:  # Python refuses to read a number of more than 4300 digits
        return RowError("broken_json", "the row holds a number with too many digits")
    return row if isinstance(row, dict) else RowError("not_an_object", f"the row is {kind(row)}, not an object")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _first_byte(file: _File) -> bytes:
    with file.plain.open("rb") as handle:
        while block := handle.read(1 << 16):
            if block.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise refusal(f"{file.path} is UTF-16; save it as UTF-8")
            if text := block.removeprefix(_BOM).lstrip(_BLANK):
                return text[:1]
    return b""


def _index_lines(path: Path) -> Arrays:
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
    bounds, blank = np.concatenate([*starts, [offset]]), np.concatenate(blank_lines)
    return {"bounds": bounds.astype(np.int64), "blank": blank.astype(np.int64)}


@safe_recursion()
def _index_array(file: _File) -> Arrays:
    """Bounds of the elements of the one array that the file holds; the objects read on the way are let go at once."""
    # Bytes that are not UTF-8 become single surrogates here and are found again in their own row.
    data = file.plain.read_bytes()
    text = data.removeprefix(_BOM).decode(errors="surrogateescape")
    starts: list[int] = []
    try:
        position = _after_space(text, text.index("[") + 1)
        while not text.startswith("]", position):
            if starts:
                if not text.startswith(",", position):
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
                position = _after_space(text, position + 1)
            starts.append(position)
            position = _after_space(text, _value_end(text, position))
        if (rest := _after_space(text, position + 1)) < len(text):
            raise json.JSONDecodeError("Nothing may follow the array", text, rest)
    except json.JSONDecodeError as error:
        remedy = "mend it there, or convert the file to JSON lines, where only the broken row is lost"
        place = f"line {error.lineno} column {error.colno} (row {max(len(starts) - 1, 0)})"
        raise refusal(f"{file.path} {place}: {error.msg}; {remedy}") from None
    sizes = [len(text[a:b].encode(errors="surrogateescape")) for a, b in pairwise([0, *starts, position])]
    bounds = np.cumsum(sizes, dtype=np.int64) + (len(_BOM) if data.startswith(_BOM) else 0)
    return {"bounds": bounds, "blank": np.empty(0, np.int64)}


def _after_space(text: str, position: int) -> int:
    match = json.decoder.WHITESPACE.match(text, position)  # type: ignore[attr-defined]
    return int(match.end())


def _value_end(text: str, position: int) -> int:
    """Where the JSON value at ``position`` ends, also when it is too deep or too long for Python to read."""
    try:
        return json.JSONDecoder().raw_decode(text, position)[1]
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError):
        for depth, end in json_depths(text, position):
            if depth == 0:
                return end
        raise json.JSONDecodeError("A bracket is not closed", text, position) from None


def _document(file: _File, lines: _JsonPart) -> list[Any] | None:
    """The rows of a file that is one object, on one line or many: columns, or a list of rows; None: it holds lines."""
    first = next(lines.spans(0, 1), b"") if len(lines) else b""
    if not first.startswith(b"{") or (len(lines) > 1 and not first.endswith((b"{", b"[", b",", b":"))):
        return None
    row = _parse(first if len(lines) == 1 else file.plain.read_bytes().removeprefix(_BOM))
    if isinstance(row, RowError):
        if len(lines) == 1 or not isinstance(_parse(next(lines.spans(1, 2))), RowError):
            return None
        raise refusal(f"{file.path} begins as one JSON object on many lines, and cannot be read as one: {row.text}")
    frames = [value for value in row.values() if isinstance(value, dict) and value and all(map(str.isdigit, value))]
    if frames and len(frames) == len(row):  # pandas' {column: {row number: value}}
        row = {name: list(value.values()) for name, value in row.items()}
    lists = {name: value for name, value in row.items() if isinstance(value, list)}
    tables = [
        name
        for name, value in lists.items()
        if value and all(isinstance(item, dict) and not {"role", "from"} & item.keys() for item in value)
    ]
    flat = any(value and not any(isinstance(item, dict) for item in value) for value in lists.values())
    if flat and len(lists) == len(row):
        if len(set(map(len, lists.values()))) == 1:
            return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        if not tables:
            sizes = listing([f"{name} {len(value)}" for name, value in lists.items()])
            raise refusal(f"{file.path}: its columns are of different lengths: {sizes}; make them equally long")
    if len(tables) > 1:
        raise refusal(f"{file.path} holds several lists of rows: {listing(tables)}; save one of them")
    return list(lists[tables[0]]) if tables else [row]


class _ListPart:
    """Rows in memory."""

    uniform = False

    def __init__(self, rows: Iterable[object], name: str) -> None:
        self._rows, self._name = list(map(_checked, rows)), name

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return f"{self._name} row {index}"

    def raw(self, start: int, stop: int, only: str | None) -> Sequence[Raw]:
        return self._rows[start:stop]


def _checked(row: object) -> Raw:
    if not isinstance(row, Mapping):
        return RowError("not_an_object", f"the row is {kind(row)}, not an object")
    try:
        # What pandas makes of a list column is an array of NumPy.
        plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
        check_depth(plain)
        json.dumps(plain, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return RowError("invalid_utf8", "the row holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    except (ValueError, TypeError) as error:
        return RowError("wrong_type", f"the row is nothing that JSON could hold: {error}")
    return plain


# ------------------------------------------------------------------------------------------------- tables of `datasets`


class _TablePart:
    """Rows ``base`` to ``base + length`` of a ``datasets.Dataset``, whose Arrow file is memory-mapped."""

    uniform = True

    def __init__(self, dataset: Any, base: int, length: int, name: str) -> None:
        # As Arrow, because plain indexing would decode images and sound, and would fail where their libraries are not.
        self._dataset, self._base, self._length, self._name = dataset.with_format("arrow"), base, length, name

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        return f"{self._name} row {index}"

    def raw(self, start: int, stop: int, only: str | None) -> list[Raw]:
        table = self._dataset[self._base + start : self._base + min(stop, self._length)]
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


def _open_parquet(files: Sequence[_File]) -> dict[Path, _TablePart]:
    """One memory-mapped data set for all files of the same schema, a part of it for each file."""
    if not files:
        return {}
    import pyarrow as pa
    import pyarrow.parquet as pq

    groups: dict[Any, dict[_File, int]] = {}
    for file in files:
        try:
            metadata = pq.read_metadata(file.plain)
            schema = metadata.schema.to_arrow_schema().remove_metadata()
        except (pa.ArrowException, OSError) as error:
            raise refusal(f"{file.path} is no readable Parquet file: {error}; write it again") from None
        groups.setdefault(schema, {})[file] = metadata.num_rows

    parts: dict[Path, _TablePart] = {}
    for schema, group in groups.items():
        filled = [file for file, rows in group.items() if rows]  # `datasets` cannot read a Parquet file without rows
        dataset, base = (
            _load("parquet", filled) if filled else _dataset(schema.empty_table(), str(next(iter(group)).path)),
            0,
        )
        for file, rows in group.items():
            parts[file.path] = _TablePart(dataset, base, rows, file.name)
            base += rows
    return parts


def _read_csv(file: _File) -> Any:
    """All columns as text, as they stand: "NA" is an answer and "007" an id."""
    import csv

    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    separator = "\t" if file.suffix == ".tsv" else ","
    try:
        with file.plain.open(newline="", encoding="utf-8-sig") as handle:
            names = next(csv.reader(handle, delimiter=separator), [])
        table = arrow_csv.read_csv(
            file.plain,
            arrow_csv.ReadOptions(block_size=min(max(file.plain.stat().st_size, 1), 2**31 - 1)),  # a row lies in one
            arrow_csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.large_string()), strings_can_be_null=False),
        )
    except (pa.ArrowException, csv.Error, ValueError) as error:
        raise refusal(f"{file.path}: no readable CSV: {error}; mend it, or save it as JSON lines") from None
    return _dataset(table, str(file.path))


def _dataset(table: Any, where: str) -> Any:
    import datasets

    twice = next((name for name in table.column_names if table.column_names.count(name) > 1), None)
    if twice is not None:
        raise refusal(f"{where} has the column {show(twice)} twice; rename one")
    try:
        return datasets.Dataset(table)
    except Exception as error:  # a type that `datasets` does not know
        raise refusal(f"{where} cannot be read: {error}") from None


def _load(loader: str, files: Sequence[_File]) -> Any:
    """Files of one kind as one data set, each in the order of its rows."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the one line of the error below says it
    try:
        # The cache of `datasets` knows a local file by path and time; a copy or a fast rewrite can keep both. Named by
        # its content, a changed file is read again. A path is taken for a pattern, hence the escape.
        patterns = [glob.escape(str(file.plain.resolve())) for file in files]
        name = _digest(file.plain for file in files)[:32]
        return datasets.load_dataset(loader, name=name, data_files=patterns, split="train")
    except Exception as error:  # `datasets` wraps its causes in many types
        cause = error.__cause__ or error
        others = " and others" * (len(files) > 1)
        raise refusal(f"{files[0].path}{others}: no readable {loader.capitalize()}: {cause}") from None
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def open_hub(name: str, split: str | None, config_name: str | None) -> Source:
    """A data set on the hub, by default its split train."""
    import datasets

    split = split or "train"
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
    identity = json.dumps([name, config_name, split, dataset._fingerprint])  # made of the revision by `datasets`
    part = _TablePart(dataset, 0, len(dataset), source)
    return Source(source, [part], hashlib.sha256(identity.encode()).hexdigest())


def open_memory(data: Any, split: str | None) -> Source:
    """A list of dictionaries or a dictionary of lists, a ``datasets.Dataset``, a table of Arrow, pandas or polars."""
    name = "rows" if isinstance(data, list | tuple) else type(data).__name__
    if type(data) is dict and data and all(isinstance(column, list | tuple) for column in data.values()):
        if len(set(map(len, data.values()))) > 1:
            raise refusal("the columns are of different lengths; make them equally long")
        data = [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]
    if isinstance(data, list | tuple):
        part = _ListPart(data, name)
        digest = hashlib.sha256()
        for row in part.raw(0, len(part), None):
            digest.update(json.dumps(row, default=str).encode())  # of a row that cannot be read: why
        return Source(name, [part], digest.hexdigest())
    if isinstance(data, Mapping) and type(data).__module__.startswith("datasets."):  # a DatasetDict
        data = data[_choose(split, list(data), name)]
    if hasattr(data, "__arrow_c_stream__") and not hasattr(data, "with_format"):
        import pyarrow as pa

        try:
            table = pa.table(data)
        except (pa.ArrowException, ValueError, TypeError) as error:  # columns of several types, or twice the same
            raise refusal(f"{name} cannot be read as a table: {error}") from None
        table = table.drop_columns([column for column in table.column_names if column.startswith("__index_level_")])
        data = _dataset(table, name)  # pyarrow's own tables and those of pandas and polars
    if not hasattr(data, "with_format") or not hasattr(data, "__len__"):
        raise refusal(
            f"data is of type {name}; give a path, a name on the hub, a list of dictionaries, a datasets.Dataset, or a "
            "table of Arrow, pandas or polars"
        )
    identity = hashlib.sha256(str(data._fingerprint).encode()).hexdigest()
    return Source(name, [_TablePart(data, 0, len(data), name)], identity)


# ------------------------------------------------------------------------------------------- messages of bounded length


def absolute_name(name: str) -> str:
    """A file or folder by its absolute path, so that it means the same from elsewhere; a name on the hub as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def require_columns(columns: Sequence[str], seen: Sequence[str], where: str) -> None:
    """Refuse a column that is not there, naming those that are, the closest first."""
    for column in columns:
        if column not in seen:
            close = difflib.get_close_matches(column, seen, n=3, cutoff=0.3)
            there = listing([*close, *(name for name in seen if name not in close)]) or "none"
            raise refusal(f"{where}: no column {show(column)}; name one of those there: {there}")


def kind(value: object) -> str:
    """What a value of JSON is, in words."""
    if isinstance(value, str):
        return "text" if value.strip() else "blank"
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def show(text: str) -> str:
    """``repr``, which escapes what cannot be printed, cut: rows hold megabytes and terminal codes."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def listing(names: Collection[str]) -> str:
    """The first twenty names, and how many more there are."""
    shown = [name if name.isprintable() and len(name) <= 60 else show(name) for name in list(names)[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def refusal(text: str) -> InputError:
    """An error of one line, whatever the data put into ``text``."""
    return InputError(one_line(text))


def one_line(text: str) -> str:
    """Printable, without line feeds, and cut."""
    text = text[:2000]
    printable = "".join(char if char.isprintable() else " " if char.isspace() else repr(char)[1:-1] for char in text)
    line = " ".join(printable.split())
    return line if len(line) <= 600 else line[:597] + "..."
