"""Loss and slope of rows of logits, in place: K4, one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from codeact_kernels.tiles import ROUNDING, Launch, architecture_of, current_device

_LOG2E = tl.constexpr(1.4426950408889634)
_BLOCK = 2048


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * _LOG2E)) + 1.0)


@triton.jit
def _finished(at, bias, lane, V, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WHOLE: tl.constexpr):
    """A block of logits with bias and softcap, -infinity past the row's end; and the tanh of the softcap."""
    inside = lane < V
    # Whole blocks go without a mask, of which a compiler knows nothing where V is odd.
    x = (tl.load(at + lane) if WHOLE else tl.load(at + lane, mask=inside, other=0.0)).to(tl.float32)
    tanh = x
    if HAS_BIAS:
        x += tl.load(bias + lane) if WHOLE else tl.load(bias + lane, mask=inside, other=0.0)
    if HAS_SOFTCAP:
        tanh = _tanh(x / softcap)
        x = softcap * tanh
    if not WHOLE:
        x = tl.where(inside, x, float("-inf"))
    return x, tanh


@triton.jit
def _summed(
    largest, total, picked, at, bias, lane, target, V, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The lanes' largest logits, sums of exponentials below those, and target's logit, with one more block."""
    x, _ = _finished(at, bias, lane, V, softcap, HAS_BIAS, HAS_SOFTCAP, WHOLE)
    picked += tl.where(lane == target, x, 0.0)
    raised = tl.maximum(largest, x)
    shift = tl.where(raised == float("-inf"), 0.0, raised)
    total = total * tl.exp2((largest - shift) * _LOG2E) + tl.exp2((x - shift) * _LOG2E)
    return raised, total, picked


@triton.jit
def _sloped(
    at, bias, lane, target, kept, factor, top, sums, V, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the slopes of a block over its logits."""
    x, tanh = _finished(at, bias, lane, V, softcap, HAS_BIAS, HAS_SOFTCAP, WHOLE)
    slope = tl.exp2((x - top) * _LOG2E) / sums - (lane == target).to(tl.float32)
    if HAS_SOFTCAP:
        slope *= 1.0 - tanh * tanh
    slope = tl.where(kept, slope * factor, 0.0).to(at.dtype.element_ty)
    if WHOLE:
        tl.store(at + lane, slope)
    else:
        tl.store(at + lane, slope, mask=lane < V)


@triton.jit(do_not_specialize=["ignore_index"])
def loss_slope(
    logits,
    stride,
    targets,
    bias,
    scale,
    losses,
    V,
    softcap,
    ignore_index,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WANT_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """K4: the loss of a row of logits, which become scale * d loss / d logit where that is wanted.

    Every lane sums its own columns, and the lanes are added once: the order depends on nothing but V, no atomics.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    kept = target != ignore_index
    at = logits + row * stride
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    picked = tl.zeros((BLOCK,), tl.float32)
    whole = V // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        largest, total, picked = _summed(
            largest, total, picked, at, bias, first + lanes, target, V, softcap, HAS_BIAS, HAS_SOFTCAP, True
        )
    if whole < V:
        largest, total, picked = _summed(
            largest, total, picked, at, bias, whole + lanes, target, V, softcap, HAS_BIAS, HAS_SOFTCAP, False
        )
    top = tl.max(largest, axis=0)
    # Lanes past the end of a short row saw nothing: -infinity below whatever is the top.
    sums = tl.sum(total * tl.exp2((largest - top) * _LOG2E), axis=0)
    tl.store(losses + row, tl.where(kept, top + tl.log(sums) - tl.sum(picked, axis=0), 0.0))
    if WANT_SLOPE:
        factor = 1.0
        if HAS_SCALE:
            factor = tl.load(scale + row)
        for first in range(0, whole, BLOCK):
            _sloped(at, bias, first + lanes, target, kept, factor, top, sums, V, softcap, HAS_BIAS, HAS_SOFTCAP, True)
        if whole < V:
            _sloped(at, bias, whole + lanes, target, kept, factor, top, sums, V, softcap, HAS_BIAS, HAS_SOFTCAP, False)


def loss_slope_launch(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    scale: Tensor | None,
    slope: bool,
    losses: Tensor,
) -> Launch:
    """K4 as (kernel, grid, arguments, options); ``compile_report`` compiles what this returns."""
    given = (losses if bias is None else bias, losses if scale is None else scale)
    arguments = (logits, logits.stride(0), targets, *given, losses, logits.shape[1], softcap or 1.0, ignore_index)
    options = {
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_SCALE": scale is not None,
        "WANT_SLOPE": slope,
        "BLOCK": _BLOCK,
        "num_warps": 8,
        **ROUNDING,
    }
    return loss_slope, (logits.shape[0],), arguments, options


@torch.library.custom_op("codeact::loss_and_slope", mutates_args=("logits",))
def loss_and_slope(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    scale: Tensor | None,
    slope: bool,
) -> Tensor:
    """``codeact.ops.cross_entropy.loss_and_slope`` on a CUDA or ROCm device: float32, bfloat16 or float16 logits."""
    architecture_of(logits.device)
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    if logits.shape[0]:
        bias, scale = (None if given is None else given.float().contiguous() for given in (bias, scale))
        launch = (logits, targets.contiguous(), bias, softcap, ignore_index, scale, slope, losses)
        kernel, grid, arguments, options = loss_slope_launch(*launch)
        with current_device(logits.device):
            kernel[grid](*arguments, **options)
    return losses


@loss_and_slope.register_fake
def _(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)
