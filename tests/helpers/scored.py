"""Data, scores and vectors of it as codeact score and embed leave them, with numbers that a test chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from codeact.data.records import Record, write_jsonl
from codeact.data.settings import DataSettings
from codeact.embedding.files import EmbeddingMetadata, write_embeddings
from codeact.scoring.folder import SCHEMA, ScoreFolder
from codeact.scoring.ifd import ScoreCost


def score_table(ifds: Any, statuses: Any = None, rows: Any = None, **columns: Any) -> pa.Table:
    """A score table of these IFDs; what is not given is the same small number for all rows."""
    count = len(ifds)
    rows = list(range(count)) if rows is None else rows
    known = {
        "id": [f"id{row}" for row in rows],
        "row": rows,
        "status": ["ok"] * count if statuses is None else statuses,
        "reason": [None] * count,
        "truncated": [False] * count,
        "prompt_tokens": [row % 7 for row in rows],
        "answer_tokens": [row % 11 for row in rows],
        "scored_tokens": [1] * count,
        "uncond_scored_tokens": [1] * count,
        "cond_nll_sum": [1.0] * count,
        "uncond_nll_sum": [1.0] * count,
        "ifd": ifds,
    }
    # made without the schema first, so that None may stand where the schema forbids it
    table = pa.table({**known, **columns})
    return pa.table([table[field.name].cast(field.type) for field in SCHEMA], names=SCHEMA.names)


def make_scored(folder: Path, data: list[dict[str, Any]], table: pa.Table, vectors: Any) -> tuple[Path, Path, Path]:
    """Write data (instruction, output, id), its scores, and the vectors of the rows that hold a record."""
    write_jsonl(folder / "data.jsonl", data)
    source = DataSettings(source=str(folder / "data.jsonl"), id="id")
    records = source.open()
    identity = {**source.model_dump(), "rows": len(records), "fingerprint": records.fingerprint}
    scores = ScoreFolder(folder / "scores", {"data": identity, "model": {}, "shard_size": 10_000})
    scores.claim()

    class Scorer:
        tokens_per_pack, route = 1, "made up"

        def score(self, rows: Any, progress: Any) -> Any:
            return table.cast(SCHEMA), ScoreCost(sequences=0, tokens=0, packs=0, capacity_tokens=0)

    for shard in scores.missing():
        scores.score(records, Scorer(), shard)
    scores.merge()
    kept = [row.row for row in records if isinstance(row, Record)]
    metadata = EmbeddingMetadata(
        model="m", data_fingerprint=records.fingerprint, rows=len(kept), skipped=0, truncated=0, tokens=0
    )
    vectors = np.asarray(vectors, np.float32)[kept]
    write_embeddings(folder / "embeddings.npy", vectors, [table["id"][row].as_py() for row in kept], kept, metadata)
    return folder / "data.jsonl", scores.folder, folder / "embeddings.npy"
