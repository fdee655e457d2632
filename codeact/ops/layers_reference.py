"""What ``layers`` computes, as transformers writes it: a chain of PyTorch's operations, each rounded to its dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + epsilon))`` of the last dimension; sums in float32, of float64 in float64."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def silu_multiply_reference(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return F.silu(gate) * up


def rotate_reference(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """``x * cosine + rotate_half(x) * sine``; x (..., T, D), cosine and sine (T, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
