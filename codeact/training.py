"""``codeact train``: conversations and a model -> a trained model, its costs, and what became of every conversation.

output_dir/     the model (or its adapters) and the tokenizer, as `from_pretrained` reads them
  merged/       the full model, after --merge
  cost.json     tokens, padding, time, memory of every step
  training.json the settings, counts of the conversations, losses, and under "log" the loss by step
  checkpoint-N/ what a killed run goes on from when the same command is given again
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, set_seed

from codeact.adapters import add_lora, merge_adapters, quantization_config
from codeact.atomic import atomic_path
from codeact.conversations import (
    EncodingCounts,
    Refused,
    Sample,
    count_conversations,
    encode_conversations,
    open_conversations,
)
from codeact.cost import CostMonitor
from codeact.cost_records import aligned
from codeact.devices import resolve_dtype
from codeact.errors import InputError
from codeact.models import load_causal_lm, load_tokenizer, quiet_transformers
from codeact.pack_dataset import IGNORE
from codeact.records import Columns, RecordSet, open_records
from codeact.trainer import PackTrainer
from codeact.training_arguments import DataArguments, TrainerArguments, TrainSettings, parse

_NAMED_REFUSALS = 5
_LOGGED = ("step", "epoch", "loss", "eval_loss", "learning_rate")  # of Trainer's log, what a loss curve needs

# Of Trainer's arguments those that decide what the weights become; a checkpoint made under others is of another run.
_DECISIVE = (
    "seed", "data_seed", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "world_size", "train_sampling_strategy", "dataloader_drop_last", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "bf16", "fp16",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a run came to. Losses are means over tokens, in nats; None where nothing was held out."""

    output: Path
    steps: int
    train_loss: float
    held_out_loss_before: float | None
    held_out_loss_after: float | None


def main(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        InputError: see ``codeact.training_arguments.parse`` and ``run``.
    """
    settings = parse(argv)
    if isinstance(settings, str):
        print(settings)
        return
    try:
        run(settings)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run(settings: TrainSettings) -> TrainResult:
    """Train, evaluate and save; a run that was killed goes on from its last checkpoint, a finished one stays.

    Under torchrun or accelerate every rank calls this; the first one prints and writes.

    Raises:
        InputError: data, model or settings do not fit together, or ``output_dir`` holds a run with other settings.
    """
    arguments = settings.trainer
    quiet_transformers()
    set_seed(arguments.seed)  # adapters are drawn before the Trainer would seed
    tokenizer = load_tokenizer(settings.model.model_name_or_path or "")
    data = _Data.read(settings, tokenizer)
    done = _finished(settings, data)
    if done is not None:
        _say(arguments, aligned([*data.lines(), ("done already", "the output folder holds this run's result")]))
        _say(arguments, aligned(_result_lines(settings, done)))
        return done
    resume = _claim(settings, data)
    model = _model(settings)
    options = {"eval_samples": data.held_out or None, "processing_class": tokenizer}
    monitor = CostMonitor(
        model,
        arguments.output_dir,
        peak_flops="measure" if arguments.device.type == "cpu" else "auto",
        print_summary=False,  # in the middle of the bar
    )
    cached = model.config.use_cache
    trainer = PackTrainer(model, data.samples, arguments, settings.packs, monitor=monitor, **options)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Progress())
    _say(arguments, aligned([*data.lines(), *_plan_lines(trainer)]))
    if resume:
        _say(arguments, f"going on from {resume}")
    outcome = trainer.train(resume_from_checkpoint=resume)
    losses = _held_out_losses(trainer) if data.held_out else (None, None)
    if monitor.report is not None:
        _say(arguments, aligned(monitor.report.lines()))

    model.config.use_cache = cached
    _stop_where_answers_end(model, data.samples)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    output = Path(arguments.output_dir)
    if settings.model.lora and arguments.should_save:
        model.generation_config.save_pretrained(output)
        if settings.model.merge:
            merge_adapters(settings.model.model_name_or_path or "", output, output / "merged", _weight_dtype(settings))
    result = TrainResult(
        output=output,
        steps=trainer.state.global_step,
        train_loss=outcome.training_loss,
        held_out_loss_before=losses[0],
        held_out_loss_after=losses[1],
    )
    if arguments.should_save:
        _write(settings, data, result, trainer.state.log_history)
    _say(arguments, aligned(_result_lines(settings, result)))
    return result


# --------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """The samples of a run, and what became of the rows that they were made of."""

    source: str
    fingerprints: list[str]
    samples: list[Sample]
    held_out: list[Sample]
    counts: EncodingCounts
    held_out_counts: EncodingCounts | None
    refused: list[Refused]

    @classmethod
    def read(cls, settings: TrainSettings, tokenizer: Any) -> _Data:
        records = _open(settings.data, settings.data.data_path or "")
        results = _encode(records, settings, tokenizer)
        samples = [result for result in results if isinstance(result, Sample)]
        if not samples:
            first = next((result.message for result in results if isinstance(result, Refused)), "")
            raise InputError(f"{records.source}: none of {len(records):,} rows can be trained on; the first: {first}")
        held_out: list[Sample] = []
        held_out_counts = None
        fingerprints = [records.fingerprint]
        refused = [result for result in results if isinstance(result, Refused)]
        if settings.data.eval_path:
            others = _open(settings.data, settings.data.eval_path)
            fingerprints.append(others.fingerprint)
            of_others = _encode(others, settings, tokenizer)
            held_out = [result for result in of_others if isinstance(result, Sample)]
            refused += [result for result in of_others if isinstance(result, Refused)]
            held_out_counts = count_conversations(of_others)
            if not held_out:
                raise InputError(
                    f"{others.source}: none of its rows can be evaluated on; the first: {refused[-1].message}"
                )
        elif settings.data.eval_ratio:
            size = round(settings.data.eval_ratio * len(samples))
            if not 0 < size < len(samples):
                raise InputError(
                    f"--eval_ratio {settings.data.eval_ratio} of {len(samples)} samples leaves none to evaluate on or "
                    "none to train on"
                )
            out = np.zeros(len(samples), np.bool_)
            out[np.random.default_rng(settings.trainer.seed).permutation(len(samples))[:size]] = True
            held_out = [sample for sample, one in zip(samples, out.tolist(), strict=True) if one]
            samples = [sample for sample, one in zip(samples, out.tolist(), strict=True) if not one]
        return cls(
            source=records.source,
            fingerprints=fingerprints,
            samples=samples,
            held_out=held_out,
            counts=count_conversations(results),
            held_out_counts=held_out_counts,
            refused=refused,
        )

    def lines(self) -> list[tuple[str, str]]:
        """Lines of the table at the begin."""
        counts = self.counts
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in sorted(counts.refused.items())) or "none"
        lines = [
            ("conversations", f"{counts.rows:,} in {self.source}"),
            ("  dropped", f"{sum(counts.refused.values()):,} ({dropped})"),
            ("  cut", f"{counts.truncated:,} to the maximum length, by {counts.cut_tokens:,} tokens"),
        ]
        if self.held_out_counts is not None:
            lost = sum(self.held_out_counts.refused.values())
            cut = f"{lost:,} dropped and {self.held_out_counts.truncated:,} cut"
            lines.append(("held out", f"{len(self.held_out):,} other conversations ({cut})"))
        elif self.held_out:
            lines.append(("held out", f"{len(self.held_out):,} of them"))
        tokens = _tokens(self.samples)
        labels = sum(int(np.count_nonzero(sample.labels != IGNORE)) for sample in self.samples)
        lines.append(("samples", f"{len(self.samples):,} of {tokens:,} tokens, {labels:,} of them to be learnt"))
        lines += [("dropped", refused.message) for refused in self.refused[:_NAMED_REFUSALS]]
        return lines


def _open(data: DataArguments, path: str) -> RecordSet:
    names = {
        "question": data.question_column,
        "answer": data.answer_column,
        "input": data.input_column,
        "conversation": data.conversation_column,
    }
    named = {key: name for key, name in names.items() if name is not None}
    if not named and data.split == "train" and data.config_name is None:
        return open_conversations(path)
    return open_records(path, Columns(**named), split=data.split, config_name=data.config_name)


def _encode(records: RecordSet, settings: TrainSettings, tokenizer: Any) -> list[Sample | Refused]:
    quiet = not settings.trainer.should_log or settings.trainer.disable_tqdm
    with tqdm(total=len(records), desc=f"tokenizing {records.source}", unit="row", disable=quiet, leave=False) as bar:
        return encode_conversations(
            records,
            tokenizer,
            settings.data.model_type,
            settings.packs.max_seq_len,
            settings.data.on_overflow,
            progress=bar.update,
        )


# -------------------------------------------------------------------------------------------------------------- model


def _model(settings: TrainSettings) -> Any:
    """The model that is trained, adapters on."""
    wanted, arguments = settings.model, settings.trainer
    name = wanted.model_name_or_path or ""
    quantization = quantization_config(wanted.quantize, _autocast_dtype(arguments))
    model, _ = load_causal_lm(name, None, _weight_dtype(settings), quantization)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and settings.packs.max_seq_len > positions:
        raise InputError(
            f"--max_seq_len {settings.packs.max_seq_len} is more than the {positions} positions of {name}; lower it"
        )
    if not wanted.lora:
        return model
    return add_lora(
        model,
        wanted.lora_r,
        wanted.lora_alpha,
        wanted.lora_dropout,
        wanted.lora_target_modules,
        bool(arguments.activation_checkpointing),
    )


def _autocast_dtype(arguments: TrainerArguments) -> torch.dtype:
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32


def _weight_dtype(settings: TrainSettings) -> torch.dtype:
    if settings.model.dtype != "auto":
        return resolve_dtype(settings.model.dtype, settings.trainer.device)
    # What is trained is kept in float32, or steps smaller than its rounding would be lost.
    return _autocast_dtype(settings.trainer) if settings.model.lora else torch.float32


def _stop_where_answers_end(model: Any, samples: Sequence[Sample]) -> None:
    """Make generation stop at the token that the model has learnt to end an answer with."""
    last = next((int(sample.labels[-1]) for sample in samples if not sample.truncated), None)
    generation = model.generation_config
    known = generation.eos_token_id
    ends = [] if known is None else list(known) if isinstance(known, list | tuple) else [known]
    if last is not None and last not in ends:
        generation.eos_token_id = [*ends, last]


# ---------------------------------------------------------------------------------------------------- the output folder


def _claim(settings: TrainSettings, data: _Data) -> str | None:
    """Take the output folder for this run; return the checkpoint to go on from.

    Raises:
        InputError: a run with other settings is there.
    """
    arguments = settings.trainer
    folder = Path(arguments.output_dir)
    explicit = arguments.resume_from_checkpoint
    if explicit and str(explicit).lower() not in ("true", "false"):
        if not (Path(explicit) / "trainer_state.json").is_file():
            raise InputError(f"--resume_from_checkpoint {explicit} is no checkpoint folder of a Trainer")
        return str(explicit)
    with arguments.main_process_first(local=False):
        if arguments.should_save:
            _check_claim(folder, _decisive(settings, data), arguments.overwrite_output_dir)
            _write(settings, data, None)
        return None if str(explicit).lower() == "false" else _last_checkpoint(folder)


def _finished(settings: TrainSettings, data: _Data) -> TrainResult | None:
    """What this very run came to, if its result is there and is not to be made anew."""
    folder = Path(settings.trainer.output_dir)
    merged = folder / "merged" if settings.model.merge else folder
    if settings.trainer.overwrite_output_dir or not (list(folder.glob("*.safetensors")) and merged.is_dir()):
        return None
    try:
        known = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        if known["settings"] != _decisive(settings, data) or known["result"] is None:
            return None
        return TrainResult(**{**known["result"], "output": folder})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_claim(folder: Path, wanted: dict[str, Any], overwrite: bool) -> None:
    try:
        known = json.loads((folder / "training.json").read_text(encoding="utf-8"))["settings"]
    except FileNotFoundError:
        known = wanted if _last_checkpoint(folder) is None else {}
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    changed = [key for key in wanted if known.get(key) != wanted[key]]
    if not changed and not overwrite:
        return
    if not overwrite:
        before, now = known.get(changed[0], "unknown"), wanted[changed[0]]
        raise InputError(
            f"{folder} holds a run with another {changed[0]} ({before}, now {now}); choose another --output_dir, or "
            "discard that run with --overwrite_output_dir True"
        )
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _decisive(settings: TrainSettings, data: _Data) -> dict[str, Any]:
    model = dataclasses.asdict(settings.model)
    model.pop("merge")
    model["model_name_or_path"] = _absolute(model["model_name_or_path"])
    of_data = {key: getattr(settings.data, key) for key in ("eval_ratio", "model_type", "on_overflow")}
    trainer = {key: getattr(settings.trainer, key) for key in _DECISIVE}
    values = {"data": data.fingerprints, **of_data, **model, **dataclasses.asdict(settings.packs), **trainer}
    return dict(json.loads(json.dumps(values, default=str)))


def _last_checkpoint(folder: Path) -> str | None:
    """The last one that was written whole: its trainer_state.json comes last."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(numbered, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def _write(
    settings: TrainSettings, data: _Data, result: TrainResult | None, log: Sequence[dict[str, Any]] = ()
) -> None:
    content = {
        "settings": _decisive(settings, data),
        "conversations": dataclasses.asdict(data.counts),
        "held_out": len(data.held_out),
        "held_out_tokens": _tokens(data.held_out),
        "held_out_of_others": data.held_out_counts is not None,
        "trained_on": len(data.samples),
        "trained_on_tokens": _tokens(data.samples),
        "result": result and {**dataclasses.asdict(result), "output": str(result.output)},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "log": [
            {key: entry[key] for key in _LOGGED if key in entry} for entry in log if {"loss", "eval_loss"} & {*entry}
        ],
    }
    with atomic_path(Path(settings.trainer.output_dir) / "training.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.input_ids) for sample in samples)


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


# -------------------------------------------------------------------------------------------------------- what is shown


def _plan_lines(trainer: PackTrainer) -> list[tuple[str, str]]:
    arguments, dataset, options = trainer.args, trainer.train_dataset, trainer.options
    items, count = len(dataset), len(dataset.samples)
    attention = trainer.model.config._attn_implementation
    if options.packs and options.pack_scope == "epoch":
        fill = int(dataset.lengths.sum()) / (items * options.max_seq_len)
        rows = f"{items:,} packs of {options.max_seq_len:,} tokens, {fill:.1%} full, {count / items:.1f} samples each"
    else:
        rows = f"{options.pad_mode}, batches of {arguments.per_device_train_batch_size} samples"
    in_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    unit = "packs" if options.packs and options.pack_scope == "epoch" else "samples"
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    dtype = str(_autocast_dtype(arguments)).removeprefix("torch.")
    return [
        ("rows", rows),
        ("a step", f"{in_step:,} {unit} on {arguments.world_size} x {arguments.device.type}, {dtype}, {attention}"),
        ("trained", f"{trained:,} of {trainer.model.num_parameters():,} parameters"),
    ]


def _result_lines(settings: TrainSettings, result: TrainResult) -> list[tuple[str, str]]:
    lines = [("training loss", f"{result.train_loss:.4f} on average")]
    if result.held_out_loss_after is not None:
        before = result.held_out_loss_before
        text = f"{result.held_out_loss_after:.4f}"
        lines.append(("held-out loss", text if before is None else f"{before:.4f} before, {text} after"))
    what = "adapters" if settings.model.lora else "model"
    lines.append((f"the {what}", str(result.output)))
    if settings.model.merge:
        lines.append(("the merged model", str(result.output / "merged")))
    return lines


def _held_out_losses(trainer: PackTrainer) -> tuple[float | None, float]:
    """Before training, if it was asked for (--eval_on_start), and after it."""
    logged = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    last = logged.get(trainer.state.global_step)
    return logged.get(0), float(trainer.evaluate()["eval_loss"] if last is None else last)


class _Progress(ProgressCallback):  # type: ignore[misc]
    """Trainer's bar, and a log as one short line instead of a dictionary."""

    def __init__(self) -> None:
        super().__init__()

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Open the bar."""
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **more)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Move the bar."""
        if not args.disable_tqdm:
            super().on_step_end(args, state, control, **more)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Show no second bar."""

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Close the bar."""
        if not args.disable_tqdm:
            super().on_train_end(args, state, control, **more)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        """Print what a person looks at; the loggers get everything."""
        line = _log_line(logs or {}, state)
        if state.is_world_process_zero and line:
            tqdm.write(line)


def _log_line(logs: dict[str, Any], state: Any) -> str:
    step = f"step {state.global_step}/{state.max_steps}"
    if "eval_loss" in logs:
        return f"{step}  held-out loss {logs['eval_loss']:.4f}"
    if "loss" not in logs:
        return ""
    parts = [step, f"loss {float(logs['loss']):.4f}", f"learning rate {float(logs['learning_rate']):.2e}"]
    if "cost/tokens_per_second" in logs:
        parts.append(f"{logs['cost/tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{logs['cost/padding_share']:.1%} padding")
    return "  ".join(parts)


def _say(arguments: TrainerArguments, text: str) -> None:
    if arguments.process_index == 0:
        print(text, flush=True)
