"""How fast, how tight and how large: codeact.pack against numpy.argsort and TRL's best-fit decreasing.

    python benchmarks/packing.py [--quick] [--json FILE]

The plan alone is timed; no tokens are moved. Lengths are int64, as numpy and Python users have them. Every packer's
result is checked, and the number of packs compared, before anything is timed. argsort is the yardstick because any
packer that sorts must do as much; argsort and the packers run once in every round, in random order, so that all see the
same machine and none always finds the caches as argsort leaves them. All of them run on one thread.

The floor: one pass each to read the lengths (8 B an item), to write and read their 32-bit copy (8 B), to write and
read the sorted positions (8 B) and to write the indices (8 B): 32 B an item. Above it stand the count, which reads the
copy once more, the clearing of the sorted positions (so that the caches hold them), the two scatters, of positions to
one place per length and of indices to one per pack, and in a first call the system's zeroing of fresh pages (up to 4
huge pages of each size are kept for later calls, see csrc/large_array.hpp).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codeact.packing import ALGORITHMS, Packs, pack

MEAN_LENGTH, SIGMA = 450, 0.8  # lognormal: what code instruction data looks like
BYTES_PER_ITEM = 32


def lognormal_lengths(items: int, capacity: int) -> np.ndarray:
    """(items,) int64 of mean about 450, clipped to 1..capacity."""
    mu = np.log(MEAN_LENGTH) - SIGMA**2 / 2
    return np.clip(np.random.default_rng(0).lognormal(mu, SIGMA, items), 1, capacity).astype(np.int64)


def seconds(functions: dict[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Wall time of each function, `runs` times: rounds in random order, of which the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(0)
    for number in range(runs + 1):
        for name, function in order.sample(list(functions.items()), len(functions)):
            start = time.perf_counter()
            function()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def check(packs: Packs, lengths: np.ndarray) -> None:
    """Every item once, no pack over capacity."""
    assert np.array_equal(np.sort(packs.indices), np.arange(len(lengths)))
    assert np.add.reduceat(lengths[packs.indices], packs.offsets[:-1]).max() <= packs.capacity


def trl_segment_tree() -> Any:
    """TRL's own segment tree, or None (with the reason printed) where it is absent."""
    try:
        from trl.data_utils import _SegmentTree
    except ImportError as error:
        print(f'TRL is left out ({error}); to compare: pip install "codeact[bench]"', file=sys.stderr)
        return None
    return _SegmentTree


def trl_bfd(segment_tree: Any, lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """The planning loop of trl.data_utils._pack_bfd (`pack_dataset(..., strategy="bfd")`), line by line, on TRL's tree.

    Left out, in TRL's favour: the moving of tokens. Sorted by numpy where TRL sorts an Arrow struct.
    """
    order = np.argsort(-lengths, kind="stable")
    tree = segment_tree(capacity)
    tree.add(capacity)  # a new bin is always available
    space_to_bin: defaultdict[int, deque[dict[str, Any]]] = defaultdict(deque)
    bins: list[dict[str, Any]] = []
    for length, index in zip(lengths[order], order, strict=True):
        space = tree.search(length)
        if space < capacity:
            bin_ = space_to_bin[space].popleft()
        else:
            bin_ = {"ids": [], "length": 0}
            bins.append(bin_)
        bin_["ids"].append(index)
        bin_["length"] += length
        if space < capacity and not space_to_bin[space]:
            tree.remove(space)
        space = space - length
        space_to_bin[space].append(bin_)
        if space > 0:
            tree.add(space)
    return [bin_["ids"] for bin_ in bins]


def measure(items: int, capacity: int, runs: int, trl_runs: int) -> list[dict[str, Any]]:
    """One record for argsort, each algorithm and TRL."""
    lengths = lognormal_lengths(items, capacity)
    packers: dict[str, Callable[[], Any]] = {
        name: lambda name=name: pack(lengths, capacity, name)
        for name in ALGORITHMS  # type: ignore[misc]
    }
    plans: dict[str, Packs] = {name: packer() for name, packer in packers.items()}
    for plan in plans.values():
        check(plan, lengths)
    counts = {name: len(plan) for name, plan in plans.items()}
    bound = plans["bfd"].lower_bound
    times = seconds({"numpy.argsort": lambda: np.argsort(lengths), **packers}, runs)

    tree = trl_segment_tree() if trl_runs else None
    if tree is not None:
        trl_plan = trl_bfd(tree, lengths, capacity)
        assert len(trl_plan) == counts["bfd"], "TRL's best fit and ours must open as many packs"
        same = sum(map(np.array_equal, trl_plan, plans["bfd"]))
        print(f"{same} of {len(trl_plan)} packs are TRL's, item by item", file=sys.stderr)
        counts["trl bfd"] = len(trl_plan)
        times |= seconds({"trl bfd": lambda: trl_bfd(tree, lengths, capacity)}, trl_runs)

    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "items": items,
            "capacity": capacity,
            "what": name,
            "dtype": str(lengths.dtype),
            "runs": len(values),
            "median_ms": 1e3 * medians[name],
            "min_ms": 1e3 * min(values),
            "max_ms": 1e3 * max(values),
            "argsort_ratio": medians[name] / medians["numpy.argsort"],
            "times_bfd": medians[name] / medians["bfd"],
            "packs": counts.get(name),
            "lower_bound": bound,
            "waste": counts[name] / bound - 1 if name in counts else None,
        }
        for name, values in times.items()
    ]


def copy_bandwidth() -> float:
    """Bytes a second that numpy moves from one warm 32 MB array to another, read and written bytes counted."""
    source, target = np.ones(2**22), np.ones(2**22)
    return 2 * source.nbytes / min(seconds({"copy": lambda: np.copyto(target, source)}, 9)["copy"])


def peak_memory(items: int, capacity: int) -> float:
    """Most bytes an item that one call adds to a fresh process, the result (8 B) included."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import packing\n"
        "from codeact.packing import pack\n"
        "lengths = packing.lognormal_lengths(int(sys.argv[2]), int(sys.argv[3])); pack(lengths[:1], 10**6)\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # resets the high-water mark
        "peak = lambda: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))\n"
        "before = peak(); packs = pack(lengths, int(sys.argv[3])); print(1024 * (peak() - before))"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(items), str(capacity)]
    return int(subprocess.check_output(arguments, text=True)) / items


def table(records: Sequence[dict[str, Any]]) -> str:
    lines = ["| items | capacity | | median ms | min to max | x argsort | x bfd | packs | bound | over bound |"]
    lines.append("|--:|--:|:--|--:|:-:|--:|--:|--:|--:|--:|")
    for r in records:
        packs = f"{r['packs']:,} | {r['lower_bound']:,} | {r['waste']:.3%}" if r["packs"] else "| |"
        lines.append(
            f"| {r['items']:,} | {r['capacity']:,} | {r['what']} | {r['median_ms']:.3f} | "
            f"{r['min_ms']:.3f} to {r['max_ms']:.3f} | {r['argsort_ratio']:.2f} | {r['times_bfd']:.1f} | {packs} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="20,000 lengths and few runs: does it still work?")
    options = parser.parse_args()
    items, runs, trl_runs = (20_000, 5, 1) if options.quick else (1_000_000, 15, 3)

    records = [r for capacity in (2048, 8192) for r in measure(items, capacity, runs, trl_runs)]
    growth = [
        r
        for size in ([10**3, 10**4] if options.quick else [10**3, 10**4, 10**5, 10**6, 10**7])
        for r in measure(size, 2048, 5 if size > 10**6 else 9, 0)
    ]
    bandwidth = copy_bandwidth()
    memory = peak_memory(items, 2048) if sys.platform == "linux" else None
    print("## The usual sizes\n\n" + table(records) + "\n\n## Growth\n\n" + table(growth))
    print(f"\nFloor: {BYTES_PER_ITEM * items / bandwidth * 1e3:.2f} ms for {BYTES_PER_ITEM} B an item", end=" ")
    print(f"at this machine's copy bandwidth, {bandwidth / 1e9:.1f} GB/s.")
    if memory is not None:
        print(f"Peak memory that a call adds at {items:,} lengths: {memory:.1f} B an item, 8 B of them the result.")
    if options.json:
        machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "numpy": np.__version__}
        figures = {**machine, "copy_bytes_per_second": bandwidth, "peak_bytes_per_item": memory}
        figures["process_peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        options.json.write_text(json.dumps({**figures, "records": records, "growth": growth}, indent=1) + "\n")


if __name__ == "__main__":
    main()
