"""What a training run will take: operations, memory, disk; and whether there is enough, said before it begins.

Estimates, on the careful side.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from codeact.base.console import size
from codeact.base.errors import InputError
from codeact.base.machine import GIB
from codeact.base.parsing import parse_json, read_json
from codeact.models.weight_files import local_weights, stored_weights
from codeact.ops.flops import Memory, ModelFacts, ModelShape, ParameterCounts

_EVALUATION = "activations of an evaluation"
FUSED_LOSS_BYTES = 4 * 4 * 2**25
"""The fused loss holds blocks of 2^25 logits: four arrays of that size at most, in float32."""


def pass_memory(
    shape: ModelShape,
    tokens: int,
    *,
    element_bytes: int,
    checkpointing: bool = False,
    fused_loss: bool = True,
    adapted_inputs: int = 0,
) -> dict[str, float]:
    """Estimate the bytes that one forward and backward pass takes beside the model, by what holds them.

    Args:
        shape: of the model.
        tokens: of the pass, padding included.
        element_bytes: of an activation: 2 under autocast, else the weights'.
        checkpointing: whether layers are computed again in the backward pass.
        fused_loss: whether the loss holds no logits.
        adapted_inputs: widths of the inputs of all layers with LoRA adapters, added up; they are kept in float32 too.
    """
    everything = float(shape.activation_bytes(tokens, element_bytes))
    if checkpointing:  # a layer's input each, and one layer's rest
        everything = tokens * shape.layers * shape.hidden * element_bytes + everything / shape.layers
    logits = float(shape.logit_bytes(tokens))
    inputs = adapted_inputs / (shape.layers if checkpointing else 1)
    return {
        "activations": everything,
        "adapters' inputs": tokens * inputs * 8.0,
        **({"blocks of the loss": min(FUSED_LOSS_BYTES, logits)} if fused_loss else {"logits": logits}),
    }


def trained_parameters(model: Any) -> int:
    """How many numbers of a model have gradients."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _optimizer_bytes(optimizer: Any) -> float:
    """Bytes of the states for each trained parameter; AdamW keeps two in float32."""
    name = str(getattr(optimizer, "value", optimizer))
    return 2.5 if "8bit" in name else {"adafactor": 0.5, "sgd": 0.0}.get(name, 8.0)


def check_memory(needs: Memory, free: float, tokens: int, where: str) -> None:
    """Refuse a step that takes more memory than there is.

    Args:
        needs: what it takes beside the model.
        free: bytes that are left where it will run.
        tokens: of a pass.
        where: what that place is called.

    Raises:
        InputError: it does not fit; says what to lower.
    """
    if needs.total <= free:
        return
    largest = needs.largest()
    states = "--lora True, or --optim adafactor"
    lower = {
        "gradients": states,
        "optimizer": states,
        "logits": "--fused_loss True, or a lower --max_length",
        _EVALUATION: "lower --per_device_eval_batch_size",
    }.get(largest, "lower --per_device_train_batch_size or --max_length, or add --activation_checkpointing True")
    raise InputError(
        f"a step of {tokens:,} tokens needs about {needs.total / GIB:.1f} GiB beside the model, most of it for "
        f"{largest}; {free / GIB:.1f} GiB are left on {where}: {lower}"
    )


def check_held(flags: Any, free: float, where: str) -> None:
    """Refuse a training that holds more than there is before its first batch: weights, gradients and optimizer.

    Args:
        flags: of the command, by name; a model that has to be fetched is not looked at.
        free: bytes that are left where it will run.
        where: what that place is called.

    Raises:
        InputError: it does not fit; says what to change.
    """
    folder = local_weights(str(flags.model_name_or_path)) if flags.model_name_or_path else None
    planned = PlannedTraining(flags)
    if folder is None or planned.sharding != "none":  # DeepSpeed and FSDP share it among processes
        return
    trained = 0.0 if flags.lora else 4.0 + _optimizer_bytes(flags.optim)
    needed = sum(stored_weights(folder).values()) * (planned.weight_bytes + trained)
    if needed > free:
        what = "weights" if flags.lora else "weights, gradients and optimizer"
        remedy = "--quantize nf4, or a smaller model" if flags.lora else "--lora True, or --optim adafactor"
        raise InputError(f"{what} take {size(needed)}, and {size(free)} are left on {where}: {remedy}")


def check_room(flags: Any, parameters: int | None = None, steps: int | None = None) -> None:
    """Refuse checkpoints that will not fit on the disk.

    Args:
        flags: of the command, by name; ``output_dir`` may be missing.
        parameters: that are trained and saved; None: as many as the weights of the model's folder, if it is one.
        steps: of the run; None: not known yet, and then as few checkpoints count as there will be for certain.

    Raises:
        InputError: they do not fit; says how much there is and what to change.
    """
    if not flags.output_dir:
        return
    if parameters is None and not flags.lora:
        parameters = sum(stored_weights(Path(str(flags.model_name_or_path or "")).expanduser()).values())
    if not parameters:
        return
    kept, one = checkpoints(flags, parameters, steps)
    needed = kept * one + 4.0 * parameters
    folder = Path(str(flags.output_dir)).expanduser().absolute()
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    already = sum(path.stat().st_size for path in folder.glob("checkpoint-*/*") if path.is_file())
    free = shutil.disk_usage(place).free + already
    if needed > free:
        if not kept:
            raise InputError(
                f"the model needs {size(needed)}, and {place} has {size(free)} left: take another --output_dir"
            )
        raise InputError(
            f"{kept} checkpoints of about {size(one)} and the model need {size(needed)}, and {place} has {size(free)} "
            f"left: lower --save_total_limit (now {flags.save_total_limit}), say --save_only_model True (a third; no "
            "resume) or --save_strategy no, or take another --output_dir"
        )


def checkpoints(flags: Any, parameters: int, steps: int | None) -> tuple[int, float]:
    """How many checkpoints lie on the disk at the same time, and the bytes of one; arguments of ``check_room``."""
    saves = _saves(flags, steps)
    # Weights in float32 and AdamW's two moments; a new checkpoint is written before the oldest goes.
    return min(saves, (flags.save_total_limit or saves) + 1), parameters * (4.0 if flags.save_only_model else 12.0)


def _saves(flags: Any, steps: int | None) -> int:
    """How many checkpoints there will be; for certain, where the number of steps is not known."""
    strategy = str(getattr(flags.save_strategy, "value", flags.save_strategy))
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return max(1, math.ceil(float(flags.num_train_epochs)))
    if steps is None:
        steps = flags.max_steps if flags.max_steps > 0 else 1
    every = float(flags.save_steps if flags.save_steps >= 1 else max(1.0, flags.save_steps * steps))
    return 1 + math.floor((steps - 1) / every)  # the last step is saved as well


class PlannedTraining:
    """What training's flags say of its cost.

    Args:
        flags: as ``codeact.training.flags.check_flags`` gives them.
        processes: that share it, one a device.

    Attributes:
        packs, packs_a_pass: whether samples share a row; packs of a forward pass, where one pack is planned as one.
        weight_bytes: of a weight that is held: 4, 2, or less where it is quantised, with its scales.
        evaluations: passes over what is held out.
        sharding, whole: none, ddp, zero1 to zero3, or fsdp; whether no device holds all weights.

    Raises:
        InputError: the configuration of DeepSpeed cannot be read.
    """

    def __init__(self, flags: Any, processes: int = 1) -> None:
        self.flags, self.processes = flags, processes
        self.packs = flags.pad_mode == "dynamic_pack"
        self.packs_a_pass = int(flags.per_device_train_batch_size) if self.packs and flags.pack_scope == "epoch" else 1
        self.autocast = bool(flags.bf16 or flags.fp16)
        self.checkpointing = bool(flags.activation_checkpointing or flags.gradient_checkpointing)
        automatic = 2.0 if flags.lora and self.autocast else 4.0  # see codeact.training.options
        held = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}.get(flags.dtype, automatic)
        self.weight_bytes = {"nf4": 0.55, "int8": 1.05}.get(flags.quantize, held)
        between = math.ceil(flags.num_train_epochs) - 1 if str(flags.eval_strategy).endswith("epoch") else 0
        self.evaluations = 1 + bool(flags.eval_on_start) + between if flags.eval_ratio else 0
        self.sharding = sharding(flags, processes)
        self.whole = self.sharding in ("zero3", "fsdp")
        # DeepSpeed computes in 16 bits and keeps a float32 copy of what is trained.
        self._half = self.sharding.startswith("zero") and self.autocast
        self._trained_bytes = 2.0 if self._half else 4.0

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
        weights = model.parameters * (min(2.0, self.weight_bytes) if self._half else self.weight_bytes)
        weights += self.trained(model) * self._trained_bytes if self.flags.lora else 0.0
        parts = {"the process": base, "weights": weights / (self.processes if self.whole else 1)}
        return Memory({**parts, **self.step_memory(model, tokens).parts})

    def step_memory(self, model: ModelFacts, tokens: int) -> Memory:
        """The part of ``memory`` that a step takes beside the model."""
        flags, ranks, trained = self.flags, self.processes, self.trained(model)
        deepspeed = self.sharding.startswith("zero")
        states = trained * (_optimizer_bytes(flags.optim) + (4.0 if self._half else 0.0))
        trained_bytes = self._trained_bytes
        parts = {
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
            element_bytes=self._element_bytes,
            checkpointing=self.checkpointing,
            fused_loss=flags.fused_loss,
            adapted_inputs=model.adapted_inputs(flags.lora_target_modules) if flags.lora else 0,
        )
        return Memory({**parts, **{name: size for name, size in of_pass.items() if size}})

    def evaluation_memory(self, model: ModelFacts, tokens: int) -> Memory:
        """What a pass of an evaluation takes beside the model: one layer after the other, and what a step left."""
        kept = self.step_memory(model, 1).parts["optimizer"]
        activations = model.shape.activation_bytes(tokens, self._element_bytes) / model.shape.layers
        return Memory({"optimizer": kept, _EVALUATION: activations})

    @property
    def _element_bytes(self) -> int:
        return 2 if self.autocast or self.weight_bytes == 2 else 4


def sharding(flags: Any, processes: int) -> str:
    """How flags ask to share a model among processes: none, ddp, zero1 to zero3, or fsdp.

    Raises:
        InputError: the configuration of DeepSpeed cannot be read.
    """
    if flags.fsdp or not flags.deepspeed:
        return "fsdp" if flags.fsdp else "ddp" if processes > 1 else "none"
    name = str(flags.deepspeed)
    if name not in ("zero1", "zero2", "zero3"):
        try:
            content = parse_json(name) if "{" in name else read_json(Path(name))
            name = f"zero{int(content.get('zero_optimization', {}).get('stage', 0))}"
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise InputError(f"--deepspeed {name} cannot be read as a configuration: {error}") from None
    return name if name != "zero0" else "ddp"
