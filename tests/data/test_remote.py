"""Data at addresses: fetched once, again when it has changed, whole or not at all. Outputs may not lie there."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import threading
from pathlib import Path

import fsspec
import pytest

from codeact.base.errors import InputError
from codeact.data import remote
from codeact.data.records import open_records
from codeact.data.texts import read_texts

ROWS = [{"instruction": f"q{row}", "output": f"a{row}" + 2000 * "x"} for row in range(5)]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CODEACT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "remote"


@pytest.fixture
def store():
    """A store in memory, which knows files by their size and time."""
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/train.jsonl", lines(ROWS))
    yield files
    files.rm("/bucket", recursive=True)


def questions(data) -> list[str]:
    return [record.question for record in open_records(data)]


def test_a_file_is_fetched_once_and_again_when_it_has_changed(store, cache, capfd, monkeypatch):
    got: list[str] = []
    real = type(store).get_file
    monkeypatch.setattr(type(store), "get_file", lambda self, path, to: (got.append(path), real(self, path, to)))
    for _ in range(2):
        assert questions("memory://bucket/train.jsonl") == [row["instruction"] for row in ROWS]
    assert len(got) == 1
    assert capfd.readouterr().err.count("fetching memory://bucket/train.jsonl, 10 KiB") == 1
    store.pipe("/bucket/train.jsonl", lines(ROWS[:2]))
    assert questions("memory://bucket/train.jsonl") == ["q0", "q1"]
    assert len(got) == 2
    old, new = sorted(cache.glob("*/*"), key=lambda place: len((place / "train.jsonl").read_bytes()), reverse=True)
    assert questions("memory://bucket/train.jsonl") == ["q0", "q1"]
    assert old.exists()  # somebody may be reading it
    os.utime(old, (0, 0))
    assert questions("memory://bucket/train.jsonl") == ["q0", "q1"]
    assert list(cache.glob("*/*")) == [new]


def test_the_same_rows_are_the_same_data_wherever_they_lie(store, tmp_path):
    (tmp_path / "here.jsonl").write_bytes(lines(ROWS))
    there, here = open_records("memory://bucket/train.jsonl"), open_records(tmp_path / "here.jsonl")
    assert there.fingerprint == here.fingerprint
    assert there.reading.startswith("memory://bucket/train.jsonl: 5 rows")


def test_a_folder_with_splits(store):
    store.pipe("/bucket/more/deep/test.jsonl", lines(ROWS[4:]))
    store.pipe("/bucket/more/train.jsonl", lines(ROWS[:1]))
    assert [record.question for record in open_records("memory://bucket/more", split="test")] == ["q4"]
    with pytest.raises(InputError, match="has the splits train, test; choose one"):
        open_records("memory://bucket/more")


def test_what_was_fetched_survives_a_kill(store, cache, monkeypatch):
    class Killed(BaseException):
        pass

    got: list[str] = []
    real = type(store).get_file

    def get(self, path, to):
        if len(got) == 1:
            Path(to).write_bytes(b"half")
            raise Killed
        got.append(path)
        real(self, path, to)

    for name in "abc":
        store.pipe(f"/bucket/parts/{name}.jsonl", lines(ROWS))
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "get_file", get)
        with pytest.raises(Killed):
            open_records("memory://bucket/parts")
    assert len(list(cache.rglob("[!.]*.jsonl"))) == 1
    monkeypatch.setattr(type(store), "get_file", lambda self, path, to: (got.append(path), real(self, path, to)))
    assert len(questions("memory://bucket/parts")) == 15
    assert [path.rpartition("/")[2] for path in got] == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_texts(store):
    store.pipe("/bucket/one.txt", b"all of it")
    store.pipe("/bucket/t.jsonl", lines([{"text": "x"}, {"text": "y"}]))
    assert list(read_texts("memory://bucket/one.txt")) == ["all of it"]
    assert list(read_texts("memory://bucket/t.jsonl")) == ["x", "y"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://bucket/none.jsonl", r"memory://bucket/none.jsonl cannot be read: .*none.jsonl.*; check the address"),
        ("memory://none/", r"cannot be read: .*; check the address, network and credentials"),
        ("nosuch://bucket/x.jsonl", r"cannot be read: .*nosuch.*; give a path, s3://"),
        ("gs://bucket/x.jsonl", r"what reads gs:// is not installed: pip install gcsfs"),
        ("https://127.0.0.1:1/x.jsonl", r"https://127.0.0.1:1/x.jsonl cannot be read: .*; check the address, network"),
        ("simplecache::memory://bucket/train.jsonl", "no such file: simplecache::memory:"),
    ],
)
def test_what_cannot_be_read_is_one_line(store, address, message):
    if address.startswith("gs:") and importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(InputError, match=message) as caught:
        open_records(address)
    assert "\n" not in str(caught.value)


def test_names_that_lead_elsewhere_and_disks_that_are_full(store, cache, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        found = {"/bucket/f/../../../x.jsonl": {"size": 1, "type": "file"}}
        patch.setattr(type(store), "find", lambda self, root, detail: found)
        store.pipe("/bucket/f/a.jsonl", lines(ROWS))
        with pytest.raises(InputError, match=r"is a name that leads elsewhere"):
            open_records("memory://bucket/f")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1024}))
    with pytest.raises(InputError, match=r"holds 10 KiB, and 1 KiB are left for .*CODEACT_CACHE names"):
        open_records("memory://bucket/train.jsonl")
    assert not list(cache.rglob("*.jsonl"))


def test_a_server(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "rows.jsonl").write_bytes(lines(ROWS))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/rows.jsonl"
        assert len(questions(address)) == 5
        with pytest.raises(InputError, match=r"none.jsonl cannot be read: .*; check the address"):
            open_records(address.replace("rows", "none"))
        server.shutdown()


def test_what_changes_by_itself_is_no_other_state_and_names_are_without_questions(store, cache, monkeypatch):
    real, count = type(store).info, iter(range(100))
    monkeypatch.setattr(
        type(store), "info", lambda self, path, **more: {**real(self, path, **more), "url": f"signed-{next(count)}"}
    )
    for _ in range(3):
        assert len(questions("memory://bucket/train.jsonl")) == 5
    assert len(list(cache.glob("*/*"))) == 1
    assert remote._name("https://host/a/rows.jsonl?sig=a/b&c=d") == "rows.jsonl"
    assert remote._name("s3://bucket/what?.jsonl") == "what?.jsonl"


def test_what_a_store_refuses_is_no_error_of_the_disk(store, monkeypatch):
    def forbidden(self, path, to):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(type(store), "get_file", forbidden)
    with pytest.raises(InputError, match=r"^memory://bucket/train.jsonl cannot be read: Forbidden; check the address"):
        open_records("memory://bucket/train.jsonl")


@pytest.mark.skipif(
    not (importlib.util.find_spec("moto") and importlib.util.find_spec("s3fs")), reason="moto or s3fs is not installed"
)
def test_a_bucket_of_a_real_s3_server(monkeypatch, codeact, tmp_path, embedder_path):
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("data")
        for part in range(2):
            bucket.pipe(f"data/rows/train-{part:05d}-of-00002.jsonl", lines(ROWS))
        output = tmp_path / "e.npy"
        code, _, err = codeact("embed", "s3://data/rows", "--model", embedder_path, "--output", output)
        assert code == 0, err
        assert "fetching s3://data/rows, 20 KiB" in err
        assert "embedded 10 questions" in err
        bucket.rm("data/rows/train-00001-of-00002.jsonl")
        code, _, err = codeact("embed", "s3://data/rows", "--model", embedder_path, "--output", output)
        assert (code, "holds 1 of the 2 files train-..." in err) == (2, True)
        code, _, err = codeact("embed", "s3://data/nothing.jsonl", "--model", embedder_path, "--output", output)
        assert (code, "s3://data/nothing.jsonl cannot be read: " in err) == (2, True)
        code, _, err = codeact("embed", "s3://data/rows", "--model", embedder_path, "--output", "s3://data/e.npy")
        assert (code, "s3://data/e.npy is no path of this machine; only data may lie there" in err) == (2, True)
    finally:
        server.stop()
