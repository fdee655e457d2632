"""How fast this machine is: a few packs really scored, a few steps really trained, some tokens really generated.

Where the model is not here or is too large for that, the rate of a large matrix product stands for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codeact.base.devices import Gpu, resolve_device, resolve_dtype, resolve_peak
from codeact.base.errors import InputError, MissingExtraError
from codeact.base.machine import free_memory, peak_memory, total_memory
from codeact.data.records import BadRow, Record
from codeact.embedding.vectors import embed_texts, load_embedder
from codeact.evaluation.decoding import Manner, Sampling, decode_batches
from codeact.models.adapters import add_lora
from codeact.models.fused_loss import fuse_loss
from codeact.models.loading import load_causal_lm
from codeact.models.weight_files import local_weights
from codeact.ops.flops import ModelFacts
from codeact.run.settings import RunSettings
from codeact.scoring.ifd import IfdScorer
from codeact.scoring.tokens import tokenize
from codeact.text.conversations import Sample, encode_conversations
from codeact.training.options import PackOptions
from codeact.training.room import PlannedTraining
from codeact.training.trainer import collator

UTILISATION = 0.6
"""What is assumed of the rate of a large matrix product where the model itself does not run."""
LOAD_BYTES_PER_SECOND = 1e9

_SECONDS = 3.0  # that a measurement should take, roughly
_BUDGET = 20.0  # after which no other is begun
_MEMORY_SHARE = 0.5  # of what is free
_NEW_TOKENS = 8
_ROWS = 8  # answers generated at once, texts embedded in a batch: at most


@dataclass(slots=True, kw_only=True)
class Machine:
    """What computes.

    ``flops``: FLOP/s that a device reaches, by stage; ``base``: bytes of a process with all libraries and no model;
    ``start_seconds``: until a model computes; ``decoding``: seconds of a step that gives so many answers a token each,
    None where it was not measured. ``gpu``: None: this machine. ``lines`` say how each is known.
    """

    memory: float
    base: float
    start_seconds: float
    flops: dict[str, float] = field(default_factory=dict)
    gpu: Gpu | None = None
    devices: int = 1
    decoding: tuple[float, int] | None = None
    lines: list[str] = field(default_factory=list)

    def measured(self, stage: str, tokens: int, flops: float, seconds: float, what: str = "tokens") -> None:
        """Keep what a stage reached."""
        self.flops[stage] = flops / seconds
        rate = f"{tokens / seconds:,.0f} tokens/s, measured here"
        self.lines.append(f"{stage}: {tokens:,} {what} in {seconds:.1f} s, {rate}")


def calibrate(
    settings: RunSettings,
    model: ModelFacts,
    embedder: ModelFacts,
    training: PlannedTraining | None,
    records: Sequence[Record | BadRow],
    stages: set[str],
) -> Machine:
    """Measure this machine, in about 20 seconds at most where nothing else runs on it.

    Args:
        settings: the run.
        model, embedder: their shapes.
        training: what is trained; None: nothing.
        records: rows to measure with; none: made-up ones.
        stages: the ones to measure.
    """
    begin = time.perf_counter()
    device = resolve_device(settings.score.device)
    dtype = resolve_dtype(settings.score.dtype, device)
    peak = resolve_peak("measure", device, dtype)[0] or 0.0
    machine = Machine(
        memory=float(total_memory(resolve_device())),
        base=float(peak_memory(device)[0]),
        start_seconds=model.parameters * 2 / LOAD_BYTES_PER_SECOND,
    )
    rows = [row for row in records if isinstance(row, Record)] or _made_up()
    of_model = stages & {"score", "train", "generate"}
    folder = local_weights(settings.score.model) if of_model else None
    tokens = int(_SECONDS * UTILISATION * peak / (2 * model.parameters))
    needed = model.parameters * (dtype.itemsize + (16 if training and not training.flags.lora else 4))
    if of_model and folder is None:
        machine.lines.append(f"{settings.score.model} has no weights here, so it was not run")
    elif of_model and (tokens < 128 or needed > _MEMORY_SHARE * free_memory(device)):
        machine.lines.append(f"{settings.score.model} is too large to be tried here in a few seconds")
    elif folder is not None:
        trial = _Trial(machine, settings, model, rows, tokens, *load_causal_lm(str(folder), device, dtype))
        prompt = trial.score(begin)
        in_time = bool(prompt) and time.perf_counter() - begin < _BUDGET
        if in_time and "generate" in stages and settings.generate and settings.generate.server is None:
            trial.generate(prompt)
        if in_time and "train" in stages and training and training.sharding in ("none", "ddp"):
            try:
                trial.train(training)
            except (InputError, MissingExtraError) as error:
                machine.lines.append(f"training was not tried: {error}")
    embedding = local_weights(settings.embed.model) if "embed" in stages else None
    if embedding is not None and time.perf_counter() - begin < _BUDGET:
        _embed(machine, settings, embedding, embedder, rows)
    reached = machine.flops.get("score")
    rate = reached or UTILISATION * peak
    if missing := ", ".join(sorted((({"score"} & of_model) | ({"embed", "train"} & stages)) - machine.flops.keys())):
        product = f"measured: a {str(dtype).removeprefix('torch.')} matrix product on {device}"
        how = f"{UTILISATION:.0%} (assumed) of {peak / 1e9:,.0f} GFLOP/s, {product}"
        how = f"not measured; taken to reach the {rate / 1e9:,.0f} GFLOP/s of score" if reached else how
        machine.lines.append(f"{missing}: {how}")
    machine.flops = {"score": rate, "embed": rate, "train": rate, **machine.flops}
    return machine


def _made_up() -> list[Record]:
    line = "value = compute(value)\n"
    return [Record(id=str(n), row=n, question=line * 20, answer=line * 50) for n in range(16)]


def _seconds(do: Callable[[], object]) -> float:
    begin = time.perf_counter()
    do()
    return time.perf_counter() - begin


@dataclass(slots=True)
class _Trial:
    """The causal model, measured in what it is used for at about ``tokens`` tokens each."""

    machine: Machine
    settings: RunSettings
    facts: ModelFacts
    rows: Sequence[Record]
    tokens: int
    model: Any
    tokenizer: Any

    def score(self, begin: float) -> list[int]:
        """Score some rows; returns the tokens of one, none where no row can be scored. ``begin``: of loading."""
        score = self.settings.score
        # The speed is that of tokens, whatever answers they are of.
        scorer = IfdScorer(
            self.model, self.tokenizer, score.template, score.max_length, None, score.protocol, turns="last"
        )
        items = tokenize(self.rows, self.tokenizer, scorer.prompts, scorer.max_length, score.protocol)
        usable = [(row, item) for row, item in zip(self.rows, items, strict=True) if item.status == "ok"]
        lengths = [length for _, item in usable for length in (len(item.conditional), len(item.unconditional))]
        room = min(self.tokens, scorer.tokens_per_pack)
        usable = usable[: 1 + int((np.cumsum(lengths)[1::2] < room).sum())]
        if not usable:
            self.machine.lines.append("no row of the sample can be scored, so the model was not run")
            return []
        some, lengths = [row for row, _ in usable], lengths[: 2 * len(usable)]
        scorer.score(some[:1])  # what is slow the first time only
        self.machine.start_seconds = time.perf_counter() - begin
        seconds = _seconds(lambda: scorer.score(some))
        head = sum(lengths) - sum(item.conditional_start + item.unconditional_start for _, item in usable)
        flops = self.facts.forward_flops(sum(lengths), float(np.square(lengths).sum()), head)
        self.machine.measured("score", sum(lengths), flops, seconds)
        return list(usable[0][1].conditional)

    def generate(self, prompt: list[int]) -> None:
        """Answer a prompt of at most 128 tokens several times at once."""
        asked = self.settings.generate
        assert asked is not None
        self.model.to(resolve_dtype(asked.dtype, self.model.device))
        count = min(len(asked.tasks) * asked.samples if asked.tasks else _ROWS, asked.batch_size or _ROWS, _ROWS)
        times: list[float] = []

        def clock(row: int, new: list[int]) -> bool:
            if row == 0:
                times.append(time.perf_counter())
            return False

        greedy = Sampling(temperature=0.0, top_p=1.0)
        list(
            decode_batches(self.model, [prompt[:128]] * count, clock, _NEW_TOKENS, greedy, [0] * count, manner=Manner())
        )
        seconds = float(np.median(np.diff(times)))
        self.machine.decoding = (seconds, count)
        rate = f"{count / seconds:,.0f} tokens/s, measured here after 128 tokens"
        self.machine.lines.append(f"generate: {count} answers at once, {rate}")

    def train(self, training: PlannedTraining) -> None:
        """Forward, backward and optimizer step of one batch, as the Trainer would do them; the model is changed."""
        flags, device = training.flags, self.model.device
        if flags.quantize != "none":
            raise InputError("quantised weights are not calibrated")
        samples = self.samples(flags, min(self.tokens // 3, flags.max_length))
        model = self.model.to(torch.bfloat16 if training.weight_bytes == 2 else torch.float32).train()
        fused = {"fused_loss": True} if flags.fused_loss and fuse_loss(model) else {}
        if flags.lora:
            model = add_lora(model, flags.lora_r, flags.lora_alpha, flags.lora_dropout, flags.lora_target_modules)
        if training.checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
        options = PackOptions(
            pad_mode=flags.pad_mode, max_length=flags.max_length, supervised_only=flags.supervised_only
        )
        # In a pack samples share an item; else each is one.
        batch = collator(options)([samples] if training.packs else [[sample] for sample in samples])
        batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        supervised = sum(int((sample.labels[1:] != -100).sum()) for sample in samples)
        inputs = {**batch, **fused, "use_cache": False, "num_items_in_batch": torch.tensor(supervised, device=device)}

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=training.autocast):
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

        seconds = _seconds(step)
        if seconds <= 2 * _SECONDS:  # the first time is slow
            seconds = _seconds(step)
        computed, width = int(batch["input_ids"].numel()), int(batch["input_ids"].shape[-1])
        squared = sum(len(sample.input_ids) ** 2 for sample in samples) if training.packs else computed * width
        head = supervised if training.packs and flags.supervised_only else computed
        flops = training.flops(self.facts, computed, head, squared)
        self.machine.measured("train", computed, flops, seconds, "tokens a step")

    def samples(self, flags: Any, room: int) -> list[Sample]:
        """Samples of one batch, of at most ``room`` tokens with their padding."""
        encoded = encode_conversations(self.rows, self.tokenizer, flags.model_type, flags.max_length, flags.on_overflow)
        samples = [sample for sample in encoded if isinstance(sample, Sample) and len(sample.input_ids) <= room]
        lengths = np.array([len(sample.input_ids) for sample in samples], np.int64)
        longest = flags.max_length if flags.pad_mode == "max_length" else np.maximum.accumulate(lengths)
        padded = longest * np.arange(1, len(samples) + 1)
        computed = lengths.cumsum() if flags.pad_mode == "dynamic_pack" else padded
        samples = samples[: int((computed <= room).sum())]
        if not samples:
            raise InputError("no row of the sample is short enough to be tried in a few seconds")
        return samples


def _embed(machine: Machine, settings: RunSettings, folder: Path, facts: ModelFacts, rows: Sequence[Record]) -> None:
    with suppress(InputError):
        encoder = load_embedder(folder, device=settings.embed.device, dtype=settings.embed.dtype)
        texts = [row.question for row in rows[: 4 * _ROWS]]
        tokens = embed_texts(texts, encoder, batch_size=_ROWS).tokens
        flops = facts.forward_flops(tokens, 2 * tokens * tokens / len(texts), 0)  # every token sees all others
        machine.measured("embed", tokens, flops, _seconds(lambda: embed_texts(texts, encoder, batch_size=_ROWS)))
