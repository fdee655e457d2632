"""A step of training on a model that is next to nothing: what flags make transformers refuse is found in a second.

A list of what Trainer, its optimizers and its schedules refuse would be long, and another one with every version.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, ProgressCallback

from codeact.base.errors import InputError
from codeact.text.conversations import Sample
from codeact.training.arguments import TrainerArguments
from codeact.training.options import DataArguments, PackOptions
from codeact.training.trainer import PackTrainer

_STEPS = ("logging_steps", "eval_steps", "save_steps")
# What is of the real run alone: how long it is, how it is shared among devices, where it is told of, and what changes
# this process for good or takes long.
_LEFT_OUT: dict[str, Any] = {
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "resume_from_checkpoint", "torch_compile_backend")),
    **dict.fromkeys(("torch_compile_mode", "parallelism_config", "hub_model_id")),
    **dict.fromkeys(("push_to_hub", "torch_compile", "full_determinism", "use_liger_kernel"), False),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **{"report_to": "none", "disable_tqdm": True, "max_steps": 1, "num_train_epochs": 1.0},
}


def rehearse(parts: Callable[..., Sequence[Any]]) -> None:
    """Train a tiny model for a step, with a checkpoint and an evaluation where there are any.

    Args:
        parts: gives the four classes of settings, with changes to the values of flags by name.

    Raises:
        InputError: it fails, and without these flags it does not.
    """
    # transformers checks them as they are; what shards is set up by the processes of the training itself
    used = parts(output_dir="output", deepspeed=None, fsdp=None, fsdp_config=None)[3]
    changes = {name: value for name, value in _LEFT_OUT.items() if hasattr(used, name)}
    own = {name: 1 for name in _STEPS if getattr(used, name)} | {
        "dataloader_num_workers": min(1, used.dataloader_num_workers)
    }

    def plain(**more: Any) -> Sequence[Any]:
        return None, DataArguments(), PackOptions(), TrainerArguments(use_cpu=used.use_cpu, bf16=used.bf16, **more)

    if (reason := _failure(parts, **changes, **own)) and not _failure(plain, **changes):
        raise InputError(f"a step with these flags fails on a tiny model: {reason}")


def _failure(parts: Callable[..., Sequence[Any]], **changes: Any) -> str | None:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            _train(*parts(output_dir=folder, **changes)[1:])
        except Exception as error:  # whatever the libraries raise
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _train(data: DataArguments, packs: PackOptions, arguments: TrainerArguments) -> None:
    torch.manual_seed(0)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a launcher gives every process one
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=8,
        )
    )
    ids = np.arange(1, 7, dtype=np.int32)
    samples = [Sample(input_ids=ids, labels=ids, cut_tokens=0, changed=0)] * 2
    # Another attention may be one for models of another kind or size.
    attention = packs.attention if packs.attention in ("sdpa", "eager") else "auto"
    options = replace(packs, max_length=8, attention=attention)
    held_out = samples if data.eval_ratio or data.eval_path else None
    trainer = PackTrainer(model, samples, arguments, options, eval_samples=held_out)
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    trainer.train()
