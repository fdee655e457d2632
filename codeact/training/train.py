"""``codeact train``: conversations and a model -> a trained model, its costs, and what became of every conversation.

output_dir/     the model (or its adapters) and the tokenizer, as `from_pretrained` reads them
  merged/       the full model, after --merge
  cost.json     tokens, padding, time, memory of every step
  training.json the settings, counts of the conversations, losses, and under "log" the loss by step
  README.md     a model card, unless one of the user's is there
  checkpoint-N/ what a killed run goes on from when the same command is given again
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from codeact.base.console import Progress, aligned
from codeact.base.devices import resolve_dtype
from codeact.base.errors import InputError
from codeact.base.files import locked_folder
from codeact.base.machine import GIB, free_memory
from codeact.models.adapters import add_lora, merge_adapters, quantization_config
from codeact.models.loading import existing_model, load_causal_lm, quiet_transformers
from codeact.ops.flops import Memory, ModelFacts
from codeact.text.conversations import Sample
from codeact.training.arguments import TrainerArguments
from codeact.training.cost import CostMonitor
from codeact.training.data import TrainingData, load_trainable
from codeact.training.flags import TrainSettings
from codeact.training.folder import TrainResult, claim, finished, write_result, written_to
from codeact.training.room import PlannedTraining, check_memory, check_room, trained_parameters
from codeact.training.trainer import PackTrainer, sharding_asked_for


def train_from_settings(settings: TrainSettings) -> TrainResult:
    """Train, evaluate and save; a run that was killed goes on from its last checkpoint, a finished one stays.

    Under torchrun or accelerate every rank calls this; the first one prints and writes.

    Raises:
        InputError: data, model or settings do not fit together, or ``output_dir`` holds a run with other settings.
    """
    arguments = settings.trainer
    own: AbstractContextManager[None] = (
        locked_folder(Path(arguments.output_dir), wait=False) if arguments.should_save else nullcontext()
    )
    with own:
        if Path(arguments.output_dir).exists():  # a rank may be here before the one that makes it
            existing_model(arguments.output_dir)  # to write into a pipe would wait for ever as well
        return _train(settings)


def _train(settings: TrainSettings) -> TrainResult:
    arguments = settings.trainer
    quiet_transformers()
    set_seed(arguments.seed)  # adapters are drawn before the Trainer would seed
    tokenizer = load_trainable(settings.model.model_name_or_path or "", settings.data, settings.packs)
    data = TrainingData.read(settings, tokenizer)
    done = finished(settings, data)
    if done is not None:
        _say(arguments, aligned([*data.lines(), ("done already", "the output folder holds this run's result")]))
        _say(arguments, aligned(_result_lines(settings, done)))
        return done
    resume = claim(settings, data)
    model, facts = _model(settings)
    options = {"eval_samples": data.held_out or None, "processing_class": tokenizer}
    peak = "measure" if arguments.device.type == "cpu" else "auto"
    monitor = CostMonitor(model, arguments.output_dir, peak_flops=peak)
    cached = model.config.use_cache
    trainer = CardTrainer(model, data.samples, arguments, settings.packs, monitor=monitor, **options)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Shown(bar=not arguments.disable_tqdm))
    needs, tokens = Memory({}), trainer.largest_pass()
    evaluation, held_out_tokens = Memory({}), trainer.eval_dataset.largest_pass() if data.held_out else 0
    if facts is not None and not sharding_asked_for(arguments):  # else DeepSpeed or FSDP decides what a rank holds
        planned = PlannedTraining(settings.flags(fused_loss=trainer.fused), arguments.world_size)
        needs, evaluation = planned.step_memory(facts, tokens), planned.evaluation_memory(facts, held_out_tokens)
    _say(arguments, aligned([*data.lines(), *_plan_lines(trainer, needs, tokens)]))
    _check_fits(trainer, {tokens: needs, held_out_tokens: evaluation} if held_out_tokens > tokens else {tokens: needs})
    if resume:
        _say(arguments, f"going on from {resume}")
    with written_to(arguments.output_dir):
        trainer.train(resume_from_checkpoint=resume)
    losses = _held_out_losses(trainer) if data.held_out else (None, None)
    if monitor.report is not None:
        _say(arguments, aligned(monitor.report.lines()))

    model.config.use_cache = cached
    _stop_where_answers_end(model, data.samples)
    output = _save(settings, trainer, model)
    result = TrainResult(
        output=output,
        steps=trainer.state.global_step,
        train_loss=trainer.mean_loss(),
        held_out_loss_before=losses[0],
        held_out_loss_after=losses[1],
    )
    if arguments.should_save:
        write_result(settings, data, result, trainer.state.log_history)
    if arguments.push_to_hub:
        trainer.push_to_hub()
    _say(arguments, aligned(_result_lines(settings, result)))
    return result


def _save(settings: TrainSettings, trainer: CardTrainer, model: Any) -> Path:
    """Write the model, or its adapters and what comes of merging them, to the output folder."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    output = Path(settings.trainer.output_dir)
    with written_to(output):
        trainer.save_model(_internal_call=True)  # what is pushed is the whole folder, when it is whole
        if settings.model.lora and settings.trainer.should_save:
            model.generation_config.save_pretrained(output)
            if settings.model.merge:
                base, dtype = settings.model.model_name_or_path or "", _weight_dtype(settings)
                merge_adapters(base, output, output / "merged", dtype)
    return output


# -------------------------------------------------------------------------------------------------------------- model


def _model(settings: TrainSettings) -> tuple[Any, ModelFacts | None]:
    """The model that is trained, adapters on, and what is known of it without them."""
    wanted, arguments = settings.model, settings.trainer
    name = wanted.model_name_or_path or ""
    quantization = quantization_config(wanted.quantize, _autocast_dtype(arguments))
    model, _ = load_causal_lm(name, None, _weight_dtype(settings), quantization)
    facts = ModelFacts.of(model, name)
    if wanted.lora:
        sizes = (wanted.lora_r, wanted.lora_alpha, wanted.lora_dropout, wanted.lora_target_modules)
        model = add_lora(model, *sizes, bool(arguments.activation_checkpointing))
        model.create_or_update_model_card = lambda folder: None  # peft's, which would also change one of the user's
    return model, facts


def _autocast_dtype(arguments: TrainerArguments) -> torch.dtype:
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32


def _weight_dtype(settings: TrainSettings) -> torch.dtype:
    if settings.model.dtype != "auto":
        return resolve_dtype(settings.model.dtype, settings.trainer.device)
    # What is trained is kept in float32, or steps smaller than its rounding would be lost.
    return _autocast_dtype(settings.trainer) if settings.model.lora else torch.float32


def _check_fits(trainer: PackTrainer, passes: dict[int, Memory]) -> None:
    arguments = trainer.args
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if arguments.device.type == "cpu" else 1
    place = "this machine" if arguments.device.type == "cpu" else str(arguments.device)
    for tokens, needs in passes.items():
        check_memory(needs, free_memory(arguments.device) / sharing, tokens, place)
    steps = arguments.max_steps
    if steps <= 0:
        packs = len(trainer.train_dataset) / (trainer.train_dataset.items_per_batch * arguments.world_size)
        steps = math.ceil(math.ceil(packs / arguments.gradient_accumulation_steps) * arguments.num_train_epochs)
    check_room(arguments, trained_parameters(trainer.model), steps)


def _stop_where_answers_end(model: Any, samples: Sequence[Sample]) -> None:
    """Make generation stop at the token that the model has learnt to end an answer with."""
    last = next((int(sample.labels[-1]) for sample in samples if not sample.truncated), None)
    generation = model.generation_config
    known = generation.eos_token_id
    ends = [] if known is None else list(known) if isinstance(known, list | tuple) else [known]
    if last is not None and last not in ends:
        generation.eos_token_id = [*ends, last]


# -------------------------------------------------------------------------------------------------------- what is shown


def _plan_lines(trainer: PackTrainer, needs: Memory, tokens: int) -> list[tuple[str, str]]:
    arguments, dataset, options = trainer.args, trainer.train_dataset, trainer.options
    items, count = len(dataset), len(dataset.samples)
    attention = trainer.model.config._attn_implementation
    if options.packs and options.pack_scope == "epoch":
        fill = int(dataset.lengths.sum()) / (items * options.max_length)
        rows = f"{items:,} packs of {options.max_length:,} tokens, {fill:.1%} full, {count / items:.1f} samples each"
    else:
        rows = f"{options.pad_mode}, batches of {arguments.per_device_train_batch_size} samples"
    in_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    unit = "packs" if options.packs and options.pack_scope == "epoch" else "samples"
    trained = trained_parameters(trainer.model)
    dtype = str(_autocast_dtype(arguments)).removeprefix("torch.")
    return [
        ("rows", rows),
        ("a step", f"{in_step:,} {unit} on {arguments.world_size} x {arguments.device.type}, {dtype}, {attention}"),
        ("a pass", f"up to {tokens:,} tokens" + (f", about {needs.total / GIB:.2f} GiB" if needs.parts else "")),
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


class CardTrainer(PackTrainer):
    """Leaves the model card to ``write_result``; what the hub refuses is one line."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Trainer's own would take the place of any other."""

    def init_hf_repo(self, *arguments: Any, **more: Any) -> None:
        """Make the repository, before the first step."""
        with _hub("nothing was trained yet"):
            super().init_hf_repo(*arguments, **more)

    def push_to_hub(self, *arguments: Any, **more: Any) -> Any:
        """Upload the folder."""
        with _hub(f"what was trained is in {self.args.output_dir}"):
            return super().push_to_hub(*arguments, **more)


@contextmanager
def _hub(state: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # no token, no network, refused: a class of its own in every library below
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--push_to_hub True: {reason}; log in with: hf auth login; {state}") from None


class _Shown(TrainerCallback):  # type: ignore[misc]
    """How far it is, and a log as one short line instead of a dictionary; the loggers get everything."""

    def __init__(self, bar: bool) -> None:
        self._bar, self._stack = bar, ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show what is left of the steps."""
        shown = self._bar and state.is_world_process_zero
        bar = Progress(state.max_steps - state.global_step, "steps", "training", show=shown)
        self._step = self._stack.enter_context(bar)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One more is done."""
        self._step(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the terminal to others."""
        self._stack.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Print what a person looks at."""
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
