"""Decode a batch of prompts: left padding, a cache that grows in place, finished rows leave the batch.

Shapes: B rows, S tokens so far (padding included), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_GROWTH = 64  # tokens that the cache grows by
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

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.get_seq_length()
        self._key_buffer, self._value_buffer = self._key_buffer[indices], self._value_buffer[indices]
        self.keys, self.values = self._key_buffer[..., :length, :], self._value_buffer[..., :length, :]


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """The model's own kind of cache (sliding windows and the like are kept), plain layers replaced by growing ones."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    ends: Callable[[int, list[int]], bool],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    pad_id: int = 0,
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
    """
    device = model.device
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    choose = _Chooser(sampling, seeds)
    new: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch continues
    open_rows = set(rows)
    cache = growing_cache(model)
    while True:
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = choose(output.logits[:, -1], rows)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row not in open_rows:
                continue
            new[row].append(token)
            if ends(row, new[row]) or len(new[row]) == max_new_tokens:
                open_rows.remove(row)
                yield row, new[row]
        if not open_rows:
            return
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        ids = chosen[:, None].to(device)
        if len(open_rows) <= _KEEP * len(rows):
            kept = torch.tensor([index for index, row in enumerate(rows) if row in open_rows], device=device)
            cache.batch_select_indices(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            rows = [rows[index] for index in kept.tolist()]


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
