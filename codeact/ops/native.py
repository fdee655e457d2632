"""The compiled core and tensors: what it computes, with which instruction set, and how operands reach it uncopied."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

import codeact._native as _native
from codeact.base.errors import one_of

_DTYPES = (torch.float32, torch.bfloat16)


def why_not(tensor: Tensor) -> str | None:
    """Why the compiled kernels cannot compute with a tensor here; None where they can."""
    if tensor.device.type != "cpu":
        return f"runs on cpu, and the operands are on {tensor.device}"
    if tensor.dtype not in _DTYPES:
        return f"computes float32, bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
    return None if _native.instruction_sets() else "needs an x86-64 CPU with AVX2"


def instruction_set() -> str:
    """The best instruction set here, or that of ``CODEACT_NATIVE_ISA`` (avx512bf16, avx512, avx2).

    Raises:
        InputError: the CPU lacks the one asked for.
    """
    here = _native.instruction_sets()
    asked = os.environ.get("CODEACT_NATIVE_ISA")
    return one_of("CODEACT_NATIVE_ISA (of those that this CPU has)", asked, here) if asked else here[0]


def as_array(tensor: Tensor) -> Any:
    """A numpy view of a CPU tensor, bfloat16 as uint16; copied only where the last dimension is not side by side."""
    tensor = tensor.detach()
    tensor = tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_tensor(array: Any) -> Tensor:
    """The tensor of an array that the compiled core returned."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
