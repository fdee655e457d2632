"""What decoder layers of the Llama kind do between their products, each in one pass over memory; without gradients.

Rounded as PyTorch's own chains of operations round; sums differ by their order. Shapes: T tokens, D elements, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

import codeact._native as _native
from codeact.ops.native import as_array, instruction_set, why_not


def fusable(*tensors: Tensor) -> bool:
    """Whether the compiled core takes these: float32 or bfloat16 alike, on the CPU, and nothing asks for gradients."""
    return (
        not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and len({tensor.dtype for tensor in tensors}) == 1
        and all(why_not(tensor) is None for tensor in tensors)
    )


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + epsilon))`` of the last dimension; x (..., D), weight (D,)."""
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    _native.rms_norm(
        as_array(x.reshape(-1, width)),
        as_array(weight),
        epsilon,
        as_array(output.view(-1, width)),
        torch.get_num_threads(),
        instruction_set(),
    )
    return output


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, both (..., D)."""
    output = torch.empty_like(gate, memory_format=torch.contiguous_format)
    width = gate.shape[-1]
    _native.silu_multiply(
        as_array(gate.reshape(-1, width)),
        as_array(up.reshape(-1, width)),
        as_array(output.view(-1, width)),
        torch.get_num_threads(),
        instruction_set(),
    )
    return output


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding, ``x * cosine + rotate_half(x) * sine``; x (H, T, D) with D even, cosine and sine (T, D)."""
    # Laid out by tokens, as the product left it and as attention reads it.
    output = x.new_empty(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)
    _native.rotate(
        as_array(x), as_array(cosine), as_array(sine), as_array(output), torch.get_num_threads(), instruction_set()
    )
    return output
