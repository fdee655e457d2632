"""Who does which part of a job, on a folder that all its workers share: files alone, no server and no lock.

    DIR/workers/NAME.json    what a worker has done and does; renewed every few seconds, and that is its lease
    DIR/claims/PART.0        holds the name of the worker that began the part; of all that try, one can make it
    DIR/claims/PART.1        of the next one, as the first is dead or failed (then its reason stands below its name)

A worker is dead when it has not renewed its file for a lease, or when it ran on this machine and is gone. That may be
wrong (a network that was away): so two writers of one part must be harmless. What a part did to workers before counts
only if a worker that lives was there already: a rerun tries everything again.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from codeact.base.console import visible
from codeact.base.errors import InputError
from codeact.base.files import TEMPORARY_PREFIX, runs
from codeact.base.parsing import read_json

LEASE = 60.0
"""Seconds without a sign of life after which a worker is dead."""
BEAT = 5.0
"""Seconds from one sign of life to the next."""
TRIES = 2
"""So many workers may die or fail over one part, then it is left out."""


@functools.cache
def place() -> str:
    """What tells this machine, and the container on it, from others: numbers of processes mean something within it."""
    boot, space = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {space}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """What a worker says of itself.

    ``began`` and ``renewed`` are by the clock of the file system; ``rows``, ``tokens`` and ``parts`` are what it did in
    ``seconds``, ``rows`` with its share of the part in hand. ``place``: see the function.
    """

    name: str
    host: str
    pid: int
    place: str
    began: float
    renewed: float
    ended: bool
    part: str | None
    parts: int
    rows: float
    tokens: int
    seconds: float

    def lives(self, now: float) -> bool:
        """Whether it is at work."""
        if self.ended or now - self.renewed > LEASE:
            return False
        return self.place != place() or runs(self.pid)


@dataclass(frozen=True, slots=True)
class Claim:
    """Who began a part. ``reason``: why that failed, in a line; ``made``: by the clock of the file system."""

    part: str
    worker: str
    reason: str
    made: float


def read_workers(folder: Path) -> list[WorkerRecord]:
    """The workers of a job, those that ended or died too, in order of name."""
    paths = sorted((folder / "workers").glob("[!.]*.json"))
    return [record for record in map(_read_worker, paths) if record is not None]


def clock_of(folder: Path) -> float:
    """Now, by the clock of the file system on which a job lies: ``renewed`` of its workers is by that, too."""
    probe = folder / f"{TEMPORARY_PREFIX}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def read_claims(folder: Path) -> list[Claim]:
    """All claims of a job, the failed ones too."""
    found = (_read_claim(path) for path in sorted((folder / "claims").glob("[!.]*.[0-9]*")))
    return [claim for claim in found if claim is not None]


def _read_worker(path: Path) -> WorkerRecord | None:
    try:
        # Opened, as network file systems then ask the server for the time of the last change.
        with path.open("rb") as file:
            renewed = os.fstat(file.fileno()).st_mtime
        content = read_json(path)
        return WorkerRecord(
            name=path.stem,
            host=str(content["host"]),
            pid=int(content["pid"]),
            place=str(content["place"]),
            began=float(content["began"]),
            renewed=renewed,
            ended=bool(content["ended"]),
            part=None if content["part"] is None else str(content["part"]),
            parts=int(content["parts"]),
            rows=float(content["rows"]),
            tokens=int(content["tokens"]),
            seconds=float(content["seconds"]),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _read_claim(path: Path) -> Claim | None:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            made = os.fstat(file.fileno()).st_mtime
            worker, reason, *_ = (*file.read(100_000).split("\n", 2), "")
    except OSError:
        return None
    return Claim(path.name.rpartition(".")[0], worker, visible(reason.strip()), made)


class Worker:
    """One that takes parts of the job in ``folder``: ``with Worker(folder) as worker``, then take, count, and finish.

    Args:
        folder: that all workers of the job see; it can be written to.
        since: deaths and failures over a part count from then on (``began`` of a worker whose place this one takes).
            Default: since the oldest worker that lives began.

    Raises:
        InputError: on entry: the folder cannot be written to.
    """

    def __init__(self, folder: Path, since: float | None = None) -> None:
        host = socket.gethostname()
        self.name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self.given_up: dict[str, str] = {}
        """Parts over which too many workers died or failed, and why."""
        self.rows, self.tokens, self.parts = 0.0, 0, 0
        self._folder, self._host, self._since = folder, host, since
        self._path, self._claims = folder / "workers" / f"{self.name}.json", folder / "claims"
        self._part: str | None = None
        self._attempt = 0
        self._ended = False
        self._begin = time.monotonic()
        self.began = 0.0
        self._part_rows, self._part_tokens = 0.0, 0
        self._stop, self._renewing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)

    def __enter__(self) -> Worker:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._claims.mkdir(exist_ok=True)
            self.renew()
            self.began = self._path.stat().st_mtime
            self.renew()
        except OSError as error:
            raise InputError(
                f"cannot write {self._path}: {error.strerror or error}; free space or choose another --output"
            ) from None
        others = [other for other in read_workers(self._folder) if other.name != self.name]
        if not any(other.lives(self.began) for other in others):  # of a job before; what they still claim is free
            for other in others:
                self._path.with_name(f"{other.name}.json").unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            if self._part is not None:
                self._claim_path(self._part, self._attempt).unlink(missing_ok=True)
                self._drop()
            self._ended = True
            self.renew()

    def take(self, part: str) -> bool:
        """Claim a part.

        Returns:
            Whether it is this worker's now. If not, another one has it or had it a moment ago, or it is ``given_up``.
        """
        reasons: list[str] = []
        for attempt in itertools.count():
            path = self._claim_path(part, attempt)
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(self.name)
            except FileExistsError:
                pass
            except OSError as error:
                raise InputError(
                    f"cannot write {path}: {error.strerror or error}; free space or choose another --output"
                ) from None
            else:
                self._part, self._attempt = part, attempt
                self.given_up.pop(part, None)
                return True
            claim = _read_claim(path)
            if claim is None or (reason := self._why_free(claim)) is None:
                return False
            if claim.made >= self._counted_from():
                reasons.append(reason)
            if len(reasons) == TRIES:
                told = list(dict.fromkeys(reasons))
                self.given_up[part] = "; ".join(told)
                return False
        raise AssertionError("numbers do not end")

    def count(self, rows: float, tokens: int) -> None:
        """Note what was done of the part in hand."""
        self._part_rows += rows
        self._part_tokens += tokens

    def finish(self, *, done: bool = True) -> None:
        """The part in hand is done, by this worker or (``done=False``) by another one before."""
        assert self._part is not None
        for attempt in range(self._attempt + 1):
            self._claim_path(self._part, attempt).unlink(missing_ok=True)
        self.rows += self._part_rows
        self.tokens += self._part_tokens
        self.parts += done
        self._drop()

    def fail(self, reason: str) -> None:
        """The part in hand cannot be done by this worker."""
        assert self._part is not None
        with suppress(OSError):
            self._claim_path(self._part, self._attempt).write_text(f"{self.name}\n{reason}", encoding="utf-8")
        self._drop()

    def _drop(self) -> None:
        self._part, self._part_rows, self._part_tokens = None, 0.0, 0

    def claimed(self) -> set[str]:
        """Parts that somebody has begun and not finished, dead or alive."""
        return {name.rpartition(".")[0] for name in os.listdir(self._claims)}

    def renew(self) -> None:
        """Say that this worker lives, and what it has done."""
        content = {
            **{"host": self._host, "pid": os.getpid(), "place": place(), "began": self.began, "ended": self._ended},
            **{"part": self._part, "parts": self.parts, "seconds": round(time.monotonic() - self._begin, 2)},
            **{"rows": round(self.rows + self._part_rows, 2), "tokens": self.tokens + self._part_tokens},
        }
        temporary = self._path.with_name(f"{TEMPORARY_PREFIX}{self._host}-{os.getpid()}-{self.name}")
        with self._renewing:
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(self._path)

    def _keep_alive(self) -> None:
        while not self._stop.wait(BEAT):
            with suppress(OSError):  # the next one may get through; if none does, others take over
                self.renew()

    def _claim_path(self, part: str, attempt: int) -> Path:
        return self._claims / f"{part}.{attempt}"

    def _why_free(self, claim: Claim) -> str | None:
        """Why a part that was claimed may be begun again; None: it may not."""
        if claim.reason:
            return claim.reason
        now = self._now()
        record = _read_worker(self._path.with_name(f"{claim.worker}.json")) if claim.worker else None
        # Without a record it is of a job before; without a name the claim is just being made.
        held = record.lives(now) if record is not None else not claim.worker and now - claim.made <= LEASE
        return None if held else f"worker {claim.worker} ended in it"

    def _now(self) -> float:
        """By the clock of the file system, so that those of the machines may differ."""
        self.renew()
        return self._path.stat().st_mtime

    def _counted_from(self) -> float:
        now = self._now()
        others = (other.began for other in read_workers(self._folder) if other.lives(now))
        return min([self.began if self._since is None else self._since, *filter(None, others)])


class Tally:
    """What all workers of a job did since it was asked last, but one of them (who counts for itself)."""

    def __init__(self, folder: Path, without: str = "") -> None:
        self._folder, self._without = folder, without
        self._seen: dict[str, tuple[float, int]] = {}
        for _ in self._news():
            pass

    def more(self) -> tuple[float, int]:
        """Rows and tokens since the last call."""
        news = list(self._news())
        return sum(rows for rows, _ in news), sum(tokens for _, tokens in news)

    def _news(self) -> Iterator[tuple[float, int]]:
        for record in read_workers(self._folder):
            rows, tokens = self._seen.get(record.name, (0.0, 0))
            if record.name != self._without and record.rows >= rows:
                self._seen[record.name] = (record.rows, record.tokens)
                yield record.rows - rows, record.tokens - tokens
