"""The output folder of ``codeact train``: whose it is, where a killed run goes on, and what ``training.json`` holds."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from codeact.base.cards import card_metadata, figures_table, hub_name, settings_block, write_card, written_by
from codeact.base.errors import InputError
from codeact.base.files import atomic_path
from codeact.base.parsing import parse_json, read_json
from codeact.data.sources import absolute_name
from codeact.training.data import TrainingData, token_count
from codeact.training.flags import TrainSettings, flag_parser

# Of Trainer's arguments those that decide what the weights become; a checkpoint made under others is of another run.
_DECISIVE = (
    "seed", "data_seed", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "world_size", "train_sampling_strategy", "dataloader_drop_last", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "bf16", "fp16",
)  # fmt: skip

_LOGGED = ("step", "epoch", "loss", "eval_loss", "learning_rate")  # of Trainer's log, what a loss curve needs


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a run came to. Losses are means over tokens, in nats; None where nothing was held out."""

    output: Path
    steps: int
    train_loss: float
    held_out_loss_before: float | None
    held_out_loss_after: float | None


@contextmanager
def written_to(folder: str | Path | None) -> Iterator[None]:
    """Turn what the libraries that save a model raise when they cannot write, each in its own way, into one line.

    Raises:
        InputError: a file in ``folder`` could not be written.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno:
            folder, reason = error.filename or folder, error.strerror or reason
        elif not re.search(r"\(os error \d+\)|PytorchStreamWriter|inline_container", reason):  # of Rust; of torch.save
            raise
        raise InputError(
            f"cannot write {folder}: {reason[:200]}; free space, lower --save_total_limit or choose another "
            "--output_dir; what was written whole stays"
        ) from None


def claim(settings: TrainSettings, data: TrainingData) -> str | None:
    """Take the output folder for this run; return the checkpoint to go on from.

    Raises:
        InputError: a run with other settings is there.
    """
    arguments = settings.trainer
    folder = Path(arguments.output_dir)
    explicit = arguments.resume_from_checkpoint
    if explicit and str(explicit).lower() not in ("true", "false"):
        return str(explicit)
    with arguments.main_process_first(local=False):
        if arguments.should_save:
            _check_claim(folder, _decisive(settings, data), arguments.overwrite_output_dir)
            write_result(settings, data, None)
        return None if str(explicit).lower() == "false" else _last_checkpoint(folder)


def finished(settings: TrainSettings, data: TrainingData) -> TrainResult | None:
    """What this very run came to, if its result is there and is not to be made anew."""
    folder = Path(settings.trainer.output_dir)
    merged = folder / "merged" if settings.model.merge else folder
    if settings.trainer.overwrite_output_dir or not (list(folder.glob("*.safetensors")) and merged.is_dir()):
        return None
    try:
        known = read_json(folder / "training.json")
        if known["settings"] != _decisive(settings, data) or known["result"] is None:
            return None
        return TrainResult(**{**known["result"], "output": folder})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_claim(folder: Path, wanted: dict[str, Any], overwrite: bool) -> None:
    try:
        content = read_json(folder / "training.json")
        known = content["settings"]
        if content["result"] is None and _last_checkpoint(folder) is None:
            known = wanted  # stopped before it made anything
    except FileNotFoundError:
        known = wanted if _last_checkpoint(folder) is None else {}
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    changed = [key for key in wanted if known.get(key) != wanted[key]]
    if not changed and not overwrite:
        return
    if not overwrite:
        before, now = (str(known.get(changed[0], "unknown"))[:100], str(wanted[changed[0]])[:100])
        raise InputError(
            f"{folder} holds a run with another {changed[0]} ({before}, now {now}); choose another --output_dir, or "
            "discard that run with --overwrite_output_dir True"
        )
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _decisive(settings: TrainSettings, data: TrainingData) -> dict[str, Any]:
    model = dataclasses.asdict(settings.model)
    model.pop("merge")
    model["model_name_or_path"] = absolute_name(model["model_name_or_path"])
    of_data = {key: getattr(settings.data, key) for key in ("eval_ratio", "model_type", "on_overflow")}
    trainer = {key: getattr(settings.trainer, key) for key in _DECISIVE}
    values = {"data": data.fingerprints, **of_data, **model, **dataclasses.asdict(settings.packs), **trainer}
    return dict(parse_json(json.dumps(values, default=str)))


def _last_checkpoint(folder: Path) -> str | None:
    """The last one that was written whole: its trainer_state.json comes last."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(numbered, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        try:
            read_json(path / "trainer_state.json")
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def write_result(
    settings: TrainSettings, data: TrainingData, result: TrainResult | None, log: Sequence[dict[str, Any]] = ()
) -> None:
    """Write ``training.json``: the settings, what was trained on, and what it came to (None: not yet); a card."""
    content = {
        "settings": _decisive(settings, data),
        "conversations": dataclasses.asdict(data.counts),
        "held_out": len(data.held_out),
        "held_out_tokens": token_count(data.held_out),
        "held_out_of_others": data.held_out_counts is not None,
        "trained_on": len(data.samples),
        "trained_on_tokens": token_count(data.samples),
        "result": result and {**dataclasses.asdict(result), "output": str(result.output)},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "log": [
            {key: entry[key] for key in _LOGGED if key in entry} for entry in log if {"loss", "eval_loss"} & {*entry}
        ],
    }
    with atomic_path(Path(settings.trainer.output_dir) / "training.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if result is not None:
        _write_model_card(settings, data, result)


def _write_model_card(settings: TrainSettings, data: TrainingData, result: TrainResult) -> None:
    """Write the README.md of what was trained, and of the merged model: the settings, and what it came to.

    A licence is not named: it follows from those of the model and the data, and is the user's to say.
    """
    model, wanted = settings.model, settings.data
    rows = Path(wanted.data_path or "")
    source = hub_name(wanted.data_path)
    counts, held_out = data.counts, result.held_out_loss_after is not None
    metadata = {
        "base_model": hub_name(model.model_name_or_path),
        "datasets": [source] if source else card_metadata(rows.parent).get("source_datasets"),
        "pipeline_tag": "text-generation",
        "tags": ["codeact", "instruction-tuning", *["lora"] * model.lora],
        "metrics": ["loss"] if held_out else None,
    }
    lines = [
        ("conversations", f"{counts.rows:,}, of which {len(data.samples):,} were trained on"),
        ("tokens", f"{token_count(data.samples):,}"),
        ("steps", f"{result.steps:,}"),
        ("training loss", f"{result.train_loss:.4f}"),
    ]
    if held_out:
        before = result.held_out_loss_before
        lines.append(("held-out conversations", f"{len(data.held_out):,}"))
        lines += [] if before is None else [("held-out loss before", f"{before:.4f}")]
        lines.append(("held-out loss", f"{result.held_out_loss_after:.4f}"))
    what = "Low-rank adapters (LoRA) for" if model.lora else "A fine-tune of"
    base = Path(model.model_name_or_path or "").expanduser()
    parts = [
        f"# {result.output.resolve().name}",
        f"{what} `{hub_name(model.model_name_or_path) or base.resolve().name}`, trained on `{source or rows.name}`. "
        f"{written_by('train')}",
        figures_table(lines),
        "Losses are means over tokens of answers, in nats; `training.json` has them by step, `cost.json` the costs.",
        "## Settings",
        "`codeact train FILE.yaml --output_dir DIR` with this file trains the same again; what it does not say is at "
        "its default.",
        settings_block(_told_flags(settings)),
        "## License",
        "Not said: it follows from those of the base model and the data. Say it as `license:` above.",
    ]
    folders = {result.output: "peft" if model.lora else "transformers"}
    folders |= {result.output / "merged": "transformers"} if model.merge else {}
    for folder, library in folders.items():
        relation = None if metadata["base_model"] is None else "adapter" if library == "peft" else "finetune"
        more = {"library_name": library, "base_model_relation": relation}
        write_card(folder, {**metadata, **more}, parts)


def _told_flags(settings: TrainSettings) -> dict[str, Any]:
    """Flags that decide the weights and are not at their defaults. Never all: a token for the hub is one, too."""
    parts = (settings.model, settings.data, settings.packs)
    values = {name: value for part in parts for name, value in dataclasses.asdict(part).items()}
    values |= {name: getattr(settings.trainer, name) for name in _DECISIVE if name != "world_size"}
    plain = parse_json(json.dumps(values, default=str))
    return {name: value for name, value in plain.items() if value != flag_parser().get_default(name)}
