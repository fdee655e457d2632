"""Cross-entropy of a linear head with its gradients, a block of logits at a time.

Shapes: T tokens, K of them with a target, D hidden size, V vocabulary, R rows of one block.

A training step needs the logits twice: for the loss, and as softmax - onehot for the gradients. Both come from the same
block while it is there, so the (T, V) logits, which are larger than everything else in a step, never exist, and nothing
is computed a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from codeact.base.errors import one_of
from codeact.ops.nll import check_operands

REDUCTIONS = ("mean", "sum", "none")

# 128 MiB of float32 logits. With fewer rows a block, the products wait for the head's weight and its gradient, which
# are read once a block; more bring little.
_BLOCK_LOGITS = 1 << 25


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
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

    Returns:
        Of shape (), or that of ``targets`` for "none", in nats: float64 for float64 operands, else float32.

    Raises:
        ValueError: shapes, dtypes, devices or targets do not fit together, or the reduction is unknown.
    """
    one_of("reduction", reduction, REDUCTIONS)
    device_type = hidden.device.type
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    # As autocast treats a linear layer: float64 stays what it is.
    autocast = autocast and hidden.dtype != torch.float64
    check_operands(hidden, weight, targets, bias, softcap, ignore_index, mixed=autocast)
    head = _Head(
        softcap=softcap,
        product_dtype=torch.get_autocast_dtype(device_type) if autocast else hidden.dtype,
        sum_dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
    )
    shape, hidden, targets = targets.shape, hidden.flatten(0, -2), targets.flatten()
    rows = (targets != ignore_index).nonzero().squeeze(1)
    whole = rows.numel() == targets.numel()
    kept_hidden, kept_targets = (hidden, targets) if whole else (hidden[rows], targets[rows])
    with torch.autocast(device_type, enabled=False):
        if reduction == "none":
            losses: Tensor = _LossPerRow.apply(kept_hidden, weight, bias, kept_targets, head)  # type: ignore[no-untyped-call]
            return (losses if whole else losses.new_zeros(targets.shape).index_put((rows,), losses)).view(shape)
        operands = (kept_hidden, weight, bias, kept_targets, head, torch.is_grad_enabled())
        total: Tensor = _SummedLoss.apply(*operands)  # type: ignore[no-untyped-call]
    return total / rows.numel() if reduction == "mean" else total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """How logits are made: the dtype of the matrix products, and that of the softmax and of all sums."""

    softcap: float | None
    product_dtype: torch.dtype
    sum_dtype: torch.dtype


class _Blocks:
    """The logits of one block of rows after another, all in the same memory.

    A fresh 64 MiB tensor a block would be mapped and zeroed by the operating system every time.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: _Head) -> None:
        self.weight = weight.to(head.product_dtype)
        self.bias = None if bias is None else bias.to(head.sum_dtype)
        self.head = head
        self.hidden = hidden
        self.size = min(max(1, _BLOCK_LOGITS // max(weight.shape[0], 1)), max(hidden.shape[0], 1))
        self._product = hidden.new_empty(self.size, weight.shape[0], dtype=head.product_dtype)
        same = head.product_dtype == head.sum_dtype
        self._logits = self._product if same else torch.empty_like(self._product, dtype=head.sum_dtype)

    def slices(self) -> list[slice]:
        tokens = self.hidden.shape[0]
        return [slice(first, min(first + self.size, tokens)) for first in range(0, tokens, self.size)]

    def rows(self, here: slice) -> Tensor:
        """Return (R, D) in the dtype of the products."""
        return self.hidden[here].to(self.head.product_dtype)

    def logits(self, rows: Tensor) -> Tensor:
        """Return (R, V) in the dtype of the sums: a view that the next call overwrites."""
        product, logits = self._product[: len(rows)], self._logits[: len(rows)]
        torch.mm(rows, self.weight.T, out=product)
        if logits.dtype != product.dtype:
            logits.copy_(product)
        if self.bias is not None:
            logits += self.bias
        if self.head.softcap is not None:
            logits.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return logits

    def bend(self, logits: Tensor) -> Tensor | None:
        """Return the derivative of the softcap at these logits, (R, V), or None: there is no softcap."""
        # d tanh = 1 - tanh^2, and the logits are softcap * tanh.
        cap = self.head.softcap
        return None if cap is None else logits.div(cap).square_().neg_().add_(1)

    def slope(self, softmax: Tensor, bend: Tensor | None, targets: Tensor, scale: Tensor | None) -> Tensor:
        """Turn softmax (R, V) into the gradient of the rows' losses, each times ``scale`` (R,), before any softcap.

        Returns (R, V) in the dtype of the products; ``softmax`` is overwritten.
        """
        slope = softmax
        slope[torch.arange(len(targets), device=targets.device), targets] -= 1
        if bend is not None:
            slope *= bend
        if scale is not None:
            slope *= scale[:, None]
        return slope if slope.dtype == self.head.product_dtype else self._product[: len(slope)].copy_(slope)


class _Gradients:
    """Sums of the gradients over the blocks; ``None`` for an operand that wants none."""

    def __init__(
        self, wanted: tuple[bool, bool, bool], blocks: _Blocks, hidden: Tensor, weight: Tensor, head: _Head
    ) -> None:
        self._blocks = blocks
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=head.sum_dtype) if wanted[1] else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=head.sum_dtype) if wanted[2] else None

    def add(self, here: slice, rows: Tensor, slope: Tensor) -> None:
        if self.hidden is not None:
            self.hidden[here] = slope @ self._blocks.weight
        if self.weight is not None:
            if self.weight.dtype == slope.dtype:
                self.weight.addmm_(slope.T, rows)
            else:
                self.weight += slope.T @ rows
        if self.bias is not None:
            self.bias += slope.sum(0, dtype=self.bias.dtype)


class _SummedLoss(torch.autograd.Function):
    """Sum of the rows' losses; the gradients are made beside it and wait for the backward pass, which scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head, wanted: bool
    ) -> Tensor:
        # Without grad mode nothing runs backward, but needs_input_grad still says what the operands are.
        needs = tuple(bool(need) and wanted for need in ctx.needs_input_grad[:3])
        blocks = _Blocks(hidden, weight, bias, head)
        gradients = _Gradients((needs[0], needs[1], needs[2]), blocks, hidden, weight, head)
        total = hidden.new_zeros((), dtype=head.sum_dtype)
        for here in blocks.slices():
            rows = blocks.rows(here)
            logits = blocks.logits(rows)
            bend = blocks.bend(logits) if any(needs) else None
            # In place all the way: a fresh block for logsumexp costs more than its arithmetic.
            logits -= logits.amax(dim=1, keepdim=True)
            at_targets = logits.gather(1, targets[here, None])
            sums = logits.exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - at_targets).sum()
            if any(needs):
                gradients.add(here, rows, blocks.slope(logits.div_(sums), bend, targets[here], None))
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            # Times a sum's own scale in float32: 1 / tokens would lose bits in bfloat16.
            None if grad is None else (grad * upstream).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None)


class _LossPerRow(torch.autograd.Function):
    """(K,) losses, each with an upstream gradient of its own: the backward pass makes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head) -> Tensor:
        blocks = _Blocks(hidden, weight, bias, head)
        losses = hidden.new_empty(hidden.shape[0], dtype=head.sum_dtype)
        lse = torch.empty_like(losses)
        for here in blocks.slices():
            logits = blocks.logits(blocks.rows(here))
            lse[here] = logits.logsumexp(dim=1)
            losses[here] = lse[here] - logits.gather(1, targets[here, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.head = head
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        blocks = _Blocks(hidden, weight, bias, ctx.head)
        gradients = _Gradients(ctx.needs_input_grad[:3], blocks, hidden, weight, ctx.head)
        for here in blocks.slices():
            rows = blocks.rows(here)
            logits = blocks.logits(rows)
            bend = blocks.bend(logits)
            softmax = logits.sub_(lse[here, None]).exp_()
            gradients.add(here, rows, blocks.slope(softmax, bend, targets[here], upstream[here]))
        given = zip(
            (gradients.hidden, gradients.weight, gradients.bias),
            (hidden.dtype, weight.dtype, None if bias is None else bias.dtype),
            strict=True,
        )
        return (*(None if grad is None else grad.to(dtype) for grad, dtype in given), None, None)
