"""The flags of ``codeact train``: our own, and every one of transformers' TrainingArguments; or a YAML or JSON file.

transformers, and with it PyTorch, is loaded once there are values to read: ``--help`` does without.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeact.base.console import say
from codeact.base.devices import cpu_has_bf16
from codeact.base.errors import InputError, addressed, one_of
from codeact.base.machine import free_memory
from codeact.base.settings import flag_name
from codeact.base.yaml_files import located, read_yaml
from codeact.training.options import DataArguments, ModelArguments, PackOptions, TrainerDefaults, refuse_inexact
from codeact.training.room import check_held, check_room, sharding

if TYPE_CHECKING:
    from codeact.training.arguments import TrainerArguments

# Flags of the paper's train.py and of others that have another name here.
_RENAMED = {
    "use_peft_lora": "--lora True",
    "use_4bit_quantization": "--quantize nf4",
    "use_8bit_quantization": "--quantize int8",
    "use_flash_attn": "--attention flash_attention_2, or nothing: the best attention is found",
    "use_fast_tokenizer": "nothing: the tokenizer is fast where there is a fast one",
    "bnb_4bit_quant_type": "--quantize nf4",
    "data": "--data_path FILE",
    "dataset": "--data_path FILE",
    "train_file": "--data_path FILE",
    "lr": "--learning_rate",
    "epochs": "--num_train_epochs",
    "batch_size": "--per_device_train_batch_size",
    "warmup_ratio": "--warmup_steps 0.03 (below 1 it is a share of the steps)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Everything that ``codeact train`` is told."""

    model: ModelArguments
    data: DataArguments
    packs: PackOptions
    trainer: TrainerArguments

    def flags(self, **changes: Any) -> argparse.Namespace:
        """Every flag by its name, as ``check_flags`` gives them; ``changes`` to them."""
        parts = (self.model, self.data, self.packs, self.trainer)
        values = {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}
        return argparse.Namespace(**{**values, **changes})


OWN = {
    ModelArguments: "model",
    DataArguments: "data",
    PackOptions: "padding, packs and what saves work",
    TrainerDefaults: "Trainer's, with a default of ours",
}
"""The classes that flags of our own come from, and how they are headed."""

_USAGE = "usage: codeact train [CONFIG.yaml] --model_name_or_path M --data_path F --output_dir DIR [flags]"
_EPILOG = """
Every flag of transformers.TrainingArguments works too (--help_all lists them;
https://huggingface.co/docs/transformers/main_classes/trainer). The usual ones:
  --output_dir DIR --num_train_epochs N --per_device_train_batch_size N --gradient_accumulation_steps N
  --learning_rate X --lr_scheduler_type cosine --warmup_steps N --bf16 True --activation_checkpointing True
  --eval_on_start True --eval_strategy epoch --save_strategy no|steps|epoch --seed N --report_to tensorboard
  --deepspeed zero1|zero2|zero3|FILE, under torchrun or accelerate launch

A first argument that is a .yaml or .json file holds flags (learning_rate: 5e-5); flags after it win."""


def _own_help() -> str:
    lines = [_USAGE]
    for part, title in OWN.items():
        lines.append(f"\n{title}:")
        for option in dataclasses.fields(part):
            default = "" if option.default is None else f" (default: {option.default})"
            lines.append(f"  --{option.name}")
            lines += [" " * 6 + line for line in textwrap.wrap(option.metadata["help"] + default, 104)]
    return "\n".join(lines) + "\n" + _EPILOG


@cache
def flag_parser() -> Any:
    """The parser of all flags, Trainer's too; its ``error`` raises an InputError."""
    from codeact.training.arguments import FlagParser, TrainerArguments

    own = {part: title for part, title in OWN.items() if part is not TrainerDefaults}
    return FlagParser({**own, TrainerArguments: "transformers.TrainingArguments"})


def parse(argv: Sequence[str]) -> TrainSettings | str:
    """Read the command line of ``codeact train``; for --help and --help_all return the text to print.

    Raises:
        InputError: a flag is unknown (the closest is named), a value is wrong, or something needed is missing.
    """
    argv = list(argv)
    if {"-h", "--help"} & set(argv) or not argv:
        return _own_help()
    parser = flag_parser()
    if {"--help_all", "--help-all"} & set(argv):
        return str(parser.format_help())
    return _settings_of_file(parser, *argv) if is_file_of_flags(argv) else _settings(parser, argv)


def is_file_of_flags(argv: Sequence[str]) -> bool:
    """Whether a command line begins with a file."""
    return bool(argv) and Path(argv[0]).suffix in (".yaml", ".yml", ".json")


def parse_mapping(values: Mapping[str, Any], where: str) -> TrainSettings:
    """Read flags from keys and values; ``where`` says in messages where they stand.

    Raises:
        InputError: as ``parse``.
    """
    parser = flag_parser()
    with told_of(where):
        return _settings(parser, _flags(parser, values), trial=False)  # ``check_flags`` came before


def check_flags(
    values: Mapping[str, Any],
    where: str,
    taken: Collection[str] | Mapping[str, Any] = (),
    here: bool = True,
    model: str | None = None,
    trial: bool = False,
) -> argparse.Namespace:
    """Check what can be checked before there is data or a model: names, values, and what they need.

    Args:
        values: flags by name.
        where: in messages, where they stand.
        taken: flags that the caller sets, refused in ``values``; with what it sets them to, if that is known by now.
        here: whether this machine will train; False: libraries, device and disk are of another one.
        model: what is trained, where the flags do not say it.
        trial: train a tiny model for a step with them.

    Returns:
        Every flag by its name, defaults filled in.

    Raises:
        InputError: as ``parse``; or a flag is one of ``taken``.
    """
    parser = flag_parser()
    with told_of(where):
        for name in taken:
            if flag_name(name) in map(flag_name, values):
                raise InputError(f"{name} follows from the other settings; leave it out")
        given = {**values, **taken} if isinstance(taken, Mapping) else values
        argv = _flags(parser, given)
        known, _ = parser.parse_known_args(argv)
        known.model_name_or_path = known.model_name_or_path or model
        flags = _filled(known, argv)
        if here:
            _compute_in_float32_where_faster(flags)
        _check_together(flags, here)
        if trial:
            _rehearse(parser, argv, flags)
    return flags


@contextmanager
def told_of(where: str) -> Iterator[None]:
    """Begin an InputError with where the flags stand."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{where}: {error.args[0]}") from None


def _settings_of_file(parser: Any, path: str, *argv: str) -> TrainSettings:
    content, tree = read_yaml(Path(path))
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no flags; write one a line, such as learning_rate: 5e-5")
    try:
        return _settings(parser, [*_flags(parser, content), *argv])
    except InputError as error:
        raise InputError(located(error.args[0], path, tree)) from None


def _settings(parser: Any, argv: Sequence[str], trial: bool = True) -> TrainSettings:
    _check_known(parser, argv)
    # Needed ones first: TrainingArguments may start processes' communication, which is slow and prints.
    known, stray = parser.parse_known_args(list(argv))
    if stray:
        raise InputError(f"{stray[0]!r} belongs to no flag; give a file of flags first, then --flag value")
    for name, meaning in (("model_name_or_path", "the model to train"), ("data_path", "the conversations")):
        if not getattr(known, name):
            raise InputError(f"--{name} is missing: {meaning}")
    flags = _filled(known, argv)
    _compute_in_float32_where_faster(flags)
    _check_together(flags, here=True)
    if trial:
        _rehearse(parser, argv, flags)
    return TrainSettings(**dict(zip(("model", "data", "packs", "trainer"), _parts(parser, argv, flags), strict=True)))


def _rehearse(parser: Any, argv: Sequence[str], flags: argparse.Namespace) -> None:
    """See ``codeact.training.rehearsal``; not among processes that a launcher has started."""
    from codeact.training.rehearsal import rehearse

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    before = dict(os.environ)  # TrainingArguments tells other libraries by it, and this is no training yet
    try:
        rehearse(lambda **changes: _parts(parser, argv, flags, **changes))
    finally:
        os.environ.clear()
        os.environ.update(before)


def _parts(parser: Any, argv: Sequence[str], flags: argparse.Namespace, **changes: Any) -> Sequence[Any]:
    """The four classes of settings, filled; ``changes`` to the values of flags.

    Raises:
        InputError: transformers refuses them.
    """
    found = [f"--{name}={getattr(flags, name)}" for name in (*_SIZES, "bf16", "fp16")]
    namespace, _ = parser.parse_known_args([*argv, *found])
    try:
        return parser.parse_dict({**vars(namespace), **changes})  # type: ignore[no-any-return]
    except InputError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError, OSError, NotImplementedError) as error:
        raise InputError(f"transformers refuses these flags: {' '.join(str(error).split())[:300]}") from None


_ABOVE_ZERO: tuple[str, ...] = ("learning_rate", "gradient_accumulation_steps", "save_steps", "logging_steps")
_ABOVE_ZERO += ("per_device_train_batch_size", "per_device_eval_batch_size")
_LARGEST_BATCH = 2**20
_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size", "max_length")


def _filled(flags: argparse.Namespace, argv: Sequence[str]) -> argparse.Namespace:
    """Fill in the sizes of batches, which count packs or samples, and a length that the model takes."""
    from codeact.models.loading import config_of, positions_of

    given = {flag_name(word.partition("=")[0].lstrip("-")) for word in argv if word.startswith("--")}
    if flags.model_name_or_path and "max_length" not in given:
        config = config_of(flags.model_name_or_path)
        flags.max_length = min(flags.max_length, (config and positions_of(config)) or flags.max_length)
    packs = flags.pad_mode == "dynamic_pack"
    counts_packs = packs and flags.pack_scope == "epoch"
    if flags.per_device_train_batch_size is None:
        flags.per_device_train_batch_size = 1 if counts_packs else 8
    if flags.per_device_eval_batch_size is None:
        flags.per_device_eval_batch_size = 1 if packs and not counts_packs else flags.per_device_train_batch_size
    return flags


def _compute_in_float32_where_faster(flags: argparse.Namespace) -> None:
    """On a CPU without instructions for 16 bits PyTorch's products take 8 times as long, and their gradients 70."""
    if bool(flags.bf16) == bool(flags.fp16) or _device(flags).type != "cpu" or cpu_has_bf16():
        return
    asked = "--bf16" if flags.bf16 else "--fp16"
    if flags.dtype in ("auto", "float32"):
        flags.bf16 = flags.fp16 = False
        _say_once(f"{asked}: this CPU has no instructions for it; it computes in float32, which is many times faster")
    else:
        _say_once(f"{asked}: this CPU has no instructions for it, and float32 is many times faster: leave out --dtype")


@cache
def _say_once(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(addressed(line))


def _check_together(flags: argparse.Namespace, here: bool) -> None:
    """Refuse now what would stop the run after hours: flags that do not fit together, or to this machine."""
    from codeact.training.arguments import deepspeed_config

    for part in (ModelArguments, DataArguments, PackOptions):
        part(**{option.name: getattr(flags, option.name) for option in dataclasses.fields(part)})
    _check_numbers(flags)
    evaluates = [name for name in ("eval_strategy", "eval_on_start", "load_best_model_at_end") if _is_set(flags, name)]
    if evaluates and not (flags.eval_ratio or flags.eval_path):
        raise InputError(f"--{evaluates[0]} needs held-out conversations: add --eval_ratio 0.05 or --eval_path FILE")
    refuse_inexact(flags, flags.pad_mode)
    deepspeed_config(flags.deepspeed)
    sharding(flags, 1)
    if flags.bf16 and flags.fp16:
        raise InputError("--bf16 and --fp16 are two dtypes to compute in; say one of them")
    if flags.load_best_model_at_end and str(flags.eval_strategy) != str(flags.save_strategy):
        raise InputError("--load_best_model_at_end needs an --eval_strategy that is the --save_strategy")
    if not here:
        return
    checkpoint = str(flags.resume_from_checkpoint or "")
    if checkpoint.lower() not in ("", "true", "false") and not (Path(checkpoint) / "trainer_state.json").is_file():
        raise InputError(f"--resume_from_checkpoint {checkpoint} is no checkpoint folder of a Trainer")
    _check_dtype(flags)
    _check_attention(flags.attention)
    _check_compiled(flags)
    optimizer = str(getattr(flags.optim, "value", flags.optim))
    for needed, module, install, purpose in (
        (flags.lora, "peft", '"codeact[train]"', "--lora True"),
        (flags.quantize != "none", "bitsandbytes", '"codeact[train]"', f"--quantize {flags.quantize}"),
        ("8bit" in optimizer or "paged" in optimizer, "bitsandbytes", '"codeact[train]"', f"--optim {optimizer}"),
        (flags.deepspeed, "deepspeed", '"codeact[deepspeed]"', "--deepspeed"),
        (flags.use_liger_kernel, "liger_kernel", "liger-kernel", "--use_liger_kernel True"),
    ):
        if needed and not importlib.util.find_spec(module):
            raise InputError(f"{purpose} needs {module}: pip install {install}")
    _check_trackers(flags.report_to)
    check_room(flags)
    device = _device(flags)
    check_held(flags, free_memory(device), "this machine" if device.type == "cpu" else str(device))


def _check_numbers(flags: argparse.Namespace) -> None:
    for name, value in vars(flags).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} {value} is no finite number")
    for name in _ABOVE_ZERO:
        if getattr(flags, name) <= 0:
            raise InputError(f"--{name} is {getattr(flags, name)}; it must be above 0")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(flags, name) > _LARGEST_BATCH:
            raise InputError(f"--{name} is {getattr(flags, name)}; more than {_LARGEST_BATCH:,} is no batch")
    if flags.num_train_epochs <= 0 and flags.max_steps <= 0:
        raise InputError(f"--num_train_epochs is {flags.num_train_epochs} and no --max_steps is given; raise one")
    if not 0 <= flags.seed < 2**32:
        raise InputError(f"--seed {flags.seed} must be from 0 to 2^32 - 1")


def _check_attention(name: str) -> None:
    """The name is known, and its library is here; whether the model takes it is seen when that is loaded."""
    from transformers import AttentionInterface
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    import codeact.ops.attention  # noqa: F401 - makes its own known

    if "/" not in name and "|" not in name:  # else kernels of the hub
        one_of("attention", name, ["auto", "eager", *AttentionInterface().valid_keys()])
    there = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if name in there and not there[name]():
        raise InputError(f"--attention {name} needs flash-attn, which does not work here; leave it out")


def _check_compiled(flags: argparse.Namespace) -> None:
    if flags.pad_mode != "dynamic_pack" or not (
        flags.torch_compile or flags.torch_compile_backend or flags.torch_compile_mode
    ):
        return
    from codeact.ops.attention import ATTENTION, isolating_attention

    attention = isolating_attention(_device(flags)) if flags.attention == "auto" else flags.attention
    if attention == ATTENTION:
        raise InputError(f"--torch_compile True cannot compile {ATTENTION}; add --attention sdpa, or leave it out")


def _is_set(flags: argparse.Namespace, name: str) -> bool:
    value = getattr(flags, name)
    return bool(value) and str(getattr(value, "value", value)) != "no"


def _check_trackers(asked: Any) -> None:
    from transformers.integrations import integration_utils

    names = [asked] if isinstance(asked, str) else list(asked or ())
    installed = integration_utils.get_available_reporting_integrations()
    for name in names:
        if name in ("none", "all"):
            continue
        one_of("--report_to", name, ["none", "all", *integration_utils.INTEGRATION_TO_CALLBACK])
        if name not in installed:
            raise InputError(f"--report_to {name}: {name} is not installed; pip install {name}, or --report_to none")


def _check_dtype(flags: argparse.Namespace) -> None:
    from codeact.ops.attention import ATTENTION, computes_16_bits_only

    wide = not (flags.bf16 or flags.fp16) and flags.dtype in ("auto", "float32")
    attention = ATTENTION if flags.attention == "auto" else flags.attention
    if wide and flags.pad_mode == "dynamic_pack" and computes_16_bits_only(attention, _device(flags)):
        raise InputError(
            "attention that keeps the samples of a pack apart computes in 16 bits on a GPU: add --bf16 True (weights "
            "stay float32), or for float32 say --attention sdpa"
        )


def _device(flags: argparse.Namespace) -> Any:
    import torch

    return torch.device("cpu" if flags.use_cpu or not torch.cuda.is_available() else "cuda")


def _check_known(parser: Any, argv: Sequence[str]) -> None:
    options = parser._option_string_actions
    for word in argv:
        name = word.split("=", 1)[0]
        if not name.startswith("--") or name in options:
            continue
        renamed = _RENAMED.get(name[2:].replace("-", "_"))
        raise InputError(f"unknown flag {name}; {f'here it is {renamed}' if renamed else _closest(parser, name)}")


def _closest(parser: Any, name: str) -> str:
    names = [f"--{action.dest}" for action in parser._actions]
    return f"did you mean {difflib.get_close_matches(name.replace('-', '_').replace('__', '--'), names, 1, 0.0)[0]}?"


def _flags(parser: Any, values: Mapping[Any, Any]) -> list[str]:
    """Keys and values as a command line, so that both are read by the same rules."""
    argv: list[str] = []
    for key, value in values.items():
        name = f"--{str(key).removeprefix('--')}"
        _check_known(parser, [name])
        if value is None:
            continue
        words = [json.dumps(value)] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        flag = [f"{name}={words[0]}"] if len(words) == 1 else [name, *map(str, words)]
        if parser.parse_known_args(flag)[1]:
            raise InputError(f"{name} takes one value, not {len(words)}")
        argv += flag
    return argv
