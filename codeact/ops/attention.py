"""Packs -> flat ids, position_ids and cu_seqlens, and the attention that keeps the samples of a pack apart.

Shapes: T tokens of a pack, N samples in it, H query heads, G key/value heads (G divides H), D head dimension.

Importing this module registers the attention ``codeact_varlen`` with transformers. It serves packed scoring and
training, padded batches and cached generation through one name: it splits a pack at ``cu_seq_lens_q`` (or, where the
caller gives none, wherever ``position_ids`` restart), and hands everything that carries a real mask or a cache to
PyTorch's SDPA.
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

import codeact._native as _native
from codeact.base.devices import to_device
from codeact.base.errors import InputError
from codeact.ops import native

ATTENTION = "codeact_varlen"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Samples laid end to end in one row, with what a causal model needs to keep them apart.

    ``input_ids`` and ``position_ids``: int64 (1, T); positions restart at 0 with every sample.
    ``cu_seqlens``: int32 (N + 1,); sample i stands at ``cu_seqlens[i]:cu_seqlens[i + 1]``.
    ``max_length``: tokens of the longest sample, its prefix included.
    ``prefixes``: int32 (N,), the sample whose tokens come before those of each, or -1; None: no sample has one.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_length: int
    prefixes: Tensor | None = None

    @classmethod
    def from_samples(
        cls, samples: Sequence[Sequence[int] | np.ndarray], prefixes: Sequence[int] | None = None
    ) -> PackedBatch:
        """Lay token id sequences (each of one token at least) end to end, in the order given.

        Args:
            samples: the sequences.
            prefixes: of each the number of one that it goes on, and which goes on none, or -1: many sequences that
                begin alike are then run as their beginning, once, and what is left of each.
        """
        lengths = np.fromiter((len(sample) for sample in samples), dtype=np.int64, count=len(samples))
        if len(samples) == 0 or lengths.min() == 0:
            raise ValueError("a pack holds at least one sample, and every sample at least one token")
        ends = np.cumsum(lengths)
        starts = ends - lengths
        ids = np.concatenate([np.asarray(sample, dtype=np.int64) for sample in samples])
        positions = np.arange(ids.size, dtype=np.int64) - np.repeat(starts, lengths)
        reach = lengths
        if prefixes is not None:
            whose = np.asarray(prefixes, dtype=np.int64)
            if not np.all((whose == -1) | ((whose >= 0) & (whose < len(whose)) & (whose[whose] == -1))):
                raise ValueError("prefixes must name, for each sample, one that has no prefix, or be -1")
            before = np.where(whose < 0, 0, lengths[whose])
            positions += np.repeat(before, lengths)
            reach = lengths + before
        return cls(
            input_ids=torch.from_numpy(ids)[None],
            position_ids=torch.from_numpy(positions)[None],
            cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
            max_length=int(reach.max()),
            prefixes=None if prefixes is None else torch.tensor(prefixes, dtype=torch.int32),
        )

    def model_inputs(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of a transformers model, on ``device``; a cache is switched off, it would join samples."""
        cu_seqlens = to_device(self.cu_seqlens, device)
        more = {} if self.prefixes is None else {"prefix_samples": self.prefixes}
        return {
            "input_ids": to_device(self.input_ids, device),
            "position_ids": to_device(self.position_ids, device),
            "use_cache": False,
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": self.max_length,
            "max_length_k": self.max_length,
            **more,
        }


def isolating_attention(device: torch.device | str) -> str:
    """Name the attention implementation for packs on ``device``, best first.

    Raises:
        InputError: nothing there keeps the samples of a pack apart.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return ATTENTION
    if kind == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (9, 0) and is_flash_attn_3_available():
            return "flash_attention_3"
        if capability >= (8, 0):
            return "flash_attention_2" if is_flash_attn_2_available() else ATTENTION
    raise InputError(
        f"no attention on {device} keeps the samples of a pack apart: it takes a CUDA device of compute capability "
        "8.0 or newer, or --device cpu"
    )


def computes_16_bits_only(attention: str, device: torch.device) -> bool:
    """Whether an attention on ``device`` is a kernel of flash-attention, which has no float32."""
    return device.type == "cuda" and attention in (ATTENTION, "flash_attention_2", "flash_attention_3")


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    prefix_samples: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention in which no sample of a pack sees another; a transformers attention function.

    Args:
        query: (B, H, T, D); ``key`` and ``value``: (B, G, S, D).
        attention_mask: None, or (B, 1, T, S) bool, True where a query may look. With a mask, or with S != T (a cache
            holds earlier tokens), this is SDPA under that mask.
        cu_seq_lens_q: (N + 1,) int32 sample boundaries of a pack (B = 1). Without it a sample starts wherever
            ``position_ids`` do not go up by one.
        sliding_window: a query sees at most so many tokens, itself included.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: (H,) sinks: the score of one more key, of value 0, that every query of a head looks at (GPT-OSS).
        prefix_samples: (N,) int32 on the CPU: the sample of the pack that each goes on, whose tokens it sees before its
            own, or -1. On the CPU, without gradients.

    Returns:
        (B, T, H, D), and None for the attention weights, which are never formed.

    Raises:
        ValueError: the model wants something that this attention does not compute.
    """
    for name in ("position_bias", "head_mask", "block_indices"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{ATTENTION} does not compute {name}, which {type(module).__name__} wants; use eager")
    if s_aux is not None and softcap is not None:
        raise ValueError(f"{ATTENTION} computes either sinks or a softcap; use eager")
    if attention_mask is not None or key.shape[2] != query.shape[2]:
        if s_aux is not None:
            mask = attention_mask
            if mask is None:  # a step with a cache: one token sees all before it
                mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            return _sink_attention(query, key, value, mask, dropout, scaling, s_aux).transpose(1, 2), None
        return _masked_attention(module, query, key, value, attention_mask, dropout, scaling, softcap, **kwargs)
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(f"{ATTENTION} is causal; {type(module).__name__} wants bidirectional attention")

    samples = _sample_bounds(query, cu_seq_lens_q, position_ids)
    bounds = _chunked(samples, module)
    _check_prefixes(prefix_samples, (query, key, value), chunked=bounds is not samples)
    kind = query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        # As autocast treats SDPA: rotary embeddings of a float32 model leave queries and keys in float32.
        query, key, value = (t.to(torch.get_autocast_dtype(kind)) for t in (query, key, value))
    if computes_16_bits_only(ATTENTION, query.device) and s_aux is None:
        return _cuda_varlen(query, key, value, bounds, max_length_q, dropout, scaling, sliding_window, softcap), None
    batch, heads, tokens, _ = query.shape
    plain = batch == 1 and not dropout and softcap is None and s_aux is None
    plain = plain and (sliding_window is None or sliding_window >= tokens)
    if plain and native_runs(query, key, value):
        return _native_varlen(query, key, value, bounds, scaling, prefix_samples), None
    output = query.new_empty(batch, tokens, heads, value.shape[-1])
    for row, here, before in _places(bounds, prefix_samples, tokens):
        q, k, v = query[row, :, here], key[row, :, here], value[row, :, here]
        if before is not None:
            k, v = (torch.cat([whole[row, :, before], own], dim=1) for whole, own in ((key, k), (value, v)))
        sample = _sample_attention(q, k, v, dropout, scaling, sliding_window, softcap, s_aux)
        output[row, here] = sample.transpose(0, 1)
    return output, None


def _check_prefixes(prefixes: Tensor | None, operands: tuple[Tensor, ...], chunked: bool) -> None:
    learns = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
    if prefixes is not None and (chunked or learns or operands[0].device.type != "cpu"):
        raise ValueError(f"{ATTENTION} has prefixes on the CPU only, without gradients, and not for chunked attention")


def _places(bounds: Tensor, prefixes: Tensor | None, tokens: int) -> Iterator[tuple[int, slice, slice | None]]:
    """Of each sample the row of the batch, its tokens there, and those of its prefix.

    The bounds count along the batch laid end to end; no sample crosses from one row to the next.
    """
    ends = bounds.tolist()
    goes_on = [-1] * (len(ends) - 1) if prefixes is None else prefixes.tolist()
    for (start, end), prefix in zip(itertools.pairwise(ends), goes_on, strict=True):
        row, first = divmod(start, tokens)
        before = slice(ends[prefix], ends[prefix + 1]) if prefix >= 0 else None
        yield row, slice(first, first + end - start), before


def _sample_bounds(query: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """Return sample boundaries along the batch laid end to end: int32 (N + 1,), 0 first and B * T last."""
    batch, _, tokens, _ = query.shape
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q describes one row of samples; this batch has {batch} rows")
        return cu_seqlens
    if position_ids is None or tokens == 1:
        return torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    starts = torch.ones(batch, tokens, dtype=torch.bool, device=query.device)
    starts[:, 1:] = (position_ids[:, 1:] - position_ids[:, :-1] != 1).expand(batch, -1)
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=batch * tokens).to(torch.int32)


def _chunked(bounds: Tensor, module: torch.nn.Module) -> Tensor:
    """Cut samples into the chunks beyond which a layer of Llama 4 does not look; they are counted from its start."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or kinds[getattr(module, "layer_idx", 0)] != "chunked_attention":
        return bounds
    chunk = cast(Any, config).attention_chunk_size
    pieces = [torch.arange(start, end, chunk) for start, end in itertools.pairwise(bounds.tolist())]
    return torch.cat([*pieces, torch.tensor([int(bounds[-1])])]).to(bounds)


def native_runs(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the compiled attention can serve these operands."""
    alike = query.dtype == key.dtype == value.dtype
    return alike and os.environ.get("CODEACT_BACKEND") != "torch" and native.why_not(query) is None


class _NativeVarlen(torch.autograd.Function):
    """csrc/attention/forward.cpp: (1, H, T, D) -> (1, T, H, D).

    Nothing but the operands waits for the backward pass, which makes the softmax again.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float, prefixes: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, bounds)
        ctx.scale = scale
        output = _native.varlen_attention(
            native.as_array(query[0]),
            native.as_array(key[0]),
            native.as_array(value[0]),
            bounds.numpy(),
            scale,
            torch.get_num_threads(),
            native.instruction_set(),
            None if prefixes is None else prefixes.numpy(),
        )
        return native.as_tensor(output)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bounds = ctx.saved_tensors
        gradients = _native.varlen_attention_backward(
            native.as_array(slope[0].transpose(0, 1)),
            native.as_array(query[0]),
            native.as_array(key[0]),
            native.as_array(value[0]),
            bounds.numpy(),
            ctx.scale,
            torch.get_num_threads(),
            native.instruction_set(),
        )
        return *(native.as_tensor(g)[None].transpose(1, 2) for g in gradients), None, None, None


def _native_varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None, prefixes: Tensor | None = None
) -> Tensor:
    """The compiled attention, with gradients where no sample has a prefix: (1, H, T, D) -> (1, T, H, D)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cast(Tensor, _NativeVarlen.apply(query, key, value, bounds, scale, prefixes))  # type: ignore[no-untyped-call]


def _sample_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of one sample: q (H, L, D), its last tokens, k and v (G, S, D) -> (H, L, D)."""
    length, before = k.shape[1], k.shape[1] - q.shape[1]
    banded = window is not None and window < length
    mask = None
    if banded or before or softcap is not None or sinks is not None:
        mask = torch.ones(q.shape[1], length, dtype=torch.bool, device=q.device).tril(before)
        if banded:
            mask = mask.triu(before + 1 - cast(int, window))
    q, k, v = q[None], k[None], v[None]
    if softcap is not None:
        return _softcapped(q, k, v, mask, dropout, scale, softcap)[0]
    if sinks is not None:
        return _sink_attention(q, k, v, cast(Tensor, mask)[None, None], dropout, scale, sinks)[0]
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout, enable_gqa=grouped
    )[0]


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float | None, softcap: float
) -> Tensor:
    """Attention by its definition, for the softcap that SDPA lacks: (B, H, T, D)."""
    groups = q.shape[1] // k.shape[1]
    scores = q @ repeat_kv(k, groups).transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.float().softmax(dim=-1).to(q.dtype), p=dropout)
    return cast(Tensor, weights @ repeat_kv(v, groups))


def _sink_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scale: float | None, sinks: Tensor
) -> Tensor:
    """SDPA with sinks: q (B, H, T, D), k and v (B, G, S, D), mask (B, 1, T, S) bool, sinks (H,) -> (B, H, T, D).

    A sink is a key of value 0. A dimension of their own gives the queries of a head its score, and other keys 0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score = (sinks / scale).to(q.dtype)[None, :, None, None].expand(len(q), -1, q.shape[2], 1)
    key = F.pad(torch.ones_like(k[:, :, :1, :1]), (k.shape[-1], 0))
    return F.scaled_dot_product_attention(
        torch.cat([q, score], dim=-1),
        torch.cat([key, F.pad(k, (0, 1))], dim=2),
        F.pad(v, (0, 0, 1, 0)),
        attn_mask=F.pad(mask, (1, 0), value=True),
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _masked_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A padded batch or a step with a cache: what the mask says, and nothing else, keeps tokens apart."""
    if softcap is not None:
        return _softcapped(query, key, value, mask, dropout, scaling, softcap).transpose(1, 2).contiguous(), None
    return cast(
        tuple[Tensor, None],
        sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs),
    )


def _cuda_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int | None,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """``torch.nn.attention.varlen`` on the batch laid end to end: (B, T, H, D). Not run on a device by its authors."""
    if dropout or softcap is not None:
        raise ValueError("torch.nn.attention.varlen has neither dropout nor softcap: install flash-attn")
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"torch.nn.attention.varlen computes bfloat16 and float16, not {query.dtype}")
    batch, heads, tokens, _ = query.shape
    if longest is None:
        longest = int((bounds[1:] - bounds[:-1]).max())
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    # Its default window looks ahead as well: (left, 0) is what makes it causal.
    left = -1 if window is None else window - 1
    # PyTorch 2.11 takes fewer key heads as they are and has no word for it. Without num_splits=1 newer ones split by
    # the longest sample, so that a sample's bits would depend on its pack.
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": key.shape[1] != heads, "num_splits": 1}
    output = varlen_attn(
        q,
        k,
        v,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        **{name: option for name, option in options.items() if name in known},
    )
    return cast(Tensor, output).view(batch, tokens, heads, value.shape[-1])


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that goes with ``varlen_attention``: None where its own sample boundaries are the whole truth.

    Everything else (padding, tokens in a cache, a model's own extra mask) gets the mask that SDPA would get. An
    attention_mask of ones alone says nothing, so it does not switch the isolation off, as it does elsewhere.
    """
    in_cache = isinstance(q_offset, Tensor) or q_offset != 0 or kv_length != q_length
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not in_cache and not padded and not use_vmap:
        return None
    return cast(
        "Tensor | None",
        sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            **kwargs,
        ),
    )


AttentionInterface.register(ATTENTION, varlen_attention)
AttentionMaskInterface.register(ATTENTION, varlen_mask)
