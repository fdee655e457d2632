"""Record + template -> token ids of the two passes that an IFD score compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from codeact.base.protocols import resolve_protocol
from codeact.data.records import BadRow, Record
from codeact.text.spans import ControlTexts, SpanEncoder, SpannedText
from codeact.text.templates import PromptBuilder, special_tokens
from codeact.text.tokenizers import beyond

STATUSES = (
    "ok",
    "unreadable",
    "empty_question",
    "empty_answer",
    "answer_too_short",
    "prompt_too_long",
    "token_beyond_model",
    "nonfinite",
)
"""What can become of a row. ``answer_too_short``: one answer token and no BOS before it, so nothing can be scored.
``token_beyond_model``: the tokenizer has a token that the model's embedding or head has no row for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedRecord:
    """The two sequences of a record, and from which token on each is scored.

    ``conditional`` is ``[BOS] prompt answer``, ``unconditional`` is ``[BOS] answer``; the tokens from ``*_start`` to
    the end of each are scored. Both are empty unless ``status`` is "ok". ``answer_tokens`` counts the whole answer,
    also where ``truncated`` says that its end was cut to fit.
    """

    status: str
    reason: str | None = None
    truncated: bool = False
    prompt_tokens: int = 0
    answer_tokens: int = 0
    conditional: Sequence[int] = ()
    conditional_start: int = 0
    unconditional: Sequence[int] = ()
    unconditional_start: int = 0


def tokenize(
    rows: Sequence[Record | BadRow],
    tokenizer: Any,
    prompts: PromptBuilder,
    max_length: int,
    protocol: str = "exact",
    vocabulary: int | None = None,
) -> list[TokenizedRecord]:
    """Tokenize rows for scoring; one result a row, in order, whatever became of it.

    Args:
        rows: records, and the rows that hold none.
        tokenizer: a transformers tokenizer.
        prompts: how the question is put.
        max_length: tokens that a sequence may hold, its BOS included.
        protocol: "exact" tokenizes the answer once and uses those ids in both passes; an answer that does not fit is
            cut at its end, the same in both; the text of a control token in a row is plain text, as in training.
            "paper" repeats the paper's reference script: prompt and answer are encoded as one text, the prompt once
            more alone to find where it ends, and the answer alone, and control tokens are read wherever they stand.
        vocabulary: how many tokens the model knows; None: all of the tokenizer's.
    """
    protocol = resolve_protocol(protocol)
    results: list[TokenizedRecord | None] = [None] * len(rows)
    controls = ControlTexts(special_tokens(tokenizer))
    texts: list[tuple[int, SpannedText, SpannedText]] = []
    for index, row in enumerate(rows):
        if isinstance(row, BadRow):
            status = row.reason if row.reason in STATUSES else "unreadable"
            results[index] = TokenizedRecord(status=status, reason=f"{row.reason}: {row.message}")
            continue
        (question, answer, *history), marks = controls.hide([row.question, row.answer, *(t for _, t in row.history)])
        roles = [role for role, _ in row.history]
        hidden = replace(row, question=question, answer=answer, history=tuple(zip(roles, history, strict=True)))
        try:
            prompt = controls.show(prompts.render(hidden), marks)
        except ValueError as error:
            results[index] = TokenizedRecord(status="unreadable", reason=f"template_refused: row {row.row}: {error}")
        else:
            texts.append((index, prompt, controls.show(answer, marks)))
    if texts:
        indices, prompt_texts, answers = zip(*texts, strict=True)
        build = {"exact": _exact, "paper": _paper}[protocol]
        for index, item in zip(indices, build(tokenizer, prompt_texts, answers, max_length), strict=True):
            result = item if vocabulary is None or item.status != "ok" else _within(item, tokenizer, vocabulary)
            reason = result.reason and f"{result.status}: row {rows[index].row}: {result.reason}"
            results[index] = replace(result, reason=reason)
    return [result for result in results if result is not None]


def _within(item: TokenizedRecord, tokenizer: Any, vocabulary: int) -> TokenizedRecord:
    """The same, or without its tokens if the model does not know one of them."""
    if (reason := beyond([*item.conditional, *item.unconditional], tokenizer, vocabulary)) is None:
        return item
    return TokenizedRecord(
        status="token_beyond_model",
        reason=reason,
        prompt_tokens=item.prompt_tokens,
        answer_tokens=item.answer_tokens,
    )


def _exact(
    tokenizer: Any, prompts: Sequence[SpannedText], answers: Sequence[SpannedText], max_length: int
) -> list[TokenizedRecord]:
    encoder = SpanEncoder(tokenizer)
    bos = encoder.bos
    results = []
    # The encoder puts the BOS first, once, also where a chat template writes it itself.
    encoded = [ids[len(bos) :].tolist() for ids, _ in encoder.encode([*prompts, *answers])]
    for prompt, answer in zip(encoded[: len(prompts)], encoded[len(prompts) :], strict=True):
        room = max_length - len(bos) - len(prompt)
        # Without a BOS nothing stands before the first answer token of the unconditional pass, so neither scores it.
        first = 0 if bos else 1
        counts: dict[str, Any] = {
            "prompt_tokens": len(prompt),
            "answer_tokens": len(answer),
            "truncated": first < room < len(answer),
        }
        if not answer:
            results.append(TokenizedRecord(status="empty_answer", reason="the answer has no tokens", **counts))
        elif len(answer) <= first:
            reason = "the answer is one token, and without a BOS before it the first cannot be scored"
            results.append(TokenizedRecord(status="answer_too_short", reason=reason, **counts))
        elif room <= first:
            reason = f"{len(prompt)} tokens leave no room for an answer in {max_length}"
            results.append(TokenizedRecord(status="prompt_too_long", reason=reason, **counts))
        else:
            kept = answer[:room]
            results.append(
                TokenizedRecord(
                    status="ok",
                    conditional=[*bos, *prompt, *kept],
                    conditional_start=len(bos) + len(prompt) + first,
                    unconditional=[*bos, *kept],
                    unconditional_start=len(bos) + first,
                    **counts,
                )
            )
    return results


def _paper(
    tokenizer: Any, prompts: Sequence[SpannedText], answers: Sequence[SpannedText], max_length: int
) -> list[TokenizedRecord]:
    results = []
    both = [prompt.text + answer.text for prompt, answer in zip(prompts, answers, strict=True)]
    encoded = zip(
        # verbose=False: a text longer than the model's limit is handled below, the tokenizer need not warn of it.
        *(
            tokenizer(texts, verbose=False)["input_ids"]
            for texts in ([item.text for item in prompts], both, [item.text for item in answers])
        ),
        strict=True,
    )
    for prompt, full, answer in encoded:
        end = min(len(prompt), max_length)
        alone = answer[: max_length - end + 1]
        counts: dict[str, Any] = {
            "prompt_tokens": end,
            "answer_tokens": len(full) - end,
            "truncated": end < max_length and (len(full) > max_length or len(alone) < len(answer)),
        }
        # What the shifted loss scores: full[max(end, 1):] and alone[1:].
        if min(len(full), max_length) <= end:
            reason = f"{len(prompt)} tokens leave no room for an answer in {max_length}"
            results.append(TokenizedRecord(status="prompt_too_long", reason=reason, **counts))
        elif len(alone) < 2:
            reason = "the answer alone is one token, and the first is not scored"
            results.append(TokenizedRecord(status="answer_too_short", reason=reason, **counts))
        else:
            results.append(
                TokenizedRecord(
                    status="ok",
                    conditional=full[:max_length],
                    conditional_start=max(end, 1),
                    unconditional=alone,
                    unconditional_start=1,
                    **counts,
                )
            )
    return results
