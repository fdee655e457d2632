"""What a pass over a file told is kept: the same rows without another pass, never those of a file that has changed."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from codeact.base.files import TEMPORARY_PREFIX
from codeact.data import kept, records, sources
from codeact.data.records import BadRow, open_records

ROWS = [{"id": f"{n % 7}", "instruction": f"é{n}", "output": "a" * n} for n in range(1, 11)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FORMS = {
    "lines.jsonl": LINES,
    "awkward.jsonl": b"\xef\xbb\xbf\n" + LINES.replace(b"\n", b"\r\n \t\r\n", 3) + b"{broken\n\n" + LINES.rstrip(b"\n"),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "packed.jsonl.gz": gzip.compress(LINES, mtime=0),
}


@pytest.fixture
def passes(tmp_path: Path, monkeypatch) -> list[str]:
    """What is read as a whole, from a cache of its own; files count as large and as written long ago."""
    monkeypatch.setenv("CODEACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "_LEAST", 0)
    monkeypatch.setattr(kept, "_MAPPED", 100)
    monkeypatch.setattr(kept, "_SETTLED", -1.0)
    monkeypatch.setattr(records, "_MANY", 0)
    done: list[str] = []

    def counted(name: str, plain):
        return lambda *arguments: done.append(name) or plain(*arguments)

    for name in ("_index_lines", "_index_array", "_file_digest"):
        monkeypatch.setattr(sources, name, counted(name, getattr(sources, name)))
    find = records.RecordSet._find_duplicates
    monkeypatch.setattr(records.RecordSet, "_find_duplicates", counted("_find_duplicates", find))
    return done


def all_of(path: Path) -> tuple[object, ...]:
    found = open_records(str(path), columns=records.Columns(id="id"))
    return found.fingerprint, len(found), [(row.reason, row.row) if isinstance(row, BadRow) else row for row in found]


@pytest.mark.parametrize("name", FORMS)
def test_another_process_reads_no_file_as_a_whole(tmp_path, passes, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(FORMS[name])
    first = all_of(path)
    assert len(passes) >= 3
    passes.clear()
    assert all_of(path) == first
    assert passes == []
    monkeypatch.setattr(kept, "_LEAST", 1 << 40)
    monkeypatch.setattr(records, "_MANY", 1 << 40)
    assert all_of(path) == first  # as nothing is kept


def test_a_file_that_changed_is_another_though_size_and_time_are_set_back(tmp_path, passes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    first, then = all_of(path), path.stat()
    for changed in (LINES.replace(b"aaa", b"bbb"), LINES.replace(b'"1"', b'"2"'), LINES.replace(b"}\n{", b" }{", 1)):
        time.sleep(0.02)  # a tick of the clock of files, which _SETTLED is for
        path.write_bytes(changed)
        os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (then.st_size, then.st_mtime_ns)
        passes.clear()
        found = all_of(path)
        assert found[0] != first[0]
        assert {"_index_lines", "_file_digest"} <= set(passes)
    assert len(list((tmp_path / "cache" / "data").glob("*/lines-*"))) == 1  # those of before are gone


def test_what_was_written_just_now_is_not_kept(tmp_path, passes, monkeypatch):
    monkeypatch.setattr(kept, "_SETTLED", 60.0)
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    for _ in range(2):
        passes.clear()
        all_of(path)
        assert "_index_lines" in passes


def test_nor_what_changes_while_it_is_read(tmp_path, passes, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    plain = sources._index_lines

    def slowly(file):
        found = plain(file)
        with path.open("ab") as more:
            more.write(LINES)
        return found

    monkeypatch.setattr(sources, "_index_lines", slowly)
    sources._JsonPart(sources._File(path, "a.jsonl", path))
    monkeypatch.setattr(sources, "_index_lines", plain)
    assert all_of(path)[1] == 2 * len(ROWS)


@pytest.mark.parametrize("damage", ["cut", "emptied", "other", "pickled"])
def test_what_is_damaged_is_made_again(tmp_path, passes, damage):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    first = all_of(path)
    files = list((tmp_path / "cache" / "data").rglob("*.npy"))
    assert len(files) == 5
    for file in files:
        if damage == "pickled":
            np.save(file, np.array([{}], object), allow_pickle=True)
        else:
            file.write_bytes({"cut": file.read_bytes()[:-3], "emptied": b"", "other": b"text"}[damage])
    passes.clear()
    assert all_of(path) == first
    assert sorted(set(passes)) == ["_file_digest", "_find_duplicates", "_index_lines"]
    passes.clear()
    assert all_of(path) == first
    assert passes == []


def test_a_cache_that_cannot_be_written_to_costs_time_only(tmp_path, passes, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    first = all_of(path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CODEACT_CACHE", str(tmp_path / "file"))
    assert all_of(path) == first


def test_who_comes_meanwhile_waits_and_maps_it(tmp_path, passes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES * 50)
    both_ask = threading.Barrier(2)

    def make() -> kept.Arrays:
        passes.append("made")
        time.sleep(0.05)
        return {"bounds": np.arange(1000)}

    def ask() -> np.ndarray:
        both_ask.wait()
        return kept.kept_of_file(path, "lines", make)["bounds"]

    with ThreadPoolExecutor(2) as pool:
        found = [asked.result() for asked in [pool.submit(ask) for _ in range(2)]]
    assert passes == ["made"]
    assert np.array_equal(*found)
    assert any(isinstance(array, np.memmap) for array in found)
    assert not list((tmp_path / "cache").rglob(f"{TEMPORARY_PREFIX}*"))
