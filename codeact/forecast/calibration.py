"""How fast this machine is: a few packs really scored, a few steps really trained, some tokens really generated.

Where the model is not here or is too large for that, the rate of a large matrix product stands for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codeact.base.devices import resolve_device, resolve_dtype, resolve_peak
from codeact.base.errors import InputError, MissingExtraError
from codeact.base.machine import free_memory, peak_memory
from codeact.data.records import BadRow, Record
from codeact.forecast.cost import ModelFacts
from codeact.forecast.training import TrainingShape
from codeact.run.settings import RunSettings
from codeact.text.conversations import Sample, encode_conversations

UTILISATION = 0.6
"""What is assumed of the rate of a large matrix product where the model itself does not run."""

_SECONDS = 3.0  # that a measurement should take, roughly
_BUDGET = 20.0  # after which no other is begun
_MEMORY_SHARE = 0.5  # of what is free
_NEW_TOKENS = 8
_ROWS = 8  # answers generated at once, texts embedded in a batch: at most


@dataclass(slots=True)
class Calibration:
    """What was found.

    ``flops``: FLOP/s that a stage reached, by its name. ``decoding``: seconds of a step that gives ``decoded_rows``
    answers a token each. ``base``: bytes of a process with all libraries and no model. ``lines`` say how each is known.
    """

    peak: float
    base: float
    flops: dict[str, float] = field(default_factory=dict)
    load_seconds: float = 0.0
    decoding: float | None = None
    decoded_rows: int = 1
    lines: list[str] = field(default_factory=list)


def calibrate(
    settings: RunSettings,
    model: ModelFacts,
    embedder: ModelFacts,
    training: TrainingShape | None,
    flags: Any,
    records: Sequence[Record | BadRow],
    stages: set[str],
) -> Calibration:
    """Measure this machine, in about 20 seconds at most where nothing else runs on it.

    Args:
        settings: the run.
        model, embedder: their shapes.
        training, flags: what is trained and its flags; None: nothing.
        records: rows to measure with; none: made-up ones.
        stages: the ones to measure.
    """
    begin = time.perf_counter()
    device = resolve_device(settings.score.device)
    dtype = resolve_dtype(settings.score.dtype, device)
    peak, _ = resolve_peak("measure", device, dtype)
    assert peak is not None
    found = Calibration(peak=peak, base=float(peak_memory(device)[0]))
    rows = [row for row in records if isinstance(row, Record)] or _made_up()
    of_model = stages & {"score", "train", "generate"}
    folder = local_weights(settings.score.model) if of_model else None
    tokens = int(_SECONDS * UTILISATION * peak / (2 * model.parameters))
    needed = model.parameters * (dtype.itemsize + (16 if training and training.lora_rank is None else 4))
    if not of_model:
        pass
    elif folder is None:
        found.lines.append(f"{settings.score.model} has no weights here, so it was not run")
    elif tokens < 128 or needed > _MEMORY_SHARE * free_memory(device):
        found.lines.append(f"{settings.score.model} is too large to be tried here in a few seconds")
    else:
        training = training if "train" in stages else None
        _run_model(found, settings, folder, device, dtype, model, training, flags, rows, tokens, "generate" in stages)
    embedding = local_weights(settings.embed.model) if "embed" in stages else None
    if embedding is not None and time.perf_counter() - begin < _BUDGET:
        _embedding(found, settings, embedding, embedder, rows)
    wanted = {"score"} & of_model | {"embed", "train"} & stages
    missing = sorted(wanted - set(found.flops))
    measured = "score" in found.flops
    rate = found.flops.get("score", UTILISATION * peak)
    found.flops = {"score": rate, "embed": rate, "train": rate, **found.flops}
    if missing and measured:
        found.lines.append(f"{', '.join(missing)}: not measured; taken to reach the {rate / 1e9:,.0f} GFLOP/s of score")
    elif missing:
        found.lines.append(
            f"{', '.join(missing)}: {UTILISATION:.0%} (assumed) of {peak / 1e9:,.0f} GFLOP/s, measured: a "
            f"{str(dtype).removeprefix('torch.')} matrix product on {device}"
        )
    return found


def local_weights(name: str) -> Path | None:
    """The folder of a model whose weights are on this machine; None if they would have to be fetched."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):
            return None
    return folder if list(folder.glob("*.safetensors")) else None


def _made_up() -> list[Record]:
    line = "value = compute(value)\n"
    return [Record(id=str(n), row=n, question=line * 20, answer=line * 50) for n in range(16)]


def _run_model(
    found: Calibration,
    settings: RunSettings,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    facts: ModelFacts,
    training: TrainingShape | None,
    flags: Any,
    rows: Sequence[Record],
    tokens: int,
    generate: bool,
) -> None:
    """Load the model once and measure what it is used for."""
    from codeact.models.loading import load_causal_lm
    from codeact.scoring.ifd import IfdScorer
    from codeact.scoring.tokens import tokenize

    start = begin = time.perf_counter()
    model, tokenizer = load_causal_lm(str(folder), device, dtype)
    score = settings.score
    scorer = IfdScorer(model, tokenizer, score.template, score.max_length, None, score.protocol)
    items = tokenize(rows, tokenizer, scorer.prompts, score.max_length, score.protocol)
    some, lengths, head, total = [], [], 0, 0
    for row, item in zip(rows, items, strict=True):
        if item.status == "ok" and total < min(tokens, scorer.tokens_per_pack):
            some.append(row)
            lengths += [len(item.conditional), len(item.unconditional)]
            head += sum(lengths[-2:]) - item.conditional_start - item.unconditional_start
            total += sum(lengths[-2:])
    if not some:
        found.lines.append("no row of the sample can be scored, so the model was not run")
        return
    scorer.score(some[:1])  # what is slow the first time only
    found.load_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    scorer.score(some)
    seconds = time.perf_counter() - begin
    found.flops["score"] = facts.forward_flops(total, float(np.square(lengths).sum()), head) / seconds
    found.lines.append(f"score: {total:,} tokens in {seconds:.1f} s, {total / seconds:,.0f} tokens/s, measured here")
    late = time.perf_counter() - start > _BUDGET
    if generate and not late:
        _decoding(found, settings, model, device, items[0].conditional)
    if training is not None and training.sharding in ("none", "ddp") and not late:
        try:
            _training(found, model, tokenizer, training, flags, facts, rows, tokens)
        except (InputError, MissingExtraError) as error:
            found.lines.append(f"training was not tried: {error}")


def _decoding(found: Calibration, settings: RunSettings, model: Any, device: torch.device, ids: Sequence[int]) -> None:
    from codeact.evaluation.decoding import Manner, Sampling, decode_batches

    wanted = settings.generate
    assert wanted is not None
    model.to(resolve_dtype(wanted.dtype, device))
    count = min(len(wanted.tasks) * wanted.samples if wanted.tasks else _ROWS, wanted.batch_size or _ROWS, _ROWS)
    prompts = [list(ids[:128])] * count
    times: list[float] = []

    def clock(row: int, new: list[int]) -> bool:
        if row == 0:
            times.append(time.perf_counter())
        return False

    for _ in decode_batches(
        model,
        prompts,
        clock,
        _NEW_TOKENS,
        Sampling(temperature=0.0, top_p=1.0),
        [0] * count,
        manner=Manner(),
    ):
        pass
    found.decoding = float(np.median(np.diff(times)))
    found.decoded_rows = count
    found.lines.append(
        f"generate: {count} answers at once, {count / found.decoding:,.0f} tokens/s, measured here after 128 tokens"
    )


def _training(
    found: Calibration,
    model: Any,
    tokenizer: Any,
    training: TrainingShape,
    flags: Any,
    facts: ModelFacts,
    rows: Sequence[Record],
    tokens: int,
) -> None:
    """Forward, backward and optimizer step of one batch, as the Trainer would do them."""
    from codeact.models.adapters import add_lora
    from codeact.models.fused_loss import fuse_loss
    from codeact.training.options import PackOptions
    from codeact.training.trainer import collator

    if flags.quantize != "none":
        raise InputError("quantised weights are not calibrated")
    samples = _one_batch(tokenizer, training, flags, rows, min(tokens // 3, training.capacity))
    device = model.device
    model = model.to(torch.bfloat16 if training.weight_bytes == 2 else torch.float32).train()
    fused = training.fused_loss and fuse_loss(model)
    if training.lora_rank is not None:
        model = add_lora(model, flags.lora_r, flags.lora_alpha, flags.lora_dropout, flags.lora_target_modules)
    if training.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    options = PackOptions(
        pad_mode=training.pad_mode, max_seq_len=flags.max_seq_len, supervised_only=flags.supervised_only
    )
    # In a pack samples share an item; else each is one.
    batch = collator(options)([samples] if options.packs else [[sample] for sample in samples])
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    lengths = np.array([len(sample.input_ids) for sample in samples])
    computed = int(batch["input_ids"].numel())
    supervised = sum(int((sample.labels[1:] != -100).sum()) for sample in samples)
    inputs = {**batch, "use_cache": False, "num_items_in_batch": torch.tensor(supervised, device=device)}
    if fused:
        inputs["fused_loss"] = True
    seconds = 0.0
    for attempt in range(2):  # the first time is slow
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=training.autocast):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds = time.perf_counter() - begin
        if attempt == 0 and seconds > 2 * _SECONDS:
            break
    head = supervised if options.packs and training.supervised_only else computed
    squared = float(np.square(lengths).sum()) if options.packs else computed * float(batch["input_ids"].shape[-1])
    found.flops["train"] = training.flops(facts, computed, head, squared) / seconds
    found.lines.append(
        f"train: {computed:,} tokens a step in {seconds:.1f} s, {computed / seconds:,.0f} tokens/s, measured here"
    )


def _one_batch(tokenizer: Any, training: TrainingShape, flags: Any, rows: Sequence[Record], room: int) -> list[Sample]:
    """Samples that make at most ``room`` tokens, padding included."""
    encoded = encode_conversations(rows, tokenizer, flags.model_type, flags.max_seq_len, flags.on_overflow)
    samples: list[Sample] = []
    for sample in encoded:
        if isinstance(sample, Sample) and len(sample.input_ids) <= room - sum(len(s.input_ids) for s in samples):
            samples.append(sample)
    if training.pad_mode == "max_length":
        samples = samples[: room // training.capacity]
    elif training.pad_mode == "dynamic_pad":
        samples = samples[: max(1, room // max(len(s.input_ids) for s in samples))] if samples else []
    if not samples:
        raise InputError("no row of the sample is short enough to be tried in a few seconds")
    return samples


def _embedding(
    found: Calibration, settings: RunSettings, folder: Path, facts: ModelFacts, rows: Sequence[Record]
) -> None:
    from codeact.embedding.vectors import embed_texts, load_embedder

    with suppress(InputError):
        encoder = load_embedder(folder, device=settings.embed.device, dtype=settings.embed.dtype)
        texts = [row.question for row in rows[: 4 * _ROWS]]
        embed_texts(texts[:1], encoder)
        begin = time.perf_counter()
        result = embed_texts(texts, encoder, batch_size=_ROWS)
        seconds = time.perf_counter() - begin
        mean = result.tokens / len(texts)
        # Not causal: every token sees all others.
        flops = facts.forward_flops(result.tokens, 2 * result.tokens * mean, 0)
        found.flops["embed"] = flops / seconds
        found.lines.append(
            f"embed: {result.tokens:,} tokens in {seconds:.1f} s, {result.tokens / seconds:,.0f} tokens/s, "
            "measured here"
        )
