"""A scoring job without a model, for what is about workers: numbers that follow from the row, and rows that do harm.

It imports no PyTorch, as processes that are started import it afresh.
"""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from codeact.base.errors import InputError
from codeact.scoring.folder import ScoreFolder
from codeact.scoring.table import SCHEMA
from codeact.workers.engines import Job, Place


class Rows:
    """A data set whose rows are their numbers."""

    def rows(self, start: int, stop: int) -> range:
        return range(start, stop)


class Scorer:
    """A file ``ROW.raise`` (refuse, kill, once, wait) in ``faults`` says what befalls who scores that row.

    ``seconds``: that a shard takes.
    """

    tokens_per_pack, route = 1, "made up"

    def __init__(self, faults: Path, seconds: float = 0.0) -> None:
        self.faults, self.seconds = faults, seconds

    def score(self, rows: range, progress: Any) -> Any:
        for fault in self.faults.glob("*.*"):
            if int(fault.stem) in rows:
                self.befall(fault)
        time.sleep(self.seconds)
        count = len(rows)
        columns = {
            "id": [f"id{row}" for row in rows],
            "row": list(rows),
            "status": ["ok"] * count,
            "reason": [None] * count,
            "truncated": [False] * count,
            "cond_nll_sum": [row / 7 for row in rows],
            "uncond_nll_sum": [row / 3 for row in rows],
            "ifd": [1 / (row + 1) for row in rows],
        }
        fields = [pa.array(columns.get(field.name, [1] * count), field.type) for field in SCHEMA]
        progress(1.0, 10 * count)
        cost = {
            "sequences": 0,
            "tokens": 10 * count,
            "packs": 1,
            "capacity_tokens": 1,
            "apart_tokens": 0,
            "shared_tokens": 0,
        }
        return pa.table(fields, schema=SCHEMA), SimpleNamespace(**cost)

    def befall(self, fault: Path) -> None:
        if fault.suffix == ".raise":
            raise RuntimeError(f"row {fault.stem} is poison")
        if fault.suffix == ".refuse":
            raise InputError(f"row {fault.stem} is refused")
        if fault.suffix == ".wait":
            while fault.exists():
                time.sleep(0.05)
            return
        if fault.suffix == ".once":  # kills the first that meets it
            fault.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def prepare(  # as ``codeact.workers.engines.Begin`` has it, with what goes before as arguments of its own
    folder: Path, shards: int, seconds: float, place: Place | None = None, first: bool = True
) -> Job:
    """A job of ``shards`` shards of 3 rows; faults are in ``folder.parent / "faults"``."""
    settings = {"data": {"rows": 3 * shards - 1}, "model": {}, "shard_size": 3}
    scores = ScoreFolder(folder, settings)
    scores.claim()
    return Job(scores, partial(scores.score, Rows(), Scorer(folder.parent / "faults", seconds)))
