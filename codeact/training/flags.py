"""The flags of ``codeact train``: our own, and every one of transformers' TrainingArguments; or a YAML or JSON file."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from codeact.base.errors import InputError, one_of
from codeact.text.conversations import OVERFLOWS
from codeact.text.templates import MODEL_TYPES
from codeact.training.trainer import PackOptions

# Those of the Llama family's linear layers; the paper's default.
LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,down_proj,up_proj,gate_proj"
QUANTIZATIONS = ("none", "nf4", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")

# Flags of the paper's train.py that have another name here.
_RENAMED = {
    "use_peft_lora": "--lora True",
    "use_4bit_quantization": "--quantize nf4",
    "use_8bit_quantization": "--quantize int8",
    "use_flash_attn": "--attention flash_attention_2, or nothing: the best attention is found",
    "use_fast_tokenizer": "nothing: the tokenizer is fast where there is a fast one",
    "bnb_4bit_quant_type": "--quantize nf4",
    "warmup_ratio": "--warmup_steps 0.03 (below 1 it is a share of the steps)",
}


def _text(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Which model, in which dtype, and the adapters on it."""

    model_name_or_path: str | None = _text(None, "Causal language model: a folder or a hub name.")
    dtype: str = _text(
        "auto",
        f"Of the weights: {', '.join(DTYPES)}. auto is float32, for adapters under --bf16 bfloat16: frozen weights "
        "need no more.",
    )
    lora: bool = _text(False, "Train low-rank adapters and leave the model as it is.")
    lora_r: int = _text(8, "Rank of the adapters.")
    lora_alpha: int = _text(16, "Their scale is lora_alpha / lora_r.")
    lora_dropout: float = _text(0.1, "Dropout before the adapters.")
    lora_target_modules: str = _text(LORA_TARGETS, "Comma-separated names of the layers that get one, or all-linear.")
    quantize: str = _text("none", "Hold the model in 4 or 8 bits below the adapters (QLoRA): none, nf4 or int8.")
    merge: bool = _text(False, "Also write the model with its adapters merged, to output_dir/merged.")

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
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
        "What codeact select wrote, or any file, folder (.json, .jsonl, .parquet) or hub data set with a column "
        "conversation, conversations or messages, or Alpaca's instruction (, input) and output.",
    )
    eval_path: str | None = _text(None, "Held-out conversations, in the same forms.")
    eval_ratio: float = _text(0.0, "Instead of eval_path: so much of data_path is held out, chosen by the seed.")
    question_column: str | None = _text(None, "Column of the question, if none of the forms above fits.")
    answer_column: str | None = _text(None, "Column of the answer.")
    input_column: str | None = _text(None, "Column appended to the question.")
    conversation_column: str | None = _text(None, "Column of turns, instead of question and answer.")
    split: str = _text("train", "Split of a hub data set.")
    config_name: str | None = _text(None, "Configuration of a hub data set.")
    model_type: str = _text("chat", f"How conversations are written: {', '.join(MODEL_TYPES)}.")
    on_overflow: str = _text(
        "truncate", f"A conversation over max_seq_len: {', '.join(OVERFLOWS)}. A cut answer gets no end of turn."
    )

    def __post_init__(self) -> None:
        one_of("model_type", self.model_type, MODEL_TYPES)
        one_of("on_overflow", self.on_overflow, OVERFLOWS)
        if not 0 <= self.eval_ratio < 1:
            raise InputError(f"--eval_ratio {self.eval_ratio} must be at least 0 and below 1")
        if self.eval_ratio and self.eval_path:
            raise InputError("--eval_ratio holds a part of data_path out, --eval_path other data; give one of the two")


@dataclass
class TrainerArguments(TrainingArguments):  # type: ignore[misc]  # transformers has no types
    """transformers' own, with two other defaults."""

    logging_steps: float = _text(10, "Log every so many steps; below 1 a share of all.")
    per_device_eval_batch_size: int | None = _text(None, "As in training; default: per_device_train_batch_size.")
    overwrite_output_dir: bool = _text(False, "Discard what another run with other settings left in output_dir.")

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise InputError("--output_dir is missing: where the trained model goes")
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        given: Any = self.deepspeed
        if isinstance(given, str) and not Path(given).exists() and "{" not in given:
            self.deepspeed: Any = _shipped(given)
        if not torch.accelerator.is_available():
            self.use_cpu: bool = True  # or bf16 autocast is refused
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().__post_init__()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Everything that ``codeact train`` is told."""

    model: ModelArguments
    data: DataArguments
    packs: PackOptions
    trainer: TrainerArguments


_OWN = (ModelArguments, DataArguments, PackOptions)
_TITLES = {ModelArguments: "model", DataArguments: "data", PackOptions: "padding, packs and what saves work"}

_EPILOG = """
Every flag of transformers.TrainingArguments works too; --help_all lists them. The usual ones:
  --output_dir DIR --num_train_epochs N --per_device_train_batch_size N --gradient_accumulation_steps N
  --learning_rate X --lr_scheduler_type cosine --warmup_steps N --bf16 True --activation_checkpointing True
  --eval_on_start True --eval_strategy epoch --save_strategy no|steps|epoch --seed N --report_to tensorboard
  --deepspeed zero1|zero2|zero3|FILE, under torchrun or accelerate launch

A first argument that is a .yaml or .json file holds flags (learning_rate: 5e-5); flags after it win.
With pack_scope epoch, per_device_train_batch_size counts packs of up to max_seq_len tokens, else samples.
"""


class _Format(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside every flag, and the epilogue as it is written."""


class _Parser(HfArgumentParser):  # type: ignore[misc]
    def __init__(self, parts: Sequence[type], **more: Any) -> None:
        super().__init__((), prog="codeact train", add_help=False, allow_abbrev=False, **more)
        self.dataclass_types = list(parts)
        for part in parts:
            part._argument_group_name = _TITLES.get(part, "transformers.TrainingArguments")  # type: ignore[attr-defined]
            self._add_dataclass_arguments(part)

    def help(self) -> str:
        return str(self.format_help())

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse(argv: Sequence[str]) -> TrainSettings | str:
    """Read the command line of ``codeact train``; for --help and --help_all return the text to print.

    Raises:
        InputError: a flag is unknown (the closest is named), a value is wrong, or something needed is missing.
    """
    argv = list(argv)
    if {"-h", "--help"} & set(argv) or not argv:
        usage = "codeact train [CONFIG.yaml] --model_name_or_path M --data_path F --output_dir DIR [flags]"
        return _Parser(_OWN, usage=usage, formatter_class=_Format, epilog=_EPILOG).help()
    parser = _Parser((*_OWN, TrainerArguments))
    if {"--help_all", "--help-all"} & set(argv):
        return parser.help()
    if Path(argv[0]).suffix in (".yaml", ".yml", ".json"):
        argv = [*_flags_of_file(parser, argv[0]), *argv[1:]]
    return _settings(parser, argv)


def parse_mapping(values: Mapping[str, Any], where: str) -> TrainSettings:
    """Read flags from keys and values; ``where`` says in messages where they stand.

    Raises:
        InputError: as ``parse``.
    """
    parser = _Parser((*_OWN, TrainerArguments))
    return _settings(parser, _flags(parser, values, where))


def check_flags(values: Mapping[str, Any], where: str, taken: Collection[str] = ()) -> argparse.Namespace:
    """Check keys and types alone: on another machine than the one to train on, too, and before there is data.

    Returns:
        Every flag by its name, defaults filled in.

    Raises:
        InputError: as ``parse``; or a flag is one of ``taken``, which the caller sets.
    """
    for name in taken:
        if name in values:
            raise InputError(f"{where}: {name} follows from the other settings; leave it out")
    parser = _Parser((*_OWN, TrainerArguments))
    known: argparse.Namespace = parser.parse_known_args(_flags(parser, values, where))[0]
    return known


def _settings(parser: _Parser, argv: Sequence[str]) -> TrainSettings:
    _check_known(parser, argv)
    # Needed ones first: TrainingArguments may start processes' communication, which is slow and prints.
    known, stray = parser.parse_known_args(list(argv))
    if stray:
        raise InputError(f"{stray[0]!r} belongs to no flag; give a file of flags first, then --flag value")
    for name, meaning in (("model_name_or_path", "the model to train"), ("data_path", "the conversations")):
        if not getattr(known, name):
            raise InputError(f"--{name} is missing: {meaning}")
    try:
        model, data, packs, trainer = parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)
    except InputError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        raise InputError(f"transformers refuses these flags: {' '.join(str(error).split())[:300]}") from None
    return TrainSettings(model=model, data=data, packs=packs, trainer=trainer)


def _check_known(parser: _Parser, argv: Sequence[str]) -> None:
    options = parser._option_string_actions
    for word in argv:
        name = word.split("=", 1)[0]
        if not name.startswith("--") or name in options:
            continue
        renamed = _RENAMED.get(name[2:].replace("-", "_"))
        raise InputError(f"unknown flag {name}; {f'here it is {renamed}' if renamed else _closest(parser, name)}")


def _closest(parser: _Parser, name: str) -> str:
    names = [f"--{action.dest}" for action in parser._actions]
    return f"did you mean {difflib.get_close_matches(name.replace('-', '_').replace('__', '--'), names, 1, 0.0)[0]}?"


def _flags_of_file(parser: _Parser, path: str) -> list[str]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no flags; write one a line, such as learning_rate: 5e-5")
    return _flags(parser, content, path)


def _flags(parser: _Parser, values: Mapping[Any, Any], where: str) -> list[str]:
    """Keys and values as a command line, so that both are read by the same rules."""
    argv: list[str] = []
    for key, value in values.items():
        name = f"--{str(key).removeprefix('--')}"
        try:
            _check_known(parser, [name])
            if value is None:
                continue
            words = [json.dumps(value)] if isinstance(value, dict) else value if isinstance(value, list) else [value]
            flag = [f"{name}={words[0]}"] if len(words) == 1 else [name, *map(str, words)]
            parser.parse_known_args(flag)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        argv += flag
    return argv


def _shipped(name: str) -> str:
    """A DeepSpeed configuration of ours, by name."""
    folder = files("codeact") / "configs"
    names = sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.startswith("zero"))
    one_of("deepspeed configuration (or file)", name, names)
    return str(folder / f"{name}.json")
