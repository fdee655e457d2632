"""What decoder layers of the Llama kind do between their products, each in one pass over memory.

On the CPU by the compiled core, without gradients; on a GPU by Triton, with them. The readable twins are in
``layers_reference``. Rounded as PyTorch's own chains of operations round; sums differ by their order. Shapes: T tokens,
D elements, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

import codeact._native as _native
from codeact.ops.native import as_array, instruction_set, why_not
from codeact.ops.nll import nll_backend


def fusable(*tensors: Tensor) -> bool:
    """Whether these are computed here: of one dtype, which Triton computes on a GPU; or the compiled core on the CPU.

    There it is float32 or bfloat16, and nothing may ask for gradients.
    """
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) != 1:
        return False
    if _on_gpu(tensors[0]):
        return True
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not wanted and all(why_not(tensor) is None for tensor in tensors)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and nll_backend(tensor) == "triton"


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + epsilon))`` of the last dimension; x (..., D), weight (D,)."""
    if _on_gpu(x):
        from codeact_kernels import layers

        return layers.rms_norm(x, weight, epsilon)
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
    if _on_gpu(gate):
        from codeact_kernels import layers

        return layers.silu_multiply(gate, up)
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
    if _on_gpu(x):
        from codeact_kernels import layers

        return layers.rotate(x, cosine, sine)
    # Laid out by tokens, as the product left it and as attention reads it.
    output = x.new_empty(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)
    _native.rotate(
        as_array(x), as_array(cosine), as_array(sine), as_array(output), torch.get_num_threads(), instruction_set()
    )
    return output
