"""Whether a model that should be sharded over the ranks is sharded: FSDP and DeepSpeed as they really run."""

from __future__ import annotations

import os
from typing import Any

import torch

from codeact.base.errors import InputError


def wanted_sharding(arguments: Any) -> str | None:
    """Name what the flags, or accelerate's launcher, ask for: "FSDP", "DeepSpeed", or None."""
    if arguments.deepspeed or _environment("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    return "FSDP" if arguments.fsdp or _environment("ACCELERATE_USE_FSDP") else None


def check_sharded(arguments: Any, prepared: torch.nn.Module) -> None:
    """Refuse to go on where sharding was asked for and every rank holds the whole model all the same.

    accelerate falls back to plain data parallel without a word where it does not support the device.

    Args:
        arguments: TrainingArguments.
        prepared: what the training step calls, after accelerate has prepared it.

    Raises:
        InputError: the run is not what was asked for.
    """
    wanted = wanted_sharding(arguments)
    if wanted is None or _is_sharded(wanted, prepared):
        return
    raise InputError(
        f"{wanted} was asked for, but the model is not sharded: it runs as {type(prepared).__name__} on "
        f"{arguments.device.type}; FSDP needs GPUs and several processes; start plain data parallel without its flags"
    )


def _is_sharded(wanted: str, prepared: torch.nn.Module) -> bool:
    if wanted == "DeepSpeed":
        return type(prepared).__name__ == "DeepSpeedEngine"
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if isinstance(prepared, FullyShardedDataParallel):
        return True
    return all(isinstance(parameter, DTensor) for parameter in prepared.parameters() if parameter.requires_grad)


def _environment(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
