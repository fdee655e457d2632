"""Records: every format gives the same rows, every bad row is named, nothing a file can hold raises anything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codeact.base.errors import InputError
from codeact.data import records as module
from codeact.data import sources
from codeact.data.records import BadRow, Columns, Record, RecordSet, open_records, write_jsonl

GOOD = {"instruction": "add", "output": "a + b"}
PLAIN = Columns()
CONVERSATION = Columns(conversation="conversation")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def dumps(rows: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def save(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def opened(tmp_path: Path, *lines: Any, columns: Columns = PLAIN, good: dict[str, Any] = GOOD) -> list[Record | BadRow]:
    """The rows of a file of these lines (bytes as they are, others as JSON) after one good row."""
    content = dumps([good]) + b"".join(line + b"\n" if isinstance(line, bytes) else dumps([line]) for line in lines)
    return list(open_records(save(tmp_path / "data.jsonl", content), columns))[1:]


def bad(tmp_path: Path, line: Any, columns: Columns = PLAIN, good: dict[str, Any] = GOOD) -> BadRow:
    (row,) = opened(tmp_path, line, columns=columns, good=good)
    assert isinstance(row, BadRow)
    assert row.message.startswith("data.jsonl row 1 (line 2): ")
    assert row.message.isprintable()
    assert len(row.message) <= 600
    return row


def pairs(records: RecordSet) -> list[tuple[str, str]]:
    return [(row.question, row.answer) if isinstance(row, Record) else (row.reason, "") for row in records]


def refused(data: Path | str, columns: Columns = PLAIN, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_records(data, columns, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 600
    return message


# ------------------------------------------------------------------------------------------------------------ formats

ROWS: list[dict[str, Any]] = [
    {"instruction": f"question {i} é", "output": f"answer {i} \u2028 𝄞", "level": i} for i in range(7)
]


def write_rows(folder: Path, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    if kind == "lines":
        return save(folder / "data.jsonl", dumps(ROWS))
    if kind == "lines_in_json":
        return save(folder / "data.json", b"\n  \n" + dumps(ROWS))
    if kind == "array":
        return save(folder / "data.json", json.dumps(ROWS, ensure_ascii=False, indent=1).encode())
    if kind == "compact_array":
        return save(folder / "DATA.JSON", json.dumps(ROWS, ensure_ascii=False, separators=(",", ":")).encode())
    if kind == "ascii_array":
        return save(folder / "data.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode() + b"\n\n")
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "data.parquet", row_group_size=3)
    return folder / "data.parquet"


@pytest.mark.parametrize("kind", ["lines", "lines_in_json", "array", "compact_array", "ascii_array", "parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    records = open_records(write_rows(tmp_path / "d", kind), PLAIN)
    expected = [
        Record(id=str(i), row=i, question=row["instruction"], answer=row["output"], extra={"level": i})
        for i, row in enumerate(ROWS)
    ]
    assert len(records) == 7
    assert list(records) == expected
    assert records.rows(2, 5) == expected[2:5]
    assert records.rows(5, 99) == expected[5:]
    assert records.rows(4, 4) == records.rows(5, 2) == records.rows(7, 9) == records.rows(50, 60) == []
    with pytest.raises(IndexError):
        records.rows(-1, 2)


def test_a_folder_is_read_in_the_order_of_relative_paths(tmp_path: Path) -> None:
    def row(text: str) -> dict[str, str]:
        return {"instruction": text, "output": "x"}

    save(tmp_path / "b.jsonl", dumps([row("b0"), row("b1")]))
    save(tmp_path / "a" / "z.json", json.dumps([row("az")]).encode())
    save(tmp_path / "a" / "empty.jsonl", b"")
    save(tmp_path / "c.JSONL", b"{oops\n" + dumps([row("c1")]))
    for name in (".hidden.jsonl", ".git/x.jsonl", "README.md", "a/notes.txt"):
        save(tmp_path / name, b"{not read")
    pq.write_table(pa.Table.from_pylist([row("p0"), row("p1")]), tmp_path / "a" / "p.parquet")
    pq.write_table(pa.Table.from_pylist([{**row("bb"), "more": 1.5}]), tmp_path / "bb.parquet")
    pq.write_table(pa.Table.from_pylist([row("q0")]), tmp_path / "q.parquet")
    pq.write_table(pa.Table.from_pylist([row("r")]).slice(0, 0), tmp_path / "r.parquet")
    records = open_records(tmp_path, PLAIN)
    assert [question for question, _ in pairs(records)] == [
        "p0",
        "p1",
        "az",
        "b0",
        "b1",
        "bb",
        "broken_json",
        "c1",
        "q0",
    ]
    rows = list(records)
    assert [row.row for row in rows] == list(range(9))
    assert rows[5].extra == {"more": 1.5}  # type: ignore[union-attr]
    assert rows[6].message.startswith("c.JSONL row 0 (line 1): not JSON")  # type: ignore[union-attr]
    for start in range(9):
        for stop in range(start, 10):
            assert records.rows(start, stop) == rows[start:stop]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_ends_blank_lines_and_byte_order_mark(tmp_path: Path, newline: bytes, last: bool, bom: bytes) -> None:
    lines = [b"", dumps([GOOD]).strip(), b" \t", b"", b"  " + dumps([GOOD]).strip() + b" ", b"nonsense"]
    records = open_records(save(tmp_path / "data.jsonl", bom + newline.join(lines) + newline * last), PLAIN)
    first, second, third = records
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert isinstance(third, BadRow)
    assert third.message.startswith("data.jsonl row 2 (line 6): ")


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 24])
def test_lines_are_found_whatever_the_chunk(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_CHUNK", chunk)
    path = save(tmp_path / "data.jsonl", b"\n\n" + dumps(ROWS[:3]) + b"\n \n" + dumps(ROWS[3:]) + b"\n" + b"broken")
    rows = list(open_records(path, PLAIN))
    assert [row.question for row in rows[:7]] == [row["instruction"] for row in ROWS]  # type: ignore[union-attr]
    assert rows[7].message.startswith("data.jsonl row 7 (line 13): ")  # type: ignore[union-attr]


def values_of(floats: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.none() | st.booleans() | st.integers() | floats | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    )


readable = values_of(st.floats(allow_nan=False))  # Infinity is read; NaN is too, but equals nothing
writable = values_of(st.floats(allow_nan=False, allow_infinity=False))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(readable, min_size=1, max_size=6), st.sampled_from([None, 1, 2]), st.booleans())
def test_an_array_and_lines_of_the_same_values_agree(
    tmp_path: Path, values: list[Any], indent: int | None, ascii_only: bool
) -> None:
    values = [GOOD, *values]
    array = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    lines = b"".join(json.dumps(value, ensure_ascii=ascii_only).encode() + b"\n" for value in values)
    first = list(open_records(save(tmp_path / "a.json", array), PLAIN))
    second = list(open_records(save(tmp_path / "b.jsonl", lines), PLAIN))
    assert len(first) == len(second) == len(values)
    for left, right in zip(first, second, strict=True):
        assert (left == right) if isinstance(left, Record) else left.reason == right.reason  # type: ignore[union-attr]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.sampled_from(["x.jsonl", "x.json"]), st.sampled_from([b"", b"\n", b"[", b",", b"]"]))
def test_no_bytes_raise_anything_but_an_input_error(tmp_path: Path, content: bytes, name: str, start: bytes) -> None:
    path = save(tmp_path / name, start + content + b"\n" + dumps([GOOD]))
    try:
        rows = list(open_records(path, PLAIN))
    except InputError:
        refused(path)
        return
    assert [row.row for row in rows] == list(range(len(rows)))
    assert all(isinstance(row, Record) or row.message.isprintable() for row in rows)


# ----------------------------------------------------------------------------------------------------------- bad rows

DEEP = b'{"instruction": ' + b"[" * 100_000 + b"]" * 100_000 + b', "output": "x"}'
LONG_NUMBER = b'{"instruction": "x", "output": "y", "n": ' + b"9" * 5000 + b"}"


@pytest.mark.parametrize(
    ("line", "reason", "text"),
    [
        (b'{"instruction": "add"', "broken_json", "not JSON: "),
        (b'{"instruction": "a\x01b", "output": "x"}', "broken_json", "Invalid control character"),
        (b'{"instruction": "a", "output": "x"} {}', "broken_json", "Extra data"),
        (b"\x00\x00", "broken_json", "not JSON"),
        (DEEP, "broken_json", "nested too deeply"),
        (LONG_NUMBER, "broken_json", "too many digits"),
        (b'{"instruction": "caf\xe9", "output": "x"}', "invalid_utf8", "byte 20 of the row"),
        (b'{"instruction": "a", "output": "\\ud800"}', "invalid_utf8", "surrogate"),
        (b'{"instruction": "a", "output": "x", "other": ["\\uDFFF"]}', "invalid_utf8", "surrogate"),
        ([1, 2], "not_an_object", "a list"),
        ("text", "not_an_object", "text"),
        (None, "not_an_object", "null"),
        ({"instruction": "add", "input": ""}, "missing_column", "'output' is missing; the row has: instruction, input"),
        ({}, "missing_column", "the row has: nothing"),
        ({"instruction": 3, "output": "x"}, "wrong_type", "column 'instruction' is a number, not text"),
        ({"instruction": "x", "output": None}, "wrong_type", "column 'output' is null, not text"),
        ({"instruction": ["x"], "output": "x"}, "wrong_type", "a list"),
        (b'{"instruction": "x", "output": NaN}', "wrong_type", "a number"),
        ({"instruction": " \n\t", "output": "x"}, "empty_question", "the question is blank"),
        ({"instruction": "x", "output": "\u3000"}, "empty_answer", "the answer is blank"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: Any, reason: str, text: str) -> None:
    row = bad(tmp_path, line)
    assert (row.reason, row.row, row.id) == (reason, 1, "1")
    assert text in row.message


def test_a_message_is_one_short_line_whatever_the_row_holds(tmp_path: Path) -> None:
    hostile = {f"\x1b[2J\u202e\n{i}" + "x" * 100_000: i for i in range(40)}
    row = bad(tmp_path, hostile)
    assert "\\x1b[2J" in row.message
    assert "and 20 more" in bad(tmp_path, {f"c{i}": 0 for i in range(40)}).message


def test_what_is_accepted(tmp_path: Path) -> None:
    twice = b'{"instruction": "old", "instruction": "new", "output": "x", "score": NaN}'
    surrogate_pair = b'{"instruction": "\\ud834\\udd1e", "output": "\\u0000"}'
    one, two = opened(tmp_path, twice, surrogate_pair)
    assert isinstance(one, Record)
    assert isinstance(two, Record)
    assert one.question == "new"
    assert np.isnan(one.extra["score"])
    assert (two.question, two.answer) == ("𝄞", "\x00")


def test_bad_elements_of_an_array_lose_only_themselves(tmp_path: Path) -> None:
    good = dumps([GOOD]).strip()
    elements = [
        good,
        DEEP,
        LONG_NUMBER,
        b"9" * 5000,
        b'{"instruction": "caf\xe9 \xed\xa0\x80", "output": "x"}',
        b"[]",
        good,
    ]
    rows = list(open_records(save(tmp_path / "a.json", b"[" + b" ,\n".join(elements) + b"]"), PLAIN))
    reasons = [row.reason if isinstance(row, BadRow) else None for row in rows]
    assert reasons == [None, "broken_json", "broken_json", "broken_json", "invalid_utf8", "not_an_object", None]
    assert rows[4].message.startswith("a.json row 4: ")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'[{"a": 1},\n {"a" 2}]', "line 2 column 7 (row 1): Expecting ':' delimiter"),
        (b'[{"a": 1}\n {"a": 2}]', "line 2 column 2 (row 0): Expecting ',' or ']'"),
        (b'[{"a": 1}', "Expecting ',' or ']'"),
        (b'[{"a": 1},]', "Expecting value"),
        (b'[{"a": 1}]\n[', "line 2 column 1 (row 0): Nothing may follow"),
        (b"[" + b"[" * 100_000, "not closed"),
        (b'[{"a": "x', "Unterminated string"),
    ],
)
def test_a_broken_array_says_where_and_what_to_do(tmp_path: Path, content: bytes, text: str) -> None:
    message = refused(save(tmp_path / "a.json", content))
    assert str(tmp_path / "a.json") in message
    assert text in message
    assert "convert the file to JSON lines" in message


# -------------------------------------------------------------------------------------------------------- what is what


def test_input_is_joined_as_in_alpaca(tmp_path: Path) -> None:
    columns = Columns(input="input")
    values: list[Any] = ["5, 3", "", " \n", None, 7]
    rows = opened(
        tmp_path, *({**GOOD, "input": value} for value in values), GOOD, columns=columns, good={**GOOD, "input": ""}
    )
    questions = [row.question if isinstance(row, Record) else row.reason for row in rows]
    assert questions == ["add\n5, 3", "add", "add", "add", "wrong_type", "add"]
    assert all(row.extra == {} for row in rows if isinstance(row, Record))
    (kept,) = opened(tmp_path, {**GOOD, "input": "5"})
    assert isinstance(kept, Record)
    assert (kept.question, kept.extra) == ("add\n5", {})  # found by its name
    (named,) = opened(tmp_path, {**GOOD, "input": "5"}, columns=Columns(question="instruction"))
    assert isinstance(named, Record)
    assert (named.question, named.extra) == ("add", {"input": "5"})


def turns(*pairs: tuple[str, Any], form: tuple[str, str] = ("role", "content")) -> dict[str, Any]:
    return {"conversation": [dict(zip(form, pair, strict=True)) for pair in pairs]}


TALK = turns(("user", "q"), ("assistant", "a"))


def test_a_conversation_of_either_form(tmp_path: Path) -> None:
    long = [("system", "s"), ("human", "q0"), ("gpt", ""), ("human", "q"), ("gpt", "a")]
    one, two, three = opened(
        tmp_path,
        {**turns(*long, form=("from", "value")), "instruction": "kept"},
        turns(("user", "q"), ("assistant", "a")),
        turns(("assistant", "hello"), ("user", "q"), ("assistant", "a")),
        columns=CONVERSATION,
        good=TALK,
    )
    assert isinstance(one, Record)
    assert (one.question, one.answer, one.extra) == ("q", "a", {"instruction": "kept"})
    assert one.history == (("system", "s"), ("user", "q0"), ("assistant", ""))
    assert isinstance(two, Record)
    assert two.history == ()
    assert isinstance(three, Record)
    assert three.history == (("assistant", "hello"),)


@pytest.mark.parametrize(
    ("row", "reason", "text"),
    [
        (turns(), "bad_conversation", "here: no turn"),
        (turns(("user", "q")), "bad_conversation", "here: user"),
        (turns(("assistant", "a")), "bad_conversation", "here: assistant"),
        (turns(("system", "s"), ("assistant", "a")), "bad_conversation", "here: system, assistant"),
        (
            turns(("user", "q"), ("assistant", "a"), ("assistant", "b")),
            "bad_conversation",
            "here: assistant, assistant",
        ),
        (turns(("user", "q"), ("tool\n", "a")), "bad_conversation", r"the role of turn 1 is 'tool\n'"),
        (turns(("user", 3), ("assistant", "a")), "bad_conversation", "the content of turn 0 is a number"),
        (
            turns(("human", None), ("gpt", "a"), form=("from", "value")),
            "bad_conversation",
            "the value of turn 0 is null",
        ),
        (turns(("user", "q"), ("x", "a"), form=("who", "content")), "bad_conversation", "the role of turn 0 is null"),
        ({"conversation": [{"role": ["user"], "content": "q"}]}, "bad_conversation", "is a list"),
        ({"conversation": ["q", "a"]}, "bad_conversation", "turn 0 is text, not an object"),
        ({"conversation": "q"}, "wrong_type", "not a list of turns"),
        ({"conversation": None}, "wrong_type", "null"),
        ({"talk": []}, "missing_column", "'conversation' is missing"),
        (turns(("user", " "), ("assistant", "a")), "empty_question", "blank"),
        (turns(("user", "q"), ("assistant", "")), "empty_answer", "blank"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path: Path, row: dict[str, Any], reason: str, text: str) -> None:
    found = bad(tmp_path, row, CONVERSATION, TALK)
    assert found.reason == reason
    assert text in found.message


def test_conversations_in_parquet_where_each_turn_has_all_keys(tmp_path: Path) -> None:
    rows = [turns(("human", "q"), ("gpt", "a"), form=("from", "value")), turns(("user", "q"), ("assistant", "b")), TALK]
    mixed = [
        {"conversation": [{k: t.get(k) for k in ("role", "content", "from", "value")} for t in row["conversation"]]}
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist([*mixed, {"conversation": None}]), tmp_path / "data.parquet")
    records = open_records(tmp_path / "data.parquet", CONVERSATION)
    assert pairs(records) == [("q", "a"), ("q", "b"), ("q", "a"), ("wrong_type", "")]


def test_columns_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="named twice: q, q"):
        Columns(question="q", answer="q")
    with pytest.raises(InputError, match="named twice"):
        Columns(id="output", answer="output")
    with pytest.raises(InputError, match="not a conversation"):
        Columns(conversation="c", input="input")
    with pytest.raises(InputError, match="takes the place of question and answer"):
        Columns(conversation="c", question="q")


# ---------------------------------------------------------------------------------------------------------------- ids


def with_ids(*ids: Any) -> list[dict[str, Any]]:
    return [{**GOOD, "key": value} for value in ids]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_ids_are_read_and_duplicates_name_the_first(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 3)
    rows = with_ids("a", "b", "7", "a", "c", "d", "a", "b", "e")
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        save(path, b"\n" + dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    records = open_records(path, Columns(id="key"))
    found = list(records)
    assert [row.id for row in found] == ["a", "b", "7", "a", "c", "d", "a", "b", "e"]
    assert [row.row for row in found if isinstance(row, BadRow)] == [3, 6, 7]
    line = " (line 2)" if kind == "jsonl" else ""
    assert f"the id 'a' is already that of data.{kind} row 0{line}" in found[3].message  # type: ignore[union-attr]
    assert records.rows(6, 7) == found[6:7]
    assert "key" not in found[0].extra  # type: ignore[union-attr]


def test_ids_of_every_kind(tmp_path: Path) -> None:
    odd = [5, "5", True, None, 1.5, ["x"], " ", "\u00e9", 10**30]
    rows = opened(tmp_path, *with_ids(*odd), GOOD, b"oops", columns=Columns(id="key"), good={**GOOD, "key": "k"})
    assert [row.id for row in rows] == ["5", "5", "3", "4", "5", "6", "7", "é", str(10**30), "10", "11"]
    reasons = [row.reason if isinstance(row, BadRow) else "" for row in rows]
    assert reasons == ["", "duplicate_id", *["wrong_type"] * 5, "", "", "missing_column", "broken_json"]


def test_a_hash_collision_is_no_duplicate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hash", len, raising=False)
    rows = opened(tmp_path, *with_ids("a", "b", "cc", "b"), columns=Columns(id="key"), good={**GOOD, "key": "x"})
    assert [isinstance(row, BadRow) for row in rows] == [False, False, False, True]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 6) | st.sampled_from("0123 "), min_size=1, max_size=30), st.integers(1, 8))
def test_duplicates_are_those_a_dictionary_finds(tmp_path: Path, ids: list[Any], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        rows = list(open_records(save(tmp_path / "d.jsonl", dumps(with_ids(*ids))), Columns(id="key")))
    seen: set[str] = set()
    for row, value in zip(rows, ids, strict=True):
        expected = "wrong_type" if value == " " else "duplicate_id" if str(value) in seen else ""
        seen |= {str(value)} - {" "}
        assert (row.reason if isinstance(row, BadRow) else "") == expected


def test_duplicates_across_files_and_of_bad_rows(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", dumps([{"instruction": "", "output": "x", "key": "k"}, {**GOOD, "key": "m"}]))
    save(tmp_path / "b.jsonl", dumps(with_ids("k", "n")))
    rows = list(open_records(tmp_path, Columns(id="key")))
    assert [row.reason if isinstance(row, BadRow) else "" for row in rows] == ["empty_question", "", "duplicate_id", ""]
    assert "already that of a.jsonl row 0 (line 1)" in rows[2].message  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------ refused at once


def test_a_column_no_row_has(tmp_path: Path) -> None:
    rows = [{"Instruction": "x", "outputs": "y", "id": 1}] * 3 + [{"other": 1}]
    path = save(tmp_path / "data.jsonl", b"broken\n" + dumps(rows))
    message = refused(path)
    assert "no column 'instruction'" in message
    assert message.endswith("there: Instruction, outputs, id, other")
    assert "no column 'idd'" in refused(path, Columns(question="Instruction", answer="outputs", id="idd"))
    assert "no column 'conversation'" in refused(path, CONVERSATION)
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "data.parquet")
    message = refused(tmp_path / "data.parquet", Columns(question="Instruction"))
    assert message.endswith("no column 'output'; name one of those there: outputs, Instruction, id")
    (tmp_path / "data.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "aaa.parquet")
    assert "data.parquet row 0 and after: no column" in refused(tmp_path)


def test_a_long_file_without_the_column_is_refused_a_short_one_is_not(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", dumps([GOOD]))
    save(tmp_path / "b.jsonl", dumps([{"prompt": "x", "output": "y"}] * 99))
    save(tmp_path / "c.jsonl", b"oops\n" * 199 + dumps([GOOD]))  # too few rows to say anything about columns
    assert len(open_records(tmp_path, PLAIN)) == 300
    save(tmp_path / "b.jsonl", dumps([{"prompt": "x", "output": "y"}] * 100))
    assert "b.jsonl row 0 (line 1) and after: no column 'instruction'" in refused(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    for name, content in [("a.jsonl", b""), ("b.jsonl", b"\n \r\n"), ("c.json", b" [ ] "), ("d.json", b"\xef\xbb\xbf")]:
        assert "holds no rows" in refused(save(tmp_path / name, content))
    pq.write_table(pa.Table.from_pylist([GOOD]).slice(0, 0), tmp_path / "e.parquet")
    assert "holds no rows" in refused(tmp_path / "e.parquet")
    (tmp_path / "empty").mkdir()
    assert "holds no .json, .jsonl, .ndjson, .csv" in refused(tmp_path / "empty")
    assert "of no kind that is read" in refused(save(tmp_path / "data.txt", b"a,b"))
    assert "UTF-16" in refused(save(tmp_path / "u.jsonl", json.dumps(GOOD).encode("utf-16")))


def test_a_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a path was looked for on the hub")

    monkeypatch.setattr(datasets, "load_dataset", never)
    save(tmp_path / "train.jsonl", dumps([GOOD]))
    message = refused(tmp_path / "trian.jsonl")
    assert message == f"no such file: {tmp_path / 'trian.jsonl'}; did you mean {tmp_path / 'train.jsonl'}?"
    assert "there is no folder" in refused(tmp_path / "none" / "train.jsonl")
    assert refused(tmp_path / "*.jsonl").endswith("*.jsonl; give the folder, of which all files are read")
    for name in (
        "train.json",
        "./train",
        "~/no such",
        "~no-such-user/train.jsonl",
        "a/b/c",
        "data.csv",
        "two words",
        "",
        "a\nb",
        "x" * 5000 + "/y/z",
    ):
        refused(name)
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is a pipe or a device, not a file: save what it gives" in refused(tmp_path / "pipe.jsonl")
    assert "leave these options out" in refused(tmp_path / "train.jsonl", split="test")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    refused(tmp_path / "loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert "cannot read" in refused(tmp_path)


def test_a_file_that_changes_under_the_reader(tmp_path: Path) -> None:
    path = save(tmp_path / "data.jsonl", dumps(ROWS))
    records = open_records(path, PLAIN)
    save(path, dumps(ROWS[:2]))
    with pytest.raises(InputError, match="has changed since it was opened"):
        records.rows(0, 7)
    path.unlink()
    with pytest.raises(InputError, match="cannot read"):
        records.rows(0, 7)
    with pytest.raises(InputError, match="cannot read"):
        _ = records.fingerprint


# ------------------------------------------------------------------------------------------------------ Parquet and hub


def test_a_changed_parquet_file_is_read_again_even_with_its_old_time(tmp_path: Path) -> None:
    path = tmp_path / "odd [1] * ?.parquet"
    for answer in ("one", "two"):
        pq.write_table(pa.Table.from_pylist([{**GOOD, "output": answer}]), path)
        os.utime(path, (1, 1))
        assert pairs(open_records(path, PLAIN)) == [("add", answer)]


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "middle"])
def test_a_corrupt_parquet_file(tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS * 50), path)
    content = path.read_bytes()
    middle = content[:4] + b"\xff" * 300 + content[304:]
    save(path, {"text": b"hello", "empty": b"", "cut": content[:-20], "middle": middle}[damage])
    assert "no readable Parquet" in refused(path)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_parquet_text_that_is_not_utf8_loses_its_row_only(tmp_path: Path) -> None:
    offsets, data = pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"a\xffc")
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, data])
    pq.write_table(pa.table({"instruction": text, "output": ["x", "y", None]}), tmp_path / "data.parquet")
    one, two, three = open_records(tmp_path / "data.parquet", PLAIN)
    assert isinstance(one, Record)
    assert isinstance(two, BadRow)
    assert (two.reason, two.message) == ("invalid_utf8", "data.parquet row 1: byte 0 of a text column is not UTF-8")
    assert isinstance(three, BadRow)
    assert three.reason == "wrong_type"


def test_parquet_that_datasets_has_no_type_for(tmp_path: Path) -> None:
    table = pa.table(
        {
            **{name: [value] for name, value in GOOD.items()},
            "m": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())),
        }
    )
    pq.write_table(table, tmp_path / "data.parquet")
    assert "no readable Parquet" in refused(tmp_path / "data.parquet")


def test_the_hub_is_asked_with_name_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return datasets.Dataset.from_list([GOOD, {"instruction": None, "output": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = open_records("some-one/set_v1.5", PLAIN, split="test[:2]", config_name="python")
    assert asked == [("some-one/set_v1.5", {"name": "python", "split": "test[:2]"})]
    assert pairs(records) == [("add", "a + b"), ("wrong_type", "")]
    assert records.source == "some-one/set_v1.5 (python, test[:2])"
    assert len(records.fingerprint) == 64
    assert records.fingerprint != open_records("some-one/set_v1.5", PLAIN, split="test").fingerprint
    assert "no column 'answer'; name one of those there: " in refused("plain", Columns(answer="answer"))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConnectionError("Couldn't reach it (OfflineModeIsEnabled)"), "check the network"),
        (
            FileNotFoundError("Dataset 'x/y' doesn't exist on the Hub or cannot be accessed."),
            "neither a local path nor",
        ),
        (FileNotFoundError("Dataset 'x/y' is a gated dataset on the Hub.\nVisit it."), "`hf auth login`"),
        (ValueError('Unknown split "tset".\nShould be one of [train].'), 'Unknown split "tset". Should be one of'),
        (RuntimeError("Dataset scripts are no longer supported"), "no longer supported"),
    ],
)
def test_what_the_hub_refuses(error: Exception, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert text in refused("x/y")


def test_the_real_hub_call_without_a_network() -> None:
    code = "from codeact.data.records import *\nopen_records('nobody/nothing-of-the-kind', Columns())"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "InputError: 'nobody/nothing-of-the-kind' cannot be fetched from the hub; check the network" in done.stderr


# ------------------------------------------------------------------------------------------------- fingerprint, writing


def test_the_fingerprint_follows_the_content_in_order(tmp_path: Path) -> None:
    a, b = dumps(ROWS[:2]), dumps(ROWS[2:])
    one, two, three, four = (tmp_path / name for name in "1234")
    for folder, contents in [(one, (a, b)), (two, (a, b)), (three, (b, a)), (four, (a + b, b""))]:
        save(folder / "x.jsonl", contents[0])
        save(folder / "y.jsonl", contents[1])
    prints = [open_records(folder, PLAIN).fingerprint for folder in (one, two, three, four)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert open_records(one / "x.jsonl", PLAIN).fingerprint == open_records(two / "x.jsonl", PLAIN).fingerprint
    other_columns = Columns(question="output", answer="instruction")
    assert open_records(one, other_columns).fingerprint != prints[0]
    assert open_records(one, PLAIN).source == str(one)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), writable), min_size=1, max_size=5))
def test_what_is_written_is_read_back(tmp_path: Path, rows: list[tuple[str, Any]]) -> None:
    path = tmp_path / "out.jsonl"
    assert write_jsonl(path, ({**GOOD, "text": text, "value": value} for text, value in rows)) == len(rows)
    assert path.read_bytes().count(b"\n") == len(rows)
    assert [dict(row.extra) for row in open_records(path, PLAIN)] == [  # type: ignore[union-attr]
        {"text": text, "value": value} for text, value in rows
    ]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), b"bytes", "\ud800", {1, 2}])
def test_what_json_cannot_hold_leaves_the_file_as_it_was(tmp_path: Path, value: Any) -> None:
    path = save(tmp_path / "out.jsonl", b"before")
    with pytest.raises(InputError, match=r"row 1 for .* cannot be written as JSON"):
        write_jsonl(path, [{"a": 1}, {"a": value}])
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_json_needs_no_heavy_library(tmp_path: Path) -> None:
    path = save(tmp_path / "data.jsonl", dumps([GOOD]))
    code = f"""
import sys
from codeact.data.records import Columns, open_records
assert len(list(open_records({str(path)!r}, Columns()))) == 1
print({{'torch', 'datasets', 'pyarrow', 'transformers'}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
