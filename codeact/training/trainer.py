"""Fine-tuning with Hugging Face's Trainer: packs without leaks, an exact token mean, and a head that makes no logits.

Shapes: B rows, T tokens of a row, K positions with a target, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from codeact.base.errors import InputError, one_of
from codeact.models.fused_loss import fuse_loss
from codeact.models.loading import split_head
from codeact.ops.attention import ATTENTION, isolating_attention
from codeact.training.cost import CostMonitor
from codeact.training.dataset import IGNORE, EpochSampler, PackCollator, PackDataset, PadCollator, TokenizedSample
from codeact.training.sharding import check_sharded

PAD_MODES = ("dynamic_pack", "dynamic_pad", "max_length")
PACK_SCOPES = ("epoch", "batch")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


# Batches that are sorted by length together: so many in Hugging Face's own group_by_length, and few where the ranks
# only have to take equally long for a step.
_LENGTH_GROUP = 50
_RANK_GROUP = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """What Trainer's own arguments do not say; the help of each is that of its flag in ``codeact train``.

    Length-sorted dynamic_pad is Trainer's own ``train_sampling_strategy="group_by_length"``. What fills padding needs
    no option: it is masked, so any id is right.
    """

    pad_mode: str = _option(
        "dynamic_pack",
        "dynamic_pack: samples share rows without padding, and none sees another. dynamic_pad: a batch is padded to "
        "its longest sample. max_length: every sample is padded to max_seq_len.",
    )
    pack_scope: str = _option(
        "epoch",
        "epoch: best-fit decreasing over all samples; per_device_train_batch_size counts packs. batch: the "
        "per_device_train_batch_size random samples of one batch share a row, as in the paper.",
    )
    max_seq_len: int = _option(2048, "Most tokens in a sample, and in a pack of scope epoch.")
    attention: str = _option(
        "auto",
        "An attention implementation of transformers. auto: for dynamic_pack the best one that keeps samples apart, "
        "else what the model has.",
    )
    supervised_only: bool = _option(True, "In a pack, the LM head sees only rows that predict a label.")
    fused_loss: bool = _option(True, "Compute the loss in blocks, without holding the logits.")

    def __post_init__(self) -> None:
        one_of("pad_mode", self.pad_mode, PAD_MODES)
        one_of("pack_scope", self.pack_scope, PACK_SCOPES)
        if self.max_seq_len < 1:
            raise InputError(f"max_seq_len is {self.max_seq_len}; it must be at least 1")

    @property
    def packs(self) -> bool:
        """Whether samples share rows."""
        return self.pad_mode == "dynamic_pack"


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
    With ``resume_from_checkpoint`` a single process ends bit for bit where it would have without the interruption.

    Args:
        model: a causal model of transformers, or one that peft has wrapped. dynamic_pack changes its attention.
        samples: what to train on; ``input_ids`` (L,) and ``labels`` (L,), -100 outside answers, L <= ``max_seq_len``.
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
        if options.packs:
            attention = options.attention if options.attention != "auto" else isolating_attention(arguments.device)
            _attend(causal_lm, _stand_in(attention, arguments.device, next(causal_lm.parameters())))
            refusal = _why_not_packed(causal_lm)
            _attend(causal_lm, attention)
            if refusal:
                others = ", ".join(sorted({"auto", "sdpa", "eager", ATTENTION} - {attention}))
                raise InputError(
                    f"pad_mode dynamic_pack is refused: {refusal}; choose another attention ({others}) or dynamic_pad"
                )
        elif options.attention != "auto":
            _attend(causal_lm, options.attention)
        fuse = options.fused_loss and not arguments.use_liger_kernel
        # The same proof shows that hidden states and head are all that the logits are made of.
        self._fused = fuse and (options.packs or not _why_not_packed(causal_lm)) and fuse_loss(causal_lm)
        # Trainer would otherwise look for columns to remove in items that have none.
        arguments = copy.copy(arguments)
        arguments.remove_unused_columns = False
        width = getattr(causal_lm.config.get_text_config(), "hidden_size", 1024)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=_dataset(samples, arguments, options, width),
            eval_dataset=None if eval_samples is None else _dataset(eval_samples, arguments, options, width, True),
            data_collator=collator(options),
            **trainer_arguments,
        )
        self._evaluated: Tensor | None = None
        self._sharding_checked = False
        self.monitor = monitor
        if monitor is not None:
            monitor.attach(self)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any, **more: Any) -> Tensor:
        """Count the batch and compute it; before the first one, see that the model is sharded if it has to be."""
        if not self._sharding_checked:
            check_sharded(self.args, model)
            self._sharding_checked = True
        if self.monitor is not None:
            self.monitor.count(inputs)
        loss: Tensor = super().training_step(model, inputs, *arguments, **more)
        return loss

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
        return super().compute_loss(
            model, {**inputs, "fused_loss": True} if self._fused else inputs, *arguments, **more
        )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop, with the loss as the mean over all tokens and not over batches."""
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        total, count = self.accelerator.reduce(self._evaluated.to(self.args.device), reduction="sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1)
        return output._replace(num_samples=len(dataloader.dataset.samples))

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, None, None]:
        """Add this batch's loss and number of targets to what ``evaluation_loop`` reports."""
        inputs = self._prepare_inputs(inputs)
        count = inputs["shift_labels"].ne(IGNORE).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            fused = {"fused_loss": True} if self._fused else {}
            loss = model(**inputs, **fused, num_items_in_batch=count.clamp(min=1))["loss"].detach()
        if self._evaluated is not None:
            self._evaluated += torch.stack([loss.double() * count, count.double()]).cpu()
        return loss, None, None


def collator(options: PackOptions) -> Callable[[Sequence[Sequence[TokenizedSample]]], dict[str, Any]]:
    """Return what turns the items of a ``PackDataset`` into a batch of the options' pad mode."""
    if options.packs:
        return PackCollator(supervised_only=options.supervised_only)
    length = options.max_seq_len if options.pad_mode == "max_length" else None
    return PadCollator(length=length)


def _dataset(
    samples: Sequence[TokenizedSample],
    arguments: TrainingArguments,
    options: PackOptions,
    width: int,
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
    return PackDataset(
        samples,
        options.max_seq_len,
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
    if arguments.auto_find_batch_size:
        raise InputError(
            "auto_find_batch_size would change packs in mid-run; lower per_device_train_batch_size instead"
        )
    if arguments.label_smoothing_factor:
        raise InputError("label_smoothing_factor needs all logits and mixes samples of a pack; leave it at 0")
    if arguments.world_size > 1 and not arguments.average_tokens_across_devices:
        raise InputError("average_tokens_across_devices=False weighs ranks, not tokens; leave it True")
    allowed = ("random", "sequential") if options.packs else ("random", "sequential", "group_by_length")
    one_of(f"train_sampling_strategy with {options.pad_mode}", str(arguments.train_sampling_strategy), allowed)


def _causal_lm(model: Any) -> Any:
    """Return the transformers model inside whatever peft has put around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise InputError(f"{type(model).__name__} is no causal language model of transformers")
    return inner


def _attend(model: Any, attention: str) -> None:
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"attention {attention!r} does not work with {type(model).__name__}: {reason}") from None


def _stand_in(attention: str, device: torch.device, parameter: Tensor) -> str:
    """Name the attention under which to prove a model: its own, or SDPA for a CUDA kernel that cannot run on it yet.

    Trainer moves the model only later, and autocast makes what the kernels compute. They keep samples apart by
    construction; what is left to prove is the architecture around them.
    """
    kernel = device.type == "cuda" and attention in (ATTENTION, "flash_attention_2", "flash_attention_3")
    runs = parameter.is_cuda and parameter.dtype in (torch.bfloat16, torch.float16)
    return "sdpa" if kernel and not runs else attention


def _why_not_packed(model: Any) -> str | None:
    """Run two samples packed and alone; say why they differ, whatever the reason, or None: they do not."""
    # With DeepSpeed ZeRO-3, and on most ranks of FSDP, the weights are not here yet: there is nothing to run.
    if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return None
    was_training = model.training
    model.eval()
    try:
        with _row_by_row(model):
            split_head(model)
    except (InputError, ValueError) as error:
        return " ".join(str(error).split())
    finally:
        model.train(was_training)
    return None


@contextmanager
def _row_by_row(model: Any) -> Iterator[None]:
    """Let LLM.int8() round every token by itself.

    Otherwise which columns it leaves in 16 bits follows from all tokens of a batch, packed or padded: a sample's logits
    then differ by that rounding, which says nothing about whether attention keeps samples apart.
    """
    states = [module.state for module in model.modules() if hasattr(getattr(module, "state", None), "threshold")]
    thresholds = [state.threshold for state in states]
    try:
        for state in states:
            state.threshold = 0.0
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold
