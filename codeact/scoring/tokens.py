"""Record + template -> token ids of the two passes that an IFD score compares.

A conversation has one conditional sequence, ``[BOS] p1 a1 p2 a2 ...``, in which every answer that is to be learnt is
scored given all before it, and an unconditional one for each answer. See docs/score.md for the definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codeact.base.protocols import resolve_protocol, resolve_turns
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

CONTEXT = "context"
"""What becomes of an answer that is not to be learnt (weight 0), beside ``STATUSES``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedRecord:
    """The two sequences of an answer, and from which token on each is scored.

    ``conditional`` is ``[BOS] prompt answer``, ``unconditional`` is ``[BOS] answer``; the tokens from ``*_start`` to
    the end of each are scored. Both are empty unless ``status`` is "ok". ``answer_tokens`` counts the whole answer,
    also where ``truncated`` says that its end was cut to fit.

    Of a conversation ``turns`` has one of these for every answer; ``turn`` is its place among the turns. Answers that
    share a pass have the same list as ``conditional``, and each ends at its ``conditional_stop`` (None: at the end of
    the list). The conversation itself has no sequences: its ``answer_tokens`` are those of all answers that are to be
    learnt, its ``prompt_tokens`` all others that the conditional passes read.
    """

    status: str
    reason: str | None = None
    truncated: bool = False
    prompt_tokens: int = 0
    answer_tokens: int = 0
    conditional: Sequence[int] = ()
    conditional_start: int = 0
    conditional_stop: int | None = None
    unconditional: Sequence[int] = ()
    unconditional_start: int = 0
    turn: int | None = None
    turns: tuple[TokenizedRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """What the model reads to score some answers, each sequence once.

    ``spans``: of every sequence, which of its tokens ``[start, stop)`` are scored, apart for each answer. ``places``
    int64 (answers, 2): which of all spans, counted through, is that of an answer given what stands before it, and
    alone; (answers, 1) without the latter. ``apart``: the tokens of a pass for every answer by itself.
    """

    sequences: list[Sequence[int]]
    spans: list[list[tuple[int, int]]]
    places: NDArray[np.int64]
    apart: int

    def lengths(self) -> NDArray[np.int64]:
        """The scored tokens of every span."""
        return np.array([stop - start for spans in self.spans for start, stop in spans], np.int64)


def passes(answers: Iterable[TokenizedRecord], alone: bool = True) -> Passes:
    """Lay out what scoring takes; of all ``answers`` the status is "ok", and those of a conversation are in order.

    ``alone``: with the passes of the answers by themselves.
    """
    sequences: list[Sequence[int]] = []
    spans: list[list[tuple[int, int]]] = []
    places: list[tuple[int, ...]] = []
    first = apart = 0
    for _, group in groupby(answers, lambda answer: id(answer.conditional)):
        shared = list(group)
        whole, count = shared[0].conditional, len(shared)
        stops = [len(whole) if item.conditional_stop is None else item.conditional_stop for item in shared]
        sequences.append(whole)
        spans.append([(item.conditional_start, stop) for item, stop in zip(shared, stops, strict=True)])
        apart += sum(stops)
        for item in shared if alone else ():
            sequences.append(item.unconditional)
            spans.append([(item.unconditional_start, len(item.unconditional))])
            apart += len(item.unconditional)
        sides = 1 + alone
        places += [tuple(first + side * count + number for side in range(sides)) for number in range(count)]
        first += sides * count
    all_places = np.array(places, np.int64).reshape(-1, 1 + alone)
    return Passes(sequences=sequences, spans=spans, places=all_places, apart=apart)


def answers_of(items: Iterable[TokenizedRecord]) -> list[TokenizedRecord]:
    """The answers that can be scored, of rows in order."""
    return [answer for item in items for answer in (item.turns or (item,)) if answer.status == "ok"]


def tokenize(
    rows: Sequence[Record | BadRow],
    tokenizer: Any,
    prompts: PromptBuilder,
    max_length: int,
    protocol: str = "exact",
    vocabulary: int | None = None,
    turns: str = "last",
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
        turns: "all" or "last"; with "all" every record is a conversation, also one of a single answer.
    """
    protocol = resolve_protocol(protocol)
    turns = resolve_turns(turns, protocol)
    results: list[TokenizedRecord | None] = [None] * len(rows)
    controls = ControlTexts(special_tokens(tokenizer))
    written: list[tuple[int, dict[int, TokenizedRecord], list[_Run]]] = []
    for index, row in enumerate(rows):
        if isinstance(row, BadRow):
            status = row.reason if row.reason in STATUSES else "unreadable"
            results[index] = TokenizedRecord(status=status, reason=f"{row.reason}: {row.message}")
            continue
        hidden, marks = controls.hide([text for _, text in row.turns])
        talk = [(role, text) for (role, _), text in zip(row.turns, hidden, strict=True)]
        left_out = {} if turns == "last" else _left_out(row)
        numbers = [number for number, (role, _) in enumerate(talk) if role == "assistant" and number not in left_out]
        numbers = numbers[-1:] if turns == "last" else numbers
        try:
            texts = prompts.runs(talk, numbers)
        except ValueError as error:
            results[index] = TokenizedRecord(status="unreadable", reason=f"template_refused: row {row.row}: {error}")
            continue
        runs = [
            [(at, controls.show(text, marks), controls.show(hidden[at], marks)) for at, text in run] for run in texts
        ]
        written.append((index, left_out, runs))
    build = {"exact": _exact, "paper": _paper}[protocol]
    tokenized = iter(build(tokenizer, [run for _, _, runs in written for run in runs], max_length))
    for index, left_out, runs in written:
        made = [next(tokenized) for _ in runs]
        if turns == "all":
            result = _conversation(left_out, made, rows[index].row)
        else:
            ((item,),) = made
            result = replace(item, turn=None, reason=_reason(item, f"row {rows[index].row}"))
        results[index] = result if vocabulary is None else _within(result, tokenizer, vocabulary, rows[index].row)
    return [result for result in results if result is not None]


_Run = list[tuple[int, SpannedText, SpannedText]]
"""Of every answer that one conditional pass scores its place among the turns, the text before it, and its own."""


def _left_out(row: Record) -> dict[int, TokenizedRecord]:
    """The earlier answers of a conversation that are context: they are read and not scored."""
    left_out = {}
    asked = False
    for number, (role, text) in enumerate(row.history):
        asked |= role == "user" and bool(text.strip())
        if role != "assistant":
            continue
        if number in row.context:
            left_out[number] = TokenizedRecord(status=CONTEXT, turn=number)
        elif not text.strip():
            reason = "the answer is blank; write it, or take the turn out"
            left_out[number] = TokenizedRecord(status="empty_answer", reason=reason, turn=number)
        elif not asked:
            reason = "no question stands before this answer, so it is context; give it weight 0, or a user turn"
            left_out[number] = TokenizedRecord(status="empty_question", reason=reason, turn=number)
    return left_out


def _conversation(left_out: dict[int, TokenizedRecord], runs: list[list[TokenizedRecord]], row: int) -> TokenizedRecord:
    """A row of all its answers."""
    scored = [item for run in runs for item in run]
    places = sorted([*left_out.values(), *scored], key=lambda item: item.turn or 0)
    fit = [item for item in scored if item.status == "ok"]
    fell_out = any(item.status == "prompt_too_long" for item in scored)
    first = fit[0] if fit else scored[0]
    return TokenizedRecord(
        status=first.status,
        reason=_reason(first, f"row {row}"),
        truncated=bool(fit) and (fell_out or any(item.truncated for item in fit)),
        # the last answer of a run stands behind all its other tokens
        prompt_tokens=sum(run[-1].prompt_tokens - sum(item.answer_tokens for item in run[:-1]) for run in runs),
        answer_tokens=sum(item.answer_tokens for item in scored),
        turns=tuple(replace(item, reason=_reason(item, f"row {row}, turn {item.turn}")) for item in places),
    )


def _reason(item: TokenizedRecord, where: str) -> str | None:
    return item.reason and f"{item.status}: {where}: {item.reason}"


def _within(item: TokenizedRecord, tokenizer: Any, vocabulary: int, row: int) -> TokenizedRecord:
    """The same, or without its tokens if the model does not know one of them."""
    reason = beyond(chain.from_iterable(passes(answers_of([item])).sequences), tokenizer, vocabulary)
    if reason is None:
        return item

    def refused(item: TokenizedRecord, where: str) -> TokenizedRecord:
        if item.status != "ok":
            return item
        made = TokenizedRecord(
            status="token_beyond_model",
            reason=reason,
            prompt_tokens=item.prompt_tokens,
            answer_tokens=item.answer_tokens,
            turn=item.turn,
        )
        return replace(made, reason=_reason(made, where))

    turns = tuple(refused(turn, f"row {row}, turn {turn.turn}") for turn in item.turns)
    return replace(refused(item, f"row {row}"), turns=turns)


def _exact(tokenizer: Any, runs: Sequence[_Run], max_length: int) -> list[list[TokenizedRecord]]:
    """Every answer of every run, tokenized by itself, behind the tokens of all before it."""
    encoder = SpanEncoder(tokenizer)
    bos = encoder.bos
    # The encoder puts the BOS first, once, also where a chat template writes it itself.
    opening = iter([ids[len(bos) :].tolist() for ids, _ in encoder.encode([run[0][1] for run in runs])])
    between = iter(
        [ids.tolist() for ids, _ in encoder.encode([text for run in runs for _, text, _ in run[1:]], inner=True)]
    )
    answers = iter([ids[len(bos) :].tolist() for ids, _ in encoder.encode([text for run in runs for *_, text in run])])
    # Without a BOS nothing stands before the first answer token of the unconditional pass, so neither scores it.
    first = 0 if bos else 1
    results = []
    for run in runs:
        whole, made, stop = [*bos], [], 0
        for place, (number, _, _) in enumerate(run):
            whole += next(between) if place else next(opening)
            answer, start = next(answers), len(whole)
            room = max_length - start
            item: dict[str, Any] = {
                "turn": number,
                "prompt_tokens": start - len(bos),
                "answer_tokens": len(answer),
                "truncated": first < room < len(answer),
            }
            if not answer:
                item |= {"status": "empty_answer", "reason": "the answer has no tokens"}
            elif len(answer) <= first:
                reason = "the answer is one token, and without a BOS before it the first cannot be scored"
                item |= {"status": "answer_too_short", "reason": reason}
            elif room <= first:
                reason = f"{start - len(bos)} tokens leave no room for an answer in {max_length}"
                item |= {"status": "prompt_too_long", "reason": reason}
            else:
                kept = answer[:room]
                stop = start + len(kept)
                item |= {
                    "status": "ok",
                    "conditional": whole,  # the one list of all answers of the run, which grows
                    "conditional_start": start + first,
                    "conditional_stop": stop,
                    "unconditional": [*bos, *kept],
                    "unconditional_start": len(bos) + first,
                }
            made.append(TokenizedRecord(**item))
            whole += answer
        del whole[stop:]  # nothing that follows the last scored token changes its loss
        results.append(made)
    return results


def _paper(tokenizer: Any, runs: Sequence[_Run], max_length: int) -> list[list[TokenizedRecord]]:
    results: list[list[TokenizedRecord]] = []
    if not runs:
        return results
    prompts, answers = zip(*((prompt.text, answer.text) for ((_, prompt, answer),) in runs), strict=True)
    both = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    encoded = zip(
        # verbose=False: a text longer than the model's limit is handled below, the tokenizer need not warn of it.
        *(tokenizer(list(texts), verbose=False)["input_ids"] for texts in (prompts, both, answers)),
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
            results.append([TokenizedRecord(status="prompt_too_long", reason=reason, **counts)])
        elif len(alone) < 2:
            reason = "the answer alone is one token, and the first is not scored"
            results.append([TokenizedRecord(status="answer_too_short", reason=reason, **counts)])
        else:
            item = TokenizedRecord(
                status="ok",
                conditional=full[:max_length],
                conditional_start=max(end, 1),
                unconditional=alone,
                unconditional_start=1,
                **counts,
            )
            results.append([item])
    return results
