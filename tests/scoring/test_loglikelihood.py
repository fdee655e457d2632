"""Log-likelihoods: against logits of a sample alone, lm-eval's own rules and model, and transformers' perplexity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import codeact
from codeact import _native
from codeact.base.errors import InputError
from codeact.scoring.loglikelihood import LikelihoodScorer, windows
from tests.helpers.zoo import LONGEST, VOCABULARY, logits_alone, make_model, random_ids

TEXT = "def add(a, b):\n    return a + b\n" * 30


def expected(model: Any, context: list[int], continuation: list[int], most: int) -> tuple[float, bool, int]:
    ids = [*context, *continuation][-most - 1 :]
    losses = logits_alone(model, ids[:-1]).log_softmax(-1)[len(ids) - 1 - len(continuation) :]
    targets = torch.tensor(continuation)
    greedy = bool((losses.argmax(-1) == targets).all())
    return float(losses.gather(1, targets[:, None]).sum()), greedy, len(continuation)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neo", "mistral sliding", "phi3 longrope", "cohere"])
def test_what_logits_give(name, tokenizer):
    """Contexts that lose their beginning, and one token more than the model has positions; half are greedy."""
    model = make_model(name)
    pairs = []
    for seed, (before, after) in enumerate([(1, 1), (5, 3), (30, 9), (60, 1), (LONGEST, 4), (3, LONGEST), (200, 17)]):
        context, continuation = random_ids(before, seed), random_ids(after, 100 + seed)
        pairs.append((context, continuation))
        for length in range(1, min(after, 4) + 1):
            pairs.append((context, greedy_continuation(model, context, length)))
    got = LikelihoodScorer(model, tokenizer, tokens_per_pack=200).score(pairs)
    want = [expected(model, *pair, LONGEST) for pair in pairs]
    np.testing.assert_allclose([one.total for one in got], [one[0] for one in want], rtol=1e-5)
    assert [(one.greedy, one.tokens) for one in got] == [one[1:] for one in want]
    assert 5 < sum(one.greedy for one in got) < len(got)


def greedy_continuation(model: Any, context: list[int], length: int) -> list[int]:
    ids = list(context)
    for _ in range(length):
        ids.append(int(logits_alone(model, ids[-LONGEST:])[-1].argmax()))
    return ids[len(context) :]


def test_of_equal_tokens_the_first_is_the_likeliest(tokenizer):
    model = make_model("llama")
    model.lm_head.weight.data[7] = model.lm_head.weight.data[11] = model.lm_head.weight.data.mean(0)
    model.lm_head.weight.data[[7, 11]] *= 100
    scorer = LikelihoodScorer(model, tokenizer)
    pairs = [([context], [token]) for context in range(20, 60) for token in (7, 11)]
    got = [one.greedy for one in scorer.score(pairs)]
    assert got == [expected(model, *pair, LONGEST)[1] for pair in pairs]
    assert any(got[::2])
    assert not any(got[1::2])


@pytest.fixture
def like_tiny_model(tiny_model):
    def make(dtype):
        model = type(tiny_model)(tiny_model.config).to(dtype).eval()
        model.load_state_dict(tiny_model.state_dict())
        return model

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continuations_of_one_context_share_it_and_no_bit_changes(like_tiny_model, tokenizer, dtype):
    """As hellaswag asks: contexts of any length, four endings each; and examples before all that are asked for."""
    model, rng = like_tiny_model(dtype), np.random.default_rng(3)

    def words(low, high):
        return " ".join(rng.choice(TEXT.split(" "), rng.integers(low, high)))

    contexts = [words(1, 60) for _ in range(12)] + [f"{TEXT[:900]} {words(5, 9)}" for _ in range(4)]
    pairs = [(context, " " + words(1, 12)) for context in contexts for _ in range(4)]
    scorer = LikelihoodScorer(model, tokenizer)
    costs, real = [], scorer._scorer._nll_sums

    def counted(*arguments):
        result = real(*arguments)
        costs.append(result[1])
        return result

    scorer._scorer._nll_sums = counted
    tokens = [scorer.encode(*pair) for pair in pairs]
    together = scorer.score(tokens)
    assert together == [scorer.score([pair])[0] for pair in tokens]
    if _native.instruction_sets():
        assert costs[0].tokens < 0.55 * (costs[0].tokens + costs[0].shared_tokens)
    assert not any(cost.shared_tokens for cost in costs[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_in_any_batch(like_tiny_model, tokenizer, dtype):
    model = like_tiny_model(dtype)
    rng = np.random.default_rng(0)
    words = TEXT.split(" ")
    pairs = [
        (" ".join(rng.choice(words, rng.integers(0, 40))), " " + " ".join(rng.choice(words, 3))) for _ in range(64)
    ]
    whole = codeact.loglikelihood(model, pairs, tokenizer)
    assert whole[::4] == [codeact.loglikelihood(model, [pair], tokenizer)[0] for pair in pairs[::4]]
    assert whole == codeact.loglikelihood(model, pairs[::-1], tokenizer)[::-1]
    some = {size: codeact.loglikelihood(model, pairs[7:39], tokenizer, tokens_per_pack=size) for size in (300, 40)}
    assert some[300] == codeact.loglikelihood(model, pairs, tokenizer, tokens_per_pack=300)[7:39]
    assert some[40] == codeact.loglikelihood(model, pairs, tokenizer, tokens_per_pack=40)[7:39]  # some have their own
    assert codeact.loglikelihood(model, [("a", "")], tokenizer) == [(0.0, True, 0)]
    assert codeact.loglikelihood(model, [], tokenizer) == []
    blank, none = codeact.loglikelihood(model, [("\n\n", "import os"), ("", "\n\nimport os")], tokenizer)
    assert blank == none  # where lm-eval fails


def test_one_line_about_what_cannot_be_scored(tokenizer):
    scorer = LikelihoodScorer(make_model("llama"), tokenizer)
    for pair, message in [
        (([], [1]), "pair 1 has no context"),
        (([1], [2] * (LONGEST + 1)), "pair 1 has a continuation of 129 tokens"),
        (([1], [VOCABULARY]), "pair 1: token 97 is beyond the 97"),
    ]:
        with pytest.raises(InputError, match=message):
            scorer.score([([1], [2]), pair])
    with pytest.raises(InputError, match="needs its tokenizer"):
        LikelihoodScorer(make_model("llama"))


@pytest.mark.parametrize("stride", [None, 512, 100, 1])
def test_perplexity_is_that_of_transformers_page(tiny_model, tokenizer, stride):
    """The loop of "Perplexity of fixed-length models"; a window counts its tokens, where the page has one fewer."""
    most, ids = (
        512 if stride != 1 else 20,
        tokenizer(TEXT if stride != 1 else TEXT[:300], return_tensors="pt").input_ids,
    )
    total, page_total, tokens, page_tokens, before = 0.0, 0.0, 0, 0, 0
    for begin in range(0, ids.shape[1], stride or most):
        end = min(begin + most, ids.shape[1])
        window = ids[:, begin:end]
        target = window.clone()
        target[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = float(tiny_model(window, labels=target).loss)
        valid = int((target != -100).sum())
        count = int((target[:, 1:] != -100).sum())
        if count:
            total, tokens = total + loss * count, tokens + count
            page_total, page_tokens = page_total + loss * (valid - 1), page_tokens + valid - 1
        before = end
        if end == ids.shape[1]:
            break
    text = tokenizer.decode(ids[0])
    result = codeact.perplexity(tiny_model, [text], tokenizer, stride, max_length=most)
    assert result.tokens == tokens
    assert math.isclose(result.nll, total, rel_tol=1e-5)
    if stride != 1:  # at which the page counts no window but the first
        assert math.isclose(result.value, math.exp(page_total / page_tokens), rel_tol=0.02)
    twice = codeact.perplexity(tiny_model, [text, "", text], tokenizer, stride, max_length=most)
    assert (twice.nll, twice.tokens) == (2 * result.nll, 2 * tokens)


def test_windows_ask_for_every_token_but_the_first_once():
    for length, most, stride in [(1, 4, 4), (4, 4, 4), (9, 4, 2), (10, 4, 3), (10, 4, 1), (3, 8, 5)]:
        asked = [token for context, wanted in windows(range(length), most, stride) for token in wanted]
        assert asked == list(range(1, length)) if stride < most else len(set(asked)) == len(asked)
        assert all(len(a) + len(b) <= most and len(a) for a, b in windows(range(length), most, stride))
    with pytest.raises(InputError, match="stride is 5; it must be 1 to the 4 tokens"):
        list(windows(range(9), 4, 5))


def test_nothing_to_predict(tiny_model, tokenizer):
    with pytest.raises(InputError, match="no text has two tokens"):
        codeact.perplexity(tiny_model, ["", "a"], tokenizer)
