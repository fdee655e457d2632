"""IFD one row at a time, as its definitions read. For tests, and the loop that benchmarks measure against."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from codeact.data.records import Record
from codeact.scoring.tokens import tokenize
from codeact.text.templates import PromptBuilder
from codeact.text.tokenizers import leading_bos


@torch.inference_mode()
def exact_ifd(
    model: PreTrainedModel, tokenizer: Any, record: Record, template: str = "qa", max_length: int = 2048
) -> float:
    """IFD of one record under the exact protocol: a forward pass for each sequence, logits, sums in float64."""
    (item,) = tokenize([record], tokenizer, PromptBuilder(tokenizer, template), max_length)
    scored = len(item.unconditional) - item.unconditional_start
    conditional = _nll_sum(model, list(item.conditional), scored)
    return math.exp((conditional - _nll_sum(model, list(item.unconditional), scored)) / scored)


@torch.inference_mode()
def exact_turns(
    model: PreTrainedModel, tokenizer: Any, record: Record, template: str = "qa", max_length: int = 2048
) -> dict[int, tuple[float, float, int]]:
    """The answers of a conversation, one turn at a time: two forward passes for each.

    Before an answer stand the tokens of the prompt that the template writes for it, made apart for every answer and for
    what is written between two of them. So it is for templates that write past answers as they are.

    Returns:
        By the place of each answer that is scored among the turns: the NLL sums (nats) given all before it and alone,
        and its scored tokens.
    """
    prompts, bos = PromptBuilder(tokenizer, template), leading_bos(tokenizer)
    results = {}
    written, before = "", list(bos)
    for number, (role, answer) in enumerate(record.turns):
        asked = any(role == "user" and text.strip() for role, text in record.turns[:number])
        if role != "assistant" or number in record.context or not answer.strip() or not asked:
            continue
        prompt = prompts.prompt(record.turns[:number])
        if not prompt.startswith(written):
            written, before = "", list(bos)
        ids = tokenizer([prompt.removeprefix(written), answer], add_special_tokens=False)["input_ids"]
        between = ids[0][len(bos) :] if not written and ids[0][:1] == bos else ids[0]
        before = before + between
        kept = ids[1][: max(0, max_length - len(before))]
        scored = len(kept) if bos else len(kept) - 1  # the first token of all is predicted by nothing
        if scored > 0:
            sums = (_nll_sum(model, before + kept, scored), _nll_sum(model, bos + kept, scored))
            results[number] = (*sums, scored)
        written, before = prompt + answer, before + ids[1]
    return results


def _nll_sum(model: PreTrainedModel, ids: list[int], scored: int) -> float:
    """Of the last ``scored`` tokens, nats."""
    logits = model(torch.tensor([ids], device=model.device)).logits[0, -scored - 1 : -1].double().cpu()
    return float(-logits.log_softmax(dim=-1)[range(scored), ids[-scored:]].sum())


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
