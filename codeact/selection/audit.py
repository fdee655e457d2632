"""Why every row of a score table was chosen or not: ``NAME.rows.parquet`` beside the chosen rows ``NAME.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
    ]
)
"""One row for each row of the score table, in its order. ``reason`` is null where the row was chosen; else the status
of the score where that is not ``ok``, ``ifd_at_least_1`` or ``ifd_not_positive`` where the strategy looks at the IFD,
and ``below_budget`` where there were enough rows that teach more."""


def audit_path(selected: str | Path) -> Path:
    """Where the audit of ``selected`` lies."""
    path = Path(selected)
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.rows.parquet")


def audit(table: pa.Table, selection: Selection, labels: NDArray[Any] | Sequence[int] | None) -> pa.Table:
    """The audit as a table of ``AUDIT_SCHEMA``; arguments as in ``codeact.selection.choose.write_selection``."""
    chosen = np.zeros(table.num_rows, np.bool_)
    chosen[selection.positions] = True
    status = pc.fill_null(table["status"], "nonfinite")
    reasons = pa.repeat("below_budget", table.num_rows)
    if selection.strategy != "random":
        ifd = table["ifd"].cast(pa.float64())
        reasons = pc.if_else(pc.fill_null(pc.greater_equal(ifd, 1.0), False), "ifd_at_least_1", reasons)
        reasons = pc.if_else(pc.fill_null(pc.less_equal(ifd, 0.0), False), "ifd_not_positive", reasons)
    reasons = pc.if_else(pc.equal(status, "ok"), reasons, status)
    reasons = pc.if_else(pa.array(chosen), pa.scalar(None, pa.string()), reasons)
    clusters = np.full(table.num_rows, UNCLUSTERED, np.int32) if labels is None else np.asarray(labels, np.int32)
    return pa.table(
        [
            table["row"],
            table["id"].cast(pa.string()),
            pa.array(clusters, mask=clusters == UNCLUSTERED),
            pa.array(chosen),
            reasons,
        ],
        schema=AUDIT_SCHEMA,
    )


def write_audit(
    selected: str | Path, table: pa.Table, selection: Selection, labels: NDArray[Any] | Sequence[int] | None
) -> Path:
    """Write the audit of ``selected`` beside it; returns its path. It appears whole or not at all."""
    path = audit_path(selected)
    with atomic_path(path) as temporary:
        pq.write_table(audit(table, selection, labels), temporary)
    return path
