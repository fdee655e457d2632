"""IFD one row at a time, as its definitions read. For tests, and the loop that benchmarks measure against."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from codeact.data.records import Record
from codeact.text.templates import PromptBuilder
from codeact.text.tokenizers import leading_bos


@torch.inference_mode()
def exact_ifd(
    model: PreTrainedModel, tokenizer: Any, record: Record, template: str = "qa", max_length: int = 2048
) -> float:
    """IFD of one record under the exact protocol: the answer's ids made once, sums in float64."""
    bos = leading_bos(tokenizer)
    prompt = tokenizer(PromptBuilder(tokenizer, template).render(record), add_special_tokens=False)["input_ids"]
    prompt = prompt[1:] if bos and prompt[:1] == bos else prompt
    answer = tokenizer(record.answer, add_special_tokens=False)["input_ids"]
    answer = answer[: max_length - len(bos) - len(prompt)]
    scored = len(answer) if bos else len(answer) - 1

    def mean_nll(ids: list[int]) -> float:
        logits = model(torch.tensor([ids], device=model.device)).logits[0, -scored - 1 : -1].double().cpu()
        log_probs = logits.log_softmax(dim=-1)
        return float(-log_probs[range(scored), ids[-scored:]].sum()) / scored

    return math.exp(mean_nll([*bos, *prompt, *answer]) - mean_nll([*bos, *answer]))


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
