"""What sharing out the shards of a job costs beside the work itself, as workers and shards grow.

    python -m benchmarks.coordination [--quick | --full] [--json FILE]

Simulated: the loop that every worker runs (``codeact.workers.engines.work``), on a clock of its own, in memory. Workers
are up to four times as fast as others; shards take one second on average, in an exponential distribution, which is
worse than real ones. Told is when the last shard is done, beside when it would be if work could be cut at will (the
floor), how often a worker lists the folder, and how often it finds a shard taken.

On this disk: what a worker does to the folder for a shard (claim, look, finish), and what a listing of a job half done
takes, in a process each.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Report, growth_exponent, in_fresh_process, main, mebibytes, resident, table
from codeact.workers import engines
from codeact.workers.claims import Worker
from codeact.workers.engines import Job, work
from codeact.workers.shards import ShardFolder

JOBS = ((10, 2_000), (100, 5_000))
FULL_JOBS = ((100, 10_000), (1_000, 100_000), (100, 1_000_000))
QUICK_JOBS = ((3, 30), (10, 100))
SIZES, FULL_SIZES, QUICK_SIZES = (1_000, 10_000), (100_000, 1_000_000), (100, 300)


class Clock:
    """Simulated time: of all threads one runs at a time, the one whose sleep ends first."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleeping: list[tuple[float, int, threading.Lock]] = []
        self._order = itertools.count()

    def sleep(self, seconds: float) -> None:
        """Let others run until then."""
        gate = self._gate(seconds)
        self.wake()
        gate.acquire()

    def enter(self, entered: threading.Semaphore) -> None:
        """Sleep until all are there and somebody wakes the first."""
        gate = self._gate(0.0)
        entered.release()
        gate.acquire()

    def _gate(self, seconds: float) -> threading.Lock:
        gate = threading.Lock()
        gate.acquire()
        heapq.heappush(self._sleeping, (self.now + seconds, next(self._order), gate))
        return gate

    def wake(self) -> None:
        """Hand over to the next one."""
        if self._sleeping:
            self.now, _, gate = heapq.heappop(self._sleeping)
            gate.release()


class Shards:
    """As much of a folder as the loop asks for, and of what workers claim in it."""

    def __init__(self, shards: int) -> None:
        self.shards, self.folder = shards, Path("nowhere")
        self.todo, self.taken = dict.fromkeys(range(shards)), set[str]()
        self.listings = self.misses = 0

    def part(self, shard: int) -> str:
        return str(shard)

    def missing(self) -> list[int]:
        self.listings += 1
        return list(self.todo)

    def is_done(self, shard: int) -> bool:
        return shard not in self.todo


class Claimant:
    """A worker's side of it."""

    def __init__(self, shards: Shards) -> None:
        self._shards, self.given_up = shards, dict[str, str]()
        self._part = ""

    def claimed(self) -> set[str]:
        return set(self._shards.taken)

    def take(self, part: str) -> bool:
        if part in self._shards.taken:
            self._shards.misses += 1
            return False
        self._part = part
        self._shards.taken.add(part)
        return True

    def count(self, rows: float, tokens: int) -> None:
        pass

    def finish(self, *, done: bool = True) -> None:
        self._shards.taken.discard(self._part)


@contextmanager
def on(clock: Clock) -> Iterator[None]:
    """The loop sleeps by this clock."""
    real = engines.time
    engines.time = type("SimulatedTime", (), {"sleep": staticmethod(clock.sleep)})  # type: ignore[assignment]
    try:
        yield
    finally:
        engines.time = real


def simulated(workers: int, count: int) -> dict[str, Any]:
    """One job, from the first worker's start to the last one's end."""
    generator, clock, shards = np.random.default_rng(0), Clock(), Shards(count)
    lengths, speeds = generator.exponential(size=count), generator.uniform(0.5, 2.0, workers)
    done, ended, entered = np.zeros(count, int), np.zeros(count), threading.Semaphore(0)

    def worker(speed: float) -> None:
        clock.enter(entered)

        def do(shard: int, step: object) -> None:
            clock.sleep(lengths[shard] / speed)
            done[shard], ended[shard] = done[shard] + 1, clock.now
            shards.todo.pop(shard, None)

        work(Job(shards, do), Claimant(shards), lambda rows, tokens: None)  # type: ignore[arg-type]
        clock.wake()

    begin, size = time.process_time(), threading.stack_size(1 << 18)
    threads = [threading.Thread(target=worker, args=(speed,)) for speed in speeds]
    with on(clock):
        for thread in threads:
            thread.start()
            entered.acquire()
        clock.wake()
        for thread in threads:
            thread.join()
    threading.stack_size(size)
    assert (done == 1).all(), "each shard once"
    return {
        "workers": workers,
        "shards": count,
        "time_over_floor": ended.max() * speeds.sum() / lengths.sum(),
        "listings_a_worker": shards.listings / workers,
        "misses_a_shard": shards.misses / count,
        "cpu_us_a_shard": 1e6 * (time.process_time() - begin) / count,
    }


class Folder(ShardFolder):
    """Of a job that writes empty files."""

    COMMAND, DOING, DONE, WHAT, IF_OTHERS = "nothing", "doing", "done", "nothing", "nothing"

    @property
    def merged_path(self) -> Path:
        return self.folder / "merged"

    def merge(self) -> dict[str, Any]:
        return {}


def on_disk(count: int) -> dict[str, Any]:
    """In a process of its own, with half of the shards done."""
    with tempfile.TemporaryDirectory() as place:
        folder = Folder(place, {"data": {"rows": count}, "shard_size": 1})
        folder.claim()
        (folder.folder / "shards").mkdir()
        for shard in range(0, count, 2):
            folder.path(shard).touch()
        Path("/proc/self/clear_refs").write_text("5")
        before, begin = resident("VmRSS"), time.perf_counter()
        missing = folder.missing()
        listing, memory = time.perf_counter() - begin, resident("VmHWM") - before
        assert len(missing) == count // 2
        some = missing[: min(len(missing), 1_000)]
        with Worker(folder.folder) as worker:
            begin = time.perf_counter()
            for shard in some:
                assert worker.take(folder.part(shard))
                assert not folder.is_done(shard)
                worker.finish()
            each = (time.perf_counter() - begin) / len(some)
    return {"shards": count, "listing_seconds": listing, "listing_memory": memory, "seconds_a_shard": each}


def run(options: argparse.Namespace) -> Report:
    jobs = QUICK_JOBS if options.quick else JOBS + FULL_JOBS * options.full
    sizes = QUICK_SIZES if options.quick else SIZES + FULL_SIZES * options.full
    found = [simulated(*job) for job in jobs]
    disk = [in_fresh_process(on_disk, count, preload=("numpy",)) for count in sizes]
    simulation = table(
        "> workers |> shards |> time over the floor |> listings a worker |> shards found taken, a shard",
        (
            (
                f"{r['workers']:,}",
                f"{r['shards']:,}",
                f"{r['time_over_floor']:.3f}",
                f"{r['listings_a_worker']:.1f}",
                f"{r['misses_a_shard']:.2f}",
            )
            for r in found
        ),
    )
    files = table(
        "> shards |> a listing |> its memory |> claim, look and finish",
        (
            (
                f"{r['shards']:,}",
                f"{1e3 * r['listing_seconds']:,.1f} ms",
                mebibytes(r["listing_memory"]),
                f"{1e6 * r['seconds_a_shard']:.0f} us",
            )
            for r in disk
        ),
    )
    power = growth_exponent([r["shards"] for r in disk], [r["listing_seconds"] for r in disk])
    told = f"A listing grows as shards to the power of {power:.2f}."
    return Report(
        sections=["## Coordination", simulation, files, told],
        lines=[],
        figures={"simulated": found, "on_disk": disk, "listing_growth_exponent": power},
    )


if __name__ == "__main__":
    main(run, __doc__, full="1,000 workers and a million shards, too: some minutes")
