"""The table of IFD scores, and the folder that grows it shard by shard and survives ``kill -9``.

    DIR/manifest.json                   settings, their hash, fingerprints of model and data; totals once merged
    DIR/shards/00003-of-00012.parquet   rows 3 * shard_size and on; carries the hash of the settings it was made with
    DIR/scores.parquet                  all shards, in row order
    DIR/turns.parquet                   of conversations, a row for every answer (a shard has it beside it, too)

A shard file appears whole or not at all, so what exists is done and a rerun does the rest. Any number of processes and
machines may share the folder: who does which shard is in ``workers`` and ``claims``, see ``codeact.workers.claims``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codeact.base.errors import InputError
from codeact.base.files import atomic_path, locked_folder, remove_leftovers
from codeact.base.parsing import parse_json, read_json
from codeact.data.records import RecordSet
from codeact.data.tables import read_table
from codeact.scoring.table import SCHEMA, TURN_SCHEMA
from codeact.scoring.token_losses import losses_path, read_losses, selective_ifd, write_losses

if TYPE_CHECKING:
    from codeact.scoring.ifd import IfdScorer

logger = logging.getLogger(__name__)

_METADATA_KEY = b"codeact"


class ScoreFolder:
    """One scoring run on disk.

    Args:
        folder: where it lives.
        settings: everything that changes a score, JSON values only: data and model with their fingerprints, template,
            length, dtype, protocol, shard size. Their hash guards the folder; ``tokens_per_pack``, ``device`` and
            ``attention`` may be noted in them, but decide nothing, so that a run can go on with others. Where the
            folder has shards of another size, that size stays.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self.hash = settings_hash(settings)
        self.rows: int = settings["data"]["rows"]
        self.by_turn: bool = settings.get("turns") == "all"
        """Whether a shard has a row for every answer of its conversations beside it."""
        self.keep_token_nll = False
        """Whether a shard is done only with the losses of its tokens beside it."""

    @property
    def shard_size(self) -> int:
        """Rows of a shard."""
        size: int = self.settings["shard_size"]
        return size

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.rows // self.shard_size)

    @classmethod
    def open(cls, folder: str | Path) -> ScoreFolder:
        """Open the run that a folder holds.

        Raises:
            InputError: it holds none, or its manifest was damaged.
        """
        manifest = _read_manifest(Path(folder))
        if manifest is None:
            raise InputError(f"{folder} holds no scores (no manifest.json); make them with: codeact score")
        return cls(folder, manifest["settings"])._known_as(manifest)

    def claim(self, overwrite: bool = False) -> None:
        """Make the folder this run's own, or check that it already is.

        Raises:
            InputError: it holds the scores of other settings (both hashes and what differs are named), or it cannot be
                written to.
        """
        with locked_folder(self.folder, wait=True):  # or one could discard what another has begun
            if overwrite:
                self._discard_others()
            if _read_manifest(self.folder) is None:
                self._write_manifest({})
        # Read what is there now: another process may have claimed the folder in the meantime.
        manifest = _read_manifest(self.folder)
        theirs = manifest["settings"] if manifest else {}
        if settings_hash({**theirs, "shard_size": self.shard_size}) == self.hash:  # shards are as they were begun
            self.settings = {**self.settings, "shard_size": theirs["shard_size"]}
            self.hash = settings_hash(self.settings)
        if manifest is None or settings_hash(theirs) != self.hash:
            differences = "; ".join(_differences(_without_places(theirs), _without_places(self.settings)))
            raise InputError(
                f"{self.folder} holds scores made with other settings (hash {settings_hash(theirs)}, this run "
                f"{self.hash}): {differences}; choose another --output, or discard them with --overwrite"
            )
        self._known_as(manifest)

    def _known_as(self, manifest: dict[str, Any]) -> ScoreFolder:
        """Take the hash that the folder's shards carry: older versions counted what decides nothing as well."""
        self.hash = manifest["hash"]
        return self

    def _discard_others(self) -> None:
        """Remove the scores of other settings; this run's own finished shards stay."""
        with suppress(InputError):  # a damaged manifest is nobody's
            manifest = _read_manifest(self.folder)
            if manifest is None or settings_hash(manifest["settings"]) == self.hash:
                return
        try:
            for name in ("manifest.json", "scores.parquet", "turns.parquet"):
                (self.folder / name).unlink(missing_ok=True)
            for name in ("shards", "claims"):
                if (self.folder / name).exists():
                    shutil.rmtree(self.folder / name)
        except OSError as error:
            raise InputError(f"cannot discard the scores in {self.folder}: {error.strerror or error}") from None

    def part(self, shard: int) -> str:
        """Return the name of one shard, as claims have it and its files begin."""
        return f"{shard:05d}-of-{self.shards:05d}"

    def path(self, shard: int) -> Path:
        """Return the file of one shard."""
        return self.folder / "shards" / f"{self.part(shard)}.parquet"

    def turns_path(self, shard: int) -> Path:
        """Return the file of the answers of one shard."""
        return self.path(shard).with_suffix(".turns.parquet")

    def shard_rows(self, shard: int) -> int:
        """Return how many rows a shard has."""
        return min(self.shard_size, self.rows - shard * self.shard_size)

    def _files(self, shard: int) -> list[Path]:
        """All files of a shard."""
        more = [self.turns_path(shard)] * self.by_turn + [losses_path(self.path(shard))] * self.keep_token_nll
        return [self.path(shard), *more]

    def missing(self) -> list[int]:
        """Return the shards that are not done, by the names of the files; ``merge`` looks into them."""
        try:
            names = {*os.listdir(self.folder / "shards")}
        except FileNotFoundError:
            return list(range(self.shards))
        endings = [path.name.removeprefix(self.part(0)) for path in self._files(0)]
        return [n for n in range(self.shards) if not all(f"{self.part(n)}{ending}" in names for ending in endings)]

    def is_done(self, shard: int) -> bool:
        """Whether a shard's files are there now."""
        with suppress(OSError):  # network file systems keep in mind what was not there, until the folder is opened
            os.close(os.open(self.folder / "shards", os.O_RDONLY))
        return all(path.exists() for path in self._files(shard))

    def score(
        self,
        records: RecordSet,
        scorer: IfdScorer,
        shards: list[int],
        progress: Callable[[float, int], object] | None = None,
    ) -> None:
        """Score ``shards`` and write each as soon as it is done.

        Args:
            records: the data set of the settings.
            scorer: made with the settings.
            shards: which to do.
            progress: called after every forward pass with the rows and the tokens done since the last call.
        """
        for shard in shards:
            first = shard * self.shard_size
            rows = records.rows(first, first + self.shard_rows(shard))
            begin = time.perf_counter()
            step = rows_done(len(rows), progress)
            losses: list[np.ndarray] = []
            turns: list[pa.Table] = []
            more = {"losses": losses} if self.keep_token_nll else {}
            table, cost = scorer.score(rows, step, **more, **({"turns": turns} if self.by_turn else {}))
            step(1.0, 0)  # rows that were refused pass through no forward pass
            facts = {
                "hash": self.hash,
                "seconds": time.perf_counter() - begin,
                "sequences": cost.sequences,
                "tokens": cost.tokens,
                "packs": cost.packs,
                "capacity_tokens": cost.capacity_tokens,
                "apart_tokens": cost.apart_tokens,
                "tokens_per_pack": scorer.tokens_per_pack,
                "route": scorer.route,
                "versions": _versions(),
            }
            table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(facts).encode()})
            if self.keep_token_nll:
                write_losses(self.path(shard), np.concatenate([np.empty((2, 0), np.float16), *losses], axis=1))
            for answers in turns:
                with atomic_path(self.turns_path(shard)) as temporary:
                    pq.write_table(answers, temporary)
            with atomic_path(self.path(shard)) as temporary:
                pq.write_table(table, temporary)

    def merge(self) -> dict[str, Any]:
        """Write ``scores.parquet`` and the totals in the manifest; returns the totals.

        Raises:
            InputError: shards are missing (they are named), or do not belong together.
        """
        missing = self.missing()
        if missing:
            named = ", ".join(map(str, missing[:20])) + (" ..." if len(missing) > 20 else "")
            raise InputError(
                f"{self.folder}: {len(missing)} of {self.shards} shards are missing ({named}); run codeact score with "
                "the same settings again, it does only what is missing"
            )
        totals: Counter[str] = Counter()
        refused: Counter[str] = Counter()
        statuses: Counter[str] = Counter()
        routes: Counter[str] = Counter()
        with (
            atomic_path(self.folder / "scores.parquet") as temporary,
            pq.ParquetWriter(temporary, SCHEMA) as writer,
        ):
            for shard in range(self.shards):
                path = self.path(shard)
                facts = self._facts(path)
                table = read_table(path, "delete it and score again", schema=SCHEMA).replace_schema_metadata(None)
                first = shard * self.shard_size
                expected = range(first, first + self.shard_rows(shard))
                if table["row"].to_pylist() != list(expected):
                    raise InputError(f"{path} does not hold rows {first} to {expected[-1]}: delete it and score again")
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
        if len(routes) > 1:
            logger.warning(
                "%s: shards were not all scored in one way, and different ways agree to rounding only: %s",
                self.folder,
                "; ".join(f"{count} by {route}" for route, count in routes.most_common()),
            )
        summary = {**totals, "status": dict(statuses), "refused": dict(refused), "routes": dict(routes)}
        if self.by_turn:
            summary["turns"] = self._merge_turns()
        self._write_manifest({"totals": summary})
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
        path = self.folder / "scores.parquet"
        if not path.exists():
            raise InputError(f"{self.folder} is not merged: run codeact merge {self.folder}")
        return read_table(path, f"run codeact merge {self.folder}", schema=SCHEMA)

    def selective_ifd(self) -> np.ndarray:
        """S-IFD of every row of the merged table, (rows,) float64, from the losses that scoring kept.

        Raises:
            InputError: it kept none, or they are damaged.
        """
        tokens = self.read()["scored_tokens"].to_numpy().astype(np.int64)

        def shards() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for shard in range(self.shards):
                part = tokens[shard * self.shard_size :][: self.shard_rows(shard)]
                yield read_losses(self.path(shard), int(part.sum())), part

        return selective_ifd(shards)

    def totals(self) -> dict[str, Any]:
        """Return the totals that ``merge`` wrote."""
        manifest = _read_manifest(self.folder)
        if manifest is None or "totals" not in manifest:
            raise InputError(f"{self.folder} is not merged: run codeact merge {self.folder}")
        totals: dict[str, Any] = manifest["totals"]
        return totals

    def _facts(self, path: Path) -> dict[str, Any]:
        """Read a shard's facts and check that it belongs to this run."""
        try:
            metadata = pq.read_schema(path).metadata or {}
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{path} is damaged ({error}): delete it and score again") from None
        facts: dict[str, Any] = parse_json(metadata.get(_METADATA_KEY, b"{}"))
        if facts.get("hash") != self.hash:
            raise InputError(
                f"{path} was made with other settings (hash {facts.get('hash')}, this run {self.hash}): delete it and "
                "score again"
            )
        return facts

    def _write_manifest(self, more: dict[str, Any]) -> None:
        content = {"hash": self.hash, "settings": self.settings, "shards": self.shards, "versions": _versions(), **more}
        with atomic_path(self.folder / "manifest.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def settings_hash(settings: dict[str, Any]) -> str:
    """Return 16 hex digits of the sha256 of the settings: of what decides a score, not of where things lie."""
    canonical = json.dumps(_without_places(settings), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _without_places(settings: dict[str, Any]) -> dict[str, Any]:
    data = {k: v for k, v in settings.get("data", {}).items() if k != "source"}
    model = {k: v for k, v in settings.get("model", {}).items() if k != "name"}
    deciding = {k: v for k, v in settings.items() if k not in ("tokens_per_pack", "device", "attention")}
    # Older versions scored the last answer only, and said nothing of it.
    return {"turns": "last", **deciding, "data": data, "model": model}


def rows_done(rows: int, progress: Callable[[float, int], object] | None) -> Callable[[float, int], None]:
    """For a scorer: turn the share of a shard's tokens that is done into rows done since the last call."""
    before = 0.0

    def step(share: float, tokens: int) -> None:
        nonlocal before
        if progress is not None:
            progress(rows * (share - before), tokens)
        before = share

    return step


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = read_json(path)
        manifest["hash"], manifest["settings"]["data"]["rows"], manifest["settings"]["shard_size"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot use {path}: {type(error).__name__} {error}; repair it, or use --overwrite") from None
    return manifest


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key} {a!r} there, {b!r} here")
    return lines


def _versions() -> dict[str, str]:
    names = ("codeact", "torch", "transformers", "datasets", "numpy", "pyarrow")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
