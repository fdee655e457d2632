"""The table of IFD scores, and the folder that grows it shard by shard; see ``codeact.workers.shards``.

    DIR/scores.parquet    all shards, in row order
    DIR/turns.parquet     of conversations, a row for every answer (a shard has it beside it, too)

Both are made by ``merge``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codeact.base.errors import InputError
from codeact.base.files import atomic_path, remove_leftovers
from codeact.data.records import RecordSet
from codeact.data.tables import read_table
from codeact.scoring.table import SCHEMA, TURN_SCHEMA
from codeact.scoring.token_losses import losses_path, read_losses, selective_ifd, write_losses
from codeact.workers.shards import ShardFolder, read_manifest, rows_done

if TYPE_CHECKING:
    from codeact.scoring.ifd import IfdScorer

logger = logging.getLogger(__name__)


class ScoreFolder(ShardFolder):
    """One scoring run on disk; ``settings`` are data and model with their fingerprints, template, length and so on."""

    COMMAND, DOING, DONE, WHAT = "codeact score", "scoring", "scored", "scores"
    IF_OTHERS = "choose another --output, or discard them with --overwrite"
    UNDECIDED = ("tokens_per_pack", "device", "attention")
    MERGED = ("scores.parquet", "turns.parquet")

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        super().__init__(folder, settings)
        self.by_turn: bool = settings.get("turns") == "all"
        """Whether a shard has a row for every answer of its conversations beside it."""
        self.keep_token_nll = False
        """Whether a shard is done only with the losses of its tokens beside it."""

    @classmethod
    def deciding(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """As of every folder; older versions scored the last answer only, and said nothing of it."""
        return {"turns": "last", **super().deciding(settings)}

    @property
    def merged_path(self) -> Path:
        """The table."""
        return self.folder / "scores.parquet"

    def turns_path(self, shard: int) -> Path:
        """Return the file of the answers of one shard."""
        return self.path(shard).with_suffix(".turns.parquet")

    def files(self, shard: int) -> list[Path]:
        """As of every folder; with those beside the table."""
        more = [self.turns_path(shard)] * self.by_turn + [losses_path(self.path(shard))] * self.keep_token_nll
        return [*super().files(shard), *more]

    def score(
        self,
        records: RecordSet,
        scorer: IfdScorer,
        shard: int,
        progress: Callable[[float, int], object] | None = None,
    ) -> None:
        """Score a shard and write it.

        Args:
            records: the data set of the settings.
            scorer: made with the settings.
            shard: which one.
            progress: called after every forward pass with the rows and the tokens done since the last call.
        """
        span = self.span(shard)
        rows = records.rows(span.start, span.stop)
        begin = time.perf_counter()
        step = rows_done(len(rows), progress)
        losses: list[np.ndarray] = []
        turns: list[pa.Table] = []
        more = {"losses": losses} if self.keep_token_nll else {}
        table, cost = scorer.score(rows, step, **more, **({"turns": turns} if self.by_turn else {}))
        step(1.0, 0)  # rows that were refused pass through no forward pass
        facts = {
            "seconds": time.perf_counter() - begin,
            "sequences": cost.sequences,
            "tokens": cost.tokens,
            "packs": cost.packs,
            "capacity_tokens": cost.capacity_tokens,
            "apart_tokens": cost.apart_tokens,
            "shared_tokens": cost.shared_tokens,
            "tokens_per_pack": scorer.tokens_per_pack,
            "route": scorer.route,
        }
        if self.keep_token_nll:
            write_losses(self.path(shard), np.concatenate([np.empty((2, 0), np.float16), *losses], axis=1))
        for answers in turns:
            with atomic_path(self.turns_path(shard)) as temporary:
                pq.write_table(answers, temporary)
        self.write_shard(shard, table, facts)

    def merge(self) -> dict[str, Any]:
        """Write ``scores.parquet`` and the totals in the manifest; returns the totals.

        Raises:
            InputError: shards are missing (they are named), or do not belong together.
        """
        self.require_all()
        totals: Counter[str] = Counter()
        refused: Counter[str] = Counter()
        statuses: Counter[str] = Counter()
        routes: Counter[str] = Counter()
        with (
            atomic_path(self.merged_path) as temporary,
            pq.ParquetWriter(temporary, SCHEMA) as writer,
        ):
            for shard in range(self.shards):
                path = self.path(shard)
                facts = self.facts(shard)
                table = read_table(path, "delete it and score again", schema=SCHEMA).replace_schema_metadata(None)
                span = self.span(shard)
                if table["row"].to_pylist() != list(span):
                    raise InputError(f"{path} does not hold rows {span[0]} to {span[-1]}: delete it and score again")
                writer.write_table(table)
                routes[facts.get("route", "an older version, which did not note it")] += 1
                refused.update(reason.split(":", 1)[0] for reason in table["reason"].to_pylist() if reason is not None)
                statuses.update(table["status"].to_pylist())
                totals["rows"] += table.num_rows
                totals["truncated"] += pc.sum(table["truncated"]).as_py()
                for name in ("prompt_tokens", "answer_tokens", "scored_tokens", "uncond_scored_tokens"):
                    totals[name] += pc.sum(table[name]).as_py()
                for name in ("seconds", "sequences", "tokens", "packs", "capacity_tokens"):
                    totals[name] += facts[name]
                totals["apart_tokens"] += facts.get("apart_tokens", facts["tokens"])
                totals["shared_tokens"] += facts.get("shared_tokens", 0)
        if len(routes) > 1:
            logger.warning(
                "%s: shards were not all scored in one way, and different ways agree to rounding only: %s",
                self.folder,
                "; ".join(f"{count} by {route}" for route, count in routes.most_common()),
            )
        summary = {**totals, "status": dict(statuses), "refused": dict(refused), "routes": dict(routes)}
        if self.by_turn:
            summary["turns"] = self._merge_turns()
        self.write_manifest({"totals": summary})
        for folder in (self.folder, self.folder / "shards", self.folder / "workers"):
            remove_leftovers(folder)
        return summary

    def _merge_turns(self) -> dict[str, int]:
        """Write ``turns.parquet``; returns how many answers have which status."""
        statuses: Counter[str] = Counter()
        with (
            atomic_path(self.folder / "turns.parquet") as temporary,
            pq.ParquetWriter(temporary, TURN_SCHEMA) as writer,
        ):
            for shard in range(self.shards):
                remedy = f"delete it and {self.path(shard)}, and score again"
                table = read_table(self.turns_path(shard), remedy, schema=TURN_SCHEMA)
                writer.write_table(table)
                statuses.update(table["status"].to_pylist())
        return dict(statuses)

    def read(self) -> pa.Table:
        """Return the merged table.

        Raises:
            InputError: it was not merged.
        """
        if not self.merged_path.exists():
            raise InputError(f"{self.folder} is not merged: run codeact merge {self.folder}")
        return read_table(self.merged_path, f"run codeact merge {self.folder}", schema=SCHEMA)

    def selective_ifd(self) -> np.ndarray:
        """S-IFD of every row of the merged table, (rows,) float64, from the losses that scoring kept.

        Raises:
            InputError: it kept none, or they are damaged.
        """
        tokens = self.read()["scored_tokens"].to_numpy().astype(np.int64)

        def shards() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for shard in range(self.shards):
                part = tokens[self.span(shard).start : self.span(shard).stop]
                yield read_losses(self.path(shard), int(part.sum())), part

        return selective_ifd(shards)

    def totals(self) -> dict[str, Any]:
        """Return the totals that ``merge`` wrote."""
        manifest = read_manifest(self.folder)
        if manifest is None or "totals" not in manifest:
            raise InputError(f"{self.folder} is not merged: run codeact merge {self.folder}")
        totals: dict[str, Any] = manifest["totals"]
        return totals
