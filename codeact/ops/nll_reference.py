"""The equation that ``codeact.token_nll`` computes, in float64 and with every logit in memory. For tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_nll_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return the float64 negative log-likelihoods, (T,) or (B, T), of ``token_nll``'s arguments."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.movedim(-1, 1), targets, ignore_index=ignore_index, reduction="none")
