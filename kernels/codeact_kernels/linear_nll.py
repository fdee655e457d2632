"""Negative log-likelihood of every token from hidden states and the LM head, without the logits, in two kernels.

K1, one program per (token tile, vocabulary tile): the tile's logits in float32 -> their log-sum-exp (to base 2,
as the hardware has it), and the target's logit for those rows whose target is among the columns. K2, per token tile:
the partial results of all vocabulary tiles, merged in the order of the vocabulary. There are no atomics, every sum has
a fixed order, and tiles do not depend on the number of tokens: the same row gives the same bits in any batch on the
same chip.

Shapes: T tokens, D hidden size, V vocabulary. Not run on a device by its authors: proven in Triton's interpreter
against float64, and compiled ahead of time for the chips in ``tiles.py`` (``compile_report.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from codeact_kernels.tiles import (
    DTYPES,
    ROUNDING,
    Launch,
    Tile,
    architecture_of,
    current_device,
    takes_descriptor,
    tile_for,
)

_LOG2E = tl.constexpr(1.4426950408889634)
# Tokens of one launch. It bounds the partial results, of 4 bytes per token and vocabulary tile: 63 MiB for V = 128256
# (the float32 logits of these tokens would be 8 GiB). More tokens are more launches, and the same bits.
MAX_TOKENS = 16384
# K2's tile: its tokens lie beside one another in memory, so that loads are whole.
_MERGE_T, _MERGE_TILES = 32, 32


@triton.jit
def _tanh(x):
    """tanh to 3e-7 relative. 1 - 2 / (exp(2x) + 1) loses small numbers to cancellation: they take a polynomial."""
    z = x * x
    p = -0.00570491096
    p = p * z + 0.0206390228
    p = p * z - 0.0537396967
    p = p * z + 0.133314416
    p = p * z - 0.333332807
    near = x + x * (z * p)
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _tile_of_program(T, V, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, GROUP_T: tl.constexpr):
    """Programs that run at the same time share token tiles and vocabulary tiles: down GROUP_T tokens, then along V."""
    program = tl.program_id(0)
    tiles_t = tl.cdiv(T, BLOCK_T)
    tiles_v = tl.cdiv(V, BLOCK_V)
    first_t = program // (GROUP_T * tiles_v) * GROUP_T
    height = tl.minimum(tiles_t - first_t, GROUP_T)
    within = program % (GROUP_T * tiles_v)
    return first_t + within % height, within // height


@triton.jit
def _finish_tile(
    logits,  # (BLOCK_T, BLOCK_V) float32 products
    bias,
    targets,
    partials,
    target_logits,
    tile_t,
    tile_v,
    T,
    V,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_V)
    first = tile_v * BLOCK_V
    if HAS_BIAS:
        logits += tl.load(bias + first + column, mask=column < V - first, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        logits = softcap * _tanh(logits / softcap)
    # After the softcap, which would turn -inf into a finite -softcap; in the one tile that reaches past the end.
    if first + BLOCK_V > V:
        logits = tl.where((column < V - first)[None, :], logits, float("-inf"))

    largest = tl.max(logits, axis=1)
    # A tile may hold nothing but -inf (a bias that forbids tokens): -inf - -inf would be NaN.
    shift = tl.where(largest == float("-inf"), 0.0, largest * _LOG2E)
    bits = shift + tl.log2(tl.sum(tl.exp2(logits * _LOG2E - shift[:, None]), axis=1))
    present = rows < T
    tl.store(partials + tile_v.to(tl.int64) * T + rows, bits, mask=present)

    target = tl.load(targets + rows, mask=present, other=-1) - first
    here = (target >= 0) & (target < BLOCK_V) & (target < V - first)
    # Most tiles hold no row's target.
    if tl.max(here.to(tl.int32), axis=0) > 0:
        place = tl.where(here, target, -1).to(tl.int32)
        picked = tl.sum(tl.where(column[None, :] == place[:, None], logits, 0.0), axis=1)
        tl.store(target_logits + rows, picked, mask=present & here)


@triton.jit(do_not_specialize=["T"])
def partial_nll(
    hidden,
    weight,
    bias,
    targets,
    partials,
    target_logits,
    T,
    V,
    D,
    hidden_stride_t,
    hidden_stride_d,
    weight_stride_v,
    weight_stride_d,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    """K1 through pointers: operands of any strides."""
    tile_t, tile_v = _tile_of_program(T, V, BLOCK_T, BLOCK_V, GROUP_T)
    # Past the end the last row is read again; nothing of it is kept. That saves a mask on every load.
    rows = tl.minimum(tile_t * BLOCK_T + tl.arange(0, BLOCK_T), T - 1).to(tl.int64)
    columns = tl.minimum(tile_v * BLOCK_V + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
    depth = tl.arange(0, BLOCK_D)
    # Offsets are int64: a head of 2^31 numbers, or rows that far apart, are real.
    hidden_at = hidden + rows[:, None] * hidden_stride_t + depth[None, :].to(tl.int64) * hidden_stride_d
    weight_at = weight + columns[None, :] * weight_stride_v + depth[:, None].to(tl.int64) * weight_stride_d
    step = tl.full((), BLOCK_D, tl.int64)
    logits = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            h = tl.load(hidden_at)
            w = tl.load(weight_at)
        else:
            h = tl.load(hidden_at, mask=depth[None, :] < D - start, other=0.0)
            w = tl.load(weight_at, mask=depth[:, None] < D - start, other=0.0)
        logits = tl.dot(h, w, logits, input_precision="ieee")
        hidden_at += step * hidden_stride_d
        weight_at += step * weight_stride_d
    _finish_tile(
        logits, bias, targets, partials, target_logits, tile_t, tile_v, T, V, softcap,
        HAS_BIAS, HAS_SOFTCAP, BLOCK_T, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def partial_nll_descriptors(
    hidden,  # tensor descriptors; what they read outside the operand is 0
    weight,
    bias,
    targets,
    partials,
    target_logits,
    T,
    V,
    D,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    """K1 through tensor descriptors: the chip's copy engine (TMA) computes the addresses and guards the edges."""
    tile_t, tile_v = _tile_of_program(T, V, BLOCK_T, BLOCK_V, GROUP_T)
    logits = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        h = hidden.load([tile_t * BLOCK_T, start])
        w = weight.load([tile_v * BLOCK_V, start])
        logits = tl.dot(h, w.T, logits, input_precision="ieee")
    _finish_tile(
        logits, bias, targets, partials, target_logits, tile_t, tile_v, T, V, softcap,
        HAS_BIAS, HAS_SOFTCAP, BLOCK_T, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "ignore_index"])
def merge_nll(
    partials,  # (tiles, T), to base 2: a token's are T apart, those of neighbours side by side
    target_logits,
    targets,
    nll,
    T,
    V,
    tiles,
    ignore_index,
    BLOCK_T: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """K2: merge the log-sum-exps from the first vocabulary tile to the last; NLL = log-sum-exp - target's logit."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    present = rows < T
    largest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        at = partials + tile[:, None].to(tl.int64) * T + rows[None, :]
        part = tl.load(at, mask=(tile < tiles)[:, None] & present[None, :], other=float("-inf"))
        raised = tl.maximum(largest, tl.max(part, axis=0))
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(part - shift[None, :]), axis=0)
        largest = raised
    lse = (tl.where(largest == float("-inf"), 0.0, largest) + tl.log2(total)) / _LOG2E
    target = tl.load(targets + rows, mask=present, other=0)
    known = (target >= 0) & (target < V)
    # A target outside the vocabulary: the host does not look, for it would have to wait, so the row says so: NaN.
    loss = tl.where(known, lse - tl.load(target_logits + rows, mask=present & known, other=0.0), float("nan"))
    tl.store(nll + rows, tl.where(target == ignore_index, 0.0, loss), mask=present)


def launches(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    partials: Tensor,
    target_logits: Tensor,
    nll: Tensor,
    softcap: float | None,
    ignore_index: int,
    tile: Tile,
) -> list[Launch]:
    """K1 and K2 as (kernel, grid, arguments, options); ``compile_report`` compiles what this returns."""
    T, D = hidden.shape
    V = weight.shape[0]
    tiles = triton.cdiv(V, tile.block_v)
    rest = (bias if bias is not None else targets, targets, partials, target_logits, T, V, D)
    options: dict[str, Any] = {
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK_T": tile.block_t,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "GROUP_T": tile.group_t,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **ROUNDING,
    }
    grid = (triton.cdiv(T, tile.block_t) * tiles,)
    cap = 1.0 if softcap is None else float(softcap)
    kernel, arguments = partial_nll, (hidden, weight, *rest, *hidden.stride(), *weight.stride(), cap)
    if tile.descriptors and takes_descriptor(hidden) and takes_descriptor(weight):
        read_hidden = TensorDescriptor.from_tensor(hidden, [tile.block_t, tile.block_d])
        read_weight = TensorDescriptor.from_tensor(weight, [tile.block_v, tile.block_d])
        kernel, arguments = partial_nll_descriptors, (read_hidden, read_weight, *rest, cap)
    else:
        if tile.descriptors:  # addresses of its own take a program registers that the whole depth would spill
            options["BLOCK_D"] = tile.block_d // 2
        options["EVEN_D"] = D % options["BLOCK_D"] == 0
    merge = (partials, target_logits, targets, nll, T, V, tiles, ignore_index)
    merge_options = {"BLOCK_T": _MERGE_T, "BLOCK_TILES": _MERGE_TILES, "num_warps": 4, **ROUNDING}
    return [
        (kernel, grid, arguments, options),
        (merge_nll, (triton.cdiv(T, _MERGE_T),), merge, merge_options),
    ]


def compute_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, ignore_index: int
) -> Tensor:
    """What ``linear_nll`` computes, of operands that were checked: as many launches as ``MAX_TOKENS`` asks for."""
    tokens = hidden.shape[0]
    nll = hidden.new_empty(tokens, dtype=torch.float32)
    if tokens == 0:
        return nll
    if weight.shape[0] == 0:
        return nll.fill_(torch.nan).masked_fill_(targets == ignore_index, 0.0)
    tile = tile_for(hidden.dtype, architecture_of(hidden.device), softcap is not None)
    rows = min(tokens, MAX_TOKENS)
    partials = nll.new_empty(triton.cdiv(weight.shape[0], tile.block_v) * rows)
    target_logits = nll.new_empty(rows)
    targets = targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    with current_device(hidden.device):
        for first in range(0, tokens, rows):
            here = slice(first, first + rows)
            operands = (hidden[here], weight, bias, targets[here], partials, target_logits, nll[here])
            for kernel, grid, arguments, options in launches(*operands, softcap, ignore_index, tile):
                kernel[grid](*arguments, **options)
    return nll


# An operator of PyTorch, so that fake tensors and torch.compile see its result and not its launches.
_linear_nll = torch.library.custom_op("codeact::linear_nll", mutates_args=())(compute_nll)


@_linear_nll.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, ignore_index: int
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Compute ``F.cross_entropy((hidden @ weight.T + bias).float(), targets, reduction="none")`` without the logits.

    Products are summed in float32 whatever the dtype. float32 operands are multiplied exactly ("ieee", outside the
    tensor cores on NVIDIA): TF32 keeps 10 bits, fewer than who asks for float32 wants; three TF32 products would be
    faster, but do not exist on AMD, and the interpreter, our only proof, does not emulate them.

    The host never waits for the device.

    Args:
        hidden: (T, D) bfloat16, float16 or float32, of any strides; on a CUDA or ROCm device.
        weight: (V, D), same dtype and device, of any strides.
        targets: (T,) int64. A target outside [0, V) that is not ``ignore_index`` gives NaN.
        bias: (V,) of any floating dtype, or None.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the softmax.
        ignore_index: a row with this target has loss 0, whatever it holds.

    Returns:
        float32 (T,), in nats. It carries no gradient.

    Raises:
        ValueError: the dtype or the device is not served. (``codeact.ops.nll.check_operands`` checks everything else.)
    """
    if hidden.dtype not in DTYPES:
        raise ValueError(f"codeact_kernels compute {', '.join(map(str, DTYPES))}, not {hidden.dtype}")
    with torch.no_grad():
        result: Tensor = _linear_nll(hidden, weight, targets, bias, softcap, ignore_index)
    return result
