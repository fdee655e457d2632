"""What training will cost: from its flags to floating-point operations and bytes on a device."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeact.base.errors import InputError
from codeact.forecast.cost import Memory, ModelFacts
from codeact.ops.flops import ModelShape, ParameterCounts
from codeact.run.settings import RunSettings
from codeact.training.room import FUSED_LOSS_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingShape:
    """What of training's flags decides its cost."""

    capacity: int
    epochs: float
    max_steps: int
    micro_batch: int
    accumulation: int
    pad_mode: str
    pack_scope: str
    supervised_only: bool
    fused_loss: bool
    lora_rank: int | None
    lora_targets: str
    lora_dropout: float
    weight_bytes: float
    """Of a weight that is held: 4, 2, or less where it is quantised."""
    autocast: bool
    checkpointing: bool
    sharding: str
    optimizer_bytes: float
    """Of a trained parameter's states."""
    eval_ratio: float
    evaluations: int
    """Passes over what is held out."""
    checkpoint_every: int | None
    """Steps; None: no checkpoints."""
    checkpoints_kept: int | None

    @property
    def strategy(self) -> str:
        """The name in ``codeact.padding.strategies.STRATEGIES``."""
        return f"dynamic_pack_{self.pack_scope}" if self.pad_mode == "dynamic_pack" else self.pad_mode

    def parameters(self, model: ModelFacts) -> ParameterCounts:
        """What is trained and what is frozen."""
        if self.lora_rank is None:
            return ParameterCounts(trained=model.trunk, frozen=0, head_trained=model.head, head_frozen=0)
        adapters = model.adapter_parameters(self.lora_rank, self.lora_targets)
        return ParameterCounts(trained=adapters, frozen=model.trunk, head_trained=0, head_frozen=model.head)

    def trained(self, model: ModelFacts) -> int:
        """Parameters that have gradients."""
        counts = self.parameters(model)
        return counts.trained + counts.head_trained + (model.lookup if self.lora_rank is None else 0)

    def flops(self, model: ModelFacts, tokens: float, head_tokens: float, squared_lengths: float) -> float:
        """Forward and backward pass of so many tokens (``ParameterCounts.flops``), and what is recomputed."""
        counts = self.parameters(model)
        attention = model.shape.attention_flops(int(squared_lengths))
        total = counts.flops(int(tokens), int(head_tokens)) + attention
        if self.checkpointing:
            total += counts.recomputed_flops(int(tokens)) + attention // 3
        return float(total)


def training_shape(flags: Any, settings: RunSettings) -> TrainingShape:
    """What of training's flags (``check_flags``) decides its cost."""
    autocast = bool(flags.bf16 or flags.fp16)
    weight_bytes = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}.get(flags.dtype)
    if weight_bytes is None:  # auto, see codeact.training.stage
        weight_bytes = 2.0 if flags.lora and autocast else 4.0
    weight_bytes = {"nf4": 0.55, "int8": 1.05}.get(flags.quantize, weight_bytes)  # with their scales
    states = {"adafactor": 0.5, "sgd": 0.0}.get(flags.optim, 2.5 if "8bit" in str(flags.optim) else 8.0)
    epochs = float(flags.num_train_epochs)
    evaluations = 0
    if flags.eval_ratio:
        # After training always, before it if asked for, after every epoch but the last if asked for.
        between = math.ceil(epochs) - 1 if str(flags.eval_strategy).endswith("epoch") else 0
        evaluations = 1 + bool(flags.eval_on_start) + between
    every = None
    if str(flags.save_strategy).endswith("steps"):
        every = max(1, int(flags.save_steps))
    return TrainingShape(
        capacity=flags.max_seq_len,
        epochs=epochs,
        max_steps=int(flags.max_steps),
        micro_batch=int(flags.per_device_train_batch_size),
        accumulation=int(flags.gradient_accumulation_steps),
        pad_mode=flags.pad_mode,
        pack_scope=flags.pack_scope,
        supervised_only=flags.supervised_only,
        fused_loss=flags.fused_loss,
        lora_rank=flags.lora_r if flags.lora else None,
        lora_targets=flags.lora_target_modules,
        lora_dropout=flags.lora_dropout,
        weight_bytes=weight_bytes,
        autocast=autocast,
        checkpointing=bool(flags.activation_checkpointing or flags.gradient_checkpointing),
        sharding=_sharding(flags, settings.processes),
        optimizer_bytes=states,
        eval_ratio=float(flags.eval_ratio),
        evaluations=evaluations,
        checkpoint_every=every,
        checkpoints_kept=flags.save_total_limit,
    )


def _sharding(flags: Any, processes: int) -> str:
    if flags.fsdp:
        return "fsdp"
    if not flags.deepspeed:
        return "ddp" if processes > 1 else "none"
    name = str(flags.deepspeed)
    if name not in ("zero1", "zero2", "zero3"):
        try:
            content = json.loads(name if "{" in name else Path(name).read_text(encoding="utf-8"))
            name = f"zero{int(content['zero_optimization']['stage'])}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"train: cannot read the stage of deepspeed {name}: {error}") from None
    return name if name != "zero0" else "ddp"


def training_memory(model: ModelFacts, shape: TrainingShape, ranks: int, tokens: int, base: float) -> Memory:
    """Estimate the peak of a training step on one device.

    Args:
        model, shape: what is trained, and how.
        ranks: processes that share it, one a device.
        tokens: computed by the largest forward pass, padding included.
        base: what the process takes before there is a model.
    """
    held, trained = model.parameters, shape.trained(model)
    adapters = trained if shape.lora_rank is not None else 0
    deepspeed = shape.sharding.startswith("zero")
    half = deepspeed and shape.autocast  # DeepSpeed computes in bfloat16 and keeps a float32 copy of what is trained
    trained_bytes = 2.0 if half else 4.0
    weights = held * (min(2.0, shape.weight_bytes) if half else shape.weight_bytes) + adapters * trained_bytes
    gradients = trained * trained_bytes
    states = trained * (shape.optimizer_bytes + (4.0 if half else 0.0))
    whole = shape.sharding in ("zero3", "fsdp")
    parts = {
        "weights": weights / (ranks if whole else 1),
        "gradients": gradients / (ranks if whole or shape.sharding == "zero2" else 1),
        "optimizer": states / (ranks if whole or deepspeed else 1),
    }
    layer = model.trunk / model.shape.layers
    if whole and ranks > 1:  # one layer is computed while the next arrives; embeddings and head are gathered too
        parts["gathered layers"] = 2 * (2 * layer + max(model.head, model.lookup))
    if shape.sharding == "ddp":
        parts["DDP's buckets"] = trained * trained_bytes
    if shape.autocast and shape.weight_bytes > 2 and not deepspeed and not whole:
        parts["autocast's copies"] = 2.0 * model.trunk
    parts["activations"] = activation_memory(model.shape, tokens, 2 if shape.autocast else 4, shape.checkpointing)
    if shape.lora_rank is not None:
        # An adapter takes its input in float32: a copy of it, one after dropout with its mask, one for autocast.
        of_token = (6.0 if shape.autocast else 0.0) + (5.0 if shape.lora_dropout else 0.0)
        inputs = model.adapted_inputs(shape.lora_targets) / (model.shape.layers if shape.checkpointing else 1)
        parts["adapters' inputs"] = tokens * inputs * of_token
    parts["logits"] = float(
        min(FUSED_LOSS_BYTES, model.shape.logit_bytes(tokens)) if shape.fused_loss else model.shape.logit_bytes(tokens)
    )
    return Memory(parts={"the process": base, **parts})


def activation_memory(shape: ModelShape, tokens: int, element_bytes: int, checkpointing: bool) -> float:
    """What a training step keeps for its backward pass; under checkpointing a layer's input, and one layer's rest."""
    everything = shape.activation_bytes(tokens, element_bytes)
    if not checkpointing:
        return float(everything)
    return tokens * shape.layers * shape.hidden * element_bytes + everything / shape.layers
