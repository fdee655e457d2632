"""Why every row of a score table was chosen or not: ``NAME.rows.parquet`` beside the chosen rows ``NAME.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from codeact.base.files import atomic_path
from codeact.selection.choose import UNCLUSTERED, Selection

AUDIT_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("cluster", pa.int32()),
        pa.field("chosen", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("answer_tokens", pa.int32(), nullable=False),
        pa.field("among_longest", pa.bool_(), nullable=False),
    ]
)
"""One row for each row of the score table, in its order. ``reason`` is null where the row was chosen; else the status
of the score where that is not ``ok``, why the strategy may not choose it (``ifd_at_least_1``, ``ifd_not_positive`` ...,
``same_question``, ``longer_than_budget``), or ``below_budget``: there were enough that come before it. ``score`` is the
difficulty; ``among_longest``: it is among as many longest answers as were chosen. The schema's metadata has the line
about length of the summary, under ``length``."""


def audit_path(selected: str | Path) -> Path:
    """Where the audit of ``selected`` lies."""
    path = Path(selected)
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.rows.parquet")


def audit(table: pa.Table, selection: Selection, labels: NDArray[Any] | Sequence[int] | None) -> pa.Table:
    """The audit as a table of ``AUDIT_SCHEMA``; arguments as in ``codeact.selection.choose.write_selection``."""
    chosen = np.zeros(table.num_rows, np.bool_)
    chosen[selection.positions] = True
    clusters = np.full(table.num_rows, UNCLUSTERED, np.int32) if labels is None else np.asarray(labels, np.int32)
    columns = [
        table["row"],
        table["id"].cast(pa.string()),
        pa.array(clusters, mask=clusters == UNCLUSTERED),
        pa.array(chosen),
        pa.array(selection.reasons, pa.string(), mask=chosen),
        pa.array(selection.score, from_pandas=True),
        table["answer_tokens"].cast(pa.int32()),
        pa.array(selection.among_longest()),
    ]
    return pa.table(columns, schema=AUDIT_SCHEMA.with_metadata({"length": selection.length_line()}))


def write_audit(
    selected: str | Path, table: pa.Table, selection: Selection, labels: NDArray[Any] | Sequence[int] | None
) -> Path:
    """Write the audit of ``selected`` beside it; returns its path. It appears whole or not at all."""
    path = audit_path(selected)
    with atomic_path(path) as temporary:
        pq.write_table(audit(table, selection, labels), temporary)
    return path
