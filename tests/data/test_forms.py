"""The usual forms: what each row says, for every command; what is not read is named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeact.base.errors import InputError
from codeact.data.forms import FORMS, Columns, form_columns
from codeact.data.records import BadRow, Record, _tell, open_records, write_jsonl
from codeact.data.sources import RowError

U, A, S = "user", "assistant", "system"
QA = [{"role": U, "content": "q"}, {"role": A, "content": "a"}]


def talk(row: dict[str, Any], columns: Columns | None = None) -> Any:
    """The turns of a row and the numbers of its answers that are context, or why there are none."""
    (record,) = open_records([row], columns)
    if isinstance(record, BadRow):
        return record.reason, record.message.removeprefix("rows row 0: ")
    return list(record.turns), set(record.context)


PAIR = [(U, "q"), (A, "a")]


@pytest.mark.parametrize(
    ("row", "turns", "context"),
    [
        ({"instruction": "q", "output": "a"}, PAIR, set()),
        ({"instruction": "q", "input": "more", "output": "a"}, [(U, "q\nmore"), (A, "a")], set()),
        ({"instruction": "q", "input": None, "response": "a"}, PAIR, set()),
        ({"prompt": "q", "completion": "a", "input": "kept"}, PAIR, set()),
        ({"question": "q", "answer": "a", "system": "s"}, [(S, "s"), *PAIR], set()),
        (
            {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["h", "i"], ["j", "k"]]},
            [(S, "s"), (U, "h"), (A, "i"), (U, "j"), (A, "k"), *PAIR],
            set(),
        ),
        ({"instruction": "q", "output": "a", "system": " ", "history": [], "tools": "[]"}, PAIR, set()),
        ({"instruction": "q", "output": "a", "history": [{"from": "human", "value": "h"}]}, [(U, "h"), *PAIR], set()),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
         [(S, "s"), *PAIR], set()),
        ({"messages": [{"role": "system", "content": "s"}, *QA], "system": "s"}, [(S, "s"), *PAIR], set()),
        ({"messages": [{"role": "developer", "content": "s"}, *QA], "output": "other"}, [(S, "s"), *PAIR], set()),
        ({"messages": [{"role": U, "content": [{"type": "text", "text": "q"}]},
                       {"role": A, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
         [(U, "q"), (A, "ab")], set()),
        ({"messages": [*QA, {"role": U, "content": "thanks"}]}, PAIR, set()),
        ({"messages": [{**QA[0]}, {**QA[1], "weight": 0}, *QA]}, [*PAIR, *PAIR], {1}),
        ({"messages": [*QA, *QA, QA[0], {**QA[1], "train": False}], "system": "s"}, [(S, "s"), *PAIR, *PAIR], set()),
        ({"messages": [{**QA[0], "loss": False}, {**QA[1], "loss": False}, QA[0], {**QA[1], "loss": True}],
          "system": "s"}, [(S, "s"), *PAIR, *PAIR], {2}),
        ({"messages": [QA[0], {**QA[1], "loss": 0.73}]}, PAIR, set()),
        ({"messages": [QA[0], {**QA[1], "train_on_turn": False}, QA[0], {**QA[1], "trainable": True, "mask": None}]},
         [*PAIR, *PAIR], {1}),
        ({"messages": None, "conversation": "an id", "instruction": "q", "output": "a"}, PAIR, set()),
    ],
)  # fmt: skip
def test_what_a_row_says(row: dict[str, Any], turns: list[Any], context: set[int]) -> None:
    assert talk(row) == (turns, context)


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5).filter(lambda text: text.strip())


@given(
    form=st.sampled_from(FORMS),
    system=st.none() | TEXTS,
    pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4),
    data=st.data(),
)
def test_what_is_written_in_a_form_is_read_again(form: str, system: Any, pairs: Any, data: Any) -> None:
    turns = [(S, system)] * (system is not None) + [turn for q, a in pairs for turn in ((U, q), (A, a))]
    earlier = [at for at, (role, _) in enumerate(turns[:-1]) if role == A]
    context = set() if form == "alpaca" or not earlier else data.draw(st.sets(st.sampled_from(earlier)))
    assert talk(form_columns(turns, context, form)) == (turns, context)


@pytest.mark.parametrize(
    ("turns", "context", "text"),
    [
        ([*PAIR, *PAIR], {1}, "cannot say answers that are not to be learnt; write messages or sharegpt"),
        ([(U, "q"), *PAIR], set(), "cannot say turns that are no pairs"),
        ([*PAIR, (S, "s"), *PAIR], set(), "cannot say turns that are no pairs"),
    ],
)
def test_what_alpaca_has_no_words_for(turns: Any, context: Any, text: str) -> None:
    with pytest.raises(RowError, match="bad_conversation") as caught:
        form_columns(turns, context, "alpaca")
    assert text in caught.value.text
    assert talk(form_columns(turns, context, "sharegpt")) == (turns, context)


@pytest.mark.parametrize(
    ("row", "reason", "text"),
    [
        ({"instruction": "q", "output": "a", "tools": [{"name": "w"}]}, "tool_use", "'tools' describes tools"),
        ({"messages": [*QA, {"role": "tool", "content": "sun"}, QA[1]]}, "tool_use", "turn 2 calls or answers a tool"),
        ({"messages": [QA[0], {"role": A, "content": None, "tool_calls": [{"id": 1}]}]}, "tool_use", "(tool_calls)"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "tool_use", "function_call"),
        ({"messages": [QA[0], {**QA[1], "reasoning_content": "hm"}]}, "bad_conversation", "has reasoning_content"),
        ({"messages": [QA[0], {**QA[1], "reasoning": "hm"}]}, "bad_conversation", "has reasoning, which is not read"),
        ({"messages": [QA[0], {**QA[1], "mask": False}, *QA]}, "bad_conversation", "has mask, which is not read; give"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train_detail": [{}]}]},
         "bad_conversation", "has train_detail, which is not read; give every answer a weight of 0 or 1"),
        ({"messages": [{"role": U, "content": [{"type": "image_url"}]}, QA[1]]}, "bad_conversation", "'image_url'"),
        ({"messages": [QA[0], {**QA[1], "weight": 0}]}, "bad_conversation", "each has weight 0"),
        ({"messages": [QA[0], {**QA[1], "weight": 0.5}]}, "bad_conversation", "is 0.5, neither 0 nor 1"),
        ({"messages": [{"role": S, "content": "x"}, *QA], "system": "s"}, "bad_conversation", "two system texts"),
        ({"instruction": "q", "output": "a", "history": [["h"]]}, "wrong_type", "item 0 of column 'history'"),
        ({"instruction": "q", "output": "a", "system": 5}, "wrong_type", "'system' is a number, not text"),
    ],
)  # fmt: skip
def test_what_is_refused_by_name(row: dict[str, Any], reason: str, text: str) -> None:
    code, message = talk(row)
    assert code == reason
    assert text in message


def test_the_remedy_for_tools_works(tokenizer: Any) -> None:
    """Tools in the system text, calls and results in the texts of assistant and user: learnt as any other answer."""
    from codeact.text.conversations import encode_conversations

    call = {"role": A, "content": None, "tool_calls": [{"function": {"name": "w", "arguments": "{}"}}]}
    row = {"messages": [QA[0], call, {"role": "tool", "content": "sun"}, {"role": A, "content": "Sunny."}]}
    reason, text = talk(row)
    assert (reason, text.partition("; ")[2]) == (
        "tool_use",
        "write tools into the system text, calls and results into the texts of assistant and user",
    )
    assert talk({**row, "messages": QA, "tools": [{"name": "w"}]})[1].endswith(text.partition("; ")[2])
    called = '<tool_call>\n{"name": "w", "arguments": {}}\n</tool_call>'
    row["messages"] = [
        {"role": S, "content": '<tools>\n{"name": "w"}\n</tools>'},
        *(QA[0], {"role": A, "content": called}),
        *({"role": U, "content": "<tool_response>\nsun\n</tool_response>"}, {"role": A, "content": "Sunny."}),
    ]
    (sample,) = encode_conversations([row], tokenizer)
    learnt = tokenizer.decode(sample.input_ids[sample.labels != -100])
    assert learnt == f"{called}<|im_end|>Sunny.<|im_end|>"


def test_columns_that_are_named_are_read_and_no_others() -> None:
    row = {"q": "q", "a": "a", "input": "i", "system": "s", "before": [["h", "i"]], "messages": QA}
    assert talk(row, Columns(question="q", answer="a")) == (PAIR, set())
    named = Columns(question="q", answer="a", system="system", history="before")
    assert talk(row, named)[0] == [(S, "s"), (U, "h"), (A, "i"), *PAIR]
    assert talk({**row, "id": "7"}, Columns(id="id"))[0] == [(S, "s"), *PAIR]  # the form is still found
    for columns, text in [
        (Columns(question="qq", answer="a"), "no column 'qq'"),
        (Columns(question="q", answer="a", system="sys"), "no column 'sys'"),
        (Columns(conversation="talks"), "no column 'talks'"),
    ]:
        with pytest.raises(InputError, match=text):
            open_records([row], columns)


@pytest.mark.parametrize(
    ("row", "columns", "line"),
    [
        ({"instruction": "q", "input": "", "output": "a", "path": 1}, None,
         "rows: 1 row, read as instruction, input -> output; columns not used: path"),
        ({"path": 1, "instruction": "q", "input": "i", "output": "a", "system": "s"}, Columns(question="instruction"),
         "rows: 1 row, read as instruction -> output; columns not used: input, system, path"),
        ({"messages": QA, "system": "s", "instruction": "x\x1b", "\x1b[2J": 0}, None,
         "rows: 1 row, read as system, the turns in messages; columns not used: instruction, '\\x1b[2J'"),
        ({"messages": [{**QA[0], "name": "bob", "id": None}, {**QA[1], "weight": 1, "images": []}], "score": 3}, None,
         "rows: 1 row, read as the turns in messages; columns not used: score, name of turns"),
    ],
)  # fmt: skip
def test_what_is_read_and_what_is_not_is_told_once(
    row: dict[str, Any], columns: Columns | None, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    _tell.cache_clear()
    with caplog.at_level(logging.INFO, "codeact"):
        records = [open_records([row], columns) for _ in range(2)]
    assert records[0].reading == line
    assert caplog.messages == [line]


def test_every_command_reads_the_same(tmp_path: Any) -> None:
    from codeact.data.settings import DataSettings
    from codeact.training.data import _open
    from codeact.training.options import DataArguments

    path = str(tmp_path / "data.jsonl")
    write_jsonl(path, [{"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["h", "i"]]}])
    (row,) = open_records(path)
    assert isinstance(row, Record)
    assert row.turns == ((S, "s"), (U, "h"), (A, "i"), (U, "q\ni"), (A, "a"))
    for records in (DataSettings(source=path).open(), _open(DataArguments(), path), open_records(path)):
        assert list(records) == [row]


def test_the_cases_that_failed(shared_cases: Any) -> None:
    data = shared_cases / "data"
    assert [row.question for row in open_records(data / "alpaca_input.jsonl") if isinstance(row, Record)] == [
        "Sort this list.\n[3, 1, 2]",
        "Reverse this text.\nabc def",
        "Say hello in Python.",
    ]
    (row,) = open_records(data / "lf_alpaca.jsonl")
    assert isinstance(row, Record)
    assert row.history == ((S, "You answer with a number."), (U, "What is the square of 2?"), (A, "4"))
    (row,) = open_records(data / "weight.jsonl")
    assert isinstance(row, Record)
    assert row.turns[1] == (A, "WRONGANSWER")
    assert row.context == {1}
    rows = list(open_records(data / "openai_tools.jsonl"))
    assert [row.reason if isinstance(row, BadRow) else row.answer for row in rows] == [
        *("tool_use", "hey", "hey there", "hey there")
    ]
