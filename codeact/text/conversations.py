"""Conversation -> training sample: token ids, and labels on what the model has to write and on nothing else.

Where an answer begins and ends is known in the rendered text (`codeact.text.templates`), to the character, and kept
through tokenization (`codeact.text.spans`); a prompt is never tokenized a second time to find out how long it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codeact.base.errors import InputError, one_of
from codeact.data.records import BadRow, Columns, Record, RecordSet, open_records
from codeact.text.formats import Rendered, Turn
from codeact.text.spans import Ints, SpanEncoder, SpannedText
from codeact.text.templates import ConversationTemplate, special_tokens

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
    turns, that did not fit.
    """

    input_ids: Ints
    labels: Ints
    cut_tokens: int

    @property
    def truncated(self) -> bool:
        """Whether something did not fit."""
        return self.cut_tokens > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A row that gives no sample.

    ``reason`` is a code: one of `codeact.data.records.BadRow`, or template_refused, empty_answer, invalid_utf8,
    no_label_left, too_long. ``message`` is one line that names the row.
    """

    id: str
    row: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingCounts:
    """What became of rows: ``rows == samples + sum(refused.values())``."""

    rows: int
    samples: int
    truncated: int
    cut_tokens: int
    tokens: int
    labelled_tokens: int
    refused: dict[str, int]


def open_conversations(data: str | Path) -> RecordSet:
    """Open training data in any of the usual forms.

    The first form that fits is taken: a column ``conversation`` (what `codeact select` writes), ``conversations``
    (ShareGPT) or ``messages``; ``instruction``, ``input`` and ``output`` (Alpaca); ``instruction`` and ``output``.
    For other columns call `codeact.data.records.open_records`.

    Raises:
        InputError: nothing there, or it has none of these columns.
    """
    forms = [Columns(conversation=name) for name in ("conversation", "conversations", "messages")]
    for columns in (*forms, Columns(input="input")):
        try:
            return open_records(data, columns)
        except InputError:
            continue
    return open_records(data, Columns())


def encode_conversations(
    rows: Iterable[Record | BadRow],
    tokenizer: Any,
    model_type: str = "chat",
    max_length: int = 2048,
    on_overflow: str = "truncate",
    progress: Callable[[int], object] | None = None,
) -> list[Sample | Refused]:
    """Tokenize conversations for training; one result a row, in order.

    Every assistant turn is labelled, its end of turn too. A BOS stands first, once, if the tokenizer writes one.

    Args:
        rows: records, and the rows that hold none.
        tokenizer: a transformers tokenizer. A slow one works; it is cut at both ends of every answer.
        model_type: one of `codeact.text.templates.MODEL_TYPES`.
        max_length: tokens of a sample at most, BOS included.
        on_overflow: of a conversation that is longer: "truncate" cuts at the end, so the question stays and the answer
            that was cut has no end of turn; "drop" refuses the row; "error" stops.
        progress: called with the number of rows of every block that is done.

    Raises:
        InputError: a setting is unknown, the tokenizer does not fit the model type, or, with "error", the first row
            that is too long.
    """
    one_of("on_overflow", on_overflow, OVERFLOWS)
    if max_length < 2:
        raise InputError(f"max_length is {max_length}; a sample needs at least 2 tokens")
    template = ConversationTemplate(tokenizer, model_type)
    template.check_trainable()
    writer = _Writer(template, special_tokens(tokenizer))
    encoder = SpanEncoder(tokenizer)
    results: list[Sample | Refused] = []
    for block in _blocks(rows):
        written = [writer.write(row) for row in block]
        encoded = iter(encoder.encode([item for item in written if isinstance(item, SpannedText)]))
        for row, item in zip(block, written, strict=True):
            if isinstance(item, Refused):
                results.append(item)
            else:
                results.append(_sample(row, *next(encoded), max_length, on_overflow))
        if progress is not None:
            progress(len(block))
    return results


def count_conversations(results: Sequence[Sample | Refused]) -> EncodingCounts:
    """Count what `encode_conversations` returned."""
    samples = [result for result in results if isinstance(result, Sample)]
    return EncodingCounts(
        rows=len(results),
        samples=len(samples),
        truncated=sum(sample.truncated for sample in samples),
        cut_tokens=sum(sample.cut_tokens for sample in samples),
        tokens=sum(len(sample.input_ids) for sample in samples),
        labelled_tokens=sum(int(np.count_nonzero(sample.labels != IGNORE)) for sample in samples),
        refused=dict(Counter(result.reason for result in results if isinstance(result, Refused))),
    )


def _blocks(rows: Iterable[Record | BadRow]) -> Iterable[list[Record | BadRow]]:
    block = []
    for row in rows:
        block.append(row)
        if len(block) == BLOCK_ROWS:
            yield block
            block = []
    if block:
        yield block


def _refuse(row: Record | BadRow, reason: str, message: str) -> Refused:
    return Refused(id=row.id, row=row.row, reason=reason, message=message)


def _sample(
    row: Record | BadRow, ids: Ints, labelled: NDArray[np.bool_], max_length: int, on_overflow: str
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
    return Sample(input_ids=ids[:stop].copy(), labels=labels, cut_tokens=length - stop)


# ---------------------------------------------------------------------------------------------------- record -> text


class _Writer:
    """Records -> text with spans."""

    def __init__(self, template: ConversationTemplate, specials: Sequence[str]) -> None:
        self.template = template
        self.specials = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def write(self, row: Record | BadRow) -> SpannedText | Refused:
        if isinstance(row, BadRow):
            return _refuse(row, row.reason, row.message)
        turns: list[Turn] = [*row.history, ("user", row.question), ("assistant", row.answer)]
        where = f"row {row.row} (id {row.id})"
        texts = "".join(text for _, text in turns)
        try:
            texts.encode()
        except UnicodeEncodeError:
            return _refuse(row, "invalid_utf8", f"{where} holds half of a surrogate pair, which is no text")
        if any(role == "assistant" and not text.strip() for role, text in turns):
            return _refuse(row, "empty_answer", f"{where}: an answer is blank")
        # Control tokens in a turn's text pass through the template as single characters that stand nowhere else.
        free = (mark for mark in map(chr, count(0xF0000)) if mark not in texts)
        marks = {token: next(free) for token in sorted(set(self.specials.findall(texts)))}
        if marks:
            turns = [(role, self.specials.sub(lambda match: marks[match[0]], text)) for role, text in turns]
        (rendered,) = self.template.render([turns])
        if isinstance(rendered, str):
            return _refuse(row, "template_refused", f"{where}: {rendered}")
        return _restore(rendered, {mark: token for token, mark in marks.items()})


def _restore(rendered: Rendered, tokens: dict[str, str]) -> SpannedText:
    """Put the texts of control tokens back where their marks stand; spans move along."""
    if not tokens:
        return SpannedText(text=rendered.text, answers=rendered.answers, plain=frozenset())
    places = [match.start() for match in re.finditer("[" + "".join(tokens) + "]", rendered.text)]
    grown = np.cumsum([0, *(len(tokens[rendered.text[place]]) - 1 for place in places)])

    def moved(position: int) -> int:
        return position + int(grown[np.searchsorted(places, position)])

    return SpannedText(
        text=re.sub("[" + "".join(tokens) + "]", lambda match: tokens[match[0]], rendered.text),
        answers=tuple((moved(start), moved(end)) for start, end in rendered.answers),
        plain=frozenset((moved(place), moved(place + 1)) for place in places),
    )
