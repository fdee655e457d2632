"""How fast, how tight and how large: codeact.pack against numpy.argsort, TRL, numba first fits and binpacking.

    python -m benchmarks.packing [--quick | --full] [--json FILE]

The plan alone is timed; no tokens are moved. Lengths are int64, as numpy and Python users have them; binpacking gets
the dictionary that it wants. argsort is the yardstick: any packer that sorts must do as much. Each packer takes
part up to the size that it can bear; all of them run on one thread. Before the clock starts: every item is in one pack
and no pack is over capacity; both numba first fits give our ffd, item by item; TRL opens as many packs as our bfd.
numba compiles in a first call that does not count.

The floor: one pass each to read the lengths (8 B an item), to write and read their 32-bit copy (8 B), to write and
read the sorted positions (8 B) and to write the indices (8 B): 32 B an item, at the speed at which one thread copies.
Above it stand the count, which reads the copy once more, the clearing of the sorted positions (so that the caches hold
them), the two scatters, of positions to one place per length and of indices to one per pack, and in a first call the
system's zeroing of fresh pages (up to 4 huge pages of each size are kept for later calls: csrc/common/large_array.hpp).
Below some 100,000 lengths all of it stays in caches that are faster than the floor says.
"""

from __future__ import annotations

import argparse
import functools
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import first_fit
from benchmarks.measure import (
    Line,
    Report,
    added_memory,
    copy_bandwidth,
    digits,
    growth_exponent,
    interleave,
    main,
    mebibytes,
    share,
    table,
)
from codeact.packing.packs import ALGORITHMS, Packs, pack

MEAN_LENGTH, SIGMA = 450, 0.8  # lognormal: what code instruction data looks like
BYTES_PER_ITEM = 32
USUAL = 10**6
TRL, TREE, SCAN, BINPACKING = "TRL bfd", "numba ffd, tree", "numba ffd, scan", "binpacking"
# The most items in the default run: TRL takes 5 s for a million, the others far more for ten times theirs.
BEARS = {TRL: 10**6, SCAN: 10**5, BINPACKING: 10**4}


def lognormal_lengths(items: int, capacity: int) -> np.ndarray:
    """(items,) int64 of mean about 450, clipped to 1..capacity."""
    mu = np.log(MEAN_LENGTH) - SIGMA**2 / 2
    return np.clip(np.random.default_rng(0).lognormal(mu, SIGMA, items), 1, capacity).astype(np.int64)


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


def packer(name: str) -> Callable[[Any, int], Any]:
    """A packer by its name: lengths and capacity -> Packs, (indices, offsets), or a list of bins."""
    if name == TRL:
        from trl.data_utils import _SegmentTree

        return functools.partial(trl_bfd, _SegmentTree)
    if name == BINPACKING:
        import binpacking

        return binpacking.to_constant_volume
    if name in ALGORITHMS:
        return lambda lengths, capacity: pack(lengths, capacity, name)
    return {TREE: first_fit.tree, SCAN: first_fit.linear, "numpy.argsort": lambda lengths, _: np.argsort(lengths)}[name]


def as_arrays(plan: Any) -> tuple[np.ndarray, np.ndarray]:
    """Indices and offsets of what a packer returned."""
    if isinstance(plan, Packs):
        return plan.indices, plan.offsets
    if isinstance(plan, tuple):
        return plan
    bins = [list(one) for one in plan]
    return np.concatenate(bins), np.cumsum([0, *map(len, bins)])


def checked_plans(names: Sequence[str], lengths: np.ndarray, capacity: int) -> dict[str, int]:
    """Number of packs by packer; raises where a plan is wrong or is not the one that it must equal."""
    counts = {}
    plans = {}
    for name in names:
        given = dict(enumerate(lengths.tolist())) if name == BINPACKING else lengths
        indices, offsets = plans[name] = as_arrays(packer(name)(given, capacity))
        assert np.array_equal(np.sort(indices), np.arange(len(lengths))), f"{name} loses items"
        assert np.add.reduceat(lengths[indices], offsets[:-1]).max() <= capacity, f"{name} overfills"
        counts[name] = len(offsets) - 1
    for name in {TREE, SCAN} & set(names):
        for ours, theirs in zip(plans["ffd"], plans[name], strict=True):
            assert np.array_equal(ours, theirs), f"{name} is another first fit"
    assert counts.get(TRL, counts["bfd"]) == counts["bfd"], "TRL's best fit and ours must open as many packs"
    return counts


def measure(items: int, capacity: int, rounds: int, bears: dict[str, int]) -> list[dict[str, Any]]:
    """One record a packer."""
    lengths = lognormal_lengths(items, capacity)
    names = [name for name in (*ALGORITHMS, TREE, SCAN, TRL, BINPACKING) if items <= bears.get(name, items)]
    counts = checked_plans(names, lengths, capacity)
    calls: dict[str, Callable[[], Any]] = {
        name: functools.partial(packer(name), lengths, capacity) for name in ["numpy.argsort", *names]
    }
    if BINPACKING in names:
        calls[BINPACKING] = functools.partial(packer(BINPACKING), dict(enumerate(lengths.tolist())), capacity)
    slow = dict.fromkeys((TRL, SCAN, BINPACKING), 2 if items > 10**5 else 3)
    # What is slow has run already, when it was checked; nothing of it is compiled in a first call.
    times = interleave({name: call for name, call in calls.items() if name not in slow}, rounds)
    times |= interleave({name: call for name, call in calls.items() if name in slow}, 3, slow, warm=False)
    bound = pack(lengths, capacity).lower_bound
    floor = BYTES_PER_ITEM * items / copy_bandwidth()
    return [
        {
            "items": items,
            "capacity": capacity,
            "what": name,
            "timing": timing,
            "argsort_ratio": timing.median / times["numpy.argsort"].median,
            "times_bfd": timing.median / times["bfd"].median,
            "floor": floor,
            "packs": counts.get(name),
            "lower_bound": bound,
            "waste": counts[name] / bound - 1 if name in counts else None,
        }
        for name, timing in times.items()
    ]


def prepare(name: str, items: int, capacity: int) -> Callable[[], Any]:
    """For ``added_memory``."""
    lengths = lognormal_lengths(items, capacity)
    function = packer(name)
    function(lengths[:1], 10**6)
    function(lengths[:100], capacity)
    return functools.partial(function, lengths, capacity)


def packing_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    return table(
        "capacity | |> items |> median (least to most) |> x argsort |> x bfd |> share of the floor |> packs |> "
        "over bound",
        (
            (
                f"{r['capacity']:,}",
                f"codeact {r['what']}" if r["what"] in ALGORITHMS else r["what"],
                f"{r['items']:,}",
                r["timing"],
                digits(r["argsort_ratio"]),
                digits(r["times_bfd"]),
                share(r["floor"], r["timing"]),
                "" if r["packs"] is None else f"{r['packs']:,}",
                "" if r["waste"] is None else f"{r['waste']:.3%}",
            )
            for r in records
        ),
    )


def run(options: argparse.Namespace) -> Report:
    usual = 20_000 if options.quick else USUAL
    sizes = [10**3, 10**4] if options.quick else [10**3, 10**4, 10**5, 10**6, 10**7]
    bears = dict.fromkeys(BEARS, 10**3) if options.quick else BEARS
    if options.full:
        bears = {TRL: 10**6, SCAN: 10**6, BINPACKING: 3 * 10**4}
        sizes.insert(2, 3 * 10**4)
    growth = [r for size in sizes for r in measure(size, 2048, 5 if size > 10**6 else 9, bears)]
    # At another capacity TRL is slower by a third; the default run leaves it to --full.
    wide = measure(usual, 8192, 9, bears if options.full else {**bears, TRL: 10**5})
    measured = {(r["what"], r["items"]): r for r in growth}
    peaks = {
        name: added_memory(prepare, name, min(usual, bears.get(name, usual)), 2048)
        for name in ("bfd", "numpy.argsort", TREE, *([] if options.quick else [TRL]))
    }
    lines = []
    for size in sizes:
        ours = measured["bfd", size]
        for name in (TREE, TRL, BINPACKING):
            if (name, size) in measured and (size in (10**3, USUAL, 10**7) or size == bears.get(name)):
                peer = measured[name, size]
                at_usual = size == usual
                lines.append(
                    Line(
                        what=f"pack {size:,} lengths into 2,048",
                        ours=ours["timing"],
                        peer=name,
                        theirs=peer["timing"],
                        floor=BYTES_PER_ITEM * size / copy_bandwidth(),
                        memory=peaks["bfd"] if at_usual else None,
                        peer_memory=peaks.get(name) if at_usual else None,
                    )
                )
    exponents = {}
    for name in ("bfd", *([] if options.quick else [TREE, TRL]), BINPACKING, SCAN):
        known = [size for size in sizes if (name, size) in measured]
        if len(known) > 1:
            medians = [measured[name, size]["timing"].median for size in known]
            exponents[name] = growth_exponent(known, medians)
    notes = [
        f"Floor: {BYTES_PER_ITEM} B an item at this machine's copy bandwidth, {copy_bandwidth() / 1e9:.1f} GB/s: "
        f"{BYTES_PER_ITEM * usual / copy_bandwidth() * 1e3:.2f} ms for {usual:,} lengths.",
        f"A call adds at {usual:,} lengths, its result (8 B a length) included: "
        + ", ".join(f"{name} {mebibytes(peak)}" for name, peak in peaks.items() if peak is not None)
        + ".",
        "Time grows, between the two largest sizes of each, as items to the power of "
        + ", ".join(f"{value:.2f} ({name})" for name, value in exponents.items())
        + ".",
    ]
    records = [*growth, *wide]
    figures = {
        "copy_bytes_per_second": copy_bandwidth(),
        "added_bytes": peaks,
        "growth_exponents": exponents,
        "records": [{**r, "timing": r["timing"].seconds} for r in records],
    }
    title = "## Packing"
    return Report(sections=[title, packing_table(records), "\n".join(notes)], lines=lines, figures=figures)


if __name__ == "__main__":
    main(run, __doc__, full="larger inputs for the slow packers: several minutes")
