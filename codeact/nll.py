"""Per-token negative log-likelihood from hidden states and the LM head, without holding the logits.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from codeact.errors import one_of

BACKENDS = ("torch",)

# A block of logits: 4 MiB of float32. It stays in the cache while the softmax passes over it, and every product is
# written to the same memory: fresh memory for each costs more than the softmax.
_BLOCK_LOGITS = 1 << 20
_BLOCK_TOKENS = 1024


def token_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Compute ``F.cross_entropy((hidden @ weight.T + bias).float(), targets, reduction="none")`` block by block.

    Args:
        hidden: (T, D) floating point.
        weight: (V, D), same dtype and device: the LM head.
        targets: (T,) int64 in ``[0, V)``, or ``ignore_index``.
        bias: (V,) or None.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the softmax (Gemma 2).
        ignore_index: a target with this value has loss 0.
        backend: "torch", or "auto" for the best one present. ``CODEACT_BACKEND`` forces one for the whole process.

    Returns:
        float32 (T,), in nats. It carries no gradient: this is for scoring.

    Raises:
        ValueError: shapes, dtypes, devices or targets do not fit together, or the backend is unknown.
    """
    one_of("backend", os.environ.get("CODEACT_BACKEND") or backend, ("auto", *BACKENDS))
    check_operands(hidden, weight, targets, bias, softcap, ignore_index)
    return _torch_nll(hidden, weight, targets, bias, softcap, ignore_index)


def check_operands(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    mixed: bool = False,
) -> None:
    """Check the operands that every loss over an LM head takes; ``mixed`` lets hidden and weight differ in dtype.

    Raises:
        ValueError: shapes, dtypes, devices or targets do not fit together.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden (T, D) and weight (V, D) do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if not (hidden.is_floating_point() and weight.is_floating_point()) or (hidden.dtype != weight.dtype and not mixed):
        raise ValueError(f"hidden and weight need one floating-point dtype, not {hidden.dtype} and {weight.dtype}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 ({hidden.shape[0]},), not {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    if len({t.device for t in (hidden, weight, targets, bias) if t is not None}) > 1:
        raise ValueError("hidden, weight, targets and bias must be on one device")
    # On a device this look would wait for every kernel in flight, and PyTorch's own assert catches it there.
    if targets.device.type == "cpu":
        wrong = ((targets < 0) | (targets >= weight.shape[0])) & (targets != ignore_index)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(f"targets[{at}] is {int(targets[at])}, outside [0, {weight.shape[0]})")


@torch.no_grad()
def _torch_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, ignore_index: int
) -> Tensor:
    """Blocks of tokens by blocks of vocabulary: each block of the head is read once per block of tokens."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    kept = targets != ignore_index
    safe = targets.where(kept, 0)
    rows = min(max(tokens, 1), _BLOCK_TOKENS)
    width = min(vocabulary, max(1, _BLOCK_LOGITS // rows))
    block = hidden.new_empty(rows, width)
    losses = hidden.new_zeros(tokens, dtype=torch.float32)
    for first in range(0, tokens, rows):
        part, target = hidden[first : first + rows], safe[first : first + rows]
        lse = losses.new_full((len(part),), -torch.inf)
        target_logit = torch.zeros_like(lse)
        for start in range(0, vocabulary, width):
            columns = weight[start : start + width]
            logits = torch.mm(part, columns.T, out=block[: len(part), : len(columns)]).float()
            if bias is not None:
                logits += bias[start : start + width].float()
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            column = target - start
            inside = (column >= 0) & (column < len(columns))
            picked = logits.gather(1, column.clamp(0, len(columns) - 1)[:, None]).squeeze(1)
            target_logit = torch.where(inside, picked, target_logit)
            largest = logits.amax(dim=1)
            total = logits.sub_(largest[:, None]).exp_().sum(dim=1)
            lse = torch.logaddexp(lse, total.log_().add_(largest))
        losses[first : first + rows] = lse - target_logit
    # A row that is ignored loses nothing, whatever it holds.
    return torch.where(kept, losses, 0.0)
