"""Files of every kind and packing, folders with splits, rows in memory: the same rows, or one line that says why."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from codeact.base.errors import InputError
from codeact.data.records import BadRow, Record, open_records, open_rows

ROWS = [{"instruction": f"question {i}, é\n", "output": "NA" if i else "007", "n": "1"} for i in range(4)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def arrow(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def csv(separator: str = ",") -> bytes:
    return pandas.DataFrame(ROWS).to_csv(index=False, sep=separator).encode()


def save(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def check(data: Any, count: int = 4, **options: Any) -> None:
    rows = list(open_records(data, **options))
    assert all(isinstance(row, Record) for row in rows), rows
    assert [(row.question, row.answer, row.extra) for row in rows if isinstance(row, Record)] == [
        (row["instruction"], row["output"], {"n": "1"}) for row in ROWS
    ] * (count // 4)


def refused(data: Any, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        open_records(data, **options)
    assert str(error.value).isprintable()
    return str(error.value)


COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
FILES = {
    "a.ndjson": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "gz_named.jsonl": gzip.compress(LINES),
    "a.jsonl.zst": zstd(LINES),
    "a.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "a.jsonl.xz": lzma.compress(LINES),
    "plain.jsonl.gz": LINES,
    "a.csv": csv(),
    "bom.csv": b"\xef\xbb\xbf" + csv(),
    "a.tsv.gz": gzip.compress(csv("\t")),
    "a.arrow": arrow(ROWS),
    "a.parquet.gz": gzip.compress(parquet(ROWS)),
    "data.json": json.dumps({"version": "1.1", "data": ROWS}).encode(),
    "pretty.json": json.dumps({"data": ROWS, "tags": ["x"]}, indent=1).encode(),
    "columns.json": json.dumps(COLUMNS).encode(),
    "pretty_columns.json": b"\xef\xbb\xbf" + json.dumps(COLUMNS, indent=2).encode(),
    "pandas.json": pandas.DataFrame(ROWS).to_json().encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    check(save(tmp_path / name, FILES[name]))


def test_one_object_is_one_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in ({"instruction": "q", "output": "a", "tags": ["x", "y"]}, {"messages": turns}):
        for indent in (None, 1):
            (record,) = open_records(save(tmp_path / "a.json", json.dumps(row, indent=indent).encode()))
            assert isinstance(record, Record)
            assert record.answer == "a"


def test_every_file_of_a_folder_is_read_or_named(tmp_path: Path) -> None:
    for number, name in enumerate(FILES):
        save(tmp_path / f"{number:02}" / name, FILES[name])
    save(tmp_path / "b.jsonl", LINES)
    save(tmp_path / "notes.txt", b"x")
    save(tmp_path / "LICENSE", b"x")
    save(tmp_path / "dataset_infos.json", b"{}")
    save(tmp_path / ".hidden", b"x")
    save(tmp_path / ".kept.jsonl", LINES)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "00")
    check(tmp_path, 4 * (len(FILES) + 1))
    assert open_records(tmp_path).reading.endswith(
        "; files not read: .kept.jsonl, LICENSE, dataset_infos.json, link, notes.txt, pipe"
    )


@pytest.mark.parametrize("name", ["data/train-{}-of-{}.jsonl", "part-{}-of-{}.jsonl", "x-{}-of-{}-ab12.jsonl.gz"])
def test_a_folder_of_which_files_are_missing_is_refused(tmp_path: Path, name: str) -> None:
    for number in (0, 1):
        save(tmp_path / name.format(f"{number:05}", "00003"), LINES)
    with pytest.raises(InputError, match=r"holds 2 of the 3 files (data/train|part|x)-\.\.\.; fetch the rest"):
        open_records(tmp_path)
    assert len(open_records(tmp_path / name.format("00001", "00003"))) == 4  # one that is named is meant
    save(tmp_path / name.format("00002", "00003"), LINES)
    check(tmp_path, 12)


@pytest.mark.parametrize(("plain", "packed"), [("b.jsonl", "b.jsonl.gz"), ("x/b.csv", "x/b.csv.zst")])
def test_a_file_that_is_there_packed_as_well_does_not_count_twice(tmp_path: Path, plain: str, packed: str) -> None:
    """As gunzip --keep leaves it."""
    for name in ("a.jsonl", plain, packed):
        save(tmp_path / name, LINES)
    assert f"holds {plain} and {packed}, which is the same, packed; take one away" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("a.jsonl", LINES.replace(b"\n", b""), "no row can be read; a.jsonl row 0 (line 1): not JSON: Extra data"),
        ("a.jsonl", b"\x00\x01\x02\n\x03", "no row can be read"),
        ("a.jsonl", b"[1, 2]\n" * 4200, "no row can be read; a.jsonl row 0 (line 1): the row is a list"),
        ("a.json", json.dumps(["text"] * 300).encode(), "no row can be read"),
        (
            "a.jsonl.gz",
            gzip.compress(random.Random(0).randbytes(5000), mtime=0)[:-900],
            "a.jsonl.gz cannot be unpacked",
        ),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:30] + b"\xff" * 60, "a.jsonl.gz cannot be unpacked"),
        ("a.jsonl.zst", zstd(LINES)[:4] + b"\xff" * 40, "a.jsonl.zst cannot be unpacked"),
        ("a.jsonl", b"PK\x03\x04....", "is a zip archive"),
        ("a.jsonl", b"\n<!DOCTYPE html><html>404", "is what a server answered (HTML or XML) and not the data"),
        ("a.csv", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "is what a server answered"),
        ("a.json", b"PAR1....", "is a Parquet file; let its name end in .parquet"),
        ("a.json", json.dumps({"train": ROWS, "test": ROWS}).encode(), "holds several lists of rows: train, test"),
        ("a.json", json.dumps({**COLUMNS, "n": ["1"]}).encode(), "of different lengths: instruction 4, output 4, n 1"),
        ("a.json", json.dumps(ROWS[0], indent=1).encode()[:-4], "as one JSON object on many lines, and cannot be read"),
        ("a.csv", b"instruction,output\na,b\nc,d,e\n", "no readable CSV"),
        ("a.csv", b"instruction,instruction,output\na,b,c\n", "has the column 'instruction' twice"),
        ("a.csv", b"instruction,output\na,caf\xe9\n", "no readable CSV"),
        ("a.arrow", b"nonsense", "no readable Arrow"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_file(
    tmp_path: Path, name: str, content: bytes, text: str
) -> None:
    message = refused(save(tmp_path / name, content))
    assert text in message
    assert name in message
    save(tmp_path / "good.jsonl", LINES)  # nor is it half a folder
    assert text in refused(tmp_path)


def test_pipes_and_dead_links_in_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", LINES)
    os.mkfifo(tmp_path / "b.jsonl")
    assert "b.jsonl: it is a pipe or a device, not a file" in refused(tmp_path)
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "b.parquet").symlink_to("/dev/zero")
    assert "b.parquet: it is a pipe or a device, not a file" in refused(tmp_path)
    (tmp_path / "b.parquet").unlink()
    (tmp_path / "b.csv").symlink_to(tmp_path / "nowhere")
    assert "b.csv: it is gone or a link to nothing" in refused(tmp_path)


DEEP = [("[" * depth + "]" * depth) for depth in (90, 150, 5_000, 200_000)]


@pytest.mark.parametrize("form", ["lines", "array", "column", "nested"])
def test_what_is_too_deep_or_too_long_loses_its_row_only(tmp_path: Path, form: str) -> None:
    good = json.dumps(ROWS[0])
    values = [*DEEP, "9" * 5000, "-" + "9" * 5000]
    rows = [good, *(f'{{"instruction": "q", "output": "a", "x": {value}}}' for value in values)]
    array = f"[{', '.join(rows)}]"
    if form in ("lines", "array"):
        path = save(
            tmp_path / f"a.json{'l' * (form == 'lines')}",
            "\n".join(rows).encode() if form == "lines" else array.encode(),
        )
        reasons = [row.reason if isinstance(row, BadRow) else "" for row in open_records(path)]
        assert reasons == ["", "", *["broken_json"] * 5]
    else:  # one value cannot be read, so its one document cannot
        text = f'{{"data": {array}}}' if form == "nested" else f'{{"instruction": [{good}], "output": [{values[-1]}]}}'
        assert "a.json" in refused(save(tmp_path / "a.json", text.encode()))


def snapshot(folder: Path) -> None:
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        save(folder / "data" / f"{split}-00000-of-00001.parquet", parquet(rows))
    save(folder / "README.md", b"# A data set\n")


def test_a_folder_of_the_hub_has_splits(tmp_path: Path) -> None:
    snapshot(tmp_path)
    assert "has the splits train, test; choose one" in refused(tmp_path)
    assert "'dev' is not among them" in refused(tmp_path, split="dev")
    assert "no splits or configurations of its own" in refused(tmp_path, config_name="x")
    check(tmp_path, split="train")
    link = tmp_path.with_name("link")
    link.symlink_to(tmp_path)
    check(link, split="train")
    records = open_records(tmp_path, split="test")
    assert len(records) == 1
    assert "files not read: README.md, data/train-00000-of-00001.parquet" in records.reading


def test_a_folder_of_the_hub_has_configurations(tmp_path: Path) -> None:
    save(tmp_path / "one" / "x.jsonl", LINES)
    save(tmp_path / "two" / "x.jsonl", LINES)
    save(tmp_path / "two" / "y.jsonl.gz", gzip.compress(LINES))
    card = "---\nconfigs:\n- config_name: small\n  data_files: one/*\n"
    card += "- config_name: large\n  data_files:\n  - split: test\n    path: two/*\n---\n"
    save(tmp_path / "README.md", card.encode())
    assert "pick one among the available configs: ['small', 'large']" in refused(tmp_path)
    assert "'larger' not found. Available: ['small', 'large']" in refused(tmp_path, config_name="larger")
    check(tmp_path, config_name="small")
    check(tmp_path, 8, config_name="large")
    assert "has the splits test; 'train' is not among them" in refused(tmp_path, config_name="large", split="train")


@pytest.mark.parametrize(
    "names", [("a.jsonl", "test_b.jsonl"), ("latest.jsonl", "x/y.jsonl"), ("train.jsonl", "b.jsonl")]
)
def test_a_folder_of_one_split_is_read_whole(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        save(tmp_path / name, LINES)
    check(tmp_path, 8)


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"), num_shards=2)
    check(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert "has the splits train, test" in refused(tmp_path / "two")
    check(tmp_path / "two", split="train")
    assert open_records(tmp_path / "two", split="test").rows(0, 9)[0].id == "0"
    prints = {open_records(tmp_path / "two", split=split).fingerprint for split in ("train", "test")}
    assert len(prints) == 2
    file = next((tmp_path / "one").glob("*.arrow"))
    save(file, b"version https://git-lfs.github.com/spec/v1\n")
    assert "is a Git LFS pointer" in refused(tmp_path / "one")


class Polars:
    """A table that speaks Arrow's own protocol and nothing else, as those of polars do."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return pa.Table.from_pylist(ROWS).__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        tuple(ROWS),
        {name: [row[name] for row in ROWS] for name in ROWS[0]},
        pandas.DataFrame(ROWS).to_dict("records"),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list([*ROWS[::-1], *ROWS]).select([3, 2, 1, 0]),
        pa.Table.from_pylist(ROWS),
        pa.RecordBatch.from_pylist(ROWS),
        pandas.DataFrame(ROWS),
        pandas.DataFrame(ROWS, index=[7, 3, 5, 1]),
        Polars(),
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
    ],
    ids=lambda data: type(data).__name__,
)
def test_rows_in_memory(data: Any) -> None:
    check(data)
    assert open_records(data).fingerprint == open_records(data).fingerprint
    assert [row.id for row in open_rows(data)] == ["0", "1", "2", "3"]


def test_rows_in_memory_that_are_no_rows() -> None:
    loop: dict[str, Any] = {**ROWS[0]}
    loop["self"] = loop
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    data = [ROWS[0], 5, {"instruction": "\ud800", "output": "a"}, loop, {"output": "a"}, {**ROWS[0], "n": deep}]
    assert [row.reason if isinstance(row, BadRow) else "" for row in open_records(data)] == [
        *("", "not_an_object", "invalid_utf8", "wrong_type", "missing_column", "wrong_type")
    ]
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)})
    assert "DatasetDict has the splits train, test" in refused(both)
    check(both, split="test")
    twice = pandas.DataFrame([["a", "b", "c"]], columns=["instruction", "instruction", "output"])
    assert "DataFrame" in refused(twice)
    assert "has the column 'instruction' twice" in refused(pa.table([["a"], ["b"]], names=["instruction"] * 2))
    assert "DataFrame cannot be read" in refused(pandas.DataFrame({"instruction": ["a", 5, b"x"]}))
    assert "different lengths" in refused({"instruction": ["a"], "output": []})
    for data in (5, None, {"a": 1}, datasets.Dataset.from_list(ROWS).to_iterable_dataset()):
        assert "give a path, a name on the hub, a list of dictionaries" in refused(data)
    assert "holds no rows" in refused([])
    assert "no column 'instruction'; name one of those there: q, a" in refused([{"q": "x", "a": "y"}])


def test_turns_out_of_pandas() -> None:
    """Parquet's lists are arrays of NumPy there."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    frame = pa.Table.from_pylist([{"messages": turns, "n": 1}]).to_pandas()
    for data in (frame, frame.to_dict("records")):
        (record,) = open_records(data)
        assert isinstance(record, Record)
        assert (record.question, record.answer, record.extra) == ("q", "a", {"n": 1})


def test_the_cases_that_failed(shared_cases: Path) -> None:
    counts = {"rows.jsonl.gz": 4, "gz_named.jsonl": 4, "nested_data.json": 4, "columns.json": 4, "bom_crlf.jsonl": 4}
    for name, count in {**counts, "mixed": 8, "saved": 2}.items():
        rows = list(open_records(shared_cases / "data" / name))
        assert len(rows) == count
        assert all(isinstance(row, Record) for row in rows)
    for name in ("lfs", "lfs/train.json", "lfs/train.jsonl", "lfs/train.parquet"):
        assert "Git LFS pointer" in refused(shared_cases / "data" / name)
    assert "has the splits train, test" in refused(shared_cases / "data" / "hubclone")
    assert len(open_records(shared_cases / "data" / "hubclone", split="train")) > 0
