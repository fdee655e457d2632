"""Cross-entropy of a linear head with its gradients, a block of logits at a time.

Shapes: T tokens, K of them that are computed, D hidden size, V vocabulary, R rows of one block.

A training step needs the logits twice: for the loss, and as softmax - onehot for the gradients. Both come from the same
block while it is there, the slopes in the logits' own memory, so the (T, V) logits, which are larger than everything
else in a step, never exist, and nothing is computed a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import codeact._native as _native
from codeact.base.errors import one_of, require
from codeact.ops import native
from codeact.ops.nll import check_operands, nll_backend

REDUCTIONS = ("mean", "sum", "none")

# Bytes of a block of logits. With fewer rows a block, the products wait for the head's weight and its gradient, which
# are read once a block; more bring little.
_BLOCK_BYTES = 1 << 27
# On a device a block has the same number of rows whatever the number of tokens: its products have one shape, and a row
# has the same bits in any batch. What is made beside operands and gradients takes no more than this many bytes.
_DEVICE_BYTES = 1 << 30
_DEVICE_BLOCK_ROWS = 4096
# Words of a row of a block on a device are rounded up to so many: odd vocabularies too are read 16 bytes at a time.
_DEVICE_LINE = 16
# Elements of a part of the head's gradient that is made in the products' dtype before it is added: on the CPU it stays
# in a cache.
_PART = 1 << 20
_DEVICE_PART = 1 << 24
# Elements of a part of a block whose losses PyTorch makes, in several float32 copies.
_TORCH_PART = 1 << 22


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    hits: Tensor | None = None,
) -> Tensor:
    """Compute ``F.cross_entropy((hidden @ weight.T + bias).float(), targets, reduction=reduction)`` without the logits.

    "mean" and "sum" compute the gradients in the forward pass, for those operands that want one: a frozen head costs no
    (V, D) gradient. "none" keeps a log-sum-exp per row and computes the logits again in the backward pass. Under
    autocast the matrix products run in its dtype, as those of a linear layer do, and gradients have their operand's
    dtype. The gradient of the head is summed up in float32 whatever its dtype.

    Args:
        hidden: (T, D) or (B, T, D) floating point.
        weight: (V, D), same device, and same dtype unless autocast makes one: the LM head.
        targets: (T,) or (B, T) int64 in ``[0, V)``, or ``ignore_index``.
        bias: (V,) or None.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the softmax (Gemma 2).
        ignore_index: a row with this target is left out: no loss, no gradient, no work, whatever it holds.
        reduction: "mean" over the rows with a target (NaN where there is none, as PyTorch has it), "sum" or "none".
        hits: int64 (), same device: the number of rows whose target has the largest logit is added to it.

    Returns:
        Of shape (), or that of ``targets`` for "none", in nats: float64 for float64 operands, else float32.

    Raises:
        ValueError: shapes, dtypes, devices or targets do not fit together, or the reduction is unknown.
    """
    one_of("reduction", reduction, REDUCTIONS)
    require("hidden", hidden, "is_floating_point", "a tensor of PyTorch")
    device_type = hidden.device.type
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    # As autocast treats a linear layer: float64 stays what it is.
    autocast = autocast and hidden.dtype != torch.float64
    check_operands(hidden, weight, targets, bias, softcap, ignore_index, mixed=autocast)
    head = _Head(
        softcap=softcap,
        ignore_index=ignore_index,
        product_dtype=torch.get_autocast_dtype(device_type) if autocast else hidden.dtype,
        sum_dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
        hits=hits,
    )
    shape, hidden, targets = targets.shape, hidden.flatten(0, -2), targets.flatten()
    kept_hidden, kept_targets, rows = hidden, targets, None
    if hidden.device.type == "cpu":  # elsewhere it would wait for the device to say how many there are
        rows = (targets != ignore_index).nonzero().squeeze(1)
        if rows.numel() < targets.numel():
            kept_hidden, kept_targets = hidden[rows], targets[rows]
    with torch.autocast(device_type, enabled=False):
        if reduction == "none":
            losses: Tensor = _LossPerRow.apply(kept_hidden, weight, bias, kept_targets, head)  # type: ignore[no-untyped-call]
            if kept_targets is not targets:
                losses = losses.new_zeros(targets.shape).index_put((rows,), losses)
            return losses.view(shape)
        operands = (kept_hidden, weight, bias, kept_targets, head, torch.is_grad_enabled())
        total: Tensor = _SummedLoss.apply(*operands)  # type: ignore[no-untyped-call]
    return total / (targets != ignore_index).sum() if reduction == "mean" else total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """How logits are made: the dtype of the matrix products, and that of the softmax and of all sums.

    ``hits``: of ``linear_cross_entropy``.
    """

    softcap: float | None
    ignore_index: int
    product_dtype: torch.dtype
    sum_dtype: torch.dtype
    hits: Tensor | None = None


_Operand = Tensor | None


def _in_blocks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head: _Head,
    wanted: tuple[bool, bool, bool],
    scale: Tensor | None = None,
) -> tuple[Tensor, tuple[_Operand, _Operand, _Operand]]:
    """Return (K,) losses, and the gradients of hidden, weight and bias that are wanted of their sum.

    ``scale`` (K,): the gradient of a row's loss counts so often. Those of weight and bias are in the dtype of the sums,
    or in the weight's own. All blocks of logits lie in the same memory: the system would map and zero a fresh one each
    time.
    """
    tokens, vocabulary, matrix = len(hidden), weight.shape[0], weight.to(head.product_dtype)
    offset = None if bias is None else bias.to(head.sum_dtype)
    on_cpu, line = hidden.device.type == "cpu", vocabulary
    if on_cpu:
        size = max(1, min(_BLOCK_BYTES // (max(vocabulary, 1) * head.product_dtype.itemsize), tokens))
    else:
        line = -(-vocabulary // _DEVICE_LINE) * _DEVICE_LINE
        size = _rows_of_block(line, hidden, head.product_dtype)
        if missing := max(0, size - tokens):
            hidden = F.pad(hidden, (0, 0, 0, missing))
            targets = F.pad(targets, (0, missing), value=head.ignore_index)
            scale = None if scale is None else F.pad(scale, (0, missing))
    block = hidden.new_empty(size, line, dtype=head.product_dtype)[:, :vocabulary]
    losses = hidden.new_empty(len(hidden), dtype=head.sum_dtype)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    # One block needs no sum: its product is the gradient, and summing in float32 would take longer than the product.
    alone = on_cpu and tokens <= size and weight.dtype == head.product_dtype
    of_weight = torch.zeros_like(weight, dtype=head.sum_dtype) if wanted[1] and not (alone and tokens) else None
    of_bias = weight.new_zeros(vocabulary, dtype=head.sum_dtype) if wanted[2] else None
    done = 0
    while done < tokens:
        # On a device the last block reaches back: to rows that are computed again, to the same bits, and not counted.
        first = done if on_cpu else min(done, len(hidden) - size)
        here = slice(first, first + size)
        rows, own = hidden[here].to(head.product_dtype), None if scale is None else scale[here]
        slope = torch.mm(rows, matrix.T, out=block[: len(rows)])
        if head.hits is not None:  # a softcap leaves the order
            guesses = (slope if offset is None else slope + offset).argmax(1)
            head.hits.add_((guesses == targets[here])[done - first :].sum())
        losses[here] = loss_and_slope(slope, targets[here], offset, head.softcap, head.ignore_index, own, any(wanted))
        if of_hidden is not None and of_hidden.dtype == slope.dtype:
            torch.mm(slope, matrix, out=of_hidden[here])
        elif of_hidden is not None:
            of_hidden[here] = slope @ matrix
        if first < done:
            slope[: done - first].zero_()
        if wanted[1] and alone:
            of_weight = slope.T @ rows
        elif of_weight is not None:
            # A row that is ignored has no slope, but 0 x infinity is no number.
            kept = rows if on_cpu else rows.masked_fill((targets[here] == head.ignore_index)[:, None], 0.0)
            _add_product(of_weight, slope, kept)
        if of_bias is not None:
            of_bias += slope.sum(0, dtype=of_bias.dtype)
        done = first + size
    return losses[:tokens], (None if of_hidden is None else of_hidden[:tokens], of_weight, of_bias)


def _rows_of_block(line: int, hidden: Tensor, product_dtype: torch.dtype) -> int:
    """Rows of a block on a device: 4,096, halved until what is made beside operands and gradients fits.

    That is a row's logits; the row padded, of its gradient too; in the products' dtype; without ignored ones; and its
    gradient in that dtype. Then the parts: those of the head's gradient, or of the losses where PyTorch makes them.
    """
    of_row = line * product_dtype.itemsize + hidden.shape[1] * (2 * hidden.itemsize + 3 * product_dtype.itemsize)
    parts = max(_DEVICE_PART * product_dtype.itemsize, 6 * 4 * _TORCH_PART)
    rows = _DEVICE_BLOCK_ROWS
    while rows > 1 and rows * of_row + parts > _DEVICE_BYTES:
        rows //= 2
    return rows


def _add_product(total: Tensor, slope: Tensor, rows: Tensor) -> None:
    """Add ``slope.T @ rows``, (V, D), to the gradient of the head."""
    if total.dtype == slope.dtype:
        total.addmm_(slope.T, rows)
    elif total.is_cuda and torch.version.hip is None and hasattr(torch.ops.aten.addmm, "dtype_out"):
        # ROCm's refuses float32 sums of 16-bit operands.
        torch.addmm(total, slope.T, rows, out_dtype=total.dtype, out=total)
    else:
        some = max(1, (_PART if total.device.type == "cpu" else _DEVICE_PART) // max(rows.shape[1], 1))
        for first in range(0, len(total), some):
            total[first : first + some] += slope[:, first : first + some].T @ rows


def loss_and_slope(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    scale: Tensor | None = None,
    slope: bool = True,
) -> Tensor:
    """Compute the loss of every row of logits, and write its gradient over them.

    One pass over memory by a compiled or a Triton kernel (csrc/nll/loss_slope.cpp,
    kernels/codeact_kernels/loss_slope.py); for other dtypes and devices by PyTorch.

    Args:
        logits: (R, V) floating point, each row side by side, without bias and softcap. Overwritten where ``slope``:
            by ``scale * (softmax - onehot)`` times the derivative of the softcap, which is 0 in an ignored row.
        targets: (R,) int64 in ``[0, V)``, or ``ignore_index``.
        bias: (V,) float32, or float64 beside such logits.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the softmax.
        ignore_index: a row with this target has loss 0, whatever it holds.
        scale: (R,) in the dtype of the losses: what the gradient of a row is multiplied by.
        slope: whether the gradient is wanted.

    Returns:
        (R,) in nats: float64 for float64 logits, else float32.
    """
    backend = nll_backend(logits).partition(" ")[0] if logits.dtype != torch.float64 else "torch"
    if backend == "native":
        array = _native.loss_and_slope(
            native.as_array(logits),
            targets.contiguous().numpy(),
            None if bias is None else bias.contiguous().numpy(),
            softcap,
            ignore_index,
            None if scale is None else scale.contiguous().numpy(),
            slope,
            torch.get_num_threads(),
            native.instruction_set(),
        )
        return native.as_tensor(array)
    if backend == "triton":
        from codeact_kernels.loss_slope import loss_and_slope as run

        losses: Tensor = run(logits, targets, bias, softcap, ignore_index, scale, slope)
        return losses
    losses = logits.new_empty(len(logits), dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    some = max(1, _TORCH_PART // max(logits.shape[1], 1))
    for first in range(0, len(logits), some):
        here = slice(first, first + some)
        own = None if scale is None else scale[here]
        losses[here] = _torch_loss_and_slope(logits[here], targets[here], bias, softcap, ignore_index, own, slope)
    return losses


def _torch_loss_and_slope(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    scale: Tensor | None,
    slope: bool,
) -> Tensor:
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z if bias is None else z + bias
    z = z if softcap is None else torch.tanh(z / softcap) * softcap
    kept = targets != ignore_index
    column = targets.where(kept, 0)[:, None]
    lse = z.logsumexp(dim=1)
    losses = torch.where(kept, lse - z.gather(1, column).squeeze(1), 0.0)
    if slope:
        gradient = (z - lse[:, None]).exp_()
        gradient.scatter_add_(1, column, gradient.new_full(column.shape, -1.0))
        if softcap is not None:
            gradient *= 1 - (z / softcap).square_()
        if scale is not None:
            gradient *= scale[:, None]
        logits.copy_(torch.where(kept[:, None], gradient, 0.0))
    return losses


class _SummedLoss(torch.autograd.Function):
    """Sum of the rows' losses; the gradients are made beside it and wait for the backward pass, which scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head, wanted: bool
    ) -> Tensor:
        # Without grad mode nothing runs backward, but needs_input_grad still says what the operands are.
        of_hidden, of_weight, of_bias = (bool(need) and wanted for need in ctx.needs_input_grad[:3])
        losses, gradients = _in_blocks(hidden, weight, bias, targets, head, (of_hidden, of_weight, of_bias))
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(*gradients)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        given = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if grad is None else _scaled(grad, upstream, dtype) for grad, dtype in given), None, None, None)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * factor`` in ``dtype``. The factor stays in float32: 1 / tokens would lose bits in bfloat16."""
    if grad.device.type != "cpu":  # where a factor without dimensions is taken as it is, whatever the other's dtype
        factor = factor.view([1] * grad.ndim)
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


class _LossPerRow(torch.autograd.Function):
    """(K,) losses, each with an upstream gradient of its own: the backward pass makes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head = replace(head, hits=None)
        return _in_blocks(hidden, weight, bias, targets, head, (False, False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        _, gradients = _in_blocks(hidden, weight, bias, targets, ctx.head, ctx.needs_input_grad[:3], upstream)
        dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return (*(None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)), None, None)
