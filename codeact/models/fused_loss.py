"""A causal model of transformers that computes its loss without its logits, on request."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from codeact.base.errors import require
from codeact.models.isolation import read_head, trunk_of
from codeact.ops.cross_entropy import linear_cross_entropy
from codeact.text.conversations import IGNORE


def fuse_loss(model: Any) -> bool:
    """Teach a causal model the keyword ``fused_loss``: with it, its loss without its logits; without it, no change.

    With ``fused_loss=True`` the model takes ``shift_labels``, what each kept row predicts or -100, and
    ``num_items_in_batch``, and returns ``loss``: the sum over this batch's targets divided by that number. To ``hits``,
    an int64 tensor (), if it is given, the number of targets that the model holds likeliest is added. What it says is
    right only where logits are ``head(hidden)``, scaled and softcapped or not; ``isolation.split_head`` proves it.

    The head is still called as a module, with hidden states and targets, so that whatever gathers its weights around a
    call (FSDP, ZeRO-3) finds the call that it waits for.

    Returns:
        False where it cannot be done: the head is no plain linear layer (a LoRA is on it, say), or the model adds a
        loss of its own.
    """
    require("model", model, "get_output_embeddings", "a causal model of transformers")
    trunk, head = trunk_of(model), model.get_output_embeddings()
    config = model.config.get_text_config()
    if type(head) is not torch.nn.Linear or trunk is None or getattr(config, "output_router_logits", False):
        return False
    if "_codeact_fused_loss" in model.__dict__:
        return True
    known, plain_head, plain_forward = read_head(model), head.forward, model.forward

    def head_forward(self: Any, hidden: Tensor, targets: Tensor | None = None, hits: Tensor | None = None) -> Tensor:
        if targets is None:
            return plain_head(hidden)
        # What shards the weights puts others in the place of those that were read.
        hidden, bias = replace(known, bias=self.bias).scaled(hidden)
        return linear_cross_entropy(hidden, self.weight, targets, bias, known.softcap, IGNORE, "sum", hits)

    def forward(self: Any, *arguments: Any, fused_loss: bool = False, **inputs: Any) -> Any:
        if not fused_loss:
            return plain_forward(*arguments, **inputs)
        targets, count = inputs.pop("shift_labels"), inputs.pop("num_items_in_batch")
        rows, hits = inputs.pop("logits_to_keep", 0), inputs.pop("hits", None)
        inputs.pop("labels", None)
        hidden = trunk(*arguments, **inputs).last_hidden_state  # (B, T, D)
        hidden = hidden[:, slice(-rows, None) if isinstance(rows, int) else rows]  # the last ones, or a mask (T,)
        return CausalLMOutputWithPast(loss=head(hidden.flatten(0, -2), targets.flatten(), hits) / count)

    # An attribute of this one model, as accelerate itself wraps `forward` for autocast.
    setattr(head, "forward", types.MethodType(head_forward, head))  # noqa: B010
    setattr(model, "forward", types.MethodType(forward, model))  # noqa: B010
    model.__dict__["_codeact_fused_loss"] = True
    return True
