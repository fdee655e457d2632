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


def write_paper_json(path: str | Path, table: pa.Table, records: RecordSet) -> int:
    """Write the scored rows as the reference script's JSON, a list of {question, answer, IFD}; return how many."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for record, ifd in _scored_records(table, records):
            entry = {"question": record.question, "answer": record.answer, "IFD": ifd}
            file.write(("," if count else "") + "\n" + json.dumps(entry, ensure_ascii=False))
            count += 1
        file.write("\n]\n")
    return count


def _scored_records(table: pa.Table, records: RecordSet, block: int = 10_000) -> Iterator[tuple[Record, float]]:
    for first in range(0, len(records), block):
        scores = table["ifd"].slice(first, block).to_pylist()
        rows = records.rows(first, min(first + block, len(records)))
        for row, ifd in zip(rows, scores, strict=True):
            if ifd is not None and not isinstance(row, BadRow):
                yield row, ifd
