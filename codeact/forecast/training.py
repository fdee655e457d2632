"""What training will cost: from its flags to floating-point operations and bytes on a device."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from codeact.base.errors import InputError
from codeact.forecast.cost import Memory, ModelFacts
from codeact.ops.flops import ParameterCounts
from codeact.padding.strategies import strategy_of
from codeact.training.room import optimizer_bytes, pass_memory


class Training:
    """What training's flags say of its cost.

    Args:
        flags: as ``codeact.training.flags.check_flags`` gives them.
        processes: that share it, one a device.

    Attributes:
        strategy: a key of ``codeact.padding.strategies.STRATEGIES``.
        packs, packs_a_pass: whether samples share a row; packs of a forward pass, where one pack is planned as one.
        weight_bytes: of a weight that is held: 4, 2, or less where it is quantised, with its scales.
        evaluations: passes over what is held out.
        sharding, whole: none, ddp, zero1 to zero3, or fsdp; whether no device holds all weights.

    Raises:
        InputError: the configuration of DeepSpeed cannot be read.
    """

    def __init__(self, flags: Any, processes: int = 1) -> None:
        self.flags, self.processes = flags, processes
        self.strategy = strategy_of(flags.pad_mode, flags.pack_scope)
        self.packs = flags.pad_mode == "dynamic_pack"
        self.packs_a_pass = int(flags.per_device_train_batch_size) if self.strategy == "dynamic_pack_epoch" else 1
        self.autocast = bool(flags.bf16 or flags.fp16)
        self.checkpointing = bool(flags.activation_checkpointing or flags.gradient_checkpointing)
        automatic = 2.0 if flags.lora and self.autocast else 4.0  # see codeact.training.options
        held = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}.get(flags.dtype, automatic)
        self.weight_bytes = {"nf4": 0.55, "int8": 1.05}.get(flags.quantize, held)
        between = math.ceil(flags.num_train_epochs) - 1 if str(flags.eval_strategy).endswith("epoch") else 0
        self.evaluations = 1 + bool(flags.eval_on_start) + between if flags.eval_ratio else 0
        self.sharding = _sharding(flags, processes)
        self.whole = self.sharding in ("zero3", "fsdp")

    def parameters(self, model: ModelFacts) -> ParameterCounts:
        """What is trained and what is frozen."""
        if not self.flags.lora:
            return ParameterCounts(trained=model.trunk, frozen=0, head_trained=model.head, head_frozen=0)
        adapters = model.adapter_parameters(self.flags.lora_r, self.flags.lora_target_modules)
        return ParameterCounts(trained=adapters, frozen=model.trunk, head_trained=0, head_frozen=model.head)

    def trained(self, model: ModelFacts) -> int:
        """Parameters that have gradients."""
        counts = self.parameters(model)
        return counts.trained + counts.head_trained + (0 if self.flags.lora else model.lookup)

    def flops(self, model: ModelFacts, tokens: float, head_tokens: float, squared_lengths: float) -> float:
        """Forward and backward pass of so many tokens (``ParameterCounts.flops``), and what is recomputed."""
        counts = self.parameters(model)
        attention = model.shape.attention_flops(int(squared_lengths))
        total = counts.flops(int(tokens), int(head_tokens)) + attention
        if self.checkpointing:
            total += counts.recomputed_flops(int(tokens)) + attention // 3
        return float(total)

    def memory(self, model: ModelFacts, tokens: int, base: float) -> Memory:
        """Estimate the peak of a training step on one device.

        Args:
            model: what is trained.
            tokens: computed by the largest forward pass, padding included.
            base: what the process takes before there is a model.
        """
        flags, ranks, trained = self.flags, self.processes, self.trained(model)
        deepspeed = self.sharding.startswith("zero")
        half = deepspeed and self.autocast  # DeepSpeed computes in 16 bits and keeps a float32 copy of what is trained
        trained_bytes = 2.0 if half else 4.0
        weights = model.parameters * (min(2.0, self.weight_bytes) if half else self.weight_bytes)
        weights += trained * trained_bytes if flags.lora else 0.0
        states = trained * (optimizer_bytes(str(flags.optim)) + (4.0 if half else 0.0))
        parts = {
            "the process": base,
            "weights": weights / (ranks if self.whole else 1),
            "gradients": trained * trained_bytes / (ranks if self.whole or self.sharding == "zero2" else 1),
            "optimizer": states / (ranks if self.whole or deepspeed else 1),
        }
        if self.whole and ranks > 1:  # a layer is computed while the next arrives; embeddings and head are gathered too
            parts["gathered layers"] = 2 * (2 * model.trunk / model.shape.layers + max(model.head, model.lookup))
        if self.sharding == "ddp":
            parts["DDP's buckets"] = trained * trained_bytes
        if self.autocast and self.weight_bytes > 2 and not deepspeed and not self.whole:
            parts["autocast's copies"] = 2.0 * model.trunk
        of_pass = pass_memory(
            model.shape,
            tokens,
            element_bytes=2 if self.autocast or self.weight_bytes == 2 else 4,
            checkpointing=self.checkpointing,
            fused_loss=flags.fused_loss,
            adapted_inputs=model.adapted_inputs(flags.lora_target_modules) if flags.lora else 0,
        )
        return Memory({**parts, **{name: size for name, size in of_pass.items() if size}})


def _sharding(flags: Any, processes: int) -> str:
    if flags.fsdp or not flags.deepspeed:
        return "fsdp" if flags.fsdp else "ddp" if processes > 1 else "none"
    name = str(flags.deepspeed)
    if name not in ("zero1", "zero2", "zero3"):
        try:
            content = json.loads(name if "{" in name else Path(name).read_text(encoding="utf-8"))
            name = f"zero{int(content['zero_optimization']['stage'])}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"train: cannot read the stage of deepspeed {name}: {error}") from None
    return name if name != "zero0" else "ddp"
