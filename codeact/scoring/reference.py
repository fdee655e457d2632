"""IFD one row at a time, as its definitions read. For tests, and the loop that benchmarks measure against."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from codeact.data.records import Record
from codeact.scoring.tokens import tokenize
from codeact.text.templates import PromptBuilder


@torch.inference_mode()
def exact_ifd(
    model: PreTrainedModel, tokenizer: Any, record: Record, template: str = "qa", max_length: int = 2048
) -> float:
    """IFD of one record under the exact protocol: a forward pass for each sequence, logits, sums in float64."""
    (item,) = tokenize([record], tokenizer, PromptBuilder(tokenizer, template), max_length)

    def mean_nll(ids: list[int], start: int) -> float:
        logits = model(torch.tensor([ids], device=model.device)).logits[0, start - 1 : -1].double().cpu()
        scored = ids[start:]
        return float(-logits.log_softmax(dim=-1)[range(len(scored)), scored].sum()) / len(scored)

    conditional = mean_nll(list(item.conditional), item.conditional_start)
    return math.exp(conditional - mean_nll(list(item.unconditional), item.unconditional_start))


@torch.inference_mode()
def paper_ifd(model: PreTrainedModel, tokenizer: Any, record: Record, max_length: int = 2048) -> float:
    """IFD of one record by the procedure of the paper's script: two forward passes with labels, losses of the model."""
    prompt = f"Question:\n{record.question}\n\nAnswer:\n"

    def encode(text: str, limit: int) -> torch.Tensor:
        encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=limit)
        ids: torch.Tensor = encoded["input_ids"].to(model.device)
        return ids

    end = encode(prompt, max_length).shape[1]
    full = encode(prompt + record.answer, max_length)
    labels = full.clone()
    labels[:, :end] = -100
    conditional = float(model(input_ids=full, labels=labels).loss)
    alone = encode(record.answer, max_length - end + 1)
    unconditional = float(model(input_ids=alone, labels=alone).loss)
    return math.exp(conditional) / math.exp(unconditional)
