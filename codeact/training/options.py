"""What ``codeact train`` takes beside Trainer's own arguments: model, data, packs. Loads no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from codeact.base.devices import DTYPES
from codeact.base.errors import InputError, one_of
from codeact.text.conversations import OVERFLOWS
from codeact.text.template_files import is_jinja, template_text
from codeact.text.templates import MODEL_TYPES

# Those of the Llama family's linear layers; the paper's default.
LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,down_proj,up_proj,gate_proj"
QUANTIZATIONS = ("none", "nf4", "int8")
WEIGHT_DTYPES = ("auto", *DTYPES)
PAD_MODES = ("dynamic_pack", "dynamic_pad", "max_length")
PACK_SCOPES = ("epoch", "batch")


def _text(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Which model, in which dtype, and the adapters on it."""

    model_name_or_path: str | None = _text(None, "Causal language model: a folder or a hub name.")
    dtype: str = _text(
        "auto",
        f"Of the weights: {', '.join(WEIGHT_DTYPES)}. auto is float32, for adapters under --bf16 bfloat16: frozen "
        "weights need no more.",
    )
    lora: bool = _text(False, "Train low-rank adapters and leave the model as it is.")
    lora_r: int = _text(8, "Rank of the adapters.")
    lora_alpha: int = _text(16, "Their scale is lora_alpha / lora_r.")
    lora_dropout: float = _text(0.1, "Dropout before the adapters.")
    lora_target_modules: str = _text(LORA_TARGETS, "Comma-separated names of the layers that get one, or all-linear.")
    quantize: str = _text("none", "Hold the model in 4 or 8 bits below the adapters (QLoRA): none, nf4 or int8.")
    merge: bool = _text(False, "Also write the model with its adapters merged, to output_dir/merged.")

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, WEIGHT_DTYPES)
        one_of("quantize", self.quantize, QUANTIZATIONS)
        if self.quantize != "none" and not self.lora:
            raise InputError(f"--quantize {self.quantize} holds weights that cannot be trained; add --lora True")
        if self.merge and not self.lora:
            raise InputError("--merge True merges adapters, and there are none without --lora True")
        if self.lora_r < 1 or not 0 <= self.lora_dropout < 1:
            raise InputError("--lora_r must be at least 1, and --lora_dropout at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Which conversations, and how they are written."""

    data_path: str | None = _text(
        None,
        "What codeact select wrote, or any file, folder or hub data set with a column messages or "
        "conversations, or a pair such as Alpaca's instruction (, input, system, history) and output.",
    )
    eval_path: str | None = _text(None, "Held-out conversations, in the same forms.")
    eval_ratio: float = _text(0.0, "Instead of eval_path: so much of data_path is held out, chosen by the seed.")
    question_column: str | None = _text(None, "Column of the question, if none of the forms above fits.")
    answer_column: str | None = _text(None, "Column of the answer.")
    input_column: str | None = _text(None, "Column appended to the question.")
    conversation_column: str | None = _text(None, "Column of turns, instead of question and answer.")
    split: str | None = _text(None, "Split of a folder or hub data set; default: the only one, or train.")
    config_name: str | None = _text(None, "Configuration of a folder or hub data set.")
    model_type: str = _text("chat", f"How conversations are written: {', '.join(MODEL_TYPES)}, or a Jinja file.")
    on_overflow: str = _text(
        "truncate", f"A conversation over max_length: {', '.join(OVERFLOWS)}. A cut answer gets no end of turn."
    )

    last_answer_only: bool = _text(False, "Learn the last answer of a conversation alone; earlier ones are context.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_type", template_text(self.model_type))
        if not is_jinja(self.model_type):
            one_of("model_type", self.model_type, MODEL_TYPES)
        one_of("on_overflow", self.on_overflow, OVERFLOWS)
        if not 0 <= self.eval_ratio < 1:
            raise InputError(f"--eval_ratio {self.eval_ratio} must be at least 0 and below 1")
        if self.eval_ratio and self.eval_path:
            raise InputError("--eval_ratio holds a part of data_path out, --eval_path other data; give one of the two")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """What Trainer's own arguments do not say; the help of each is that of its flag in ``codeact train``.

    Length-sorted dynamic_pad is Trainer's own ``train_sampling_strategy="group_by_length"``. What fills padding needs
    no option: it is masked, so any id is right.
    """

    pad_mode: str = _text(
        "dynamic_pack",
        "dynamic_pack: samples share rows without padding, and none sees another. dynamic_pad: a batch is padded to "
        "its longest sample. max_length: every sample is padded to max_length.",
    )
    pack_scope: str = _text(
        "epoch",
        "epoch: best-fit decreasing over all samples; per_device_train_batch_size counts packs. batch: the "
        "per_device_train_batch_size random samples of one batch share a row, as in the paper.",
    )
    max_length: int = _text(
        2048, "Most tokens in a sample, and in a pack of scope epoch. If it is not said, no more than the model takes."
    )
    attention: str = _text(
        "auto",
        "An attention implementation of transformers. auto: for dynamic_pack the best one that keeps samples apart, "
        "else what the model has.",
    )
    supervised_only: bool = _text(True, "In a pack, the LM head sees only rows that predict a label.")
    fused_loss: bool = _text(True, "Compute the loss in blocks, without holding the logits.")
    token_accuracy: bool = _text(
        False, "Log mean_token_accuracy, too: the share of labelled tokens that the model holds likeliest."
    )

    def __post_init__(self) -> None:
        one_of("pad_mode", self.pad_mode, PAD_MODES)
        one_of("pack_scope", self.pack_scope, PACK_SCOPES)
        if self.max_length < 2:
            raise InputError(f"--max_length is {self.max_length}; a sample needs at least 2 tokens")

    @property
    def packs(self) -> bool:
        """Whether samples share rows."""
        return self.pad_mode == "dynamic_pack"


@dataclass
class TrainerDefaults:
    """Trainer's arguments that have another default here, and one more."""

    per_device_train_batch_size: int | None = _text(
        None, "Packs of a forward pass (default: 1); outside of pack_scope epoch samples (default: 8)."
    )
    per_device_eval_batch_size: int | None = _text(
        None, "Default: per_device_train_batch_size; with pack_scope batch 1, since evaluation counts packs."
    )
    save_total_limit: int | None = _text(2, "Keep so many checkpoints, the last ones; a checkpoint holds everything.")
    logging_steps: float = _text(10, "Log every so many steps; below 1 a share of all.")
    overwrite_output_dir: bool = _text(False, "Discard what another run with other settings left in output_dir.")


def refuse_inexact(arguments: Any, pad_mode: str) -> None:
    """Refuse what of Trainer's arguments would make a loss that is not the mean over its tokens.

    Raises:
        InputError: it is named.
    """
    if arguments.auto_find_batch_size:
        raise InputError(
            "auto_find_batch_size would change packs in mid-run; lower per_device_train_batch_size instead"
        )
    if arguments.label_smoothing_factor:
        raise InputError("label_smoothing_factor needs all logits and mixes samples of a pack; leave it at 0")
    allowed = ("random", "sequential") + ("group_by_length",) * (pad_mode != "dynamic_pack")
    one_of(f"train_sampling_strategy with {pad_mode}", str(arguments.train_sampling_strategy), allowed)
