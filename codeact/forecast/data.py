"""The rows and token lengths that a forecast starts from: counted on a sample of the data, or assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from codeact.base.errors import InputError
from codeact.data.records import BadRow, Record, RecordSet, open_records
from codeact.models.loading import config_of, load_tokenizer
from codeact.padding.strategies import Integers
from codeact.run.settings import ForecastSettings, RunSettings
from codeact.scoring.ifd import default_max_length
from codeact.scoring.tokens import answers_of, passes, tokenize
from codeact.text.conversations import IGNORE, Sample, encode_conversations
from codeact.text.templates import PromptBuilder

SAMPLE_ROWS = 400
TEMPLATE_TOKENS = 20  # of a row, where no template is rendered
LENGTH_SPREAD = 0.6  # standard deviation of the logarithm of a length, where lengths are assumed


class Sampled:
    """Token counts of some rows, (n,), that stand for ``rows`` rows; ``counted``: on data, so with an error."""

    def __init__(self, values: npt.ArrayLike, rows: float, counted: bool = True) -> None:
        self.values: Integers = np.asarray(values, dtype=np.int64)
        self.rows, self.counted = rows, counted

    @property
    def total(self) -> float:
        """Estimate of the sum over all rows."""
        return float(self.values.mean()) * self.rows if len(self.values) else 0.0

    @property
    def error(self) -> float:
        """Standard error of ``total``; 0 where every row was counted, or none."""
        count = len(self.values)
        if not self.counted or count < 2 or self.rows <= count:
            return 0.0
        spread = float(self.values.std(ddof=1)) * math.sqrt(1 - count / self.rows)
        return spread / math.sqrt(count) * self.rows

    @property
    def squares(self) -> float:
        """Estimate of the sum of squares."""
        return float(np.square(self.values.astype(np.float64)).mean()) * self.rows if len(self.values) else 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DataFacts:
    """Rows, and the tokens that every stage makes of them.

    ``conditional``, ``unconditional`` and ``scored`` are the two passes of scoring and what of both is scored;
    ``questions`` go to the embedder; ``conversations`` are training samples, ``supervised`` those tokens of them that
    have a label. ``row_bytes``: of a row as text, on average. ``records``: the rows that were looked at, if any.
    """

    rows: int
    conditional: Sampled
    unconditional: Sampled
    scored: Sampled
    questions: Sampled
    conversations: Sampled
    supervised: Sampled
    row_bytes: float
    records: Sequence[Record | BadRow]
    source: str


def data_facts(
    settings: RunSettings, flags: Any, embedder: str, embedder_length: int, chosen: Path | None = None
) -> DataFacts:
    """Count tokens of some hundred rows, drawn by a fixed seed; or make lengths up from the section ``forecast``.

    Args:
        settings: the run.
        flags: of training, see ``codeact.training.flags.check_flags``; None if there is no training.
        embedder: what to load the embedder's tokenizer by; "": count as the causal model does.
        embedder_length: tokens that the embedder takes.
        chosen: conversations that were selected already, if they were: what training takes.

    Raises:
        InputError: neither data nor section tells.
    """
    assumed = settings.forecast
    tokenizer, no_tokenizer = _tried(load_tokenizer, settings.score.model)
    records, no_data = _tried(settings.data.open)
    rows, why = assumed.rows if records is None else len(records), no_data or no_tokenizer
    if rows is None:
        raise InputError(f"{no_data}; or say what it holds, in the settings: {_section(assumed)}")
    if not why:
        return _counted(settings, records, tokenizer, flags, embedder, embedder_length, chosen)
    if assumed.question_tokens is None or assumed.answer_tokens is None:
        raise InputError(f"{why}; or say how long its rows are, in the settings: {_section(assumed)}")
    return _assumed(settings, rows, assumed.question_tokens, assumed.answer_tokens, flags, embedder_length, why)


def _section(assumed: ForecastSettings) -> str:
    missing = {"rows": "80000", "question_tokens": "120", "answer_tokens": "300"}
    return "forecast: {" + ", ".join(f"{k}: {v}" for k, v in missing.items() if getattr(assumed, k) is None) + "}"


def _tried(make: Any, *arguments: Any) -> tuple[Any, str]:
    try:
        return make(*arguments), ""
    except InputError as error:
        return None, str(error)


def _counted(
    settings: RunSettings,
    records: RecordSet,
    tokenizer: Any,
    flags: Any,
    embedder: str,
    embedder_length: int,
    chosen: Path | None,
) -> DataFacts:
    score, rows = settings.score, len(records)
    drawn = _draw(records)
    prompts = PromptBuilder(tokenizer, score.template)
    most = _most_tokens(settings)
    turns = score.turns_of(records.columns)
    items = tokenize(drawn, tokenizer, prompts, most, score.protocol, turns=turns)
    answers = [own for item in items if (own := answers_of([item]))]
    plans = [passes(own) for own in answers]
    # of every row, the sequences that are run for it
    given = [[*{id(answer.conditional): len(answer.conditional) for answer in own}.values()] for own in answers]
    alone = [[len(answer.unconditional) for answer in own] for own in answers]
    good = [row for row in drawn if isinstance(row, Record)]
    texts = [row.question.encode("utf-8", "replace").decode("utf-8") for row in good]
    embeds, _ = _tried(load_tokenizer, embedder) if embedder else (None, "")
    questions = (embeds or tokenizer)(texts, verbose=False)["input_ids"] if texts else []
    samples: list[Sample] = []
    stands_for = 0.0
    if flags is not None:
        conversations = open_records(chosen) if chosen else None
        among = drawn if conversations is None else _draw(conversations)
        results = encode_conversations(among, tokenizer, flags.model_type, flags.max_length, flags.on_overflow)
        samples = [result for result in results if isinstance(result, Sample)]
        mean = float(np.mean([sum(lengths) for lengths in given] or [0]))
        whole = settings.select.rows_of(rows, mean) if conversations is None else len(conversations)
        stands_for = whole * len(samples) / len(among)
    how = "all of them tokenized" if len(drawn) == rows else f"{len(drawn):,} of them tokenized (drawn by seed 0)"

    def sampled(by_row: list[list[int]]) -> Sampled:
        values = [value for row in by_row for value in row]
        return Sampled(values, len(values) * rows / len(drawn))

    return DataFacts(
        rows=rows,
        conditional=sampled(given),
        unconditional=sampled(alone),
        scored=sampled([[sum(stop - start for spans in plan.spans for start, stop in spans)] for plan in plans]),
        questions=Sampled([min(len(ids), embedder_length) for ids in questions], len(good) * rows / len(drawn)),
        conversations=Sampled([len(sample.input_ids) for sample in samples], stands_for),
        supervised=Sampled([np.count_nonzero(sample.labels[1:] != IGNORE) for sample in samples], stands_for),
        row_bytes=float(np.mean([len((r.question + r.answer).encode(errors="replace")) for r in good] or [0])),
        records=drawn,
        source=f"{records.source}: {rows:,} rows, {how}",
    )


def _most_tokens(settings: RunSettings) -> int:
    """Of a sequence that is scored."""
    return settings.score.max_length or default_max_length(config_of(settings.score.model))


def _draw(records: RecordSet) -> list[Record | BadRow]:
    if len(records) <= SAMPLE_ROWS:
        return records.rows(0, len(records))
    picked = np.sort(np.random.default_rng(0).choice(len(records), SAMPLE_ROWS, replace=False)).tolist()
    return [row for position in picked for row in records.rows(position, position + 1)]


def _assumed(
    settings: RunSettings, rows: int, question: float, answer: float, flags: Any, embedder_length: int, why: str
) -> DataFacts:
    """Lengths spread lognormally around the averages that the settings give."""
    most = _most_tokens(settings)
    rng = np.random.default_rng(0)
    questions = _spread(rng, question)
    answers = np.maximum(_spread(rng, answer), 2)
    prompts = np.minimum(questions + TEMPLATE_TOKENS, most - 2)
    kept = np.minimum(answers, most - prompts)
    conversations = np.minimum(questions + answers + TEMPLATE_TOKENS, most if flags is None else flags.max_length)
    chosen = settings.select.rows_of(rows, float(np.mean(prompts + kept))) if flags is not None else 0
    averages = f"{rows:,} rows of {question:g} + {answer:g} tokens on average, as the section forecast says"
    return DataFacts(
        rows=rows,
        conditional=Sampled(prompts + kept, rows, counted=False),
        unconditional=Sampled(kept, rows, counted=False),
        scored=Sampled(2 * kept, rows, counted=False),
        questions=Sampled(np.minimum(questions, embedder_length), rows, counted=False),
        conversations=Sampled(conversations, chosen, counted=False),
        supervised=Sampled(np.minimum(answers, conversations - 1), chosen, counted=False),
        row_bytes=3.5 * (question + answer),
        records=(),
        source=f"{averages}, spread lognormally (not looked at: {why})",
    )


def _spread(rng: np.random.Generator, mean: float) -> Integers:
    """Lengths of that mean, whatever was drawn."""
    drawn = rng.lognormal(0.0, LENGTH_SPREAD, SAMPLE_ROWS)
    lengths: Integers = np.maximum(np.rint(drawn * mean / drawn.mean()), 1).astype(np.int64)
    return lengths
