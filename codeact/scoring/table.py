"""The table of IFD scores, and the paper's JSON of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from codeact.base.files import atomic_path
from codeact.data.records import BadRow, Record, RecordSet

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("answer_tokens", pa.int32(), nullable=False),
        pa.field("scored_tokens", pa.int32(), nullable=False),
        pa.field("uncond_scored_tokens", pa.int32(), nullable=False),
        pa.field("cond_nll_sum", pa.float64()),
        pa.field("uncond_nll_sum", pa.float64()),
        pa.field("ifd", pa.float64()),
    ]
)
"""The score table: one row for each row of the data set, whatever became of it."""

TURN_SCHEMA = SCHEMA.insert(2, pa.field("turn", pa.int32(), nullable=False))
"""A row for each answer of the conversations, whatever became of it; ``turn`` is its place among the turns."""


def write_paper_json(path: str | Path, table: pa.Table, records: RecordSet) -> tuple[int, int]:
    """Write the reference script's JSON, a list of {question, answer, IFD}, in the order of the rows.

    Every row with a question and an answer is in it; of one whose score failed the IFD is 0, as that script has it.

    Returns:
        How many rows were written, and of how many the score failed.
    """
    count = failed = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for record, ifd in _records_with_scores(table, records):
            entry = {"question": record.question, "answer": record.answer, "IFD": 0 if ifd is None else ifd}
            file.write(("," if count else "") + "\n" + json.dumps(entry, ensure_ascii=False))
            count += 1
            failed += ifd is None
        file.write("\n]\n")
    return count, failed


def _records_with_scores(
    table: pa.Table, records: RecordSet, block: int = 10_000
) -> Iterator[tuple[Record, float | None]]:
    for first in range(0, len(records), block):
        scores = table["ifd"].slice(first, block).to_pylist()
        rows = records.rows(first, min(first + block, len(records)))
        for row, ifd in zip(rows, scores, strict=True):
            if not isinstance(row, BadRow):
                yield row, ifd
