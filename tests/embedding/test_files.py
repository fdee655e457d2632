"""The pair of files that keeps vectors, under kills and mix-ups."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from codeact.base.errors import InputError
from codeact.embedding import files
from codeact.embedding.files import EmbeddingMetadata, read_embeddings, write_embeddings


def metadata(rows, **changes):
    values = {"model": "m", "data_fingerprint": "f", "rows": rows, "skipped": 1, "truncated": 2, "tokens": 3}
    return EmbeddingMetadata(**values | changes)


def vectors_of(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)


@pytest.mark.parametrize("rows", [0, 1, 7, 70_000])
def test_what_is_written_is_read(tmp_path, rows):
    path = tmp_path / "deep" / "e.npy"
    vectors, numbers = vectors_of(rows), list(range(3, 3 + 2 * rows, 2))
    write_embeddings(path, vectors, [f"ä{number}" for number in numbers], numbers, metadata(rows))
    table = read_embeddings(path)
    assert np.array_equal(table.vectors, vectors)
    assert (table.vectors.dtype, table.vectors.shape) == (np.float32, (rows, 4))
    assert not rows or isinstance(table.vectors, np.memmap)
    assert table.ids.to_pylist() == [f"ä{number}" for number in numbers]
    assert table.rows.tolist() == numbers
    assert table.metadata == metadata(rows)
    assert np.array_equal(np.load(path, allow_pickle=False), vectors)
    assert sorted(file.name for file in path.parent.iterdir()) == ["e.npy", "e.rows.parquet"]


@pytest.mark.parametrize(
    ("vectors", "ids", "rows"),
    [
        (vectors_of(2), ["a"], [0, 1]),
        (vectors_of(2), ["a", "b"], [0]),
        (vectors_of(3), ["a", "b", "c"], [0, 1, 2]),
        (vectors_of(2)[0], ["a", "b"], [0, 1]),
        (vectors_of(2), ["a", "b"], [1, 0]),
        (vectors_of(2), ["a", "b"], [1, 1]),
        (vectors_of(2), ["a", "b"], [-1, 0]),
    ],
)
def test_parts_that_do_not_fit_are_not_written(tmp_path, vectors, ids, rows):
    with pytest.raises(InputError):
        write_embeddings(tmp_path / "e.npy", vectors, ids, rows, metadata(2))
    assert list(tmp_path.iterdir()) == []


def test_another_name_than_npy_is_refused(tmp_path):
    for call in (
        lambda path: write_embeddings(path, vectors_of(1), ["a"], [0], metadata(1)),
        read_embeddings,
    ):
        with pytest.raises(InputError, match=r"must end in \.npy"):
            call(tmp_path / "e.bin")


def write_pair(path, seed, rows=5):
    write_embeddings(path, vectors_of(rows, seed), [str(row) for row in range(rows)], range(rows), metadata(rows))


@pytest.mark.parametrize("rows", [5, 200_000])
@pytest.mark.parametrize("part", [".npy", ".rows.parquet"])
def test_halves_of_two_runs_are_never_taken_for_one(tmp_path, part, rows):
    write_pair(tmp_path / "a.npy", 1, rows)
    write_pair(tmp_path / "b.npy", 2, rows)
    os.replace((tmp_path / "b.npy").with_suffix(part), (tmp_path / "a.npy").with_suffix(part))
    with pytest.raises(InputError, match="are not of one run, or one is damaged; run codeact embed again"):
        read_embeddings(tmp_path / "a.npy")


def test_a_missing_cut_or_foreign_half_is_refused(tmp_path):
    path, sidecar = tmp_path / "a.npy", tmp_path / "a.rows.parquet"
    with pytest.raises(InputError, match=r"a\.npy is missing"):
        read_embeddings(path)
    write_pair(path, 1)
    npy, rows = path.read_bytes(), sidecar.read_bytes()
    sidecar.unlink()
    with pytest.raises(InputError, match=r"a\.rows\.parquet is missing"):
        read_embeddings(path)
    for cut in (0, 10, len(rows) // 2, len(rows) - 1):
        sidecar.write_bytes(rows[:cut])
        with pytest.raises(InputError, match="cannot be read"):
            read_embeddings(path)
    sidecar.write_bytes(rows)
    for cut in (0, 10, len(npy) - 1):
        path.write_bytes(npy[:cut])
        with pytest.raises(InputError, match="are not of one run"):
            read_embeddings(path)
    path.write_bytes(npy)
    pq.write_table(pa.table({"row": [0], "id": ["0"]}), sidecar)
    with pytest.raises(InputError, match="was not written by codeact embed"):
        read_embeddings(path)
    pq.write_table(pa.table({"other": [0]}), sidecar)
    with pytest.raises(InputError):
        read_embeddings(path)


def rewrite_metadata(path, **changes):
    """Make the sidecar vouch for whatever the other file now is, with ``changes`` to what it says."""
    sidecar = path.with_suffix(".rows.parquet")
    stored = json.loads(pq.read_metadata(sidecar).metadata[files._METADATA_KEY])
    stored |= {"npy_digest": files._digest(path), **changes}
    table = pq.read_table(sidecar).replace_schema_metadata({files._METADATA_KEY: json.dumps(stored)})
    pq.write_table(table, sidecar)


def test_a_newer_format_is_refused(tmp_path):
    write_pair(tmp_path / "a.npy", 1)
    rewrite_metadata(tmp_path / "a.npy")
    read_embeddings(tmp_path / "a.npy")
    rewrite_metadata(tmp_path / "a.npy", version=99)
    with pytest.raises(InputError, match="has format 99, this codeact reads 1"):
        read_embeddings(tmp_path / "a.npy")


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was loaded')",))


@pytest.mark.parametrize("content", ["pickle", "objects", "float64", "one dimension", "too few"])
def test_a_numpy_file_of_another_kind_is_refused_and_no_pickle_is_loaded(tmp_path, content):
    path = tmp_path / "a.npy"
    write_pair(path, 1)
    if content == "pickle":
        path.write_bytes(pickle.dumps(Hostile()))
    elif content == "objects":
        np.save(path, np.array([Hostile()] * 5, dtype=object), allow_pickle=True)
    else:
        wrong = {"float64": np.zeros((5, 4)), "one dimension": np.zeros(5, np.float32), "too few": vectors_of(4)}
        np.save(path, wrong[content])
    rewrite_metadata(path)
    with pytest.raises(InputError, match="run codeact embed again"):
        read_embeddings(path)


KILLED_WRITER = """
import os, sys
import numpy as np
from codeact.embedding.files import EmbeddingMetadata, write_embeddings

steps = int(sys.argv[2])
def counted(real):
    def step(*args, **kwargs):
        global steps
        if steps == 0:
            os.kill(os.getpid(), 9)
        steps -= 1
        return real(*args, **kwargs)
    return step
os.replace, os.fsync, os.unlink = counted(os.replace), counted(os.fsync), counted(os.unlink)
rows = 5
metadata = EmbeddingMetadata(model="new", data_fingerprint="f", rows=rows, skipped=0, truncated=0, tokens=0)
write_embeddings(sys.argv[1], np.full((rows, 4), 7, np.float32), ["x"] * rows, range(rows), metadata)
"""


def test_a_kill_at_any_step_leaves_the_old_pair_the_new_pair_or_a_refusal(tmp_path):
    outcomes = []
    for step in range(20):
        path = tmp_path / f"{step}.npy"
        write_pair(path, 1)
        process = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path), str(step)], check=False)
        try:
            table = read_embeddings(path)
        except InputError as error:
            assert "only count together; run codeact embed again" in str(error)  # noqa: PT017 - any of three is right
            outcomes.append("refused")
        else:
            new = table.metadata.model == "new"
            assert np.array_equal(table.vectors, np.full((5, 4), 7) if new else vectors_of(5, 1))
            assert table.ids.to_pylist() == (["x"] * 5 if new else list("01234"))
            outcomes.append("new" if new else "old")
        if process.returncode == 0:
            break
    assert outcomes == sorted(outcomes, key=["old", "refused", "new"].index)
    assert set(outcomes) == {"old", "refused", "new"}


def test_both_files_of_a_pair_get_their_names_under_one_lock(tmp_path, named_under_lock):
    named = named_under_lock(tmp_path)
    write_pair(tmp_path / "e.npy", 1)
    assert named == ["e.npy", "e.rows.parquet"]
