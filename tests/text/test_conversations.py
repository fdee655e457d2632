"""Samples for training: every label on an answer, every answer labelled, whatever the text and the length."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codeact.base.errors import InputError
from codeact.data.records import BadRow, Record, open_records, write_jsonl
from codeact.text.conversations import (
    IGNORE,
    Refused,
    Sample,
    count_conversations,
    encode_conversations,
)
from codeact.text.formats import CHAT_FORMATS
from codeact.text.spans import SpanEncoder, SpannedText
from codeact.text.templates import MODEL_TYPES, ConversationTemplate
from tests.helpers.chat_tokenizers import family_tokenizer, llama2_tokenizer

HISTORY = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))

OWN_TYPES = [name for name in MODEL_TYPES if not name.startswith("paper-")]  # the others: test_paper_formats.py


def row(question="Add two numbers.", answer="def add(a, b):\n    return a + b", history=(), number=0):
    return Record(id=f"r{number}", row=number, question=question, answer=answer, history=tuple(history))


def made_for(tokenizer, model_type):
    return tokenizer if model_type == "chat" else family_tokenizer(tokenizer, model_type)


def encode_one(record, tokenizer, model_type="chat", **options):
    (result,) = encode_conversations([record], tokenizer, model_type, **options)
    return result


def labelled_texts(sample, tokenizer):
    """The text of every run of labels."""
    on = np.flatnonzero(sample.labels != IGNORE)
    runs = np.split(on, np.flatnonzero(np.diff(on) > 1) + 1)
    return [tokenizer.decode(sample.labels[run], clean_up_tokenization_spaces=False) for run in runs]


def answers_of(record, tokenizer, model_type):
    """The answers as the model has to write them."""
    ends = {"chat": "<|im_end|>"} | {name: family.end for name, family in CHAT_FORMATS.items()}
    end = ends[model_type].replace("{eos}", tokenizer.eos_token)
    family = CHAT_FORMATS.get(model_type)
    texts = [text for role, text in record.history if role == "assistant"] + [record.answer]
    return [(family.lead if family else "") + (t.strip() if family and family.strip else t) + end for t in texts]


def check(sample, max_length=None):
    assert isinstance(sample, Sample)
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    assert sample.input_ids.shape == sample.labels.shape
    on = sample.labels != IGNORE
    assert np.array_equal(sample.labels[on], sample.input_ids[on])
    assert on[-1]
    assert not on[0]
    assert max_length is None or len(on) <= max_length


@pytest.mark.parametrize("model_type", OWN_TYPES)
class TestLabels:
    def test_answers_and_their_ends_and_nothing_else(self, tokenizer, model_type):
        made = made_for(tokenizer, model_type)
        for record in (row(), row(history=HISTORY), row(answer="    indented\n"), row(answer="\n\nx"), row(answer=" ")):
            result = encode_one(record, made, model_type)
            if not record.answer.strip():
                assert result.reason == "empty_answer"
                continue
            check(result)
            assert labelled_texts(result, made) == answers_of(record, made, model_type)

    def test_the_whole_is_the_rendered_text(self, tokenizer, model_type):
        made = made_for(tokenizer, model_type)
        record = row(history=HISTORY)
        turns = [*HISTORY, ("user", record.question), ("assistant", record.answer)]
        (rendered,) = ConversationTemplate(made, model_type).render([turns])
        result = encode_one(record, made, model_type)
        writes_bos = model_type in ("codegemma", "deepseek", "llama3")  # CodeLlama's text holds it already
        text = (made.bos_token if writes_bos else "") + rendered.text[: rendered.answers[-1][1]]
        assert made.decode(result.input_ids, clean_up_tokenization_spaces=False) == text
        if model_type != "llama3":  # SmolLM2 takes "\n\n" apart before text, but not at the end of a prompt
            assert result.input_ids.tolist() == made(text, add_special_tokens=False)["input_ids"]

    @pytest.mark.parametrize("answer", ["x", "    return 1", "\n\nreturn 1", "\t\tx", "é", "\u0301x", "🙂", "ing"])
    def test_before_the_answer_stands_what_generation_would_see(self, tokenizer, model_type, answer):
        """Also where the first characters of the answer would have become one token with the end of the prompt."""
        made = made_for(tokenizer, model_type)
        result = encode_one(row(answer=answer), made, model_type)
        prompt = ConversationTemplate(made, model_type).prompt([("user", row().question)])
        ids = made(prompt, add_special_tokens=model_type not in ("chat", "codellama"))["input_ids"]
        first = int(np.flatnonzero(result.labels != IGNORE)[0])
        assert result.input_ids[:first].tolist() == ids

    def test_every_length(self, tokenizer, model_type):
        made = made_for(tokenizer, model_type)
        record = row(history=HISTORY, answer="    a = '🙂'\n    return a")
        full = encode_one(record, made, model_type)
        first = int(np.flatnonzero(full.labels != IGNORE)[0])
        length = len(full.input_ids)
        for limit in range(2, length + 3):
            result = encode_one(record, made, model_type, max_length=limit)
            if limit <= first:
                assert (result.reason, result.row, result.id) == ("no_label_left", 0, "r0")
                continue
            check(result, limit)
            size = len(result.input_ids)
            # an exact beginning: a cut answer has no end of turn, and nothing after the last label is kept
            assert np.array_equal(result.input_ids, full.input_ids[:size])
            assert np.array_equal(result.labels, full.labels[:size])
            assert (full.labels[size:limit] == IGNORE).all()
            assert result.truncated == (limit < length)
            assert len(result.input_ids) + result.cut_tokens == length
            for policy in ("drop", "error"):
                if limit >= length:
                    same = encode_one(record, made, model_type, max_length=limit, on_overflow=policy)
                    assert np.array_equal(same.input_ids, full.input_ids)
        for limit in (2, first, first + 1, length - 1):
            dropped = encode_one(record, made, model_type, max_length=limit, on_overflow="drop")
            assert dropped.reason == "too_long"
            assert f"row 0 (id r0): {length} tokens are more than {limit}" in dropped.message
            with pytest.raises(InputError, match=r"row 0 \(id r0\).*use on_overflow truncate or drop"):
                encode_one(record, made, model_type, max_length=limit, on_overflow="error")

    def test_order_and_blocks(self, tokenizer, model_type, monkeypatch):
        made = made_for(tokenizer, model_type)
        rows = [row("Q" * n, f"    a{n}" if n % 3 else f"{made.eos_token} {n}", number=n) for n in range(1, 24)]
        alone = [encode_one(record, made, model_type) for record in rows]
        monkeypatch.setattr("codeact.text.conversations.BLOCK_ROWS", 7)
        done = []
        together = encode_conversations(iter(rows), made, model_type, progress=done.append)
        assert done == [7, 7, 7, 2]
        for one, other in zip(alone, together, strict=True):
            assert np.array_equal(one.input_ids, other.input_ids)
            assert np.array_equal(one.labels, other.labels)


HOSTILE = [
    *("<s> </s> <bos> <eos> <|EOT|> <|endoftext|> <|im_end|> <|im_start|> <|eot_id|> <|start_header_id|>".split()),
    *("<end_of_turn> <start_of_turn> <|begin_of_text|> [INST] [/INST] <<SYS>> {text} {question} {{ x }}".split()),
    *("<|im_start|>assistant\n", "### Response:\n", "\n", "\n\n", "    ", "\t", " "),
    *("a", "é", "e\u0301", "🙂", "\U000f0000"),
]  # fmt: skip
# Not any character: SmolLM2 has no token for some bytes and leaves them out without a word.
CHARACTERS = "abcXYZ019 .,:;()[]{}<>|/#*_=+-'\"\\éßñ中文字かな한글абвאבعر€→≤…—🙂🚀\u0301\u200d\u00a0\u2028\r\u3000"
TEXT = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(CHARACTERS, max_size=5)), max_size=5).map("".join)
ANSWER = TEXT.filter(lambda text: bool(text.strip()))


class TestHostile:
    @pytest.mark.parametrize("model_type", OWN_TYPES)
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(data=st.data())
    def test_any_text_and_length(self, tokenizer, model_type, data):
        made = made_for(tokenizer, model_type)
        pairs = data.draw(st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=3))
        history = [turn for q, a in pairs[:-1] for turn in (("user", q), ("assistant", a))]
        record = row(*pairs[-1], history=history)
        result = encode_one(record, made, model_type)
        check(result)
        assert labelled_texts(result, made) == answers_of(record, made, model_type)
        turns = [*history, ("user", record.question), ("assistant", record.answer)]
        (rendered,) = ConversationTemplate(made, model_type).render([turns])
        text = made.decode(result.input_ids, clean_up_tokenization_spaces=False)
        assert text.endswith(rendered.text[: rendered.answers[-1][1]])
        # no control token but those of the format: as many as of harmless turns
        harmless = row("q", "a", [(role, "x") for role, _ in history])
        control = set(made.added_tokens_decoder)
        expected = [i for i in encode_one(harmless, made, model_type).input_ids.tolist() if i in control]
        assert [i for i in result.input_ids.tolist() if i in control] == expected

        limit = data.draw(st.integers(2, len(result.input_ids) + 2))
        cut = encode_one(record, made, model_type, max_length=limit)
        if isinstance(cut, Sample):
            check(cut, limit)
            assert np.array_equal(cut.labels, result.labels[: len(cut.labels)])
            assert cut.truncated == (limit < len(result.input_ids))
        else:
            assert cut.reason == "no_label_left"
            assert (result.labels[:limit] == IGNORE).all()

    def test_half_of_a_surrogate_pair(self, tokenizer):
        assert encode_one(row("a\ud800"), tokenizer).reason == "invalid_utf8"


class TestBos:
    @pytest.mark.parametrize("model_type", OWN_TYPES)
    def test_once_where_the_tokenizer_writes_one(self, tokenizer, bos_tokenizer, model_type):
        made = bos_tokenizer if model_type == "chat" else family_tokenizer(tokenizer, model_type)
        ids = encode_one(row(), made, model_type).input_ids.tolist()
        # ChatML: SmolLM2's BOS opens every turn, CodeQwen's is not written; StarCoder2's is its EOS, too
        opens = ids[0] == made.bos_token_id
        assert opens == (model_type != "codeqwen")
        assert ids[1] != made.bos_token_id
        if model_type in ("codellama", "codegemma", "deepseek", "llama3"):
            assert ids.count(made.bos_token_id) == 1

    def test_codellama_opens_every_pair(self, tokenizer):
        made = family_tokenizer(tokenizer, "codellama")
        ids = encode_one(row(history=HISTORY), made, "codellama").input_ids.tolist()
        assert ids.count(made.bos_token_id) == 2


@pytest.mark.parametrize("place", ["question", "answer", "history"])
def test_a_token_beyond_the_model_is_a_status_of_its_row(tokenizer, place):
    """A word that was added to the tokenizer, and for which the model's embedding was not widened."""
    wider = copy.deepcopy(tokenizer)
    wider.add_tokens(["ZZTOP"])
    texts = {"question": "add two", "answer": "return a", "history": "sure"}
    texts[place] += " ZZTOP"
    rows = [row("q", "a"), row(texts["question"], texts["answer"], [("user", "hi"), ("assistant", texts["history"])])]
    results = encode_conversations(rows, wider, "chat", 256, vocabulary=len(tokenizer))
    assert isinstance(results[0], Sample)
    assert isinstance(results[1], Refused)
    assert results[1].reason == "token_beyond_model"
    assert f"token {len(tokenizer)} ('ZZTOP') is beyond the {len(tokenizer)} of the model" in results[1].message
    assert count_conversations(results).refused == {"token_beyond_model": 1}
    assert all(isinstance(one, Sample) for one in encode_conversations(rows, wider, "chat", 256))


class TestOtherTokenizers:
    @pytest.mark.parametrize("answer", ["def add(a, b): return a", "  two", "\n\nx", "<s>a</s> b", "é 🙂"])
    def test_one_that_puts_a_space_before_every_text(self, answer):
        """Such a space belongs after a control token and nowhere else: not where the text was cut."""
        made = llama2_tokenizer()

        def spelled(ids):
            tokens = made.convert_ids_to_tokens(ids)
            parts = [bytes([int(t[3:5], 16)]) if t.startswith("<0x") else t.replace("▁", " ").encode() for t in tokens]
            return b"".join(parts).decode()

        record = row("add <s> two", answer, [("user", "</s>"), ("assistant", answer)])
        result = encode_one(record, made, "codellama")
        check(result)
        turns = "<s> [INST] {} [/INST] {} </s>"  # Llama 2's own space after BOS
        assert spelled(result.input_ids) == "".join(turns.format(q, answer.strip()) for q in ("</s>", "add <s> two"))
        assert spelled(result.labels[result.labels != IGNORE]) == f" {answer.strip()} </s>" * 2

        result = encode_one(record, made, "deepseek")
        check(result)
        assert spelled(result.labels[result.labels != IGNORE]) == f"{answer}\n</s>" * 2
        assert spelled(result.input_ids).endswith(f"### Instruction:\nadd <s> two\n### Response:\n{answer}\n</s>")

    def slow(self, tokenizer):
        changed = copy.deepcopy(tokenizer)

        class Slow(type(changed)):
            is_fast = False

            def __call__(self, *args, **options):
                assert not options.get("return_offsets_mapping")
                return super().__call__(*args, **options)

        changed.__class__ = Slow
        return changed

    @pytest.mark.parametrize("answer", ["x", "    indented <|im_end|>", "\n"])
    def test_one_without_offsets(self, tokenizer, answer):
        made = self.slow(tokenizer)
        record = row(answer=answer + ".", history=HISTORY)
        result = encode_one(record, made)
        check(result)
        assert labelled_texts(result, made) == answers_of(record, made, "chat")

    @pytest.mark.parametrize("answer", ["x", " x", "    indented", "\n  x"])
    def test_one_whose_offsets_leave_out_spaces(self, tokenizer, answer):
        from tokenizers.processors import ByteLevel

        made = copy.deepcopy(family_tokenizer(tokenizer, "deepseek"))
        made.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
        assert not SpanEncoder(made).offsets
        record = row(answer=answer, history=HISTORY)
        result = encode_one(record, made, "deepseek")
        check(result)
        assert labelled_texts(result, made) == answers_of(record, made, "deepseek")

    def test_an_end_of_turn_that_swallows_white_space(self, tokenizer):
        """Phi-3's control tokens take the line break after them along."""
        from transformers import AddedToken

        made = copy.deepcopy(tokenizer)
        made.add_special_tokens({"eos_token": AddedToken("<|end|>", rstrip=True, special=True)})
        made.add_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)], special_tokens=True)
        made.chat_template = (
            "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        )
        record = row(answer="  x", history=HISTORY)
        result = encode_one(record, made)
        check(result)
        assert labelled_texts(result, made) == ["Hello<|end|>", "  x<|end|>"]

    def test_bounds_inside_a_token_are_cut(self, tokenizer):
        """Whatever spans a template gives: here they fall into the middle of a word."""
        text = "abcdefghij klmnop"
        spans = [(start, end) for end in range(2, len(text)) for start in range(1, end)]
        items = [SpannedText(text=text, answers=(span,), plain=frozenset()) for span in spans]
        for (start, end), (ids, labelled) in zip(spans, SpanEncoder(tokenizer).encode(items), strict=True):
            assert tokenizer.decode(ids[labelled]) == text[start:end]
            assert tokenizer.decode(ids) == text


class TestRows:
    def test_nothing_is_lost(self, tokenizer):
        rows = [
            BadRow(id="0", row=0, reason="bad_conversation", message="f line 1: no usable pair"),
            row(number=1),
            row(number=2, answer=" \n"),
            row(number=3, history=(("user", "a"), ("assistant", "  "))),
            row(number=4, question="long " * 300),
            row(number=5, answer="long " * 300),
        ]
        results = encode_conversations(rows, tokenizer, max_length=128)
        assert [r.reason if isinstance(r, Refused) else "ok" for r in results] == [
            "bad_conversation", "ok", "empty_answer", "empty_answer", "no_label_left", "ok",
        ]  # fmt: skip
        assert results[0].message == "f line 1: no usable pair"
        assert [r.row for r in results if isinstance(r, Refused)] == [0, 2, 3, 4]
        counts = count_conversations(results)
        assert counts.rows == counts.samples + sum(counts.refused.values()) == 6
        assert counts.refused == {"bad_conversation": 1, "empty_answer": 2, "no_label_left": 1}
        assert (counts.samples, counts.truncated) == (2, 1)
        assert counts.tokens == len(results[1].input_ids) + 128
        assert 0 < counts.labelled_tokens < counts.tokens

    def test_none(self, tokenizer):
        assert encode_conversations([], tokenizer) == []
        assert count_conversations([]).rows == 0

    def test_a_conversation_that_the_template_refuses(self, tokenizer):
        made = family_tokenizer(tokenizer, "codegemma")
        result = encode_one(row(history=(("user", "a"),)), made, "codegemma")
        assert result.reason == "template_refused"
        assert "row 0 (id r0): in this template user and assistant have to alternate" in result.message

    def test_a_new_sample_owns_its_memory(self, tokenizer):
        result = encode_one(row(), tokenizer, max_length=60)
        assert result.input_ids.base is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_length": 1}, "at least 2"),
            ({"on_overflow": "cut"}, "on_overflow 'cut' is unknown"),
            ({"model_type": "lama3"}, "choose one of: llama3"),
            ({"model_type": "llama3"}, "needs <|start_header_id|>"),
        ],
    )
    def test_settings(self, tokenizer, options, message):
        with pytest.raises(InputError) as error:
            encode_conversations([row()], tokenizer, **options)
        assert message in str(error.value)


TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


class TestFiles:
    @pytest.mark.parametrize(
        "line",
        [
            {"id": "7", "messages": TURNS, "ifd": 0.5, "cluster": 1, "extra": {"instruction": "other"}},
            {"conversation": SHAREGPT},
            {"conversations": SHAREGPT},
            {"messages": TURNS},
            {"instruction": "Q", "output": "A"},
            {"instruction": "Q", "input": "", "output": "A"},
        ],
    )
    def test_every_form_gives_the_same(self, tokenizer, tmp_path, line):
        write_jsonl(tmp_path / "data.jsonl", [line, line])
        results = encode_conversations(open_records(tmp_path / "data.jsonl"), tokenizer)
        expected = encode_one(row("Q", "A"), tokenizer)
        assert len(results) == 2
        for result in results:
            assert np.array_equal(result.input_ids, expected.input_ids)
            assert np.array_equal(result.labels, expected.labels)

    def test_an_input_column_is_not_lost(self, tokenizer, tmp_path):
        write_jsonl(tmp_path / "data.jsonl", [{"instruction": "Q", "input": "more", "output": "A"}])
        (record,) = open_records(tmp_path / "data.jsonl")
        assert record.question == "Q\nmore"

    def test_a_conversation_without_an_answer(self, tokenizer, tmp_path):
        lines = [{"messages": TURNS[:1]}, {"messages": TURNS}, {"messages": []}]
        (tmp_path / "data.json").write_text(json.dumps(lines))
        results = encode_conversations(open_records(tmp_path / "data.json"), tokenizer)
        assert count_conversations(results).refused == {"bad_conversation": 2}

    def test_other_columns_and_no_file(self, tmp_path):
        write_jsonl(tmp_path / "data.jsonl", [{"problem": "Q", "solution": "A"}])
        with pytest.raises(InputError, match="instruction"):
            open_records(tmp_path / "data.jsonl")
        with pytest.raises(InputError, match=r"nowhere\.jsonl"):
            open_records(tmp_path / "nowhere.jsonl")

    @pytest.mark.parametrize("model_type", ["chat", "llama3", "codellama"])
    def test_answers_that_are_not_to_be_learnt_are_context(self, tokenizer, model_type):
        made = made_for(tokenizer, model_type)
        turns = [("user", "2+2?"), ("assistant", "WRONG"), ("user", "Check."), ("assistant", "4.")]
        messages = [{"role": role, "content": text, "weight": int(text != "WRONG")} for role, text in turns]
        whole = row("Check.", "4.", turns[:2])
        both = encode_one(whole, made, model_type)
        (weighted,) = encode_conversations([{"messages": messages}], made, model_type)
        last = encode_one(whole, made, model_type, last_answer_only=True)
        assert labelled_texts(both, made) == answers_of(whole, made, model_type)
        for sample in (weighted, last):
            check(sample)
            assert np.array_equal(sample.input_ids, both.input_ids)
            assert labelled_texts(sample, made) == answers_of(whole, made, model_type)[1:]

    def test_the_system_text_and_history_of_a_row_are_written(self, tokenizer):
        data = [{"instruction": "And 3?", "input": "", "output": "9", "system": "A number.", "history": [["2?", "4"]]}]
        (sample,) = encode_conversations(data, tokenizer)
        assert labelled_texts(sample, tokenizer) == ["4<|im_end|>", "9<|im_end|>"]
        assert tokenizer.decode(sample.input_ids).startswith("<|im_start|>system\nA number.<|im_end|>\n")
