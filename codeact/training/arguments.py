"""transformers' TrainingArguments as ``codeact train`` has them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from codeact.base.errors import InputError, one_of
from codeact.training.options import TrainerDefaults


@dataclass
class _NewNames:
    """What transformers before 5.23 knows by the old name only."""

    activation_checkpointing: bool = field(
        default=False, metadata={"help": "Compute a layer's activations again in the backward pass; saves memory."}
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Of torch.utils.checkpoint."}
    )


_OLD: Any = "activation_checkpointing" not in TrainingArguments.__dataclass_fields__
_NEW_NAMES: Any = _NewNames if _OLD else object


@dataclass
class TrainerArguments(TrainerDefaults, TrainingArguments, _NEW_NAMES):  # type: ignore[misc]  # transformers has no types
    """transformers' own, with our defaults. ``codeact.training.flags`` fills in the sizes of batches."""

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise InputError("--output_dir is missing: where the trained model goes")
        self.per_device_train_batch_size = self.per_device_train_batch_size or 1
        self.per_device_eval_batch_size = self.per_device_eval_batch_size or self.per_device_train_batch_size
        given: Any = self.deepspeed
        if isinstance(given, str) and not Path(given).exists() and "{" not in given:
            self.deepspeed: Any = _shipped(given)
        if not torch.accelerator.is_available():
            self.use_cpu: bool = True  # or bf16 autocast is refused
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if _OLD and self.activation_checkpointing:
            self.gradient_checkpointing: bool = True
            self.gradient_checkpointing_kwargs: Any = self.activation_checkpointing_kwargs
        super().__post_init__()


class FlagParser(HfArgumentParser):  # type: ignore[misc]
    """transformers' parser of dataclasses, each under a title of its own; what is wrong is an InputError."""

    def __init__(self, parts: Mapping[type, str]) -> None:
        super().__init__((), prog="codeact train", add_help=False, allow_abbrev=False)
        self.dataclass_types = list(parts)
        for part, title in parts.items():
            part._argument_group_name = title  # type: ignore[attr-defined]
            self._add_dataclass_arguments(part)

    def error(self, message: str) -> NoReturn:
        """Instead of ending the process."""
        raise InputError(message)


def _shipped(name: str) -> str:
    """A DeepSpeed configuration of ours, by name."""
    folder = files("codeact") / "configs"
    names = sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.startswith("zero"))
    one_of("deepspeed configuration (or file)", name, names)
    return str(folder / f"{name}.json")
