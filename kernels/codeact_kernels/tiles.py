"""How much of (tokens, vocabulary, hidden size) one program of K1 computes, per architecture and dtype.

A tile never depends on the number of tokens: with it the order of every sum is fixed, and a row has the same bits in
whatever batch it stands.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# A kernel, its grid, its arguments and its compile-time options.
Launch = tuple[Any, tuple[int], tuple[Any, ...], dict[str, Any]]

# Said here because Triton's default changes with 3.10, and with it every last bit.
ROUNDING = {"enable_fp_fusion": True}

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Shape of K1's tile, its warps and pipeline stages, and whether tensor descriptors (TMA) feed it."""

    block_t: int
    block_v: int
    block_d: int
    warps: int
    stages: int
    descriptors: bool = False


# Checked by ``python -m codeact_kernels.compile_report``: no register spills, shared memory within the chip's limit.
# 128 x 256 spills on sm_90. sm_80's tile also fits the 99 KiB of sm_86, sm_89 and sm_120. None was timed on a device.
_HALF = {
    "sm_80": Tile(block_t=128, block_v=128, block_d=32, warps=8, stages=4),
    "sm_90": Tile(block_t=128, block_v=128, block_d=64, warps=8, stages=4, descriptors=True),
    "sm_100": Tile(block_t=128, block_v=128, block_d=64, warps=8, stages=4, descriptors=True),
    "gfx942": Tile(block_t=128, block_v=128, block_d=64, warps=8, stages=2),
}
# Exact float32 products run outside the tensor cores (linear_nll.py says why), where smaller tiles keep to registers.
_SINGLE = {
    "sm_80": Tile(block_t=64, block_v=64, block_d=16, warps=4, stages=3),
    "sm_90": Tile(block_t=64, block_v=64, block_d=16, warps=4, stages=3),
    "sm_100": Tile(block_t=64, block_v=64, block_d=16, warps=4, stages=3),
    "gfx942": Tile(block_t=64, block_v=64, block_d=32, warps=4, stages=2),
}
# A tile costs the interpreter 6 to 25 ms whatever its size; small ones meet more edges.
_INTERPRETED = Tile(block_t=16, block_v=32, block_d=16, warps=1, stages=1)

ARCHITECTURES = tuple(_HALF)


_INTERPRETING = bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """Whether our kernels run in Triton's interpreter: TRITON_INTERPRET=1 counts when they are imported, not later."""
    return _INTERPRETING


def tile_for(dtype: torch.dtype, architecture: str) -> Tile:
    """Return K1's tile for operands of ``dtype`` on ``architecture``: one of ARCHITECTURES, or "interpreter"."""
    if architecture == "interpreter":
        return _INTERPRETED
    return (_SINGLE if dtype == torch.float32 else _HALF)[architecture]


def architecture_of(device: torch.device) -> str:
    """Return the name of the tiles for ``device``.

    Raises:
        ValueError: no kernel runs there.
    """
    if interpreting():
        return "interpreter"
    if device.type != "cuda":
        raise ValueError(
            f"codeact_kernels need a CUDA or ROCm device, not {device} (TRITON_INTERPRET=1 runs on the CPU)"
        )
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise ValueError(f"codeact_kernels need compute capability 8.0 or newer; {device} has {capability}")
    if capability < (9, 0) or capability >= (12, 0):
        return "sm_80"
    return "sm_90" if capability < (10, 0) else "sm_100"


def takes_descriptor(operand: Tensor) -> bool:
    """Whether a tensor descriptor can read this (rows, D) operand: contiguous rows at multiples of 16 bytes."""
    return (
        operand.numel() > 0
        and operand.stride(1) == 1
        and operand.stride(0) * operand.itemsize % 16 == 0
        and operand.data_ptr() % 16 == 0
    )


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` the current one: Triton launches there, wherever the operands are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
