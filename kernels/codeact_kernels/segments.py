"""Sums over the samples of a pack: K3, one program per sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from codeact_kernels.tiles import ROUNDING, Launch, architecture_of, current_device

_BLOCK = 1024


@triton.jit
def sum_segments(
    values,
    targets,
    cu_seqlens,
    sums,
    counts,
    ignore_index,
    HAS_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """K3: float64 sum and int32 count of ``values[cu_seqlens[i]:cu_seqlens[i + 1]]``.

    Every lane adds up its own values from the segment's start on, and the lanes are added once: the order depends on
    the segment alone, not on where it stands.
    """
    segment = tl.program_id(0)
    start = tl.load(cu_seqlens + segment).to(tl.int64)
    end = tl.load(cu_seqlens + segment + 1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        kept = at < end
        if HAS_TARGETS:
            kept = kept & (tl.load(targets + at, mask=kept, other=0) != ignore_index)
        total += tl.load(values + at, mask=kept, other=0.0).to(tl.float64)
        count += kept.to(tl.int32)
    tl.store(sums + segment, tl.sum(total, axis=0))
    tl.store(counts + segment, tl.sum(count, axis=0))


def segment_launch(
    values: Tensor, targets: Tensor | None, cu_seqlens: Tensor, sums: Tensor, counts: Tensor, ignore_index: int
) -> Launch:
    """K3 as (kernel, grid, arguments, options); ``compile_report`` compiles what this returns."""
    arguments = (values, values if targets is None else targets, cu_seqlens, sums, counts, ignore_index)
    options = {"HAS_TARGETS": targets is not None, "BLOCK": _BLOCK, "num_warps": 4, **ROUNDING}
    return sum_segments, (sums.shape[0],), arguments, options


@torch.library.custom_op("codeact::segment_sums", mutates_args=())
def _segment_sums(
    values: Tensor, cu_seqlens: Tensor, targets: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    architecture_of(values.device)
    segments = cu_seqlens.shape[0] - 1
    sums = values.new_empty(segments, dtype=torch.float64)
    counts = values.new_empty(segments, dtype=torch.int32)
    if segments:
        targets = None if targets is None else targets.contiguous()
        operands = (values.contiguous(), targets, cu_seqlens.contiguous(), sums, counts)
        kernel, grid, arguments, options = segment_launch(*operands, ignore_index)
        with current_device(values.device):
            kernel[grid](*arguments, **options)
    return sums, counts


@_segment_sums.register_fake
def _(values: Tensor, cu_seqlens: Tensor, targets: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    segments = cu_seqlens.shape[0] - 1
    return values.new_empty(segments, dtype=torch.float64), values.new_empty(segments, dtype=torch.int32)


def segment_sums(
    values: Tensor, cu_seqlens: Tensor, targets: Tensor | None = None, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Sum per-token values over the samples of a pack, in float64, and count the tokens that were summed.

    Args:
        values: (T,) floating point, on a CUDA or ROCm device: losses per token.
        cu_seqlens: (N + 1,) int32 or int64 bounds; sample i is ``values[cu_seqlens[i]:cu_seqlens[i + 1]]``, and may be
            empty. The host does not look at them, for it would have to wait for the device.
        targets: (T,) int64; tokens whose target is ``ignore_index`` are neither summed nor counted. None keeps all.
        ignore_index: see ``targets``.

    Returns:
        Sums float64 (N,) and counts int32 (N,), on the device of ``values``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    if values.ndim != 1 or not values.is_floating_point():
        raise ValueError(f"values must be floating point (T,), not {values.dtype} {tuple(values.shape)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 (N + 1,), not {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if targets is not None and (targets.shape != values.shape or targets.dtype != torch.int64):
        raise ValueError(f"targets must be int64 {tuple(values.shape)}, not {targets.dtype} {tuple(targets.shape)}")
    if len({t.device for t in (values, cu_seqlens, targets) if t is not None}) > 1:
        raise ValueError("values, cu_seqlens and targets must be on one device")
    with torch.no_grad():
        result: tuple[Tensor, Tensor] = _segment_sums(values, cu_seqlens, targets, ignore_index)
    return result
