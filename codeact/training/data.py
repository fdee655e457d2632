"""What a run trains on: conversations as samples, those held out, and what became of every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from codeact.base.console import Progress
from codeact.base.errors import InputError
from codeact.data.forms import Columns
from codeact.data.records import RecordSet, open_records
from codeact.models.adapters import check_targets
from codeact.models.loading import config_of, load_tokenizer, positions_of
from codeact.text.conversations import (
    IGNORE,
    EncodingCounts,
    Refused,
    Sample,
    count_conversations,
    encode_conversations,
)
from codeact.text.templates import ConversationTemplate
from codeact.training.flags import TrainSettings
from codeact.training.options import DataArguments

_NAMED_REFUSALS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The samples of a run, and what became of the rows that they were made of."""

    source: str
    fingerprints: list[str]
    samples: list[Sample]
    held_out: list[Sample]
    counts: EncodingCounts
    held_out_counts: EncodingCounts | None
    refused: list[Refused]

    @classmethod
    def read(cls, settings: TrainSettings, tokenizer: Any) -> TrainingData:
        """Tokenize the conversations, and hold some out.

        Raises:
            InputError: none of them can be trained on, or none evaluated on.
        """
        records = _open(settings.data, settings.data.data_path or "")
        results, samples, refused = _encode(records, settings, tokenizer)
        if not samples:
            first = next((result.message for result in refused), "")
            raise InputError(f"{records.source}: none of {len(records):,} rows can be trained on; the first: {first}")
        held_out: list[Sample] = []
        held_out_counts = None
        fingerprints = [records.fingerprint]
        if settings.data.eval_path:
            others = _open(settings.data, settings.data.eval_path)
            fingerprints.append(others.fingerprint)
            of_others, held_out, more = _encode(others, settings, tokenizer)
            refused += more
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
        if counts.changed:
            text = f"{counts.changed:,} earlier answers, which the chat template changes (leaves out their reasoning)"
            lines.append(("  not learnt", text))
        if self.held_out_counts is not None:
            lost = sum(self.held_out_counts.refused.values())
            cut = f"{lost:,} dropped and {self.held_out_counts.truncated:,} cut"
            lines.append(("held out", f"{len(self.held_out):,} other conversations ({cut})"))
        elif self.held_out:
            lines.append(("held out", f"{len(self.held_out):,} of them"))
        tokens = token_count(self.samples)
        labels = sum(int(np.count_nonzero(sample.labels != IGNORE)) for sample in self.samples)
        lines.append(("samples", f"{len(self.samples):,} of {tokens:,} tokens, {labels:,} of them to be learnt"))
        lines += [("dropped", refused.message) for refused in self.refused[:_NAMED_REFUSALS]]
        return lines


def load_trainable(name: str, data: Any, packs: Any) -> Any:
    """Load a model's tokenizer, if what is said of data and packs fits it and the model's configuration.

    Args:
        name: the model's folder or hub name.
        data: what has ``model_type``.
        packs: what has ``max_length``.

    Raises:
        InputError: the model has fewer positions, or its chat template cannot be trained on.
    """
    tokenizer = load_tokenizer(name)
    template = ConversationTemplate(tokenizer, data.model_type)
    template.check_trainable()
    if template.own or template.model_type != "chat":
        tokenizer.chat_template = template.jinja  # is saved with the model, which is asked so by others, too
    config = config_of(name)
    positions = config and positions_of(config)
    if positions and packs.max_length > positions:
        raise InputError(f"--max_length {packs.max_length} is more than the {positions} positions of {name}; lower it")
    return tokenizer


def check_data_and_adapters(name: str, flags: Any) -> None:
    """Find what would stop a training before there are weights: held-out data, and layers for adapters.

    Raises:
        InputError: the data cannot be opened, or the model has no layer of one of the names.
    """
    if flags.eval_path:
        _open(flags, flags.eval_path)
    if flags.lora and (config := config_of(name)) is not None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        check_targets(model, flags.lora_target_modules)


def _open(data: DataArguments, path: str) -> RecordSet:
    names = {
        "question": data.question_column,
        "answer": data.answer_column,
        "input": data.input_column,
        "conversation": data.conversation_column,
    }
    return open_records(path, Columns(**names), split=data.split, config_name=data.config_name)


def _encode(
    records: RecordSet, settings: TrainSettings, tokenizer: Any
) -> tuple[list[Sample | Refused], list[Sample], list[Refused]]:
    """What became of every row, and the two kinds of it."""
    quiet = not settings.trainer.should_log or settings.trainer.disable_tqdm
    config = config_of(settings.model.model_name_or_path or "")
    with Progress(len(records), "rows", f"tokenizing {records.source}", show=not quiet) as step:
        results = encode_conversations(
            records,
            tokenizer,
            settings.data.model_type,
            settings.packs.max_length,
            settings.data.on_overflow,
            progress=step,
            last_answer_only=settings.data.last_answer_only,
            vocabulary=config and getattr(config.get_text_config(), "vocab_size", None),
        )
    samples = [result for result in results if isinstance(result, Sample)]
    return results, samples, [result for result in results if isinstance(result, Refused)]


def token_count(samples: Sequence[Sample]) -> int:
    """Tokens of all samples."""
    return sum(len(sample.input_ids) for sample in samples)
