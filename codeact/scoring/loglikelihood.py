"""Log-likelihoods of continuations and texts on packs, without logits: the same bits in whatever batch.

What a continuation's tokens are is lm-eval's rule, so that its numbers and ours are of the same tokens: context and
continuation are encoded as one text, spaces at the end of the context belong to the continuation, and an empty context
is the tokenizer's BOS, else its EOS.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from codeact.base.devices import default_tokens_per_pack
from codeact.base.errors import InputError
from codeact.models.isolation import computing
from codeact.models.loading import model_and_tokenizer, positions_of
from codeact.scoring.ifd import MAX_LENGTH, IfdScorer

TokenPair = tuple[Sequence[int], Sequence[int]]
"""Ids of a context, at least one, and of its continuation."""


class LogLikelihood(NamedTuple):
    """``total``: the summed log-likelihood of a continuation, nats.

    ``greedy``: each of its tokens is the likeliest. ``tokens``: how many it has.
    """

    total: float
    greedy: bool
    tokens: int


class LikelihoodScorer:
    """Log-likelihoods by one causal model.

    Args:
        model: a causal transformers model, or the name or folder of one, loaded as ``dtype`` on ``device``.
        tokenizer: its tokenizer; may be None when ``model`` is a name.
        max_length: tokens that the model is given at most; a longer context loses its beginning. None: all the model
            takes.
        dtype, device, attention: of ``codeact.score_ifd``.
        tokens_per_pack: tokens of every forward pass, filled up where there are fewer, since a product of matrices
            rounds by its size; None: by the device and the model. A longer sequence has a pass of its own.

    Raises:
        InputError: a setting is unknown, or the model cannot be loaded or packed.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike[str],
        tokenizer: Any = None,
        max_length: int | None = None,
        dtype: str = "auto",
        device: str = "auto",
        tokens_per_pack: int | None = None,
        attention: str = "auto",
    ) -> None:
        call = "loglikelihood(model, pairs, tokenizer)"
        model, tokenizer = model_and_tokenizer(model, tokenizer, dtype, device, call)
        self.tokenizer = tokenizer
        length = max_length or positions_of(model.config) or MAX_LENGTH
        place = model.get_input_embeddings().weight.device
        # Every pass has so many tokens: small enough that a few pairs do not wait for it.
        tokens_per_pack = tokens_per_pack or default_tokens_per_pack(place, model.num_parameters()) // 4
        self._scorer = IfdScorer(
            model, tokenizer, max_length=length, tokens_per_pack=tokens_per_pack, attention=attention
        )

    @property
    def max_length(self) -> int:
        """Tokens that the model is given at most."""
        return self._scorer.max_length

    def encode(self, context: str, continuation: str) -> TokenPair:
        """The tokens of a pair.

        Raises:
            InputError: the context is empty, and the tokenizer has neither BOS nor EOS to stand for it.
        """
        if not context:
            start = self._start()
            ids = self.tokenizer.encode(continuation, add_special_tokens=False)
            return (ids[:1], ids[1:]) if ids[:1] == [start] else ([start], ids)
        spaces = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
        ids = self._encode(context)
        if not ids:  # nothing but spaces
            return self.encode("", continuation)
        return ids, self._encode(context + continuation)[len(ids) :]

    def _encode(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token
        more = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        ids: list[int] = self.tokenizer.encode(text, **more)
        return ids

    def _start(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise InputError("this tokenizer has no BOS or EOS to stand for an empty context; give every pair one")

    def score(self, pairs: Sequence[TokenPair]) -> list[LogLikelihood]:
        """Log-likelihoods of continuations of tokens, in order.

        Raises:
            InputError: a context is empty, a continuation over ``max_length`` tokens, or a token beyond the model.
        """
        scorer, sequences, starts = self._scorer, [], []
        for number, (context, continuation) in enumerate(pairs):
            if not len(context) or len(continuation) > self.max_length:
                problem = "no context" if not len(context) else f"a continuation of {len(continuation)} tokens"
                raise InputError(f"pair {number} has {problem}; the model takes 1 to {self.max_length} tokens")
            whole = [*context, *continuation][-self.max_length - 1 :]
            if max(whole) >= scorer.vocabulary:
                raise InputError(f"pair {number}: token {max(whole)} is beyond the {scorer.vocabulary} of the model")
            sequences.append(whole)
            starts.append(len(whole) - len(continuation))
        some = [number for number, start in enumerate(starts) if start < len(sequences[number])]
        totals, greedy = np.zeros(len(sequences)), np.ones(len(sequences), np.bool_)
        with computing(scorer.model, scorer.attention):
            nll, likeliest, _ = scorer.likelihoods([sequences[n] for n in some], [starts[n] for n in some])
        totals[some], greedy[some] = -nll, likeliest
        counts = [len(whole) - start for whole, start in zip(sequences, starts, strict=True)]
        return [LogLikelihood(*result) for result in zip(totals.tolist(), greedy.tolist(), counts, strict=True)]

    def perplexity(self, texts: Iterable[str], stride: int | None = None) -> Perplexity:
        """Perplexity of texts, each by windows of its own; arguments and errors as in ``codeact.perplexity``."""
        pairs: list[TokenPair] = []
        for text in texts:
            pairs += windows(self._encode(text), self.max_length, stride or self.max_length)
        results = self.score(pairs)
        tokens = sum(result.tokens for result in results)
        if not tokens:
            raise InputError("no text has two tokens, so there is nothing to predict; give longer ones")
        return Perplexity(nll=-math.fsum(result.total for result in results), tokens=tokens)


class Perplexity(NamedTuple):
    """``nll``: summed over all ``tokens`` that were predicted, nats."""

    nll: float
    tokens: int

    @property
    def value(self) -> float:
        """exp of the mean; infinity where that is too large."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def windows(ids: Sequence[int], max_length: int, stride: int) -> Iterator[TokenPair]:
    """The windows of transformers' page "Perplexity of fixed-length models": each a context and what it is asked for.

    A window of ``max_length`` tokens begins every ``stride`` tokens; of each, what no window before it held is asked
    for, but never the first token of a window, which nothing precedes.

    Raises:
        InputError: the stride is not 1 to ``max_length``.
    """
    if not 1 <= stride <= max_length:
        raise InputError(f"stride is {stride}; it must be 1 to the {max_length} tokens of a window")
    before = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        first = max(before, begin + 1)
        if first < end:
            yield ids[begin:first], ids[first:end]
        before = end
        if end == len(ids):
            break


def loglikelihood(
    model: PreTrainedModel | str | os.PathLike[str],
    pairs: Iterable[tuple[str, str]],
    tokenizer: Any = None,
    **options: Any,
) -> list[LogLikelihood]:
    """Log-likelihood of every continuation given its context, on packs and without logits, the same bits in any batch.

    Args:
        model: a causal transformers model, or the name or folder of one.
        pairs: (context, continuation); an empty context is BOS, else EOS; an empty continuation has 0.0.
        tokenizer: its tokenizer; may be None when ``model`` is a name.
        options: ``max_length``, ``dtype``, ``device``, ``tokens_per_pack``, ``attention`` of ``LikelihoodScorer``.

    Returns:
        (total, greedy, tokens) a pair, in order.

    Raises:
        InputError: the model cannot be loaded or packed, or a pair cannot be scored; the message names it.
    """
    scorer = LikelihoodScorer(model, tokenizer, **options)
    return scorer.score([scorer.encode(*pair) for pair in pairs])


def perplexity(
    model: PreTrainedModel | str | os.PathLike[str],
    texts: Iterable[str],
    tokenizer: Any = None,
    stride: int | None = None,
    **options: Any,
) -> Perplexity:
    """Perplexity of texts, each by the windows of ``windows``; every token counts once.

    Args:
        model: a causal transformers model, or the name or folder of one.
        texts: each by itself; what one says is no context of the next.
        tokenizer: its tokenizer; may be None when ``model`` is a name.
        stride: tokens from one window to the next; None: as long as a window, so that none overlap.
        options: ``max_length`` (of a window), ``dtype``, ``device``, ``tokens_per_pack``, ``attention``.

    Raises:
        InputError: the model cannot be loaded or packed, the stride does not fit, or there is nothing to predict.
    """
    return LikelihoodScorer(model, tokenizer, **options).perplexity(texts, stride)
