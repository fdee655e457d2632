"""Decode a batch of prompts: left padding, a cache that grows in place, finished rows leave the batch.

Rows that would change each other's numbers do not share a batch (``codeact.models.isolation.PassRule``): where a row
comes to a length from which its model computes the whole pass in another way, it leaves the batch, and goes on in
another one with a new cache.

Shapes: B rows, S tokens so far (padding included), V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from codeact.base.errors import InputError
from codeact.models.isolation import (
    PassRule,
    few_layers,
    forget_longest,
    only_layers,
    refusals_of,
    round_row_by_row,
    trunk_of,
)

_GROWTH = 64  # tokens that the cache grows by
_STEPS = 3  # of a trial
_KEEP = 0.875  # a smaller share of unfinished rows is worth copying the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """``temperature`` 0 takes the likeliest token, whatever the model's own generation settings say."""

    temperature: float = 0.0
    top_p: float = 1.0


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A cache layer that writes a step's token in place; transformers' own copies all tokens at every step."""

    keys: Tensor
    values: Tensor
    _key_buffer: Tensor
    _value_buffer: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if begin == 0 or end > self._key_buffer.shape[-2]:
            self._key_buffer = self._grown(self.keys, key_states, begin, end)
            self._value_buffer = self._grown(self.values, value_states, begin, end)
        self._key_buffer[..., begin:end, :] = key_states
        self._value_buffer[..., begin:end, :] = value_states
        self.keys, self.values = self._key_buffer[..., :end, :], self._value_buffer[..., :end, :]
        return self.keys, self.values

    @staticmethod
    def _grown(old: Tensor, new: Tensor, begin: int, end: int) -> Tensor:
        buffer = new.new_empty(*new.shape[:-2], end + _GROWTH, new.shape[-1])
        if begin:
            buffer[..., :begin, :] = old
        return buffer

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:  # of a layer that is left out
            return
        length = self.get_seq_length()
        self._key_buffer, self._value_buffer = self._key_buffer[beam_idx], self._value_buffer[beam_idx]
        self.keys, self.values = self._key_buffer[..., :length, :], self._value_buffer[..., :length, :]


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """The model's own kind of cache (sliding windows and the like are kept), plain layers replaced by growing ones."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a model can be decoded so that a row gets what it gets by itself; see ``exact_manner``."""

    batched: bool = True
    cached: bool = True


@torch.inference_mode()
def decode_batches(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    ends: Callable[[int, list[int]], bool],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    pad_id: int = 0,
    manner: Manner | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continue every prompt; yields ``(row, new token ids)`` as rows finish.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids, each of one at least.
        ends: called with row and its new tokens, the latest last: whether the row is finished.
        max_new_tokens: at most so many tokens a row.
        sampling: how the next token is chosen.
        seeds: one a row, so that what is drawn for a row does not depend on its neighbours.
        pad_id: any valid token; it is masked.
        manner: how, so that a row gets what it gets alone; None: ``exact_manner`` finds it.
    """
    forget_longest(model)
    round_row_by_row(model)
    manner = manner or exact_manner(model, max(map(len, prompts), default=0) + max_new_tokens)
    run = _Run(model, PassRule.of(model), ends, max_new_tokens, _Chooser(sampling, seeds), pad_id, manner)
    texts = [list(prompt) for prompt in prompts]
    starts = [len(prompt) for prompt in prompts]
    waiting = list(range(len(texts)))
    while waiting:
        # The shortest first: when it has come to where the others are, they go on together.
        keys = dict(zip(waiting, run.rule.keys([len(texts[row]) for row in waiting]).tolist(), strict=True))
        batch = [row for row in waiting if keys[row] == min(keys.values())]
        if not run.manner.batched or run.rule.capacity(max(len(texts[row]) for row in batch), 2) == 1:
            batch = batch[:1]
        waiting = [row for row in waiting if row not in set(batch)]
        for row in run.batch(texts, starts, batch):
            if row in run.left:
                waiting.append(row)
            else:
                yield row, texts[row][starts[row] :]
        run.left.clear()


class _Run:
    """What all batches of one call of ``decode`` share; ``left``: rows that have to go on in another batch."""

    def __init__(
        self,
        model: PreTrainedModel,
        rule: PassRule,
        ends: Callable[[int, list[int]], bool],
        max_new_tokens: int,
        choose: _Chooser,
        pad_id: int,
        manner: Manner,
    ) -> None:
        self.model, self.rule, self.ends, self.max_new_tokens = model, rule, ends, max_new_tokens
        self.choose, self.pad_id, self.manner = choose, pad_id, manner
        self.left: set[int] = set()

    def batch(self, texts: list[list[int]], starts: Sequence[int], rows: list[int]) -> Iterator[int]:
        """Lengthen the texts of ``rows``; yields every row that is finished, or that has to leave."""
        open_rows = set(rows)
        key = self.rule.keys([len(texts[rows[0]])])[0]
        cache = growing_cache(self.model) if self.manner.cached else None
        ids, mask, positions = self._inputs([texts[row] for row in rows])
        while True:
            chosen = self.choose(next_logits(self.model, ids, mask, positions, cache), rows)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if row not in open_rows:
                    continue
                texts[row].append(token)
                new = texts[row][starts[row] :]
                if self.ends(row, new) or len(new) == self.max_new_tokens:
                    open_rows.remove(row)
                    yield row
            if not open_rows:
                return
            if cache is None:
                ids, mask, positions = self._inputs([texts[row] for row in rows])
            else:
                ids = chosen[:, None].to(self.model.device)
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                positions = positions[:, -1:] + 1
            # Rows that are finished and still in the batch grow as well, and may not cross over either.
            next_keys = self.rule.keys(mask.sum(1).cpu().numpy())
            stay = [row in open_rows and next_keys[place] == key for place, row in enumerate(rows)]
            leaving = open_rows.difference(row for row, stays in zip(rows, stay, strict=True) if stays)
            open_rows -= leaving
            self.left |= leaving
            yield from leaving
            if not open_rows:
                return
            if len(open_rows) <= _KEEP * len(rows) or (next_keys != key).any():
                kept = torch.tensor([place for place, one in enumerate(stay) if one], device=self.model.device)
                if cache is not None:
                    cache.reorder_cache(kept)
                ids, mask, positions = ids[kept], mask[kept], positions[kept]
                rows = [row for row, one in zip(rows, stay, strict=True) if one]

    def _inputs(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and positions of texts, padded on the left: int64 (B, S) each."""
        width = max(map(len, texts))
        ids = torch.full((len(texts), width), self.pad_id)
        mask = torch.zeros(len(texts), width, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, width - len(text) :] = torch.tensor(text)
            mask[row, width - len(text) :] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def next_logits(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | None
) -> Tensor:
    """Logits (B, V) of what follows ``ids`` (B, S), after what the cache holds; None: after nothing."""
    known = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
    # Mamba: a state instead of keys; its mask is of these ids alone. transformers 5.24 calls every cache "cache".
    recurrent = "cache_params" in known or (getattr(model, "_is_stateful", False) and "position_ids" not in known)
    if len(ids) > 1 or cache is not None:
        inputs |= {"attention_mask": mask[:, -ids.shape[1] :] if recurrent else mask, "position_ids": positions}
    if cache is not None:
        names = ("cache", "cache_params", "past_key_values")
        inputs[next((name for name in names if name in known), "past_key_values")] = cache
    if "logits_to_keep" in known:
        inputs["logits_to_keep"] = 1
    return model(**inputs).logits[:, -1]  # type: ignore[no-any-return]


@torch.inference_mode()
def exact_manner(model: PreTrainedModel, longest: int) -> Manner:
    """Find the fastest manner in which a row gets the logits that it gets alone and without a cache, by trying it.

    Three prompts of different lengths get three tokens more, and one of them leaves in between; then, on a few layers,
    one prompt of nearly ``longest`` tokens and one of a third of it, which leaves: a model may choose among the keys of
    long rows in another way, or lose tokens when a pass holds many. An architecture without a cache, one whose
    recurrent state runs over padding, or one in which later tokens decide what earlier ones become, is decoded in a
    slower manner.

    Args:
        model: a causal language model in evaluation mode.
        longest: tokens of the longest row that there will be.
    """
    rule = PassRule.of(model)
    width = min(longest, *rule.switches, rule.shared or longest) - _STEPS  # rows beyond never share a pass
    layers = few_layers(model)
    for manner in (Manner(), Manner(batched=False)):
        with suppress(InputError), refusals_of(model):
            if _agrees(model, (3, 11, 6), manner):
                if width <= 11 or layers is None:
                    return manner
                with only_layers(model, layers):
                    if not _looks_back_only(model, width):
                        break  # whatever the manner
                    if _agrees(model, (max(1, width // 3), width), manner):
                        return manner
    return Manner(batched=False, cached=False)


def _looks_back_only(model: PreTrainedModel, length: int) -> bool:
    """Whether tokens become what they become, whatever follows.

    A model that keeps the keys of the highest scores (DeepSeek 3.2) may choose others among equal ones when the row is
    longer, in any dtype: scores of few heads after a ReLU are all 0 for many keys.
    """
    trunk = trunk_of(model)
    if trunk is None:
        return True
    (ids,) = _prompts(model, (length,))
    tokens = torch.tensor([ids], device=model.device)
    whole = trunk(input_ids=tokens, use_cache=False).last_hidden_state.float()
    most = _tolerance(model) * float(whole.abs().max())
    for end in (length // 4, length // 2, 3 * length // 4):
        begin = trunk(input_ids=tokens[:, :end], use_cache=False).last_hidden_state.float()
        if not float((begin - whole[:, :end]).abs().max()) <= most:
            return False
    return True


def _prompts(model: PreTrainedModel, lengths: Sequence[int]) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(0)
    count = model.get_input_embeddings().weight.shape[0]
    return [torch.randint(count, (length,), generator=drawn).tolist() for length in lengths]


def _tolerance(model: PreTrainedModel) -> float:
    """A share of the largest number: what rounding in another order makes of it."""
    return 1e-3 if model.dtype == torch.float32 else 5e-2


def _agrees(model: PreTrainedModel, lengths: Sequence[int], manner: Manner) -> bool:
    prompts = _prompts(model, lengths)
    run = _Run(model, PassRule(), lambda *_: False, _STEPS, _Chooser(Sampling(), []), 0, manner)
    groups = [prompts] if manner.batched else [[prompt] for prompt in prompts]
    for group in groups:
        texts = [list(text) for text in group]
        cache = growing_cache(model)
        ids, mask, positions = run._inputs(texts)
        for _ in range(_STEPS):
            got = next_logits(model, ids, mask, positions, cache).float()
            true = torch.cat([_logits_alone(model, text) for text in texts])
            if not float((got - true).abs().max()) <= _tolerance(model) * float(true.abs().max()):
                return False
            ids, positions = true.argmax(-1, keepdim=True), positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(texts), 1)], dim=1)
            for text, token in zip(texts, ids[:, 0].tolist(), strict=True):
                text.append(token)
            if len(texts) == len(prompts):  # the first one leaves
                kept = torch.arange(1, len(texts), device=ids.device)
                cache.reorder_cache(kept)
                ids, mask, positions, texts = ids[kept], mask[kept], positions[kept], texts[1:]
    return True


def _logits_alone(model: PreTrainedModel, text: Sequence[int]) -> Tensor:
    ids = torch.tensor([text], device=model.device)
    positions = torch.arange(len(text), device=model.device)[None]
    return next_logits(model, ids, torch.ones_like(ids), positions, None).float()


class _Chooser:
    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self._sampling = sampling
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Choose the next tokens: logits (B, V) -> int64 (B,) on the CPU."""
        if self._sampling.temperature == 0:
            return logits.argmax(dim=-1).cpu()
        draws = torch.stack([torch.rand((), generator=self._generators[row]) for row in rows])
        return sample(logits.float().cpu(), draws, self._sampling)


def sample(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """Draw from the smallest set of likeliest tokens that holds ``top_p`` of the probability.

    Args:
        logits: float32 (B, V).
        draws: float32 (B,), uniform on [0, 1).
        sampling: a temperature above 0.

    Returns:
        int64 (B,).
    """
    probabilities, tokens = (logits / sampling.temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulated = probabilities.cumsum(dim=-1)
    kept = cumulated - probabilities < sampling.top_p  # the first is always kept
    mass = (probabilities * kept).cumsum(dim=-1)
    index = (mass <= draws[:, None] * mass[:, -1:]).sum(dim=-1)
    last = kept.sum(dim=-1) - 1  # rounding can put the draw behind the last token
    return tokens.gather(1, torch.minimum(index, last)[:, None]).squeeze(1)
