"""Batched decoding gives every row what it gets by itself without a cache, whatever the architecture."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from codeact.evaluation.decoding import Manner, Sampling, decode_batches, exact_manner
from codeact.evaluation.generate import HuggingFaceGenerator
from tests.helpers.zoo import LONGEST, SWITCH, WINDOW, known, logits_alone, make_model, random_ids, share_the_pass

CACHED = (
    "llama", "llama dynamic", "phi3 longrope", "mistral sliding", "gemma2", "gpt_neo", "llama4_text", "mixtral", "lfm2",
    "mamba", "jamba", "qwen3_next", "falcon_h1", "granitemoehybrid", "gpt_oss", "bloom", "mamba2", "bamba",
)  # fmt: skip
SWITCHING = ("llama dynamic", "phi3 longrope")
WHOLE = ("recurrent_gemma", "xlstm", "minimax")
# The second and the fourth row come to the switch while they grow, the third begins beyond it, the first ends below.
PROMPTS = [random_ids(length, seed) for seed, length in enumerate((3, SWITCH - 5, SWITCH + 4, SWITCH - 2, WINDOW - 1))]
TOKENS = (4, 9, 6, 9, 7)


def greedy_alone(model, prompt: list[int], new: list[int], switches: bool) -> list[int]:
    """The likeliest tokens after the prompt and each of the new ones, by themselves and without a cache.

    One pass has them all, but where its length decides how it is computed.
    """
    if not switches:
        return logits_alone(model, [*prompt, *new])[len(prompt) - 1 : -1].argmax(-1).tolist()
    texts = ([*prompt, *new[:count]] for count in range(len(new)))
    return [int(logits_alone(model, text)[-1].argmax()) for text in texts]


def run(model, prompts=PROMPTS, manner=None) -> dict[int, list[int]]:
    def ends(row: int, ids: list[int]) -> bool:
        return len(ids) == TOKENS[row]

    return dict(decode_batches(model, prompts, ends, 20, Sampling(), range(len(prompts)), manner=manner))


@pytest.mark.parametrize(
    ("name", "manner"),
    [*((name, Manner()) for name in CACHED), *((name, Manner(batched=False, cached=False)) for name in WHOLE)],
)
def test_rows_are_what_they_are_alone(name, manner):
    """Rows that end at different steps and leave the batch, over windows, chunks and both sides of a switch of RoPE."""
    model = make_model(name)
    assert exact_manner(model, LONGEST) == manner
    rows = run(model)
    assert [len(rows[row]) for row in range(len(PROMPTS))] == list(TOKENS)
    for row, prompt in enumerate(PROMPTS):
        assert greedy_alone(model, prompt, rows[row], name in SWITCHING) == rows[row]


@pytest.mark.parametrize("manner", [Manner(batched=False), Manner(batched=False, cached=False)])
def test_slower_manners_are_as_right(manner):
    model = make_model("phi3 longrope")
    assert run(model, manner=manner) == run(model)


@pytest.mark.parametrize(
    ("broken", "manner"), [("pad", Manner(batched=False)), ("cache", Manner(batched=False, cached=False))]
)
def test_a_model_that_is_wrong_in_a_batch_or_with_a_cache_is_found_out(broken, manner, monkeypatch):
    """One whose state runs over padding; one whose cache forgets, without any error."""
    model = make_model("mamba")
    plain = model.forward

    def forward(**inputs):
        if broken == "pad":
            inputs["attention_mask"] = None
        elif inputs["input_ids"].shape[1] == 1:
            inputs["cache" if "cache" in inputs else "cache_params"] = None
        return plain(**inputs)

    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", forward)
    assert exact_manner(model, LONGEST) == manner


@pytest.mark.parametrize("room", [0, 60])
@pytest.mark.parametrize("how", ["capacity", "statistics", "mean"])
def test_what_the_tokens_of_a_pass_share_is_found_out(how, room):
    """Also where no short batch shows it: then rows are decoded one by one, and right."""
    model = share_the_pass(make_model("llama"), how, room)
    assert exact_manner(model, LONGEST) == Manner(batched=False, cached=False)
    prompts = [random_ids(length, length) for length in (50, 64, 70)]
    rows = dict(decode_batches(model, prompts, lambda *_: False, 4, Sampling(), range(3)))
    for row, prompt in enumerate(prompts):
        assert greedy_alone(model, prompt, rows[row], switches=True) == rows[row]


@pytest.mark.skipif(not known("minimax_m3_vl_text"), reason="this transformers has no MiniMax M3")
def test_keys_that_are_chosen_by_blocks_of_the_batch():
    """Its blocks are counted from the padding on; transformers says so."""
    model = make_model("minimax_m3_vl_text")
    assert not exact_manner(model, LONGEST).batched
    prompts = [random_ids(length, length) for length in (5, 110, 75)]
    rows = dict(decode_batches(model, prompts, lambda *_: False, 6, Sampling(), range(3)))
    for row, prompt in enumerate(prompts):
        assert greedy_alone(model, prompt, rows[row], switches=True) == rows[row]


@pytest.mark.skipif(not known("deepseek_v32"), reason="this transformers has no DeepSeek 3.2")
class TestEqualScores:
    """DeepSeek 3.2 keeps the keys of the highest scores; of equal ones a row that is longer may keep others."""

    PROMPTS = tuple(random_ids(length, length) for length in (40, 60, 75, 90))

    def rows(self, model, manner: Manner) -> list[bool]:
        """Whether each is what it is alone and without a cache."""
        found = decode_batches(model, self.PROMPTS, lambda *_: False, 6, Sampling(), range(4), manner=manner)
        rows = dict(found)
        return [greedy_alone(model, prompt, rows[row], True) == rows[row] for row, prompt in enumerate(self.PROMPTS)]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_cache_would_change_them_and_is_not_used(self, dtype):
        """It is no rounding: float64 has the same rows wrong."""
        model = make_model("deepseek_v32", dtype)
        assert not all(self.rows(model, Manner()))
        assert exact_manner(model, LONGEST) == Manner(batched=False, cached=False)
        assert all(self.rows(model, exact_manner(model, LONGEST)))

    def test_where_the_first_of_equal_ones_is_kept_they_are_right(self, monkeypatch):
        def topk(scores, count, dim=-1):
            values, places = scores.sort(dim=dim, descending=True, stable=True)
            return SimpleNamespace(values=values[..., :count], indices=places[..., :count])

        monkeypatch.setattr(torch.Tensor, "topk", topk)
        model = make_model("deepseek_v32")
        assert exact_manner(model, LONGEST) == Manner()
        assert all(self.rows(model, Manner()))

    def test_where_hardly_any_are_equal_they_are_right(self):
        model = make_model("deepseek_v32 many heads")
        assert exact_manner(model, LONGEST) == Manner()
        assert all(self.rows(model, Manner()))

    def test_a_later_token_that_changes_an_earlier_one_is_seen(self, monkeypatch):
        """Whether the rows of the trial end otherwise for it is chance."""
        model = make_model("llama")
        plain = model.model.layers[1].mlp.forward
        # The fifth token looks at how long the row is, and nobody after it looks at the fifth.
        mask = torch.arange(LONGEST)[None, :, None] == 4
        monkeypatch.setattr(
            model.model.layers[1].mlp, "forward", lambda h: plain(h + h.shape[1] * mask[:, : h.shape[1]])
        )
        assert exact_manner(model, LONGEST) == Manner(batched=False, cached=False)


@pytest.mark.parametrize("name", ["llama", "mamba", "xlstm", "gpt_neo", "bloom"])
def test_a_batch_has_a_size_with_and_without_attention_heads(name, monkeypatch):
    generator = HuggingFaceGenerator(make_model(name), None, {})
    monkeypatch.setattr("codeact.evaluation.generate.free_memory", lambda _: 1e6)
    sizes = [generator.batch_size(longest) for longest in (1, 100, 10**9)]
    assert sizes[0] == 64 > sizes[1] > sizes[2] == 1
