"""Stand-ins for the attention kernels of a GPU, on the CPU: their signatures, what they refuse, and the right numbers.

They take bfloat16 and float16 only, as flash-attention does, and differentiate.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codeact.ops import attention
from codeact.training import trainer

KERNELS = ("torch 2.11", "torch 2.12 and newer", "flash-attn 2")


def _packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
    assert {t.dtype for t in (q, k, v)} <= {torch.bfloat16, torch.float16}, f"no kernel for {q.dtype}, {k.dtype}"
    assert q.dtype == k.dtype == v.dtype
    assert (q.ndim, bounds.dtype) == (3, torch.int32)
    assert longest == int(bounds.diff().max())
    parts = []
    for start, end in itertools.pairwise(bounds.tolist()):
        heads = (t[start:end].transpose(0, 1)[None] for t in (q, k, v))
        part = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


class Kernels:
    """While ``install`` is in force, attention on the CPU is that of a GPU. ``calls``: keyword arguments of each."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.calls: list[dict[str, Any]] = []
        self.name = "flash_attention_2" if kind == "flash-attn 2" else attention.ATTENTION

    def install(self, monkeypatch: Any) -> None:
        """Put them in, and nothing else: the model stays where it is."""
        kernels = (attention.ATTENTION, "flash_attention_2")
        for module in (attention, trainer):
            monkeypatch.setattr(module, "computes_16_bits_only", lambda name, device: name in kernels)
        monkeypatch.setattr(trainer, "packing_attention", lambda model, device: self.name)
        if self.kind == "flash-attn 2":
            from transformers import PreTrainedModel
            from transformers import modeling_flash_attention_utils as flash

            functions = (None, self.flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
            monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: functions)
            monkeypatch.setattr(flash, "_loaded_implementation", None)
            monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
        else:
            old = self.kind == "torch 2.11"
            monkeypatch.setattr(attention, "varlen_attn", self.varlen_attn_2_11 if old else self.varlen_attn)

    def varlen_attn_2_11(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):  # fmt: skip
        """The signature of PyTorch 2.11; its kernel groups heads without being told."""
        return self.varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=True
        )

    def varlen_attn(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        """The signature of PyTorch 2.12 to 2.13."""
        assert tuple(window_size) == (-1, 0), "not causal"
        assert enable_gqa or key.shape[1] == query.shape[1]
        assert torch.equal(cu_seq_q, cu_seq_k)
        self.calls.append({"dtype": query.dtype})
        return _packed(query, key, value, cu_seq_q, max_q, scale)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        """The signature of flash-attn 2.8."""
        assert causal
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        self.calls.append({"dtype": q.dtype, "deterministic": deterministic})
        return _packed(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)
