"""Questions -> vectors shard by shard: bad rows, what is named, kills, several workers, other settings."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest

from codeact.base.errors import InputError
from codeact.data.settings import DataSettings
from codeact.embedding.files import read_embeddings
from codeact.embedding.folder import EmbeddingFolder, remove_made
from codeact.embedding.stage import EmbedSettings, embed_data
from codeact.embedding.vectors import embed
from codeact.run.status import status_text
from codeact.workers.claims import Worker
from codeact.workers.engines import Begin, LocalPool, supervise, work_alone
from tests.helpers import fake_embedder
from tests.helpers.fake_embedder import FakeEmbedder

ROWS = [{"q": f"question {row}" + " w" * row, "a": "a"} for row in range(11)]
ROWS[2] = "{broken"
ROWS[8] = ROWS[9] = ROWS[10] = {"q": 5, "a": "a"}  # the last shards hold no record at all
READABLE = [0, 1, 3, 4, 5, 6, 7]


def data(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return DataSettings(source=str(path), question="q", answer="a")


@pytest.fixture
def model(monkeypatch):
    """``model(broken)``: what is loaded from then on, and what was embedded by it."""

    def change(broken=None):
        encoder = FakeEmbedder(broken)
        monkeypatch.setattr("codeact.embedding.vectors.load_embedder", lambda *_, **__: encoder)
        return encoder

    change()
    return change


def run(rows, output, **more):
    known = {"model": "fake", "batch_size": 3, "shard_size": 4, **more}
    return embed_data(data(output.with_suffix(".jsonl"), rows), EmbedSettings(**known), output)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_readable_records_are_embedded_shard_by_shard_and_bad_rows_are_counted(tmp_path, model, capfd):
    written = run(ROWS, tmp_path / "e.npy")
    table = read_embeddings(tmp_path / "e.npy")
    assert table.metadata == written
    assert (written.rows, written.skipped, written.truncated) == (7, 4, 3)
    assert table.rows.tolist() == READABLE
    assert table.ids.to_pylist() == list(map(str, READABLE))
    assert np.array_equal(table.vectors, embed([ROWS[row]["q"] for row in READABLE], FakeEmbedder()))
    assert names(tmp_path) == ["e.jsonl", "e.npy", "e.rows.parquet"]
    assert "embedded 7 questions (48 tokens; 3 cut to the model's length; 4 rows" in capfd.readouterr().err
    encoder = model()
    assert run(ROWS, tmp_path / "e.npy", dtype="float32").rows == 7
    assert encoder.batches == []  # up to date


def test_a_kill_loses_the_shard_in_hand_only(tmp_path, model):
    class Killed(BaseException):
        pass

    first = model()
    real, first.encode = first.encode, lambda texts, **how: real(texts, **how) if len(first.batches) < 2 else die()

    def die():
        raise Killed

    with pytest.raises(Killed):
        run(ROWS, tmp_path / "e.npy")
    assert not (tmp_path / "e.npy").exists()
    assert "1 of 3 shards, 4 of 11 rows" in status_text(tmp_path / "e.npy")
    second = model()
    run(ROWS, tmp_path / "e.npy")
    assert sum(map(len, second.batches)) == 4 + 1  # and one empty text, of the shard without records
    run(ROWS, tmp_path / "once.npy")
    for ending in (".npy", ".rows.parquet"):
        assert (tmp_path / f"e{ending}").read_bytes() == (tmp_path / f"once{ending}").read_bytes()
    with pytest.raises(InputError, match="is made, and nobody is at work on it"):
        status_text(tmp_path / "e.npy")


def test_shards_of_other_settings_are_made_anew_unless_somebody_is_at_work_on_them(tmp_path, model):
    model({"question 7" + " w" * 7: np.nan})
    with pytest.raises(InputError, match=r"the vector of row 7 \(id '7'\) is not finite"):
        run(ROWS, tmp_path / "e.npy")
    model()
    with (
        Worker(tmp_path / "e.shards"),
        pytest.raises(InputError, match=r"data.rows 11 there, 8 here; another process is at work on them"),
    ):
        run(ROWS[:8], tmp_path / "e.npy")
    run(ROWS[:8], tmp_path / "e.npy")
    assert read_embeddings(tmp_path / "e.npy").rows.tolist() == READABLE
    run(ROWS, tmp_path / "f.npy", shard_size=1)
    assert np.array_equal(read_embeddings(tmp_path / "f.npy").vectors, read_embeddings(tmp_path / "e.npy").vectors)


def test_another_shard_size_goes_on_and_another_model_of_the_hub_does_not(tmp_path, model):
    broken = {"question 7" + " w" * 7: np.nan}
    model(broken)
    with pytest.raises(InputError, match=r"the vector of row 7"):
        run(ROWS, tmp_path / "e.npy")
    second = model()
    run(ROWS, tmp_path / "e.npy", shard_size=2)
    assert sum(map(len, second.batches)) == 4 + 1
    model(broken)
    with pytest.raises(InputError, match=r"the vector of row 7"):
        run(ROWS, tmp_path / "f.npy")
    other = model()
    assert run(ROWS, tmp_path / "f.npy", model="other").model == "other"
    assert sum(map(len, other.batches)) == 7 + 1


@pytest.mark.parametrize("file", ["e.npy", "e.rows.parquet"])
def test_half_a_pair_is_made_anew(tmp_path, model, file):
    run(ROWS, tmp_path / "e.npy")
    content = (tmp_path / file).read_bytes()
    for half in (content[:-1], None):
        (tmp_path / file).unlink()
        if half is not None:
            (tmp_path / file).write_bytes(half)
        assert run(ROWS, tmp_path / "e.npy").rows == 7
        assert (tmp_path / file).read_bytes() == content


def test_who_comes_late_finds_all_done(tmp_path, model):
    """It had begun to load its model when others put the shards together and removed them."""
    source, output = tmp_path / "d.jsonl", tmp_path / "e.npy"
    data(source, ROWS)
    assert work_alone(fake_embedder.prepare(source, output, 4), show=False)["rows"] == 7
    remove_made(output.with_suffix(".shards"))
    assert not output.with_suffix(".shards").exists()
    stamp = output.stat().st_mtime_ns
    late = fake_embedder.prepare(source, output, 4)
    assert work_alone(late, show=False)["rows"] == 7
    assert output.stat().st_mtime_ns == stamp
    with Worker(late.folder.folder):
        remove_made(late.folder.folder)
        assert late.folder.folder.exists()  # as somebody has still to see it
    remove_made(late.folder.folder)
    assert names(tmp_path) == ["d.jsonl", "e.npy", "e.rows.parquet"]


def test_shards_of_two_widths_are_not_put_together(tmp_path):
    source, output = tmp_path / "d.jsonl", tmp_path / "e.npy"
    data(source, ROWS)
    job = fake_embedder.prepare(source, output, 4)
    for shard in range(3):
        job.do(shard, lambda rows, tokens: None)
    vectors = output.with_suffix(".shards") / "shards" / "00001-of-00003.npy"
    np.save(vectors, np.load(vectors)[:, :3])
    with pytest.raises(InputError, match=r"cannot write .*: vectors of 5 and of 3 numbers"):
        job.folder.merge()


def test_no_readable_record_at_all(tmp_path, model):
    with pytest.raises(InputError, match="none of 1 rows holds a question that can be embedded"):
        run([{"q": 5, "a": "a"}], tmp_path / "e.npy")
    assert read_embeddings(tmp_path / "e.npy").vectors.shape == (0, FakeEmbedder.dimension)


def test_a_bad_vector_names_row_and_id_and_leaves_the_old_files(tmp_path, model):
    run(ROWS, tmp_path / "e.npy")
    old = (tmp_path / "e.npy").read_bytes()
    model({"bad": np.nan})
    rows = [{"q": "good", "a": "a"}, {"q": 5, "a": "a"}, {"q": "bad", "a": "a"}]
    with pytest.raises(InputError, match=r"the vector of row 2 \(id '2'\) is not finite"):
        run(rows, tmp_path / "e.npy")
    assert (tmp_path / "e.npy").read_bytes() == old
    read_embeddings(tmp_path / "e.npy")


@pytest.mark.parametrize("what", ["vectors", "cut", "rows", "other"])
def test_a_damaged_shard_is_named(tmp_path, what):
    source, output = tmp_path / "d.jsonl", tmp_path / "e.npy"
    data(source, ROWS)
    job = fake_embedder.prepare(source, output, 4)
    for shard in range(3):
        job.do(shard, lambda rows, tokens: None)
    vectors, rows = sorted((output.with_suffix(".shards") / "shards").glob("00001*"))
    if what == "vectors":
        vectors.write_bytes(b"")
    elif what == "cut":
        np.save(vectors, np.load(vectors)[:-1])
    elif what == "rows":
        rows.write_bytes(rows.read_bytes()[:-1])
    else:
        pq.write_table(pq.read_table(rows).replace_schema_metadata(None), rows)
    with pytest.raises(InputError, match=r"00001-of-00003.*delete .*00001-of-00003.parquet|delete it and run codeact"):
        job.folder.merge()
    assert not output.exists()
    rows.unlink()
    assert work_alone(fake_embedder.prepare(source, output, 4), show=False)["rows"] == 7


@pytest.mark.parametrize("how", ["threads", "processes"])
def test_several_workers_make_the_same_files(tmp_path, how):
    source = tmp_path / "d.jsonl"
    data(source, ROWS)
    work_alone(fake_embedder.prepare(source, tmp_path / "once.npy", 1), show=False)
    output = tmp_path / "e.npy"
    if how == "processes":
        begin = Begin(folder=output.with_suffix(".shards"), prepare=partial(fake_embedder.prepare, source, output, 1))
        supervise(LocalPool(), begin, 2, lambda: EmbeddingFolder.open(begin.folder), "processes")
    else:
        barrier, jobs = threading.Barrier(4), [fake_embedder.prepare(source, output, 1) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            ended = list(pool.map(lambda job: (barrier.wait(), work_alone(job, show=False))[1], jobs))
        assert len([totals for totals in ended if totals is not None]) == 1
    for ending in (".npy", ".rows.parquet"):
        assert output.with_suffix(ending).read_bytes() == (tmp_path / "once").with_suffix(ending).read_bytes()
