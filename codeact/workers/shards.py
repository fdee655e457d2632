"""A job that is cut into shards, as a folder that grows shard by shard and survives ``kill -9``.

    DIR/manifest.json                   settings, their hash, what data and model were; totals once merged
    DIR/shards/00003-of-00012.parquet   rows 3 * shard_size and on; carries the hash of the settings it was made with

A shard file appears whole or not at all, so what exists is done and a rerun does the rest. Any number of processes and
machines may share the folder: who does which shard is in ``workers`` and ``claims``, see ``codeact.workers.claims``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

import pyarrow as pa
import pyarrow.parquet as pq

from codeact import __version__
from codeact.base.errors import InputError
from codeact.base.files import atomic_path, locked_folder
from codeact.base.machine import versions
from codeact.base.parsing import parse_json, read_json

_METADATA_KEY = b"codeact"


class ShardFolder(ABC):
    """One job on disk.

    Args:
        folder: where it lives.
        settings: everything that changes a result, JSON values only; ``data`` with ``rows``, and ``shard_size`` among
            them. Their hash guards the folder; ``UNDECIDED`` may be noted in them, but decide nothing, so that a job
            can go on with others. Where the folder has shards of another size, that size stays.
    """

    COMMAND: ClassVar[str]
    DOING: ClassVar[str]
    DONE: ClassVar[str]
    WHAT: ClassVar[str]
    """What it holds, in the plural."""
    IF_OTHERS: ClassVar[str]
    """What to do where it holds those of other settings."""
    UNDECIDED: ClassVar[tuple[str, ...]] = ()
    MERGED: ClassVar[tuple[str, ...]] = ()
    """Files in the folder that a merge makes."""

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self.hash = self.hash_of(settings)
        self.rows: int = settings["data"]["rows"]

    @property
    def shard_size(self) -> int:
        """Rows of a shard."""
        size: int = self.settings["shard_size"]
        return size

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.rows // self.shard_size)

    @property
    @abstractmethod
    def merged_path(self) -> Path:
        """The file that a merge makes last."""

    @property
    def is_merged(self) -> bool:
        """Whether it is there."""
        return self.merged_path.exists()

    @abstractmethod
    def merge(self) -> dict[str, Any]:
        """Put all shards together; returns the totals.

        Raises:
            InputError: shards are missing (they are named), or do not belong together.
        """

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open the job that a folder holds.

        Raises:
            InputError: it holds none, or its manifest was damaged.
        """
        manifest = read_manifest(Path(folder))
        if manifest is None:
            raise InputError(f"{folder} holds no {cls.WHAT} (no manifest.json); make them with: {cls.COMMAND}")
        return cls(folder, manifest["settings"])._known_as(manifest)

    def claim(self, overwrite: bool = False) -> None:
        """Make the folder this job's own, or check that it already is.

        Raises:
            InputError: it holds shards of other settings (both hashes and what differs are named), or it cannot be
                written to.
        """
        with locked_folder(self.folder, wait=True):  # or one could discard what another has begun
            if overwrite:
                self._discard_others()
            if read_manifest(self.folder) is None:
                self.write_manifest({})
        # Read what is there now: another process may have claimed the folder in the meantime.
        manifest = read_manifest(self.folder)
        theirs = manifest["settings"] if manifest else {}
        if self.hash_of({**theirs, "shard_size": self.shard_size}) == self.hash:  # shards are as they were begun
            self.settings = {**self.settings, "shard_size": theirs["shard_size"]}
            self.hash = self.hash_of(self.settings)
        if manifest is None or self.hash_of(theirs) != self.hash:
            differences = "; ".join(_differences(self.deciding(theirs), self.deciding(self.settings)))
            raise InputError(
                f"{self.folder} holds {self.WHAT} made with other settings (hash {self.hash_of(theirs)}, this run "
                f"{self.hash}): {differences}; {self.IF_OTHERS}"
            )
        self._known_as(manifest)

    def _known_as(self, manifest: dict[str, Any]) -> Self:
        """Take the hash that the folder's shards carry: older versions counted what decides nothing as well."""
        self.hash = manifest["hash"]
        return self

    def _discard_others(self) -> None:
        """Remove the shards of other settings; this job's own finished ones stay."""
        with suppress(InputError):  # a damaged manifest is nobody's
            manifest = read_manifest(self.folder)
            if manifest is None or self.hash_of({**manifest["settings"], "shard_size": self.shard_size}) == self.hash:
                return
        try:
            for name in ("manifest.json", *self.MERGED):
                (self.folder / name).unlink(missing_ok=True)
            for name in ("shards", "claims"):
                if (self.folder / name).exists():
                    shutil.rmtree(self.folder / name)
        except OSError as error:
            raise InputError(f"cannot discard the {self.WHAT} in {self.folder}: {error.strerror or error}") from None

    def part(self, shard: int) -> str:
        """Return the name of one shard, as claims have it and its files begin."""
        return f"{shard:05d}-of-{self.shards:05d}"

    def path(self, shard: int) -> Path:
        """Return the file of one shard that is written last."""
        return self.folder / "shards" / f"{self.part(shard)}.parquet"

    def span(self, shard: int) -> range:
        """Return the rows of the data set that are in a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.rows))

    def files(self, shard: int) -> list[Path]:
        """Return all files without which a shard is not done."""
        return [self.path(shard)]

    def missing(self) -> list[int]:
        """Return the shards that are not done, by the names of the files; ``merge`` looks into them."""
        try:
            names = {*os.listdir(self.folder / "shards")}
        except FileNotFoundError:
            return list(range(self.shards))
        endings = [path.name.removeprefix(self.part(0)) for path in self.files(0)]
        return [n for n in range(self.shards) if not all(f"{self.part(n)}{ending}" in names for ending in endings)]

    def is_done(self, shard: int) -> bool:
        """Whether a shard's files are there now."""
        with suppress(OSError):  # network file systems keep in mind what was not there, until the folder is opened
            os.close(os.open(self.folder / "shards", os.O_RDONLY))
        return all(path.exists() for path in self.files(shard))

    def require_all(self) -> None:
        """Refuse to go on without a shard.

        Raises:
            InputError: shards are missing.
        """
        missing = self.missing()
        if missing:
            named = ", ".join(map(str, missing[:20])) + (" ..." if len(missing) > 20 else "")
            raise InputError(
                f"{self.folder}: {len(missing)} of {self.shards} shards are missing ({named}); run {self.COMMAND} with "
                "the same settings again, it does only what is missing"
            )

    def write_shard(self, shard: int, table: pa.Table, facts: dict[str, Any]) -> None:
        """Write the file of a shard that says that it is done, with the facts and versions."""
        facts = {"hash": self.hash, **facts, "versions": {"codeact": __version__, **versions()}}
        with atomic_path(self.path(shard)) as temporary:
            pq.write_table(table.replace_schema_metadata({_METADATA_KEY: json.dumps(facts).encode()}), temporary)

    def facts(self, shard: int) -> dict[str, Any]:
        """Read a shard's facts and check that it belongs to this job."""
        path, remedy = self.path(shard), f"delete it and run {self.COMMAND} again"
        try:
            metadata = pq.read_schema(path).metadata or {}
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{path} is damaged ({error}): {remedy}") from None
        facts: dict[str, Any] = parse_json(metadata.get(_METADATA_KEY, b"{}"))
        if facts.get("hash") != self.hash:
            raise InputError(
                f"{path} was made with other settings (hash {facts.get('hash')}, this run {self.hash}): {remedy}"
            )
        return facts

    def write_manifest(self, more: dict[str, Any]) -> None:
        """Write ``manifest.json``."""
        content = {
            "hash": self.hash,
            "settings": self.settings,
            "shards": self.shards,
            "versions": {"codeact": __version__, **versions()},
            **more,
        }
        with atomic_path(self.folder / "manifest.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def hash_of(cls, settings: dict[str, Any]) -> str:
        """Return 16 hex digits of the sha256 of what decides a result, not of where things lie."""
        canonical = json.dumps(cls.deciding(settings), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @classmethod
    def deciding(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings without names of places and what is only noted."""
        data = {k: v for k, v in settings.get("data", {}).items() if k != "source"}
        model = {k: v for k, v in settings.get("model", {}).items() if k != "name"}
        return {**{k: v for k, v in settings.items() if k not in cls.UNDECIDED}, "data": data, "model": model}


def rows_done(rows: int, progress: Callable[[float, int], object] | None) -> Callable[[float, int], None]:
    """For what does a shard: turn the share of its tokens that is done into rows done since the last call."""
    before = 0.0

    def step(share: float, tokens: int) -> None:
        nonlocal before
        if progress is not None:
            progress(rows * (share - before), tokens)
        before = share

    return step


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What ``manifest.json`` of a folder says; None: there is none.

    Raises:
        InputError: it is damaged.
    """
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
