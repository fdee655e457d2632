"""What decoder layers of the Llama kind do between their products, forward and backward, each in one pass over memory.

Computed in float32 and rounded where PyTorch's chain of operations rounds on its way forward. There are no atomics, and
every sum has an order that the width alone decides: a row has the same bits in any batch. Shapes: R rows or T tokens, H
heads, D elements. Not run on a device by its authors: proven in Triton's interpreter, and compiled ahead of time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from codeact_kernels.tiles import ROUNDING, Launch, architecture_of, current_device

# Elements of one program where a row is shorter; of one program of ``silu_multiply``.
_TILE = 2048
# Rows whose part of the weight's gradient one program adds up.
_PART_ROWS = 32


@triton.jit
def rms_norm_rows(
    x, x_stride, weight, output, scales, R, D, epsilon,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``weight * (x / sqrt(mean(x^2) + epsilon))`` of ROWS rows, and their 1 / sqrt."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    inside = (rows < R)[:, None] & (lane < D)[None, :]
    wide = tl.load(x + rows[:, None] * x_stride + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / D + epsilon)
    normal = (wide * scale[:, None]).to(x.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + lane, mask=lane < D, other=0.0).to(tl.float32)
    result = (normal * factor[None, :]).to(output.dtype.element_ty)
    tl.store(output + rows[:, None] * D + lane[None, :], result, mask=inside)
    tl.store(scales + rows, scale, mask=rows < R)


@triton.jit
def rms_norm_slopes(
    slope, x, x_stride, weight, scales, of_x, of_weight, R, D,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of x of STEPS x ROWS rows, and what they add to that of the weight: a row of ``of_weight``."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    factor = tl.load(weight + lane, mask=lane < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        rows = (program * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (rows < R)[:, None] & (lane < D)[None, :]
        g = tl.load(slope + rows[:, None] * D + lane[None, :], mask=inside, other=0.0).to(tl.float32)
        wide = tl.load(x + rows[:, None] * x_stride + lane[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + rows, mask=rows < R, other=0.0)[:, None]
        normal = wide * scale
        total += tl.sum(g * normal, axis=0)
        g *= factor[None, :]
        mean = tl.sum(g * normal, axis=1) / D
        result = (scale * (g - normal * mean[:, None])).to(of_x.dtype.element_ty)
        tl.store(of_x + rows[:, None] * D + lane[None, :], result, mask=inside)
    tl.store(of_weight + program * D + lane, total, mask=lane < D)


@triton.jit
def gate(gates, ups, output, N, BLOCK: tl.constexpr):
    """``silu(gate) * up`` of BLOCK elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gates + at, mask=at < N, other=0.0).to(tl.float32)
    up = tl.load(ups + at, mask=at < N, other=0.0).to(tl.float32)
    opened = (x / (1.0 + tl.exp(-x))).to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + at, (opened * up).to(output.dtype.element_ty), mask=at < N)


@triton.jit
def gate_slopes(slope, gates, ups, of_gates, of_ups, N, BLOCK: tl.constexpr):
    """Gradients of both operands of ``gate``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(slope + at, mask=at < N, other=0.0).to(tl.float32)
    x = tl.load(gates + at, mask=at < N, other=0.0).to(tl.float32)
    up = tl.load(ups + at, mask=at < N, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    opened = x * sigmoid
    of_gate = g * up * (sigmoid + opened * (1.0 - sigmoid))
    tl.store(of_gates + at, of_gate.to(of_gates.dtype.element_ty), mask=at < N)
    tl.store(of_ups + at, (g * opened).to(of_ups.dtype.element_ty), mask=at < N)


@triton.jit
def rotation(
    x, x_stride_h, x_stride_t, cosine, cosine_stride, sine, sine_stride, output, H, T, D,
    BACKWARD: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotary embedding of TOKENS tokens' heads, or the gradient of x; output (T, H, D)."""
    tokens = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    heads = tl.arange(0, HEADS)[None, :, None]
    lane = tl.arange(0, HALF)[None, None, :]
    half = D // 2
    of_token = (tokens < T) & (lane < half)
    inside = of_token & (heads < H)
    at = x + heads * x_stride_h + tokens * x_stride_t + lane
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    at = cosine + tokens * cosine_stride + lane
    first_cosine = tl.load(at, mask=of_token, other=0.0).to(tl.float32)
    second_cosine = tl.load(at + half, mask=of_token, other=0.0).to(tl.float32)
    at = sine + tokens * sine_stride + lane
    first_sine = tl.load(at, mask=of_token, other=0.0).to(tl.float32)
    second_sine = tl.load(at + half, mask=of_token, other=0.0).to(tl.float32)
    if BACKWARD:
        to_first, to_second = second * second_sine, -first * first_sine
    else:
        to_first, to_second = -second * first_sine, first * second_sine
    to_first, to_second = to_first.to(x.dtype.element_ty), to_second.to(x.dtype.element_ty)
    first = (first * first_cosine).to(x.dtype.element_ty).to(tl.float32) + to_first.to(tl.float32)
    second = (second * second_cosine).to(x.dtype.element_ty).to(tl.float32) + to_second.to(tl.float32)
    at = output + (tokens * H + heads) * D + lane
    tl.store(at, first.to(output.dtype.element_ty), mask=inside)
    tl.store(at + half, second.to(output.dtype.element_ty), mask=inside)


def _by_rows(width: int) -> dict[str, Any]:
    block = triton.next_power_of_2(max(width, 1))
    return {"ROWS": max(1, _TILE // block), "BLOCK": block, "num_warps": 4 if block <= _TILE else 8, **ROUNDING}


def norm_launch(x: Tensor, weight: Tensor, epsilon: float, output: Tensor, scales: Tensor) -> Launch:
    """The norm as (kernel, grid, arguments, options); ``compile_report`` compiles what these functions return."""
    rows, width = x.shape
    options = _by_rows(width)
    arguments = (x, x.stride(0), weight, output, scales, rows, width, epsilon)
    return rms_norm_rows, (triton.cdiv(rows, options["ROWS"]),), arguments, options


def norm_slopes_launch(
    slope: Tensor, x: Tensor, weight: Tensor, scales: Tensor, of_x: Tensor, of_weight: Tensor
) -> Launch:
    """The gradients of the norm; ``of_weight`` has a row for every ``_PART_ROWS`` rows of x, or for those of a tile."""
    rows, width = x.shape
    options = _by_rows(width)
    options["STEPS"] = max(1, _PART_ROWS // options["ROWS"])
    options["num_warps"] *= 2  # it holds twice as much as the norm: with fewer, triton 3.9 spills on sm_100
    arguments = (slope, x, x.stride(0), weight, scales, of_x, of_weight, rows, width)
    return rms_norm_slopes, (len(of_weight),), arguments, options


def gate_launch(gates: Tensor, ups: Tensor, output: Tensor) -> Launch:
    """SiLU x gate."""
    return gate, (triton.cdiv(output.numel(), _TILE),), (gates, ups, output, output.numel()), _GATE


def gate_slopes_launch(slope: Tensor, gates: Tensor, ups: Tensor, of_gates: Tensor, of_ups: Tensor) -> Launch:
    """The gradients of SiLU x gate."""
    arguments = (slope, gates, ups, of_gates, of_ups, slope.numel())
    return gate_slopes, (triton.cdiv(slope.numel(), _TILE),), arguments, _GATE


_GATE: dict[str, Any] = {"BLOCK": _TILE, "num_warps": 4, **ROUNDING}


def rotation_launch(x: Tensor, cosine: Tensor, sine: Tensor, output: Tensor, backward: bool) -> Launch:
    """Rotary embedding of x (H, T, D), or the gradient of x."""
    heads, tokens, width = x.shape
    shape = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(max(width // 2, 1))}
    shape["TOKENS"] = max(1, _TILE // 2 // (shape["HEADS"] * shape["HALF"]))
    strides = (x.stride(0), x.stride(1), cosine, cosine.stride(0), sine, sine.stride(0))
    options = {"BACKWARD": backward, **shape, "num_warps": 4, **ROUNDING}
    return rotation, (triton.cdiv(tokens, shape["TOKENS"]),), (x, *strides, output, heads, tokens, width), options


def _run(launch: Launch, device: torch.device) -> None:
    architecture_of(device)
    kernel, grid, arguments, options = launch
    if grid[0]:
        with current_device(device):
            kernel[grid](*arguments, **options)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("codeact::rms_norm", mutates_args=())
def _norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    output, scales = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
    _run(norm_launch(_dense(x), weight.contiguous(), epsilon, output, scales), x.device)
    return output, scales


@torch.library.custom_op("codeact::rms_norm_slopes", mutates_args=())
def _norm_slopes(slope: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    rows = max(_PART_ROWS, _by_rows(x.shape[1])["ROWS"])
    of_x = torch.empty_like(slope)
    parts = x.new_empty(triton.cdiv(x.shape[0], rows), x.shape[1], dtype=torch.float32)
    _run(norm_slopes_launch(slope, _dense(x), weight.contiguous(), scales, of_x, parts), x.device)
    return of_x, parts.sum(0).to(weight.dtype)


@torch.library.custom_op("codeact::silu_multiply", mutates_args=())
def _gate(gates: Tensor, ups: Tensor) -> Tensor:
    output = torch.empty_like(gates)
    _run(gate_launch(gates, ups, output), gates.device)
    return output


@torch.library.custom_op("codeact::silu_multiply_slopes", mutates_args=())
def _gate_slopes(slope: Tensor, gates: Tensor, ups: Tensor) -> tuple[Tensor, Tensor]:
    of_gates, of_ups = torch.empty_like(gates), torch.empty_like(ups)
    _run(gate_slopes_launch(slope, gates, ups, of_gates, of_ups), slope.device)
    return of_gates, of_ups


@torch.library.custom_op("codeact::rotate", mutates_args=())
def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool) -> Tensor:
    # Laid out by tokens, as the product left it and as attention reads it.
    output = x.new_empty(x.shape[1], x.shape[0], x.shape[2])
    _run(rotation_launch(_dense(x), _dense(cosine), _dense(sine), output, backward), x.device)
    return output


@_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


@_norm_slopes.register_fake
def _(slope: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(slope), torch.empty_like(weight)


@_gate.register_fake
def _(gates: Tensor, ups: Tensor) -> Tensor:
    return torch.empty_like(gates)


@_gate_slopes.register_fake
def _(slope: Tensor, gates: Tensor, ups: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gates), torch.empty_like(ups)


@_rotate.register_fake
def _(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[0], x.shape[2])


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _norm_backward(ctx: Any, slope: Tensor, _: Any) -> tuple[Any, ...]:
    return *_norm_slopes(slope.contiguous(), *ctx.saved_tensors), None


def _keep_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gate_backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
    return tuple(_gate_slopes(slope.contiguous(), *ctx.saved_tensors))


def _keep_angles(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _rotate_backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
    return _rotate(slope.transpose(0, 1), *ctx.saved_tensors, True).transpose(0, 1), None, None, None


_norm.register_autograd(_norm_backward, setup_context=_keep_norm)
_gate.register_autograd(_gate_backward, setup_context=_keep_gate)
_rotate.register_autograd(_rotate_backward, setup_context=_keep_angles)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``codeact.ops.layers.rms_norm`` on a CUDA or ROCm device, with gradients of both operands."""
    output: Tensor = _norm(x.reshape(-1, x.shape[-1]), weight, epsilon)[0]
    return output.view(x.shape)


def silu_multiply(gates: Tensor, ups: Tensor) -> Tensor:
    """``codeact.ops.layers.silu_multiply`` on a CUDA or ROCm device, with gradients of both operands."""
    output: Tensor = _gate(gates.contiguous(), ups.contiguous())
    return output


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """``codeact.ops.layers.rotate`` on a CUDA or ROCm device, with the gradient of x; those of the angles are none."""
    output: Tensor = _rotate(x, cosine, sine, False)
    return output.transpose(0, 1)
