"""IFD against one-row-at-a-time references, on tiny and on real models."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from codeact.base.errors import InputError
from codeact.data.records import BadRow, Record
from codeact.models.isolation import prove_isolation, split_head
from codeact.models.loading import load_causal_lm
from codeact.scoring.ifd import IfdScorer, score_ifd
from codeact.scoring.reference import exact_ifd, paper_ifd
from codeact.scoring.table import SCHEMA
from codeact.scoring.tokens import tokenize
from codeact.text.templates import TEMPLATES, PromptBuilder
from codeact.text.tokenizers import leading_bos
from tests.conftest import make_records

CPU = torch.device("cpu")


def row(question="Add two numbers.", answer="def add(a, b):\n    return a + b", number=0, **more):
    return Record(id=str(number), row=number, question=question, answer=answer, **more)


class TestTokens:
    def test_answer_ids_are_the_same_in_both_passes(self, tokenizer):
        (item,) = tokenize([row()], tokenizer, PromptBuilder(tokenizer, "qa"), 100)
        prompt = tokenizer("Question:\nAdd two numbers.\n\nAnswer:\n")["input_ids"]
        answer = tokenizer(row().answer)["input_ids"]
        assert item.conditional == prompt + answer
        assert item.unconditional == answer
        # no BOS: the first answer token has no context in the second pass, so neither scores it
        assert (item.conditional_start, item.unconditional_start) == (len(prompt) + 1, 1)
        assert (item.prompt_tokens, item.answer_tokens, item.truncated) == (len(prompt), len(answer), False)

    def test_with_a_bos_every_answer_token_is_scored(self, bos_tokenizer):
        assert leading_bos(bos_tokenizer) == [bos_tokenizer.bos_token_id]
        (item,) = tokenize([row()], bos_tokenizer, PromptBuilder(bos_tokenizer, "qa"), 100)
        assert item.conditional[0] == item.unconditional[0] == bos_tokenizer.bos_token_id
        assert item.conditional_start == 1 + item.prompt_tokens
        assert item.unconditional_start == 1
        assert len(item.unconditional) == 1 + item.answer_tokens

    def test_a_chat_template_that_writes_the_bos_gets_one_only(self, bos_tokenizer):
        (item,) = tokenize([row()], bos_tokenizer, PromptBuilder(bos_tokenizer, "chat"), 100)
        bos = bos_tokenizer.bos_token_id  # SmolLM2's template opens with it
        assert item.conditional[:2].count(bos) == 1

    def test_chat_template_holds_the_history(self, tokenizer):
        prompts = PromptBuilder(tokenizer, "chat")
        text = prompts.render(row(history=(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))))
        assert [text.index(part) for part in ("Be brief.", "Hi", "Hello", "Add two")] == sorted(
            text.index(part) for part in ("Be brief.", "Hi", "Hello", "Add two")
        )
        assert text.endswith("<|im_start|>assistant\n")

    def test_text_templates_hold_the_history_and_braces(self, tokenizer):
        history = (("system", "S"), ("user", "Q1 {x}"), ("assistant", "A1"))
        text = PromptBuilder(tokenizer, "qa").render(row("Q2 {question} {}", history=history))
        assert text == "S\n\nQuestion:\nQ1 {x}\n\nAnswer:\nA1\n\nQuestion:\nQ2 {question} {}\n\nAnswer:\n"

    @pytest.mark.parametrize("name", [*TEMPLATES, "deepseek", "chat", "Q: {question}\nA:"])
    def test_every_template_holds_the_question_once(self, tokenizer, name):
        assert PromptBuilder(tokenizer, name).render(row("xyzzy")).count("xyzzy") == 1

    def test_unknown_template_lists_the_closest_first(self, tokenizer):
        with pytest.raises(InputError, match="template 'deepsek' is unknown; choose one of: deepseek, "):
            PromptBuilder(tokenizer, "deepsek")

    def test_chat_without_a_template_is_refused(self, tokenizer, monkeypatch):
        monkeypatch.setattr(tokenizer, "chat_template", None)
        with pytest.raises(InputError, match="no chat template"):
            PromptBuilder(tokenizer, "chat")

    def test_a_conversation_that_the_template_refuses_is_a_row_with_a_reason(self, tokenizer, monkeypatch):
        monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
        (item,) = tokenize([row()], tokenizer, PromptBuilder(tokenizer, "chat"), 100)
        assert (item.status, item.reason.split(":")[0]) == ("unreadable", "template_refused")
        assert "no system role" in item.reason

    @pytest.mark.parametrize("protocol", ["exact", "paper"])
    def test_every_length_limit(self, tokenizer, protocol):
        """From no room at all to room for everything: never a crash, never a sequence too long."""
        for limit in range(2, 60):
            (item,) = tokenize([row()], tokenizer, PromptBuilder(tokenizer, "qa"), limit, protocol)
            if item.status == "ok":
                assert len(item.conditional) <= limit
                assert item.conditional_start < len(item.conditional)
                assert item.unconditional_start < len(item.unconditional)
                if protocol == "exact":
                    kept = item.unconditional
                    assert list(item.conditional)[-len(kept) :] == list(kept)
                    assert item.truncated == (len(kept) < item.answer_tokens)
            else:
                assert item.status == "prompt_too_long"
                assert not item.truncated
                assert str(limit) in item.reason

    def test_rows_without_a_record_keep_their_place(self, tokenizer):
        rows = [
            BadRow(id="0", row=0, reason="broken_json", message="f row 0: broken"),
            row(number=1),
            BadRow(id="2", row=2, reason="empty_answer", message="f row 2: empty"),
        ]
        items = tokenize(rows, tokenizer, PromptBuilder(tokenizer, "qa"), 100)
        assert [item.status for item in items] == ["unreadable", "ok", "empty_answer"]
        assert items[0].reason == "broken_json: f row 0: broken"

    def test_one_token_and_no_bos(self, tokenizer):
        (item,) = tokenize([row(answer="x", number=7)], tokenizer, PromptBuilder(tokenizer, "qa"), 100)
        assert item.status == "answer_too_short"
        assert item.reason.startswith("answer_too_short: row 7: ")


class TestExact:
    @pytest.mark.parametrize("tokens_per_pack", [1, 64, 300, 100_000])
    def test_equals_reference_for_any_pack_size_and_order(self, tiny_model, tokenizer, records, tokens_per_pack):
        expected = {record.id: exact_ifd(tiny_model, tokenizer, record) for record in records}
        random.Random(tokens_per_pack).shuffle(records)
        table = score_ifd(tiny_model, tokenizer, records, max_length=512, tokens_per_pack=tokens_per_pack)
        assert table.schema == SCHEMA
        assert table["id"].to_pylist() == [record.id for record in records]
        for name, value in zip(table["id"].to_pylist(), table["ifd"].to_pylist(), strict=True):
            assert value == pytest.approx(expected[name], rel=1e-4)

    @pytest.mark.parametrize("template", ["chat", "alpaca", "deepseek"])
    def test_templates_and_truncation(self, tiny_model, tokenizer, template):
        records = [row("Q " * n, "def f(): return 1 " * 40, number=n) for n in (1, 40, 90)]
        table = score_ifd(tiny_model, tokenizer, records, template=template, max_length=256)
        assert table["truncated"].to_pylist() == [True] * 3
        for record, value in zip(records, table["ifd"].to_pylist(), strict=True):
            assert value == pytest.approx(exact_ifd(tiny_model, tokenizer, record, template, 256), rel=1e-4)

    @pytest.mark.parametrize("tokens_per_pack", [300, 2048])
    def test_what_all_prompts_begin_with_is_computed_once_a_pack(self, tiny_model, tokenizer, records, tokens_per_pack):
        system = "You are a careful programmer. " * 12
        template = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{{question}}<|im_end|>\n"
        scorer = IfdScorer(tiny_model, tokenizer, template, max_length=512, tokens_per_pack=tokens_per_pack)
        table, cost = scorer.score(records)
        for record, value in zip(records, table["ifd"].to_pylist(), strict=True):
            assert value == pytest.approx(exact_ifd(tiny_model, tokenizer, record, template, 512), rel=1e-4)
        scorer._shares[False] = False
        apart, whole = scorer.score(records)
        assert apart["cond_nll_sum"].to_pylist() == pytest.approx(table["cond_nll_sum"].to_pylist(), rel=1e-5)
        assert cost.tokens + cost.shared_tokens == whole.tokens
        assert whole.shared_tokens == 0
        assert cost.sequences == whole.sequences == 2 * len(records)
        assert cost.packs <= whole.packs
        assert cost.shared_tokens > (2 if tokens_per_pack == 300 else 10) * 60

    def test_with_bos(self, tiny_model, bos_tokenizer, records):
        table = score_ifd(tiny_model, bos_tokenizer, records, max_length=512)
        assert table["scored_tokens"].to_pylist() == table["answer_tokens"].to_pylist()
        for record, value in zip(records, table["ifd"].to_pylist(), strict=True):
            assert value == pytest.approx(exact_ifd(tiny_model, bos_tokenizer, record), rel=1e-4)

    def test_a_longer_sequence_has_a_pack_of_its_own(self, tiny_model, tokenizer):
        rows = [row(answer="def f(): return 1 " * n, number=n) for n in (1, 2, 3, 40)]
        scorer = IfdScorer(tiny_model, tokenizer, max_length=512, tokens_per_pack=64)
        scorer._shares[False] = False
        packs = []
        real = scorer._pack_sums
        scorer._pack_sums = lambda samples, *more: packs.append([len(s) for s in samples]) or real(samples, *more)
        scorer.score(rows)
        assert sum(map(len, packs)) == 8
        assert all(len(pack) == 1 or sum(pack) <= 64 for pack in packs)
        assert max(map(sum, packs)) > 64
        assert max(map(len, packs)) > 1

    def test_sums_and_counts_give_the_score(self, tiny_model, tokenizer, records):
        for item in score_ifd(tiny_model, tokenizer, records, max_length=512).to_pylist():
            assert item["scored_tokens"] == item["uncond_scored_tokens"] == item["answer_tokens"] - 1
            mean = (item["cond_nll_sum"] - item["uncond_nll_sum"]) / item["scored_tokens"]
            assert item["ifd"] == pytest.approx(math.exp(mean), rel=1e-12)

    def test_real_model_on_real_rows(self, model, model_path, model_tokenizer, code_alpaca):
        records = code_alpaca.rows(100, 104)
        ours, _ = load_causal_lm(str(model_path), CPU, torch.float32)
        table = score_ifd(ours, model_tokenizer, records, tokens_per_pack=512, max_length=512)
        for record, value in zip(records, table["ifd"].to_pylist(), strict=True):
            assert value == pytest.approx(exact_ifd(model, model_tokenizer, record), rel=1e-4)


class TestSeed:
    def test_equals_the_procedure_on_real_rows(self, model, model_path, model_tokenizer, code_alpaca):
        records = code_alpaca.rows(0, 5)
        ours, _ = load_causal_lm(str(model_path), CPU, torch.float32)
        table = score_ifd(ours, model_tokenizer, records, protocol="paper", max_length=512)
        assert table["status"].to_pylist() == ["ok"] * 5
        for record, value in zip(records, table["ifd"].to_pylist(), strict=True):
            assert value == pytest.approx(paper_ifd(model, model_tokenizer, record), rel=1e-4)

    @pytest.mark.parametrize("with_bos", [False, True])
    @pytest.mark.parametrize("max_length", [90, 512])
    def test_truncation_and_bos(self, tiny_model, tokenizer, bos_tokenizer, with_bos, max_length):
        chosen = bos_tokenizer if with_bos else tokenizer
        records = make_records(10, seed=3)
        table = score_ifd(tiny_model, chosen, records, protocol="paper", max_length=max_length)
        assert any(table["truncated"].to_pylist()) == (max_length == 90)
        scored = 0
        for record, item in zip(records, table.to_pylist(), strict=True):
            if item["status"] == "ok":
                scored += 1
                assert item["ifd"] == pytest.approx(paper_ifd(tiny_model, chosen, record, max_length), rel=1e-4)
        assert scored > 4

    def test_differs_from_exact(self, tiny_model, tokenizer, records):
        exact = score_ifd(tiny_model, tokenizer, records, max_length=512)["ifd"].to_numpy()
        paper = score_ifd(tiny_model, tokenizer, records, max_length=512, protocol="paper")["ifd"].to_numpy()
        assert np.abs(exact - paper).max() > 1e-3

    def test_other_templates_are_refused(self, tiny_model, tokenizer):
        with pytest.raises(InputError, match="template qa only"):
            IfdScorer(tiny_model, tokenizer, template="chat", protocol="paper")


class TestFailures:
    def test_a_failure_is_never_a_number(self, tiny_model, tokenizer, records):
        """A model that overflows gives a status and a reason, not a score of 0."""
        scorer = IfdScorer(tiny_model, tokenizer, max_length=512)
        with torch.no_grad():
            scorer.trunk.norm.weight.fill_(torch.nan)
        table, _ = scorer.score(records)
        assert set(table["status"].to_pylist()) == {"nonfinite"}
        assert table["ifd"].null_count == table["cond_nll_sum"].null_count == len(records)
        assert all(reason.startswith("nonfinite: ") for reason in table["reason"].to_pylist())

    def test_no_records(self, tiny_model, tokenizer):
        assert score_ifd(tiny_model, tokenizer, [], max_length=512).num_rows == 0

    def test_only_bad_rows(self, tiny_model, tokenizer):
        rows = [BadRow(id="0", row=0, reason="empty_question", message="f row 0: empty")]
        assert score_ifd(tiny_model, tokenizer, rows, max_length=512)["status"].to_pylist() == ["empty_question"]

    @pytest.mark.parametrize("length", [1, 513])
    def test_length_beyond_the_model(self, tiny_model, tokenizer, length):
        with pytest.raises(InputError, match="takes 2 to 512 tokens"):
            IfdScorer(tiny_model, tokenizer, max_length=length)

    def test_no_such_model(self, tmp_path):
        with pytest.raises(InputError, match=r"no such folder: .*safetensors"):
            score_ifd(str(tmp_path / "nowhere"), records=[])

    def test_weights_that_need_unpickling_are_refused(self, tiny_model, tiny_model_path, tokenizer, tmp_path):
        tiny_model.config.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        torch.save(tiny_model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match="cannot load model"):
            load_causal_lm(str(tmp_path), CPU, torch.float32)

    def test_a_checkpoint_that_lacks_weights_is_refused(self, tiny_model, tokenizer, tmp_path):
        """transformers would fill in a random head, and every score would be noise with status ok."""
        tiny_model.base_model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"lacks 1 weights .*lm_head"):
            load_causal_lm(str(tmp_path), CPU, torch.float32)

    def test_a_model_file_cut_short_is_refused(self, tiny_model_path, tmp_path):
        import shutil

        folder = shutil.copytree(tiny_model_path, tmp_path / "model")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(InputError, match="cannot load model"):
            load_causal_lm(str(folder), CPU, torch.float32)

    def test_a_pack_that_does_not_fit_on_the_device(self, tiny_model, tokenizer, records, monkeypatch):
        scorer = IfdScorer(tiny_model, tokenizer, max_length=512)

        def full(*_, **__):
            raise torch.OutOfMemoryError

        monkeypatch.setattr(scorer, "trunk", full)
        with pytest.raises(
            InputError, match=r"a sequence of \d+ tokens does not fit on cpu: lower max_length \(now 512"
        ):
            scorer.score(records)

    @pytest.mark.parametrize(("room", "tokens_per_pack"), [(200, 2048), (600, 1024), (200, 300)])
    def test_a_pack_that_does_not_fit_is_halved_and_scoring_goes_on(
        self, tiny_model, tokenizer, records, monkeypatch, caplog, room, tokens_per_pack
    ):
        expected = score_ifd(tiny_model, tokenizer, records, max_length=180)
        scorer = IfdScorer(tiny_model, tokenizer, max_length=180, tokens_per_pack=tokens_per_pack)
        real, ran, done = scorer.trunk, [], []

        def small(input_ids, **more):
            if input_ids.numel() > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            ran.append(input_ids.numel())
            return real(input_ids=input_ids, **more)

        monkeypatch.setattr(scorer, "trunk", small)
        table, cost = scorer.score(records, lambda share, tokens: done.append((share, tokens)))
        for name in ("cond_nll_sum", "uncond_nll_sum", "ifd"):
            np.testing.assert_allclose(table[name], expected[name], rtol=1e-4)
        assert table.drop_columns(["cond_nll_sum", "uncond_nll_sum", "ifd"]).equals(
            expected.drop_columns(["cond_nll_sum", "uncond_nll_sum", "ifd"])
        )
        assert (cost.packs, cost.tokens) == (len(ran), sum(ran))
        assert done[-1][0] == 1.0
        assert sum(tokens for _, tokens in done) == cost.tokens
        assert scorer.tokens_per_pack <= room
        scorer.score(records)
        assert len([m for m in caplog.messages if "packs are halved until they do" in m]) == 1, "once"

    def test_a_loaded_model_without_a_tokenizer(self, tiny_model, records):
        with pytest.raises(InputError, match="needs its tokenizer"):
            score_ifd(tiny_model, records=records)

    def test_an_attention_that_leaks_is_refused(self, tiny_model, monkeypatch):
        """The check runs the model, so it sees a leak whatever its cause."""
        prove_isolation(tiny_model, "sdpa", 512)  # it isolates a pack when positions restart
        monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
        with pytest.raises(InputError, match=r"cannot be packed with sdpa: .*say attention codeact_varlen"):
            prove_isolation(tiny_model, "sdpa", 512)

    def test_a_head_that_does_more_is_refused(self, tiny_model):
        class Scaled(torch.nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        tiny_model.lm_head.__class__ = Scaled
        prove_isolation(tiny_model, "sdpa", 512)  # which says nothing of the head
        with pytest.raises(InputError, match="more than a linear layer"):
            split_head(tiny_model)

    def test_softcapped_head(self, tokenizer, records):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "gemma2", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.5,
            final_logit_softcapping=3.0, attn_logit_softcapping=None, max_position_embeddings=512,
        )  # fmt: skip
        gemma = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        expected = [exact_ifd(gemma, tokenizer, record) for record in records]
        ours = score_ifd(gemma, tokenizer, records, max_length=512)["ifd"].to_pylist()
        assert ours == pytest.approx(expected, rel=1e-4)


def test_rows_of_any_kind_are_scored_alike(tiny_model, tokenizer):
    """A list of dictionaries, tables, a data set: with the columns found as on the command line."""
    import datasets
    import pandas
    import pyarrow as pa

    from codeact.data.records import open_records

    rows = [
        {"instruction": "Sort this.", "input": "[3, 1]", "output": "[1, 3]"},
        {"instruction": "Q", "output": "A b c"},
    ]
    table = score_ifd(tiny_model, tokenizer, rows, max_length=64)
    assert table["status"].to_pylist() == ["ok", "ok"]
    joined = [Record(id=str(n), row=n, question=q, answer=a) for n, (q, a) in enumerate(
        [("Sort this.\n[3, 1]", "[1, 3]"), ("Q", "A b c")])]  # fmt: skip
    assert table.equals(score_ifd(tiny_model, tokenizer, joined, max_length=64))
    filled = [{"input": "", **row} for row in rows]
    for data in (datasets.Dataset.from_list(filled), pa.Table.from_pylist(filled), pandas.DataFrame(filled),
                 open_records(filled), iter(rows)):  # fmt: skip
        assert table.equals(score_ifd(tiny_model, tokenizer, data, max_length=64))
