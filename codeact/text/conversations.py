"""Conversation -> training sample: token ids, and labels on what the model has to write and on nothing else.

Where an answer begins and ends is known in the rendered text (`codeact.text.templates`), to the character, and kept
through tokenization (`codeact.text.spans`); a prompt is never tokenized a second time to find out how long it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codeact.base.errors import InputError, one_of
from codeact.data.records import BadRow, Record, open_rows
from codeact.text.spans import ControlTexts, Ints, SpanEncoder, SpannedText
from codeact.text.templates import ConversationTemplate, special_tokens
from codeact.text.tokenizers import beyond

IGNORE = -100
"""The label of a token that is not learned."""

OVERFLOWS = ("truncate", "drop", "error")
BLOCK_ROWS = 1024  # rows tokenized in one call; more only costs memory for offsets


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """What a model is trained on.

    ``input_ids`` int32 (L,); ``labels`` int32 (L,), equal to ``input_ids`` on answers and their end of turn and
    ``IGNORE`` elsewhere (not shifted: transformers does that). Both end with the last label, since what follows it
    cannot change a causal loss. ``cut_tokens``: so many more there were, of the end of an answer or of whole later
    turns, that did not fit. ``changed``: so many earlier answers are context because the chat template writes them
    otherwise than the data, most often without their reasoning.
    """

    input_ids: Ints
    labels: Ints
    cut_tokens: int
    changed: int = 0

    @property
    def truncated(self) -> bool:
        """Whether something did not fit."""
        return self.cut_tokens > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A row that gives no sample.

    ``reason`` is a code: one of `codeact.data.records.BadRow`, or template_refused, empty_answer, invalid_utf8,
    no_label_left, too_long, token_beyond_model. ``message`` is one line that names the row.
    """

    id: str
    row: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingCounts:
    """What became of rows: ``rows == samples + sum(refused.values())``; ``changed``: answers, see ``Sample``."""

    rows: int
    samples: int
    truncated: int
    cut_tokens: int
    changed: int
    tokens: int
    labelled_tokens: int
    refused: dict[str, int]


def encode_conversations(
    rows: Any,
    tokenizer: Any,
    model_type: str = "chat",
    max_length: int = 2048,
    on_overflow: str = "truncate",
    progress: Callable[[int], object] | None = None,
    last_answer_only: bool = False,
    vocabulary: int | None = None,
) -> list[Sample | Refused]:
    """Tokenize conversations for training; one result a row, in order.

    Every assistant turn is labelled, its end of turn too, unless the data excludes it (weight 0) or a chat template
    changes it once later turns follow (leaves out its reasoning). A BOS stands first, once, if the tokenizer has one.

    Args:
        rows: records, and the rows that hold none; or whatever `codeact.data.records.open_records` opens.
        tokenizer: a transformers tokenizer. A slow one works; it is cut at both ends of every answer.
        model_type: one of `codeact.text.templates.MODEL_TYPES`.
        max_length: tokens of a sample at most, BOS included.
        on_overflow: of a conversation that is longer: "truncate" cuts at the end, so the question stays and the answer
            that was cut has no end of turn; "drop" refuses the row; "error" stops.
        progress: called with the number of rows of every block that is done.
        last_answer_only: what came before the last question is context, its answers are not labelled.
        vocabulary: how many tokens the model knows, if it may be fewer than the tokenizer's; a row with another one is
            refused.

    Raises:
        InputError: a setting is unknown, the tokenizer does not fit the model type, or, with "error", the first row
            that is too long.
    """
    one_of("on_overflow", on_overflow, OVERFLOWS)
    if max_length < 2:
        raise InputError(f"max_length is {max_length}; a sample needs at least 2 tokens")
    template = ConversationTemplate(tokenizer, model_type)
    template.check_trainable()
    controls = ControlTexts(special_tokens(tokenizer))
    encoder = SpanEncoder(tokenizer)
    results: list[Sample | Refused] = []
    for block in _blocks(open_rows(rows)):
        written = [_write(row, template, controls, last_answer_only) for row in block]
        apart = template.model_type != "chat" and bool(template.family.rounds)
        encoded = iter(encoder.encode([item for item in written if isinstance(item, SpannedText) and not apart]))
        for row, item in zip(block, written, strict=True):
            if isinstance(item, Refused):
                results.append(item)
            else:
                assert isinstance(row, Record)
                ids, labelled = _rounds(row, item, template) if apart else next(encoded)
                sample = _sample(row, ids, labelled, item.changed, max_length, on_overflow)
                results.append(_within(row, sample, tokenizer, vocabulary))
        if progress is not None:
            progress(len(block))
    return results


def _within(row: Record | BadRow, sample: Sample | Refused, tokenizer: Any, vocabulary: int | None) -> Sample | Refused:
    """The same, or a refusal if the model does not know one of its tokens."""
    if isinstance(sample, Refused) or (reason := beyond(sample.input_ids, tokenizer, vocabulary)) is None:
        return sample
    return _refuse(row, "token_beyond_model", f"row {row.row} (id {row.id}): {reason}")


def count_conversations(results: Sequence[Sample | Refused]) -> EncodingCounts:
    """Count what `encode_conversations` returned."""
    samples = [result for result in results if isinstance(result, Sample)]
    return EncodingCounts(
        rows=len(results),
        samples=len(samples),
        truncated=sum(sample.truncated for sample in samples),
        cut_tokens=sum(sample.cut_tokens for sample in samples),
        changed=sum(sample.changed for sample in samples),
        tokens=sum(len(sample.input_ids) for sample in samples),
        labelled_tokens=sum(int(np.count_nonzero(sample.labels != IGNORE)) for sample in samples),
        refused=dict(Counter(result.reason for result in results if isinstance(result, Refused))),
    )


def _blocks(rows: Iterable[Record | BadRow]) -> Iterator[list[Record | BadRow]]:
    remaining = iter(rows)
    while block := list(islice(remaining, BLOCK_ROWS)):
        yield block


def _refuse(row: Record | BadRow, reason: str, message: str) -> Refused:
    return Refused(id=row.id, row=row.row, reason=reason, message=message)


def _sample(
    row: Record | BadRow, ids: Ints, labelled: NDArray[np.bool_], changed: int, max_length: int, on_overflow: str
) -> Sample | Refused:
    wanted = np.flatnonzero(labelled)
    length = int(wanted[-1]) + 1 if len(wanted) else 0
    if length > max_length and on_overflow != "truncate":
        message = f"row {row.row} (id {row.id}): {length} tokens are more than {max_length}"
        if on_overflow == "error":
            raise InputError(f"{message}; raise the length, or use on_overflow truncate or drop")
        return _refuse(row, "too_long", message)
    kept = wanted[wanted < max_length]
    # Nothing comes before the first token that could predict it.
    if not len(kept) or kept[-1] == 0:
        question = int(wanted[0]) if length else len(ids)
        message = f"row {row.row} (id {row.id}): {question} tokens of prompt leave no answer within {max_length}"
        return _refuse(row, "no_label_left", message)
    # A cut may fall into a later question; what comes after the last label that is left is of no use.
    stop = int(kept[-1]) + 1
    labels = np.where(labelled[:stop], ids[:stop], np.int32(IGNORE))
    return Sample(input_ids=ids[:stop].copy(), labels=labels, cut_tokens=length - stop, changed=changed)


def _rounds(row: Record, item: SpannedText, template: ConversationTemplate) -> tuple[Ints, NDArray[np.bool_]]:
    """A conversation as the paper's script tokenizes it: every question and every answer by itself."""
    ids: list[int] = []
    labelled: list[bool] = []
    for (prompt, answer), span in zip(
        template.family.encode_rounds(template.tokenizer, row.turns), item.answers, strict=True
    ):
        ids += [*prompt, *answer]
        labelled += [False] * len(prompt) + [span not in item.context] * len(answer)
    return np.array(ids, np.int32), np.array(labelled, np.bool_)


def _write(
    row: Record | BadRow, template: ConversationTemplate, controls: ControlTexts, last_answer_only: bool
) -> SpannedText | Refused:
    """A record as text, and where its answers are."""
    if isinstance(row, BadRow):
        return _refuse(row, row.reason, row.message)
    roles = [role for role, _ in row.turns]
    texts = [text for _, text in row.turns]
    where = f"row {row.row} (id {row.id})"
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return _refuse(row, "invalid_utf8", f"{where} holds half of a surrogate pair, which is no text")
    if any(role == "assistant" and not text.strip() for role, text in row.turns):
        return _refuse(row, "empty_answer", f"{where}: an answer is blank")
    hidden, marks = controls.hide(texts)
    (rendered,) = template.render([list(zip(roles, hidden, strict=True))])
    if isinstance(rendered, str):
        return _refuse(row, "template_refused", f"{where}: {rendered}")
    whole = controls.show(rendered.text, marks, rendered.answers)
    numbers = [number for number, role in enumerate(roles) if role == "assistant"]
    context = {*numbers[:-1]} if last_answer_only else {*row.context}
    changed = {numbers[place] for place in rendered.changed} - context
    context |= changed
    if context and len(numbers) != len(whole.answers):
        message = f"{where}: the chat template marks {len(whole.answers)} of {len(numbers)} answers, and not all count"
        return _refuse(row, "template_refused", message)
    spans = zip(numbers, whole.answers, strict=False)
    context_spans = frozenset(span for number, span in spans if number in context)
    return replace(whole, context=context_spans, changed=len(changed))
