"""k-means on embeddings: codeact.cluster against scikit-learn, MiniBatchKMeans and faiss.

    python -m benchmarks.clustering [--quick | --full] [--json FILE]

Vectors: float32, unit length, 384 dimensions (all-MiniLM-L6-v2's), drawn round 50 centres so widely that the clusters
run into each other, as those of real questions do. Inertia is the sum of squared distances to the means of the labels
that an arm returns, in float64: one rule for all. Before the clock starts: codeact gives the inertia of scikit-learn
with the same seed and restarts to 1e-4, and no arm is looser than codeact by more than 10 %.

Their stopping rules differ, and so does what they promise:
- codeact: 3 runs from k-means++, 300 iterations or a shift of the centres below 1e-4 of the variance; the same labels
  on any number of threads. "codeact, sampled": one run on 256 k rows, as faiss does.
- scikit-learn, 3 runs: the same, its last bits by the threads. KMeans as it comes: one run.
- MiniBatchKMeans as it comes: 3 starts on samples, batches of 1,024, until 10 of them bring nothing; not Lloyd's.
- faiss as it comes: one run from random rows on at most 256 k of them, 25 iterations. "faiss, all rows": all of them,
  3 runs.

The floor: every pass that codeact made (counted: iterations of all runs, and draws of starts) reads all vectors once
(4 N D bytes, at the speed of one thread's copy) and multiplies them with the centres (2 N k D operations, at the
multipliers' speed, all threads); the larger of the two.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import codeact
from benchmarks.measure import (
    Line,
    Report,
    Timing,
    added_memory,
    copy_bandwidth,
    growth_exponent,
    interleave,
    main,
    mebibytes,
    multiplier_peak,
    share,
    table,
)
from codeact.selection.clustering import MAX_ITERATIONS
from codeact.selection.kmeans import fit_native

DIMENSIONS, SEED, RESTARTS = 384, 42, 3
# N, k, rounds. 10 clusters are the paper's.
CASES = ((100, 10, 5), (1_000, 10, 5), (10_000, 10, 5), (10_000, 100, 3), (40_000, 10, 2))
FULL_CASES = (*CASES, (80_000, 10, 3), (80_000, 100, 3))
OURS, SAMPLED, SAME, PLAIN = "codeact", "codeact, sampled", "scikit-learn, 3 runs", "scikit-learn"
MINIBATCH, FAISS, FAISS_ALL = "MiniBatchKMeans", "faiss", "faiss, all rows, 3 runs"
NAMES = (OURS, SAMPLED, SAME, PLAIN, MINIBATCH, FAISS, FAISS_ALL)


def vectors_of(rows: int) -> np.ndarray:
    """(rows, 384) float32, unit length."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(50, DIMENSIONS))
    vectors = centres[generator.integers(50, size=rows)] + 1.5 * generator.normal(size=(rows, DIMENSIONS))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def faiss_labels(vectors: np.ndarray, k: int, **settings: Any) -> np.ndarray:
    import faiss

    kmeans = faiss.Kmeans(vectors.shape[1], k, seed=SEED, **settings)
    kmeans.train(vectors)
    return kmeans.assign(vectors)[1]


def clusterer(name: str) -> Callable[[np.ndarray, int], np.ndarray]:
    """Vectors and k -> labels."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    return {
        OURS: lambda v, k: codeact.cluster(v, k, SEED, "native", n_init=RESTARTS),
        SAMPLED: lambda v, k: codeact.cluster(v, k, SEED, "native", n_init=1, fit_rows=256 * k),
        SAME: lambda v, k: KMeans(k, n_init=RESTARTS, random_state=SEED).fit(v).labels_,
        PLAIN: lambda v, k: KMeans(k, random_state=SEED).fit(v).labels_,
        MINIBATCH: lambda v, k: MiniBatchKMeans(k, random_state=SEED).fit(v).labels_,
        FAISS: faiss_labels,
        FAISS_ALL: lambda v, k: faiss_labels(v, k, nredo=RESTARTS, max_points_per_centroid=len(v)),
    }[name]


def inertia_of(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squared distances to the means: that of the squares less that of the means."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    sums = np.add.reduceat(vectors[order].astype(np.float64), starts)
    counts = np.diff(np.append(starts, len(labels)))
    return float((vectors.astype(np.float64) ** 2).sum() - (sums**2 / counts[:, None]).sum())


def passes_of(vectors: np.ndarray, k: int) -> int:
    """Over all rows, of codeact's k-means."""
    return fit_native(vectors, k, SEED, RESTARTS, MAX_ITERATIONS)[2]


def measure(rows: int, k: int, rounds: int) -> list[dict[str, Any]]:
    vectors = vectors_of(rows)
    calls = {name: functools.partial(clusterer(name), vectors, k) for name in NAMES}
    inertia = {name: inertia_of(vectors, call()) for name, call in calls.items()}
    assert abs(inertia[OURS] / inertia[SAME] - 1) < 1e-4, "codeact is scikit-learn's k-means"
    assert max(inertia.values()) < 1.1 * inertia[OURS], inertia
    passes = passes_of(vectors, k)
    times = interleave(calls, rounds, warm=False)
    peak = multiplier_peak().get("float32")
    reading = 4 * vectors.size / copy_bandwidth()
    floor = None if peak is None else passes * max(reading, 2 * vectors.size * k / peak)
    return [
        {
            "rows": rows,
            "k": k,
            "what": name,
            "timing": times[name],
            "times_codeact": times[OURS].median / times[name].median,
            "inertia": inertia[name] / inertia[OURS],
            "floor": floor if name == OURS else None,
            "passes": passes if name == OURS else None,
        }
        for name in NAMES
    ]


def prepare(name: str, rows: int, k: int) -> Callable[[], Any]:
    """For ``added_memory``."""
    vectors = vectors_of(rows)
    function = clusterer(name)
    function(vectors[: 4 * k], k)
    return functools.partial(function, vectors, k)


def clustering_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    return table(
        "N, k | |> median (least to most) |> x codeact's speed |> inertia / codeact's |> share of the floor |> "
        "added memory",
        (
            (
                f"{r['rows']:,}, {r['k']}",
                r["what"],
                r["timing"],
                f"{r['times_codeact']:.2f}",
                f"{r['inertia']:.4f}",
                share(r["floor"], r["timing"]),
                mebibytes(r.get("added_bytes")),
            )
            for r in records
        ),
    )


def run(options: argparse.Namespace) -> Report:
    cases = ((100, 10, 2), (1_000, 10, 2)) if options.quick else FULL_CASES if options.full else CASES
    records = [record for case in cases for record in measure(*case)]
    rows, k, _ = cases[-1]
    for record in records:
        if (record["rows"], record["k"]) == (rows, k):
            record["added_bytes"] = added_memory(prepare, record["what"], rows, k)
    lines = []
    for rows, k, _ in cases:
        group = {r["what"]: r for r in records if (r["rows"], r["k"]) == (rows, k)}
        # The fastest of those that are as tight as codeact, and the fastest of all.
        tight = [r for name, r in group.items() if name not in (OURS, SAMPLED) and r["inertia"] < 1.001]
        fastest = [r for name, r in group.items() if name not in (OURS, SAMPLED)]
        peers = {min(some, key=lambda r: r["timing"].median)["what"] for some in (tight, fastest) if some}
        lines += [
            Line(
                what=f"k-means, {rows:,} x {DIMENSIONS}, k {k}",
                ours=group[OURS]["timing"],
                peer=f"{name} (inertia x {group[name]['inertia']:.4f})",
                theirs=group[name]["timing"],
                floor=group[OURS]["floor"],
                memory=group[OURS].get("added_bytes"),
                peer_memory=group[name].get("added_bytes"),
            )
            for name in sorted(peers)
        ]
        lines.append(
            Line(
                what=f"the same, sampled (inertia x {group[SAMPLED]['inertia']:.4f})",
                ours=group[SAMPLED]["timing"],
                peer=f"{FAISS} (inertia x {group[FAISS]['inertia']:.4f})",
                theirs=group[FAISS]["timing"],
                memory=group[SAMPLED].get("added_bytes"),
                peer_memory=group[FAISS].get("added_bytes"),
            )
        )
    grown: dict[str, list[Timing]] = {
        name: [r["timing"] for r in records if r["what"] == name and r["k"] == 10] for name in NAMES
    }
    sizes = [rows for rows, k, _ in cases if k == 10]
    exponents = {name: growth_exponent(sizes, [t.median for t in timings]) for name, timings in grown.items()}
    note = f"Time grows from {sizes[-2]:,} to {sizes[-1]:,} rows (k = 10) as N to the power of " + ", ".join(
        f"{value:.2f} ({name})" for name, value in exponents.items()
    )
    return Report(
        sections=["## Clustering", clustering_table(records), note + "."],
        lines=lines,
        figures={
            "growth_exponents": exponents,
            "records": [{**r, "timing": r["timing"].seconds} for r in records],
        },
    )


if __name__ == "__main__":
    main(run, __doc__, full="80,000 vectors as well, the size of the paper's data: some minutes")
