"""Who does the shards of a job: this process, several of this machine, or actors of Ray. All do the same: ``work``.

    share_out --+-- one worker: work(job)
                +-- supervise(pool): starts workers, watches them, replaces those that die; each: work(job)

A worker claims a shard in the folder that all share, looks whether it is done, does it, and claims the next. So fast
ones do more, and whoever is started with the same command, by whatever and wherever, takes part.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn, Protocol

from codeact.base.console import Progress, counted, say
from codeact.base.errors import InputError
from codeact.workers.choice import launched_rank, local_rank
from codeact.workers.claims import BEAT, LEASE, TRIES, Tally, Worker, read_workers
from codeact.workers.shards import ShardFolder

_MISSES = 16  # shards in a row that others have: then where there are free ones is looked up anew
_FAILURES = 3  # shards in a row that fail: then it is not the shards
_NAMED = 5
Step = Callable[[float, int], object]


@dataclass(frozen=True, slots=True)
class Job:
    """``do(shard, step)`` does a shard of ``folder``, calling ``step`` with the rows and the tokens done since."""

    folder: ShardFolder
    do: Callable[[int, Step], object]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs: as process ``index`` of its machine, with one of ``share`` parts of the cores."""

    index: int
    share: int = 1

    def take(self, device: str) -> str:
        """Return the GPU that is for this worker alone, if ``device`` is auto; where there is none take those cores."""
        import torch

        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, torch.get_num_threads() // self.share))
            return device
        local = self.index if launched_rank() is None else local_rank(self.index)
        return f"cuda:{local % torch.cuda.device_count()}" if device == "auto" else device


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """What a worker that is started has to know; it can be pickled.

    Attributes:
        folder: of the shards.
        prepare: ``prepare(place, first)`` opens the data and loads the model; the place is None where a worker has the
            machine to itself. The first worker decides whether the folder may be used.
        share: see ``Place``.
        first: see ``prepare``.
        since: deaths over a shard count from then on; see ``codeact.workers.claims.Worker``.
        modules: what a worker loads, before it does anything else.
    """

    folder: Path
    prepare: Callable[[Place | None, bool], Job]
    share: int = 1
    first: bool = True
    since: float | None = None
    modules: tuple[str, ...] = ()


def run_worker(begin: Begin, index: int) -> None:
    """All that a started worker does; errors as of ``prepare`` and ``work``."""
    job = begin.prepare(Place(index, begin.share), begin.first)
    with Worker(begin.folder, begin.since) as worker:
        work(job, worker, lambda rows, tokens: None)


def work(job: Job, worker: Worker, step: Step) -> None:
    """Do shards until all are done, by this worker and others.

    Args:
        job: the folder, and what does a shard.
        worker: of this process.
        step: called after every forward pass with the rows and the tokens done since.

    Raises:
        InputError: something that the user can mend; or all that is left are shards over which workers died or failed.
    """
    folder, failures, start = job.folder, 0, 0

    def count(rows: float, tokens: int) -> None:
        worker.count(rows, tokens)
        step(rows, tokens)

    missing = folder.missing()
    while missing:
        claimed = worker.claimed()
        free = [shard for shard in missing if folder.part(shard) not in claimed]
        left = free or missing
        taken = misses = 0
        for shard in left[start:] + left[:start]:
            if folder.is_done(shard) or not worker.take(folder.part(shard)):
                misses += 1
                if misses == _MISSES:
                    break
                continue
            taken, misses = taken + 1, 0
            if folder.is_done(shard):  # since it was looked at
                worker.finish(done=False)
                continue
            try:
                job.do(shard, count)
            except InputError:
                raise
            except Exception as error:
                reason = f"{_named(folder, shard)} failed: {type(error).__name__}: {error}"
                say(reason)
                worker.fail(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
                failures += 1
                if failures == _FAILURES:
                    raise InputError(
                        f"{_FAILURES} shards in a row failed, the last one so: {reason}; see {folder.folder}/claims"
                    ) from error
                continue
            failures = 0
            worker.finish()
        start = random.randrange(len(left)) if misses == _MISSES else 0
        if free:
            missing = folder.missing()
            continue
        missing = [shard for shard in missing if not folder.is_done(shard)]
        if all(folder.part(shard) in worker.given_up for shard in missing):
            break
        if not taken:  # others are at work on what is left
            time.sleep(min(LEASE, BEAT / 5 * max(1, len(missing) / _MISSES)))
    if missing:
        raise_given_up(folder, missing, worker.given_up)


def raise_given_up(folder: ShardFolder, missing: list[int], reasons: dict[str, str]) -> NoReturn:
    """Name the shards that cannot be done."""
    named = [f"{_named(folder, n)}: {reasons.get(folder.part(n), 'was not done')}" for n in missing[:_NAMED]]
    more = [f"and {len(missing) - _NAMED:,} more"] if len(missing) > _NAMED else []
    raise InputError(
        f"{folder.folder}: {len(missing)} of {counted(folder.shards, 'shard')} cannot be {folder.DONE}, all others are "
        f"({'; '.join([*named, *more])}); the same command tries them again"
    )


def _named(folder: ShardFolder, shard: int) -> str:
    span = folder.span(shard)
    return f"shard {shard} (rows {span[0]:,} to {span[-1]:,})"


def work_alone(job: Job, *, show: bool) -> dict[str, Any] | None:
    """Work in this process, and show how far all workers are.

    Returns:
        The totals of the merge; None where another worker does that.
    """
    folder = job.folder
    with Worker(folder.folder) as worker:
        missing = folder.missing()
        others, asked = Tally(folder.folder, worker.name), time.monotonic()
        with Progress(_rows(folder, missing), "rows", _doing(folder, len(missing)), show=show) as bar:

            def step(rows: float, tokens: int) -> None:
                nonlocal asked
                bar(rows, tokens)
                if time.monotonic() - asked > BEAT:
                    bar(*others.more())
                    asked = time.monotonic()

            work(job, worker, step)
        return _merge(folder, worker, worker.began)


def _merge(folder: ShardFolder, worker: Worker, since: float) -> dict[str, Any] | None:
    """Put the shards together, unless another worker does, or did since then."""
    path = folder.merged_path
    if (path.exists() and path.stat().st_mtime >= since) or not worker.take("merge"):
        return None
    totals = folder.merge()
    worker.finish(done=False)
    return totals


def _rows(folder: ShardFolder, shards: list[int]) -> int:
    return sum(len(folder.span(shard)) for shard in shards)


def _doing(folder: ShardFolder, missing: int) -> str:
    return f"{folder.DOING} {missing} of {folder.shards} shards"


# ------------------------------------------------------------------------------------ workers that this process starts


class WorkerDied(Exception):  # noqa: N818 - nothing that one could mend
    """It ended without a word, as one does that is killed."""


class Pool(Protocol):
    """Places where workers run: processes of this machine, actors of Ray."""

    def start(self, index: int, begin: Begin) -> None:
        """Start worker ``index``."""

    def ended(self, seconds: float) -> list[tuple[int, Exception | None]]:
        """Wait so long at most; returns the workers that ended since, and by what: None is well."""

    def stop(self) -> None:
        """End all workers."""


def supervise(
    pool: Pool, begin: Begin, workers: int, open_folder: Callable[[], ShardFolder], what: str
) -> dict[str, Any] | None:
    """Keep ``workers`` at work until all shards are done, and merge them.

    The first begins alone, as it decides whether the folder may be used. One that dies is replaced, until more die in a
    row than shards that kill their workers could explain.

    Args:
        pool: where they run.
        begin: what a worker has to know.
        workers: how many.
        open_folder: opens the folder, once the first worker has claimed it.
        what: they are, in the plural.

    Returns:
        The totals of the merge; None where another worker does that.

    Raises:
        InputError: one ended by it; or workers die one after the other; or shards are left over which workers died.
    """
    folder: ShardFolder | None = None
    bar: Progress | None = None
    deaths, running = 0, {0}
    done: dict[str, int] = {}
    old = {record.name for record in read_workers(begin.folder)}
    tally = Tally(begin.folder)
    with ExitStack() as stack:
        stack.callback(pool.stop)
        pool.start(0, begin)
        while running:
            for index, error in pool.ended(BEAT / 5):
                running.discard(index)
                if isinstance(error, WorkerDied):
                    deaths += 1
                    if deaths > TRIES * workers:
                        raise InputError(
                            f"{deaths} {what} died in a row ({error}), perhaps for want of memory; lower "
                            "--workers or the size of a batch and run again: finished shards are kept"
                        ) from None
                    say(f"one of the {what} died ({error}); another takes its place")
                    pool.start(index, begin)
                    running.add(index)
                elif error is not None:
                    raise error
            records = [r for r in read_workers(begin.folder) if r.name not in old and r.began]
            if records and folder is None:
                folder = open_folder()
                begin = replace(begin, first=False, since=min(r.began for r in records))
                missing = folder.missing()
                since = sum(record.parts for record in records)  # small ones are done before anybody looks
                rows = min(_rows(folder, missing) + since * folder.shard_size, folder.rows)
                told = f"{_doing(folder, len(missing) + since)} with {workers} {what}"
                bar = stack.enter_context(Progress(rows, "rows", told))
                for index in range(1, workers if missing else 1):
                    pool.start(index, begin)
                    running.add(index)
            before = sum(done.values())
            done.update({record.name: record.parts for record in records})
            deaths = 0 if sum(done.values()) > before else deaths
            if bar is not None:
                bar(*tally.more())
        with Worker(begin.folder, begin.since) as worker:
            return _merge(open_folder(), worker, begin.since or worker.began)


class LocalPool:
    """Processes of this machine. They end with this one, whatever ends it."""

    def __init__(self) -> None:
        self._started: dict[int, tuple[BaseProcess, Connection]] = {}

    def start(self, index: int, begin: Begin) -> None:
        """Start a process: where no GPU is, forked from one that has loaded the libraries, which takes seconds."""
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = _process(begin, index, theirs)
        theirs.close()
        self._started[index] = process, ours

    def ended(self, seconds: float) -> list[tuple[int, Exception | None]]:
        """Those that ended, with what they said."""
        wait([process.sentinel for process, _ in self._started.values()], seconds)
        found: list[tuple[int, Exception | None]] = []
        for index, (process, said) in list(self._started.items()):
            if process.is_alive():
                continue
            process.join()
            error: Exception | None = None
            if (code := process.exitcode or 0) < 0:
                error = WorkerDied(signal.Signals(-code).name)
            elif code:
                error = InputError(f"a worker ended with exit code {code}; see above")
                with suppress(EOFError):
                    error = InputError(said.recv()) if said.poll() else error
            said.close()
            del self._started[index]
            found.append((index, error))
        return found

    def stop(self) -> None:
        """End them at once: what they hold is free as soon as they are gone."""
        for process, _ in self._started.values():
            process.terminate()
        for process, _ in self._started.values():
            process.join()


_forked_with: dict[str, str] = {}  # the environment of the process from which workers are forked


def _process(begin: Begin, index: int, said: Connection) -> BaseProcess:
    """A worker that is started: forked from a process that has loaded the libraries, or else by itself."""
    work: dict[str, Any] = {"target": _local_worker, "args": (begin, index, said)}
    if not _may_have_gpu() and (not _forked_with or _forked_with == dict(os.environ)):
        forking: Any = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload([__name__, *begin.modules])
        _forked_with.update(os.environ)
        with suppress(OSError, EOFError):  # a name of a socket that is too long, a library that fails as it is loaded
            process: BaseProcess = forking.Process(**work)
            process.start()
            return process
    process = multiprocessing.get_context("spawn").Process(**work)
    process.start()
    return process


def _may_have_gpu() -> bool:
    """Whether a forked process might miss one: CUDA that a library has looked for before a fork is lost after it."""
    there = (Path("/dev/kfd"), Path("/dev/dxg"), *Path("/dev").glob("nvidia*"))
    return sys.platform != "linux" or any(path.exists() for path in there)


def _local_worker(begin: Begin, index: int, said: Connection) -> None:
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is shared among processes, and one that is terminated leaks it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, for all of its processes: the parent acts on it
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()  # a process outlives a parent that is killed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        run_worker(begin, index)
    except InputError as error:
        said.send(error.args[0])
        raise SystemExit(2) from None
