"""Every answer of a conversation in one pass, against one turn at a time; a row a turn and a row a conversation."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from codeact.base.errors import InputError
from codeact.data.records import BadRow, Record, open_records, write_jsonl
from codeact.data.settings import DataSettings
from codeact.scoring.folder import ScoreFolder
from codeact.scoring.ifd import IfdScorer, score_ifd
from codeact.scoring.reference import exact_ifd, exact_turns
from codeact.scoring.stage import ScoreSettings, score_data, score_lines
from codeact.scoring.table import SCHEMA, TURN_SCHEMA
from codeact.scoring.token_losses import losses_path
from codeact.scoring.tokens import answers_of, tokenize
from codeact.text.templates import PromptBuilder
from tests.conftest import make_records
from tests.helpers.chat_tokenizers import family_tokenizer, llama2_tokenizer

S, U, A = "system", "user", "assistant"
ADD = "def add(a, b):\n    return a + b"


def conversation(*turns: tuple[str, str], number: int = 0, context: tuple[int, ...] = ()) -> Record:
    (*history, (_, question), (_, answer)) = turns
    more = {"history": tuple(history), "context": frozenset(context)}
    return Record(id=f"c{number}", row=number, question=question, answer=answer, **more)


AWKWARD = [
    conversation((U, "Add two."), (A, ADD), number=0),
    conversation((S, "Be brief."), (U, "Hi {question}"), (A, "Hello."), (U, "Add."), (A, ADD + "\n"), number=1),
    conversation((U, "One."), (U, "Two."), (A, "First."), (U, "Three."), (U, "Four."), (A, "Second."), number=2),
    conversation((U, "q"), (A, " \n"), (U, "Once more"), (A, "There it is."), (U, ""), (A, "So"), (U, "x"), (A, "y z"),
                 number=3),
    conversation((U, "q"), (A, "not to be learnt"), (U, "Why?"), (A, "So it is."), (U, "k"), (A, "l m n"), number=4,
                 context=(1,)),
    conversation((A, "How can I help?"), (S, "s"), (U, "Sort it."), (A, "sorted(x)"), (A, "  reversed(x)\n"), (U, "?"),
                 (A, "Yes, it is."), number=5),
    conversation((U, "x"), (A, "y"), (U, "z"), (A, "one, two"), number=6),
    conversation(*[(role, f"{role} says {n} " * (1 + n)) for n in range(9) for role in (U, A)], number=7),
]  # fmt: skip


def turn_table(model, tokenizer, records, **more):
    return score_ifd(model, tokenizer, records, by_turn=True, **more)


class TestOnePass:
    @pytest.mark.parametrize("template", ["qa", "chat", "deepseek", "codeqwen", "Q: {question}\nA:"])
    @pytest.mark.parametrize("with_bos", [False, True])
    @pytest.mark.parametrize("max_length", [512, 110])
    def test_equals_one_turn_at_a_time(
        self, tiny_model, tokenizer, bos_tokenizer, request, template, with_bos, max_length
    ):
        chosen = bos_tokenizer if with_bos else tokenizer
        if template in ("deepseek", "codeqwen") and not with_bos:
            chosen = family_tokenizer(tokenizer, template)
            tiny_model.resize_token_embeddings(len(chosen))
        options = {"template": template, "max_length": max_length, "tokens_per_pack": 300}
        turns = turn_table(tiny_model, chosen, AWKWARD, **options)
        assert turns.schema == TURN_SCHEMA
        found = {}
        for item in turns.to_pylist():
            if item["status"] == "ok":
                sums = (item["cond_nll_sum"], item["uncond_nll_sum"], item["scored_tokens"])
                found[item["row"], item["turn"]] = sums
                assert item["ifd"] == pytest.approx(math.exp((sums[0] - sums[1]) / sums[2]), rel=1e-12)
        expected = {
            (record.row, number): sums
            for record in AWKWARD
            for number, sums in exact_turns(tiny_model, chosen, record, template, max_length).items()
        }
        assert found.keys() == expected.keys()
        assert len(found) >= 12
        for place, sums in expected.items():
            assert found[place] == pytest.approx(sums, rel=1e-4), place
        # a conversation: the sums over its answers, whose quotient of perplexities is weighted by tokens
        table = score_ifd(tiny_model, chosen, AWKWARD, **options)
        assert table.schema == SCHEMA
        for item in table.to_pylist():
            own = np.array([sums for (row, _), sums in expected.items() if row == item["row"]])
            assert item["status"] == "ok"
            ours = (item["cond_nll_sum"], item["uncond_nll_sum"], item["scored_tokens"])
            assert ours == pytest.approx(own.sum(axis=0), rel=1e-4)
            assert item["ifd"] == pytest.approx(math.exp((ours[0] - ours[1]) / ours[2]), rel=1e-12)

    def test_random_conversations(self, tiny_model, tokenizer):
        """Roles, weights and blank texts as they fall, read from messages as data has them."""
        rng = random.Random(7)
        texts = ["x = 1", "x", " ", "Why is that so?", ADD, "ok\n", "\n  indented", "no. 7"]
        rows = []
        for _ in range(60):
            roles = rng.choices((U, A, S), (4, 4, 1), k=rng.randint(1, 8))
            turns = [{"role": role, "content": rng.choice(texts)} for role in roles]
            rows.append({"messages": [{**t, "weight": rng.randint(0, 3) and 1} for t in turns] + QA_TURNS})
        records = list(open_records(rows))
        assert not any(isinstance(record, BadRow) for record in records)
        turns = turn_table(tiny_model, tokenizer, records, max_length=256).to_pylist()
        answers = [(r.row, n) for r in records for n, (role, _) in enumerate(r.turns) if role == A]
        assert [(item["row"], item["turn"]) for item in turns] == answers
        scored = {(item["row"], item["turn"]): item for item in turns if item["status"] == "ok"}
        expected = {
            (record.row, number): sums
            for record in records
            for number, sums in exact_turns(tiny_model, tokenizer, record, max_length=256).items()
        }
        assert scored.keys() == expected.keys()
        for place, (given, alone, tokens) in expected.items():
            item = scored[place]
            assert (item["cond_nll_sum"], item["uncond_nll_sum"]) == pytest.approx((given, alone), rel=1e-4)
            assert item["scored_tokens"] == tokens
        assert {item["status"] for item in turns} == {
            "ok", "context", "empty_answer", "empty_question", "answer_too_short"
        }  # fmt: skip

    def test_a_pass_for_a_conversation_and_one_for_each_answer_alone(self, tiny_model, tokenizer):
        scorer = IfdScorer(tiny_model, tokenizer, max_length=512)
        _, cost = scorer.score([AWKWARD[7]])
        items = tokenize([AWKWARD[7]], tokenizer, scorer.prompts, 512, turns="all")
        answers = answers_of(items)
        assert cost.sequences == 1 + 9
        longest = max(answers, key=lambda item: item.conditional_stop).conditional_stop
        alone = sum(len(item.unconditional) for item in answers)
        assert cost.tokens == longest + alone
        assert cost.apart_tokens == sum(item.conditional_stop for item in answers) + alone
        assert cost.apart_tokens > 2 * cost.tokens

    def test_a_row_of_one_answer_is_what_it_was(self, tiny_model, tokenizer, records):
        single = [*records, AWKWARD[0]]
        every, last = (
            score_ifd(tiny_model, tokenizer, single, max_length=180, turns=turns) for turns in ("all", "last")
        )
        assert every.equals(last)
        turns = turn_table(tiny_model, tokenizer, single, max_length=180)
        assert turns["turn"].to_pylist() == [1] * len(single)
        assert turns.drop_columns(["turn", "reason"]).equals(every.drop_columns(["reason"]))

    @pytest.mark.parametrize("turns", ["all", "last"])
    def test_losses_without_the_answers_alone_are_those_of_the_score(self, tiny_model, tokenizer, turns):
        rows = [*AWKWARD, BadRow(id="b", row=8, reason="broken_json", message="m"), AWKWARD[0]]
        scorer = IfdScorer(tiny_model, tokenizer, max_length=90, turns=turns)
        losses, tokens = scorer.answer_losses(rows)
        table, _ = scorer.score(rows)
        np.testing.assert_allclose(losses, np.nan_to_num(table["cond_nll_sum"].to_numpy()), rtol=1e-5)
        assert tokens.tolist() == table["scored_tokens"].to_pylist()

    def test_the_last_answer_alone(self, tiny_model, tokenizer):
        table = score_ifd(tiny_model, tokenizer, AWKWARD, turns="last", max_length=512)
        for record, ifd in zip(AWKWARD, table["ifd"].to_pylist(), strict=True):
            assert ifd == pytest.approx(exact_ifd(tiny_model, tokenizer, record, max_length=512), rel=1e-4)


QA_TURNS = [{"role": U, "content": "And?"}, {"role": A, "content": "That is all there is."}]


def until(record: Record, turn: int) -> Record:
    """The conversation up to and with an answer."""
    return conversation(*record.turns[: turn + 1], number=record.row)


class TestTemplates:
    @pytest.mark.parametrize("template", ["chat", "codeqwen", "starcoder2"])
    def test_an_answer_has_the_tokens_that_it_would_have_as_the_last(self, tokenizer, template):
        """Where control tokens stand around the answers, the pass is the prompt of each of them, to the token."""
        chosen = tokenizer if template == "chat" else family_tokenizer(tokenizer, template)
        prompts = PromptBuilder(chosen, template)
        record = AWKWARD[7]
        (item,) = tokenize([record], chosen, prompts, 4096, turns="all")
        for turn in item.turns:
            (alone,) = tokenize([until(record, turn.turn)], chosen, prompts, 4096)
            assert list(turn.conditional[: turn.conditional_stop]) == list(alone.conditional)
            assert turn.conditional_start == alone.conditional_start
            assert turn.unconditional == alone.unconditional
        assert len({id(turn.conditional) for turn in item.turns}) == 1

    def test_past_answers_without_their_reasoning(self, tiny_model, tokenizer):
        """What the template changes cannot be in the pass in which it is scored: another one begins, and no score
        depends on it."""
        chosen = copy.deepcopy(tokenizer)
        chosen.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
            "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        record = conversation(
            (U, "a"), (A, "Plain."), (U, "b"), (A, "<think>Hm, so.</think>\nThen b."), (U, "c"), (A, "Plain again."),
            (U, "d"), (A, "<think>At last.</think>\nThen d."),
        )  # fmt: skip
        (item,) = tokenize([record], chosen, PromptBuilder(chosen, "chat"), 512, turns="all")
        runs = {id(turn.conditional): turn.conditional for turn in item.turns}
        assert [len(runs), len(item.turns)] == [2, 4]
        text = chosen.decode(list(runs.values())[1])
        assert "Then b." in text
        assert "Hm, so." not in text
        turns = turn_table(tiny_model, chosen, [record], template="chat", max_length=512)
        for turn, given in zip(turns["turn"].to_pylist(), turns["cond_nll_sum"].to_pylist(), strict=True):
            alone = score_ifd(tiny_model, chosen, [until(record, turn)], template="chat", turns="last", max_length=512)
            assert given == pytest.approx(alone["cond_nll_sum"][0].as_py(), rel=1e-4)
        assert item.answer_tokens == sum(turn.answer_tokens for turn in item.turns)
        assert item.prompt_tokens + item.answer_tokens == sum(map(len, runs.values()))

    @pytest.mark.parametrize("name", ["codellama", "codegemma", "llama3"])
    def test_white_space_that_a_template_strips_does_not_end_a_pass(self, tokenizer, name):
        """The answers stand in it as they are in the data; all else is as the template writes it."""
        chosen = family_tokenizer(tokenizer, name)
        record = conversation((S, "s"), (U, "a"), (A, "  one\n"), (U, "b"), (A, "two"), (U, "c"), (A, "three \n"))
        (item,) = tokenize([record], chosen, PromptBuilder(chosen, name), 512, turns="all")
        assert len({id(turn.conditional) for turn in item.turns}) == 1
        whole = chosen.decode(item.turns[-1].conditional)
        prompt = PromptBuilder(chosen, name).render(record)
        bos = "" if prompt.startswith(chosen.bos_token) else chosen.bos_token
        assert "".join(whole.split()) == "".join(f"{bos}{prompt}three".split())
        for turn, answer in zip(item.turns, ("  one\n", "two", "three \n"), strict=True):
            own = turn.conditional[turn.conditional_start : turn.conditional_stop]
            ids = chosen(answer, add_special_tokens=False)["input_ids"]
            assert list(own) == ids
            assert turn.unconditional == [chosen.bos_token_id, *ids]

    def test_tokenizers_that_put_a_space_before_a_text(self):
        """Between two answers none is put, and no BOS either; an answer has the same ids in both passes."""
        chosen = llama2_tokenizer()
        record = conversation((U, "add"), (A, "def add"), (U, "two"), (A, "return a"))
        (item,) = tokenize([record], chosen, PromptBuilder(chosen, "codellama"), 512, turns="all")
        ids = list(item.turns[1].conditional)
        assert ids.count(1) == 2  # the template's own, at the beginning of each turn
        assert ids.count(2) == 1
        for turn in item.turns:
            assert list(turn.conditional[turn.conditional_start : turn.conditional_stop]) == turn.unconditional[1:]
        # the same texts in one piece, where spaces are put before the whole and before each answer, as ever
        first, second = item.turns
        between = ids[first.conditional_stop : second.conditional_start]
        assert "".join(chosen.decode(between).split()) == "</s><s>[INST]two[/INST]"
        assert chosen.convert_ids_to_tokens(between[0]) == "▁"

    def test_a_bos_that_is_the_eos(self, tiny_model, tokenizer):
        """It stands at the end of a turn as well, and is not taken for the beginning of a text."""
        chosen = family_tokenizer(tokenizer, "starcoder2")
        chosen = copy.deepcopy(chosen)
        from tokenizers.processors import TemplateProcessing

        chosen.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{chosen.bos_token} $A", special_tokens=[(chosen.bos_token, chosen.bos_token_id)]
        )
        record = conversation((U, "a"), (A, "one"), (U, "b"), (A, "two"))
        (item,) = tokenize([record], chosen, PromptBuilder(chosen, "starcoder2"), 512, turns="all")
        (whole,) = {id(turn.conditional): list(turn.conditional) for turn in item.turns}.values()
        assert whole.count(chosen.bos_token_id) == 2
        assert item.prompt_tokens + item.answer_tokens == len(whole) - 1

    def test_control_tokens_in_any_turn_are_plain_text(self, tokenizer):
        record = conversation((U, "<|im_end|>"), (A, "a<|im_end|>b"), (U, "q"), (A, "<|im_start|>assistant\n"))
        prompts = PromptBuilder(tokenizer, "chat")
        (faked,), (plain,) = (
            tokenize([row], tokenizer, prompts, 512, turns="all")
            for row in (record, conversation((U, "u"), (A, "v w"), (U, "w"), (A, "x y")))
        )
        special = set(tokenizer.all_special_ids)
        controls = [[t for t in item.turns[-1].conditional if t in special] for item in (faked, plain)]
        assert controls[0] == controls[1]
        assert not any(special.intersection(turn.unconditional) for turn in faked.turns)


class TestStatuses:
    def test_every_answer_has_a_row_and_a_reason(self, tiny_model, tokenizer):
        turns = turn_table(tiny_model, tokenizer, AWKWARD[:7], max_length=512)
        told = {(item["row"], item["turn"]): (item["status"], item["reason"]) for item in turns.to_pylist()}
        assert told[0, 1] == ("ok", None)
        assert told[3, 1] == (
            "empty_answer", "empty_answer: row 3, turn 1: the answer is blank; write it, or take the turn out"
        )  # fmt: skip
        assert told[3, 5][0] == "answer_too_short"
        assert told[4, 1] == ("context", None)
        assert told[5, 0][0] == "empty_question"
        assert "row 5, turn 0: no question stands before this answer" in told[5, 0][1]
        assert told[5, 4] == ("ok", None), "an answer after an answer is given all before it"
        assert told[6, 1][0] == "answer_too_short"
        assert "answer_too_short: row 6, turn 1: the answer is one token" in told[6, 1][1]
        assert all(reason is None or "\n" not in reason for _, reason in told.values())

    @pytest.mark.parametrize("with_bos", [False, True])
    def test_every_length_limit(self, tokenizer, bos_tokenizer, with_bos):
        """Which answers fall out of a conversation that is too long; each is told, and no sequence is longer."""
        chosen, seen = bos_tokenizer if with_bos else tokenizer, set()
        prompts = PromptBuilder(chosen, "qa")
        (full,) = tokenize([AWKWARD[7]], chosen, prompts, 10_000, turns="all")
        for limit in range(2, 700, 3):
            (item,) = tokenize([AWKWARD[7]], chosen, prompts, limit, turns="all")
            assert (item.prompt_tokens, item.answer_tokens) == (full.prompt_tokens, full.answer_tokens)
            statuses = [turn.status for turn in item.turns]
            scored = statuses.count("ok")
            seen.add(scored)
            assert statuses == ["ok"] * scored + ["prompt_too_long"] * (9 - scored)
            assert item.status == ("ok" if scored else "prompt_too_long")
            assert item.truncated == (bool(scored) and item.turns[-1] != full.turns[-1])
            for turn, whole in zip(item.turns[:scored], full.turns, strict=False):
                assert len(turn.conditional) <= limit
                kept = len(turn.unconditional)
                assert turn.unconditional == whole.unconditional[:kept]
                assert turn.truncated == (kept < len(whole.unconditional))
                assert turn.truncated <= (turn is item.turns[scored - 1])
            for turn in item.turns[scored:]:
                assert f"row 7, turn {turn.turn}: {turn.prompt_tokens} tokens leave no room" in turn.reason
        assert seen == set(range(10))

    def test_what_the_model_does_not_know_is_a_status_of_the_whole_row(self, tiny_model, tokenizer):
        wider = copy.deepcopy(tokenizer)
        wider.add_tokens(["<|frobnicate|>"])
        rows = [conversation((U, "q"), (A, "one two"), (U, "r"), (A, f"x = {word}"), number=n)
                for n, word in enumerate(["2", "<|frobnicate|>"])]  # fmt: skip
        assert score_ifd(tiny_model, wider, rows, max_length=128)["status"].to_pylist() == ["ok", "token_beyond_model"]
        turns = turn_table(tiny_model, wider, rows, max_length=128)
        assert turns["status"].to_pylist() == ["ok", "ok", "token_beyond_model", "token_beyond_model"]
        assert "row 1, turn 1: token " in turns["reason"][2].as_py()

    def test_a_loss_that_is_not_finite_is_a_status_of_its_turn_and_of_the_row(self, tiny_model, tokenizer):
        scorer = IfdScorer(tiny_model, tokenizer, max_length=256)
        real = scorer._nll_sums

        def broken(*arguments):
            sums, cost = real(*arguments)
            sums[1] = np.nan
            return sums, cost

        scorer._nll_sums = broken
        turns: list = []
        table, _ = scorer.score([AWKWARD[1], AWKWARD[0]], turns=turns)
        assert table["status"].to_pylist() == ["nonfinite", "ok"]
        assert turns[0]["status"].to_pylist() == ["ok", "nonfinite", "ok"]
        assert turns[0]["reason"][1].as_py().startswith("nonfinite: row 1, turn 4: NLL sums")

    def test_a_template_that_refuses_a_conversation(self, tokenizer):
        """Two questions in a row, in a format that has to alternate."""
        chosen = family_tokenizer(tokenizer, "llama3")
        strict = family_tokenizer(tokenizer, "codegemma")
        (item,) = tokenize([AWKWARD[2]], strict, PromptBuilder(strict, "codegemma"), 512, turns="all")
        assert (item.status, item.turns) == ("unreadable", ())
        assert "template_refused: row 2: in this template user and assistant have to alternate" in item.reason
        (item,) = tokenize([AWKWARD[2]], chosen, PromptBuilder(chosen, "llama3"), 512, turns="all")
        assert [turn.status for turn in item.turns] == ["ok", "ok"]

    def test_settings_that_do_not_go_together(self, tiny_model, tokenizer, tiny_model_path):
        for call in (
            lambda: IfdScorer(tiny_model, tokenizer, protocol="paper", turns="all", max_length=64),
            lambda: ScoreSettings(model=str(tiny_model_path), protocol="paper", turns="all"),
        ):
            with pytest.raises(ValueError, match="protocol paper scores the last answer of a conversation only"):
                call()
        assert IfdScorer(tiny_model, tokenizer, protocol="paper", max_length=64).turns == "last"
        with pytest.raises(InputError, match="turns 'every' is unknown; choose one of"):
            IfdScorer(tiny_model, tokenizer, turns="every", max_length=64)
        for more in ({"turns": "last"}, {"protocol": "paper"}):
            with pytest.raises(InputError, match="a row for every answer wants turns all"):
                turn_table(tiny_model, tokenizer, AWKWARD, max_length=64, **more)


# ----------------------------------------------------------------------------------------------------- on disk


def messages(record: Record) -> dict:
    turns = [
        {"role": role, "content": text, "weight": int(at not in record.context)}
        for at, (role, text) in enumerate(record.turns)
    ]
    return {"id": record.id, "messages": turns}


@pytest.fixture(scope="module")
def talk_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rows = [messages(record) for record in AWKWARD]
    rows.insert(3, {"id": "bad", "messages": [{"role": U, "content": "q"}]})
    write_jsonl(path, rows)
    return path


def score(path: Path, model: Path, output: Path, **more):
    settings = {"model": str(model), "max_length": 90, "shard_size": 2, "dtype": "float32", **more}
    return score_data(DataSettings(source=str(path), id="id"), ScoreSettings(**settings), output)


class TestFolder:
    def test_a_row_a_conversation_and_a_row_a_turn(self, talk_path, tiny_model_path, tiny_model, tokenizer, tmp_path):
        totals = score(talk_path, tiny_model_path, tmp_path / "s", keep_token_nll=True)
        folder = ScoreFolder.open(tmp_path / "s")
        table, turns = folder.read(), pq.read_table(tmp_path / "s" / "turns.parquet")
        assert (table.schema, turns.schema) == (SCHEMA, TURN_SCHEMA)
        assert table["id"].to_pylist() == ["c0", "c1", "c2", "bad", "c3", "c4", "c5", "c6", "c7"]
        assert table["status"].to_pylist().count("ok") == 8
        rows = list(DataSettings(source=str(talk_path), id="id").open())
        more = {"max_length": 90}
        expected = turn_table(tiny_model, tokenizer, rows, **more)
        for name in turns.column_names:
            if name in ("cond_nll_sum", "uncond_nll_sum", "ifd"):
                np.testing.assert_allclose(turns[name].to_numpy(), expected[name].to_numpy(), rtol=1e-4)
            else:
                assert turns[name].equals(expected[name]), name
        assert totals["turns"] == {
            name: turns["status"].to_pylist().count(name) for name in set(turns["status"].to_pylist())
        }
        lines = dict(score_lines(totals, tmp_path / "s"))
        assert lines["answers"].startswith(f"{totals['turns']['ok']} of {turns.num_rows} scored, ")
        assert "1 context" in lines["answers"]
        saved = totals["apart_tokens"] - totals["tokens"] - totals["shared_tokens"]
        assert lines["saved"].startswith(f"{saved:,} of the {totals['apart_tokens']:,} tokens that turn by turn")
        # the loss of every token: of a row those of all its answers
        tokens = table["scored_tokens"].to_numpy()
        kept = np.concatenate([np.load(losses_path(folder.path(n)))[0] for n in range(folder.shards)])
        sums = [part.astype(float).sum() for part in np.split(kept, np.cumsum(tokens)[:-1])]
        np.testing.assert_allclose(sums, np.nan_to_num(table["cond_nll_sum"].to_numpy()), rtol=2e-3)
        assert np.isfinite(folder.selective_ifd()).sum() == 8

    def test_what_is_missing_is_done_again(self, talk_path, tiny_model_path, tmp_path):
        score(talk_path, tiny_model_path, tmp_path / "s")
        before = pq.read_table(tmp_path / "s" / "turns.parquet")
        folder = ScoreFolder.open(tmp_path / "s")
        folder.turns_path(1).unlink()
        assert folder.missing() == [1]
        with pytest.raises(InputError, match=r"1 of 5 shards are missing \(1\)"):
            folder.merge()
        folder.turns_path(2).write_bytes(b"PAR1")
        score_again = ScoreSettings(model=str(tiny_model_path), max_length=90, shard_size=2, dtype="float32")
        with pytest.raises(InputError, match=r"00002-of-00005.turns.parquet is damaged .*delete it and .*score again"):
            score_data(DataSettings(source=str(talk_path), id="id"), score_again, tmp_path / "s")
        folder.turns_path(2).unlink()
        score(talk_path, tiny_model_path, tmp_path / "s")
        after = pq.read_table(tmp_path / "s" / "turns.parquet")
        assert after.drop_columns(["cond_nll_sum", "uncond_nll_sum", "ifd"]).equals(
            before.drop_columns(["cond_nll_sum", "uncond_nll_sum", "ifd"])
        )

    def test_other_turns_are_another_run(self, talk_path, tiny_model_path, tmp_path):
        score(talk_path, tiny_model_path, tmp_path / "s")
        with pytest.raises(InputError, match="turns 'all' there, 'last' here"):
            score(talk_path, tiny_model_path, tmp_path / "s", turns="last")
        score(talk_path, tiny_model_path, tmp_path / "last", turns="last")
        assert not (tmp_path / "last" / "turns.parquet").exists()
        every, last = (ScoreFolder.open(tmp_path / name).read() for name in ("s", "last"))
        assert every["ifd"][0] == last["ifd"][0]
        assert every["ifd"][1] != last["ifd"][1]
        # a folder of an older version, which says nothing of turns, holds last answers
        path = tmp_path / "last" / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["settings"]["turns"]
        path.write_text(json.dumps(manifest))
        score(talk_path, tiny_model_path, tmp_path / "last", turns="last")
        with pytest.raises(InputError, match="turns 'last' there, 'all' here"):
            score(talk_path, tiny_model_path, tmp_path / "last")

    def test_data_of_one_answer_a_row_has_no_turns(self, tiny_model_path, tmp_path):
        rows = [{"id": r.id, "instruction": r.question, "output": r.answer} for r in make_records(5)]
        write_jsonl(tmp_path / "rows.jsonl", rows)
        totals = score(tmp_path / "rows.jsonl", tiny_model_path, tmp_path / "s", turns="all")
        settings = ScoreFolder.open(tmp_path / "s").settings
        assert settings["turns"] == "last"
        assert ScoreFolder.hash_of({k: v for k, v in settings.items() if k != "turns"}) == ScoreFolder.hash_of(settings)
        assert "turns" not in totals
        assert not list((tmp_path / "s").glob("*turns*"))


def test_from_the_command_line_to_chosen_conversations(codeact, talk_path, tiny_model_path, tmp_path, monkeypatch):
    """Score, check, choose by tokens, clean and pack, with conversations as they are."""
    monkeypatch.chdir(tmp_path)
    model = ("--model", tiny_model_path, "--max-length", "400", "--dtype", "float32")
    common = ("score", talk_path, "--id-column", "id", *model, "--output", "s")
    code, out, _ = codeact(*common, "--check-with", tiny_model_path, "--check-rows", "8", "--keep-token-nll")
    assert code == 0, out
    assert "of 27 scored" in " ".join(out.split())
    assert "Spearman 1.00" in out
    choose = ("--strategy", "top_ifd", "--difficulty", "s_ifd", "--budget-tokens", "900")
    code, out, _ = codeact("select", "--scores", "s", *choose, "--output", "chosen.jsonl")
    assert code == 0, out
    tokens = {r["id"]: r["prompt_tokens"] + r["answer_tokens"] for r in ScoreFolder.open("s").read().to_pylist()}
    chosen = [json.loads(line) for line in Path("chosen.jsonl").read_text().splitlines()]
    assert 0 < sum(tokens[row["id"]] for row in chosen) <= 900
    by_id = {record.id: record for record in AWKWARD}
    for row in chosen:
        assert [(turn["role"], turn["content"]) for turn in row["messages"]] == list(by_id[row["id"]].turns)
    assert codeact("clean", talk_path, "--id-column", "id", "--output", "clean.jsonl")[0] == 0
    code, out, err = codeact(*common, "--turns", "last")
    assert code == 2
    assert "turns 'all' there, 'last' here" in err
