"""Fine-tuning with Hugging Face's Trainer: packs without leaks, an exact token mean, and a head that makes no logits.

Shapes: B rows, T tokens of a row, K positions with a target, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from codeact.base.errors import InputError
from codeact.models.fused_layers import fused_layers
from codeact.models.fused_loss import fuse_loss
from codeact.models.isolation import PassRule, packing_attention, prove_isolation, set_attention, split_head
from codeact.ops.attention import computes_16_bits_only
from codeact.text.conversations import IGNORE
from codeact.training.cost import CostMonitor
from codeact.training.dataset import EpochSampler, PackCollator, PackDataset, PadCollator, TokenizedSample
from codeact.training.options import PackOptions, refuse_inexact

_LOSSES = "codeact losses"  # their place in a checkpoint's trainer_state.json

# Batches that are sorted by length together: so many in Hugging Face's own group_by_length, and few where the ranks
# only have to take equally long for a step.
_LENGTH_GROUP = 50
_RANK_GROUP = 16


def train(
    model: torch.nn.Module,
    samples: Sequence[TokenizedSample],
    arguments: TrainingArguments,
    options: PackOptions | None = None,
    *,
    eval_samples: Sequence[TokenizedSample] | None = None,
    monitor: CostMonitor | None = None,
    resume_from_checkpoint: str | bool | None = None,
    **trainer_arguments: Any,
) -> PackTrainer:
    """Train ``model`` in place and return the trainer: its ``state`` has the losses, its ``save_model`` the weights.

    The loss of a step is the mean over all its labelled tokens, whatever the padding, the accumulation or the ranks.
    With ``resume_from_checkpoint`` a single process ends where it would have without the interruption, on a CPU bit for
    bit.

    Args:
        model: a causal model of transformers, or one that peft has wrapped. dynamic_pack changes its attention.
        samples: what to train on; ``input_ids`` (L,) and ``labels`` (L,), -100 outside answers, L <= ``max_length``.
        arguments: all of Trainer's. ``bf16``, ``activation_checkpointing``, ``optim`` (fused AdamW unless said) and
            ``gradient_accumulation_steps`` mean what they mean there.
        options: pad mode and cost cutters; None for the defaults.
        eval_samples: what ``eval_loss``, a mean over tokens, is computed on.
        monitor: counts what every step costs.
        resume_from_checkpoint: a checkpoint folder, or True for the last one in ``output_dir``.
        trainer_arguments: passed on to Trainer, such as ``callbacks`` and ``processing_class`` (a tokenizer).

    Raises:
        InputError: the attention lets samples see each other, a sample does not fit, or an argument would make the
            loss inexact.
    """
    more = {"eval_samples": eval_samples, "monitor": monitor, **trainer_arguments}
    trainer = PackTrainer(model, samples, arguments, options, **more)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


class PackTrainer(Trainer):  # type: ignore[misc]
    """Trainer on ``PackDataset``s. Arguments and errors: see ``train``."""

    def __init__(
        self,
        model: torch.nn.Module,
        samples: Sequence[TokenizedSample],
        arguments: TrainingArguments,
        options: PackOptions | None = None,
        *,
        eval_samples: Sequence[TokenizedSample] | None = None,
        monitor: CostMonitor | None = None,
        **trainer_arguments: Any,
    ) -> None:
        self.options = options = options or PackOptions()
        _refuse_inexact(arguments, options)
        causal_lm = _causal_lm(model)
        _refuse_beyond([*samples, *(eval_samples or ())], causal_lm)
        if options.packs:
            attention = options.attention
            if attention == "auto":
                attention = packing_attention(causal_lm, arguments.device)
            stand_in = _stand_in(attention, arguments.device, next(causal_lm.parameters()))
            if _has_weights(causal_lm):
                tokens = sum(len(sample.input_ids) for sample in samples)
                tokens = min(tokens, arguments.train_batch_size * options.max_length)
                if next(causal_lm.parameters()).device != arguments.device:
                    tokens = 0  # on a CPU, before it goes to its device, more than a sample would take long
                prove_isolation(causal_lm, stand_in, options.max_length, None, "say --pad_mode dynamic_pad", tokens)
            set_attention(causal_lm, attention)
        elif options.attention != "auto":
            set_attention(causal_lm, options.attention)
        self.fused = options.fused_loss and not arguments.use_liger_kernel and _has_plain_head(causal_lm)
        self.fused = self.fused and fuse_loss(causal_lm)
        if options.token_accuracy and arguments.use_liger_kernel:
            raise InputError("Liger's loss says no token's rank; leave out --token_accuracy or --use_liger_kernel")
        rule = PassRule.of(causal_lm)
        # Trainer would otherwise look for columns to remove in items that have none.
        arguments = copy.copy(arguments)
        arguments.remove_unused_columns = False
        width = getattr(causal_lm.config.get_text_config(), "hidden_size", 1024)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=_dataset(samples, arguments, options, width, rule),
            eval_dataset=None
            if eval_samples is None
            else _dataset(eval_samples, arguments, options, width, rule, True),
            data_collator=collator(options),
            **trainer_arguments,
        )
        self._evaluated: Tensor | None = None
        self._hits: Tensor | None = None  # since the last log: labelled tokens that the model held likeliest, and all
        self._sharding_checked = False
        self._loss_sum: Tensor | None = None
        self._resumed: tuple[float, int] | None = None
        self.monitor = monitor
        if monitor is not None:
            monitor.attach(self)

    def train(self, *arguments: Any, **more: Any) -> Any:
        """Trainer's, on a GPU with one pass over memory for what lies between a layer's products."""
        with fused_layers(self.model) if _fuses_layers(self.args) else nullcontext():
            return super().train(*arguments, **more)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any, **more: Any) -> Tensor:
        """Count the batch and compute it; before the first one, see that the model is sharded if it has to be."""
        if not self._sharding_checked:
            check_sharded(self.args, model)
            self._sharding_checked = True
        if self.monitor is not None:
            self.monitor.count(inputs)
        loss: Tensor = super().training_step(model, inputs, *arguments, **more)
        if self._loss_sum is None:
            self._loss_sum = torch.tensor(self._losses_of_checkpoint()[0], dtype=torch.float64, device=loss.device)
        self._loss_sum += loss.detach()
        return loss

    def mean_loss(self) -> float:
        """The training loss, a mean over all steps: also those before an interruption, which Trainer's own forgets."""
        total, first = self._losses_of_checkpoint()
        if self._loss_sum is not None:
            total = float(self.accelerator.gather(self._loss_sum.reshape(1)).mean())
        return total / max(1, int(self.state.global_step) - first)

    def _losses_of_checkpoint(self) -> tuple[float, int]:
        """The sum of the losses before this process took over, and the step from which on they were counted."""
        if self._resumed is None:
            known = (self.state.stateful_callbacks or {}).get(_LOSSES)
            known = known or {"sum": 0.0, "first_step": self.state.global_step}
            self._resumed = (float(known["sum"]), int(known["first_step"]))
        return self._resumed

    def largest_pass(self) -> int:
        """Tokens of the largest forward pass of training, padding included; of batches laid end to end in epoch 0."""
        dataset: PackDataset = self.train_dataset
        if self.options.pad_mode == "max_length":
            return dataset.items_per_batch * self.options.max_length
        return dataset.largest_pass()

    def _save_checkpoint(self, *arguments: Any, **more: Any) -> None:
        """Write the losses' sum into the checkpoint's trainer_state.json."""
        first = self._losses_of_checkpoint()[1]
        count = self.state.global_step - first
        self.state.stateful_callbacks[_LOSSES] = {"sum": self.mean_loss() * count, "first_step": first}
        super()._save_checkpoint(*arguments, **more)

    def get_train_dataloader(self) -> Any:
        """Return a loader in which an item of scope "batch" is a batch already."""
        batch_size = self.train_dataset.items_per_batch
        return self._get_dataloader(
            self.train_dataset, "Training", batch_size, sampler_fn=self._get_train_sampler, is_training=True
        )

    def _get_train_sampler(self, train_dataset: PackDataset | None = None) -> EpochSampler:
        return EpochSampler(self.train_dataset if train_dataset is None else train_dataset)

    def _get_eval_sampler(self, eval_dataset: PackDataset) -> EpochSampler:
        return EpochSampler(eval_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        count = super()._get_num_items_in_batch(batch_samples, device)
        # A step of nothing but dummies has loss 0, not 0 / 0.
        return count.clamp(min=1) if isinstance(count, Tensor) else count

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any, **more: Any) -> Any:
        """Return Trainer's loss: the sum over this batch's targets divided by the step's number of targets."""
        inputs = {**inputs, "fused_loss": True} if self.fused else inputs
        if not self.options.token_accuracy:
            return super().compute_loss(model, inputs, *arguments, **more)
        hits, labels = self._no_hits(inputs), inputs["shift_labels"]
        if self.fused:
            inputs["hits"] = hits[0]
        loss, output = super().compute_loss(model, inputs, *arguments, **{**more, "return_outputs": True})
        self._add_hits(hits, output, labels)
        self._hits = hits if self._hits is None else self._hits + hits
        return (loss, output) if more.get("return_outputs") else loss

    @staticmethod
    def _no_hits(inputs: dict[str, Any]) -> Tensor:
        return torch.zeros(2, dtype=torch.int64, device=inputs["shift_labels"].device)

    def _add_hits(self, hits: Tensor, output: Any, labels: Tensor) -> None:
        """Add the labelled tokens of a pass, and those among them with the largest logit where no fused loss did."""
        hits[1] += labels.ne(IGNORE).sum()
        if not self.fused:
            hits[0] += (output["logits"].argmax(-1) == labels).sum()

    def log(self, logs: dict[str, float], *arguments: Any, **more: Any) -> None:
        """Trainer's, with the share of labelled tokens since the last one that the model held likeliest."""
        if "loss" in logs and self._hits is not None:
            hit, count = self.accelerator.reduce(self._hits, reduction="sum").tolist()
            logs["mean_token_accuracy"] = hit / max(count, 1)
            self._hits = None
        super().log(logs, *arguments, **more)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop, with the loss as the mean over all tokens and not over batches."""
        self._evaluated = torch.zeros(3, dtype=torch.float64)
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        total, count, hit = self.accelerator.reduce(self._evaluated.to(self.args.device), reduction="sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1)
        if self.options.token_accuracy:
            output.metrics[f"{metric_key_prefix}_mean_token_accuracy"] = hit / max(count, 1)
        return output._replace(num_samples=len(dataloader.dataset.samples))

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, None, None]:
        """Add this batch's loss and number of targets to what ``evaluation_loop`` reports."""
        inputs = self._prepare_inputs(inputs)
        count, hits = inputs["shift_labels"].ne(IGNORE).sum(), self._no_hits(inputs)
        fused: dict[str, Any] = {"fused_loss": True} if self.fused else {}
        if self.fused and self.options.token_accuracy:
            fused["hits"] = hits[0]
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs, **fused, num_items_in_batch=count.clamp(min=1))
        loss = output["loss"].detach()
        if self.options.token_accuracy:
            self._add_hits(hits, output, inputs["shift_labels"])
        if self._evaluated is not None:
            self._evaluated += torch.stack([loss.double() * count, count.double(), hits[0].double()]).cpu()
        return loss, None, None


def collator(options: PackOptions) -> Callable[[Sequence[Sequence[TokenizedSample]]], dict[str, Any]]:
    """Return what turns the items of a ``PackDataset`` into a batch of the options' pad mode."""
    if options.packs:
        return PackCollator(supervised_only=options.supervised_only)
    length = options.max_length if options.pad_mode == "max_length" else None
    return PadCollator(length=length)


def _dataset(
    samples: Sequence[TokenizedSample],
    arguments: TrainingArguments,
    options: PackOptions,
    width: int,
    rule: PassRule,
    evaluation: bool = False,
) -> PackDataset:
    batch = arguments.per_device_eval_batch_size if evaluation else arguments.per_device_train_batch_size
    scope = ("epoch" if evaluation else options.pack_scope) if options.packs else "sample"
    window = 1
    if not evaluation:
        if arguments.train_sampling_strategy == "group_by_length" and not options.packs:
            window = _LENGTH_GROUP
        elif options.packs and arguments.world_size > 1:
            window = _RANK_GROUP
    lengths = np.array([len(sample.input_ids) for sample in samples], dtype=np.int64)
    keys = rule.keys(lengths)
    # What is laid end to end is one pass, whatever its packs; rows that are padded are each a pass of their own.
    end_to_end = np.sort(lengths)[-batch:].sum() if scope == "batch" else lengths.sum()
    crowded = options.packs and rule.shared is not None and end_to_end > rule.shared
    if batch > 1 and (crowded or len(np.unique(keys)) > 1):
        raise InputError(
            f"samples of up to {lengths.max()} tokens and short ones cannot share a batch: this model computes a whole "
            f"pass in another way above {rule.shared or rule.switches[0]} tokens. Set per_device_train_batch_size and "
            "per_device_eval_batch_size to 1 (gradient_accumulation_steps makes up for it), or lower max_length"
        )
    return PackDataset(
        samples,
        options.max_length,
        apart=keys,
        shared=rule.shared,
        scope=scope,
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        world_size=arguments.world_size,
        items_per_batch=1 if scope == "batch" else batch,
        samples_per_batch=batch,
        sort_window=window,
        # Per layer a token costs about 24 D^2 operations, and its causal attention to each of L others 2 D.
        square_cost=1 / (12 * width),
        shuffle=not evaluation and arguments.train_sampling_strategy != "sequential",
    )


def _refuse_inexact(arguments: TrainingArguments, options: PackOptions) -> None:
    if arguments.n_gpu > 1:
        raise InputError(
            f"one process cannot share a pack among {arguments.n_gpu} GPUs; start one process a GPU with torchrun or "
            "accelerate launch, or set CUDA_VISIBLE_DEVICES"
        )
    if arguments.world_size > 1 and not arguments.average_tokens_across_devices:
        raise InputError("average_tokens_across_devices=False weighs ranks, not tokens; leave it True")
    refuse_inexact(arguments, options.pad_mode)


def _refuse_beyond(samples: Sequence[TokenizedSample], causal_lm: Any) -> None:
    vocabulary: int = getattr(causal_lm.config.get_text_config(), "vocab_size", None) or 2**63
    for number, sample in enumerate(samples):
        largest = max(int(np.max(sample.input_ids)), int(np.max(sample.labels))) if len(sample.input_ids) else 0
        if largest >= vocabulary:
            raise InputError(f"sample {number}: token {largest} is beyond the {vocabulary} of the model; leave it out")


def _causal_lm(model: Any) -> Any:
    """Return the transformers model inside whatever peft has put around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise InputError(f"{type(model).__name__} is no causal language model of transformers")
    return inner


def _stand_in(attention: str, device: torch.device, parameter: Tensor) -> str:
    """Name the attention under which to prove a model: its own, or SDPA for a CUDA kernel that cannot run on it yet.

    Trainer moves the model only later, and autocast makes what the kernels compute. They keep samples apart by
    construction; what is left to prove is the architecture around them.
    """
    runs = parameter.is_cuda and parameter.dtype in (torch.bfloat16, torch.float16)
    return "sdpa" if computes_16_bits_only(attention, device) and not runs else attention


def _fuses_layers(arguments: TrainingArguments) -> bool:
    """Not where weights are sharded, which are not there to be tried, and not over Liger's own."""
    on_gpu = arguments.device.type == "cuda"
    return on_gpu and sharding_asked_for(arguments) is None and not arguments.use_liger_kernel


def _has_weights(model: Any) -> bool:
    """Whether a model can be run now. With DeepSpeed ZeRO-3, and on most ranks of FSDP, its weights come later."""
    return not any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters())


def _has_plain_head(model: Any) -> bool:
    """Whether hidden states and head are all that the logits are made of; taken to be so where it cannot be tried."""
    try:
        return not _has_weights(model) or bool(split_head(model))
    except InputError:
        return False


def sharding_asked_for(arguments: Any) -> str | None:
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
    asked = sharding_asked_for(arguments)
    if asked is None or _is_sharded(asked, prepared):
        return
    raise InputError(
        f"{asked} was asked for, but the model is not sharded: it runs as {type(prepared).__name__} on "
        f"{arguments.device.type}; FSDP needs GPUs and several processes; start plain data parallel without its flags"
    )


def _is_sharded(asked: str, prepared: torch.nn.Module) -> bool:
    if asked == "DeepSpeed":
        return type(prepared).__name__ == "DeepSpeedEngine"
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if isinstance(prepared, FullyShardedDataParallel):
        return True
    return all(isinstance(parameter, DTensor) for parameter in prepared.parameters() if parameter.requires_grad)


def _environment(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
