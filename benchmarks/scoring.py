"""IFD end to end: codeact against the paper's one-row-at-a-time loop and against padded batches, on real rows.

    python -m benchmarks.scoring [--quick | --full] [--data FILE] [--json FILE]

Model: SmolLM2-135M-Instruct. Rows: ``--data`` (columns instruction, input, output), by default functions harvested from
this Python's standard library. The rows are cut into chunks; every arm scores every chunk, in random order, so that a
machine whose speed drifts is fair to all. Before anything is timed, the exact scores must agree with those of padded
batches and the paper's with the loop's, to 1e-3 in float32 and 0.1 in bfloat16. Added memory: scoring eight of the
rows, with the model in memory. How the time grows with the rows is in benchmarks.stages, on a smaller model.

Once more with a text of 77 tokens before every question, as chat templates have one: it is computed once a pack.

The floor: the multiply-adds of every linear layer on every token that is computed, and of the LM head on every token
that is scored, at the best speed that torch.mm reaches on the model's own shapes in the same process.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import Line, Report, Timing, added_memory, digits, main, mebibytes, table
from codeact import token_nll
from codeact.base.devices import cpu_has_bf16
from codeact.base.protocols import PROTOCOLS
from codeact.data.harvest import write_harvest
from codeact.data.records import Columns, Record, open_records
from codeact.models.loading import load_causal_lm
from codeact.run import demo_models
from codeact.scoring import ifd
from codeact.scoring.ifd import IfdScorer
from codeact.scoring.reference import paper_ifd
from codeact.scoring.tokens import tokenize
from codeact.text.templates import PromptBuilder

CHUNKS = 4
BATCH = 16
LOOP, PADDED, OURS = "the paper's loop", f"padded batches of {BATCH}", "codeact, exact"
ROWS = {torch.float32: 60, torch.bfloat16: 120}
SYSTEM = "You answer questions about Python. Write clear, correct and tested code, and nothing but code. " * 4 + "\n"
SYSTEM_ROWS = 32
FULL_ROWS = 200
MAX_LENGTH = 2048


def read_rows(data: Path | None, count: int) -> list[Record]:
    """The first ``count`` rows that both protocols can score."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            data = Path(folder) / "stdlib.jsonl"
            write_harvest("stdlib", data, limit=2 * count)
            columns = Columns()
        else:
            columns = Columns(input="input")
        rows = [row for row in open_records(data, columns) if isinstance(row, Record)]
    tokenizer = AutoTokenizer.from_pretrained(demo_models.causal_lm())
    prompts = PromptBuilder(tokenizer, "qa")
    both = [tokenize(rows, tokenizer, prompts, MAX_LENGTH, protocol) for protocol in PROTOCOLS]
    return [row for row, exact, paper in zip(rows, *both, strict=True) if exact.status == paper.status == "ok"][:count]


@torch.inference_mode()
def padded_batches(model: Any, tokenizer: Any, rows: Sequence[Record]) -> list[float]:
    """The usual loop: length-sorted batches of 16, padded, full logits, cross-entropy."""
    prompts = PromptBuilder(tokenizer, "qa")
    items = tokenize(rows, tokenizer, prompts, MAX_LENGTH)
    sums = np.zeros((len(rows), 2))
    for which, name in enumerate(("conditional", "unconditional")):
        order = sorted(range(len(rows)), key=lambda i: len(getattr(items[i], name)))
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            sequences = [torch.tensor(getattr(items[i], name)) for i in batch]
            ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
            labels = ids.masked_fill(mask == 0, -100)
            for row, i in enumerate(batch):
                labels[row, : getattr(items[i], f"{name}_start")] = -100
            logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
            sums[batch, which] = nll.double().sum(1).numpy()
    counts = [len(item.unconditional) - item.unconditional_start for item in items]
    return list(np.exp((sums[:, 0] - sums[:, 1]) / counts))


def matmul_peak(model: Any, dtype: torch.dtype) -> float:
    """Best multiply-add speed, in FLOP/s, over the shapes of the model's linear layers and 2048 tokens."""
    best = 0.0
    shapes = {tuple(m.weight.shape) for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)}
    for out_features, in_features in sorted(shapes):
        x, w = torch.randn(2048, in_features).to(dtype), torch.randn(out_features, in_features).to(dtype)
        for _ in range(6):
            begin = time.perf_counter()
            x @ w.T
            best = max(best, 2 * x.numel() * out_features / (time.perf_counter() - begin))
    return best


def multiply_adds(model: Any, tokens: int, scored: int) -> float:
    """Of the linear layers on so many tokens and of the LM head on those that are scored, counted as two."""
    linear = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Linear))
    return 2.0 * (linear * tokens + model.get_output_embeddings().weight.numel() * scored)


def flops(model: Any, items: Sequence[Any], beginning: int = 0) -> float:
    """Multiply-adds that no scorer of these sequences can avoid; so many tokens before every question once."""
    tokens = sum(len(item.conditional) + len(item.unconditional) for item in items) - beginning * (len(items) - 1)
    scored = sum(2 * (len(item.unconditional) - item.unconditional_start) for item in items)
    return multiply_adds(model, tokens, scored)


@contextmanager
def without(name: str) -> Iterator[None]:
    """Score without the compiled NLL, or without any compiled kernel, to see what it is worth end to end."""
    if name == "kernels":
        os.environ["CODEACT_BACKEND"] = "torch"
    else:
        ifd.token_nll = functools.partial(token_nll, backend="torch")
    try:
        yield
    finally:
        os.environ.pop("CODEACT_BACKEND", None)
        ifd.token_nll = token_nll


def measure(rows: list[Record], dtype: torch.dtype, beginning: str = "") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time every arm on every chunk in one dtype; with a ``beginning`` before every question, ours and the loop."""
    rows = [replace(row, question=beginning + row.question) for row in rows]
    path = str(demo_models.causal_lm())
    ours, tokenizer = load_causal_lm(path, torch.device("cpu"), dtype)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()
    exact, paper = IfdScorer(ours, tokenizer), IfdScorer(ours, tokenizer, protocol="paper")

    def score(chunk: list[Record], scorer: IfdScorer = exact, lacking: str | None = None) -> list[float]:
        with without(lacking) if lacking else nullcontext():
            return scorer.score(chunk)[0]["ifd"].to_pylist()

    arms: dict[str, Callable[[list[Record]], Any]] = {
        LOOP: lambda chunk: [paper_ifd(plain, tokenizer, row) for row in chunk],
        PADDED: lambda chunk: padded_batches(plain, tokenizer, chunk),
        OURS: score,
        "codeact, exact, NLL in PyTorch": lambda chunk: score(chunk, lacking="nll"),
        "codeact, exact, all in PyTorch": lambda chunk: score(chunk, lacking="kernels"),
        "codeact, paper": lambda chunk: score(chunk, paper),
    }
    if beginning:
        arms = {name: arms[name] for name in (LOOP, OURS, "codeact, paper")}
    # The arms that only explain another one take fewer chunks.
    most_chunks = {name: 2 for name in arms if name == PADDED or "PyTorch" in name}
    few = rows[: 2 * BATCH : 4] if len(rows) > CHUNKS * 4 else rows[:2]
    got = {name: np.array(arm(few)) for name, arm in arms.items()}
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    if not beginning:
        np.testing.assert_allclose(got[OURS], got[PADDED], rtol=tolerance)
    np.testing.assert_allclose(got["codeact, paper"], got[LOOP], rtol=tolerance)

    peak = matmul_peak(plain, dtype)
    chunks = [rows[i::CHUNKS] for i in range(CHUNKS)]
    items = [tokenize(chunk, tokenizer, PromptBuilder(tokenizer, "qa"), MAX_LENGTH) for chunk in chunks]
    tokens = [sum(len(item.conditional) + len(item.unconditional) for item in chunk) for chunk in items]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    shuffle = random.Random(0)
    for chunk in chunks:
        for name in shuffle.sample(list(arms), len(arms)):
            if len(seconds[name]) < most_chunks.get(name, CHUNKS):
                begin = time.perf_counter()
                arms[name](chunk)
                seconds[name].append(time.perf_counter() - begin)
    peak = max(peak, matmul_peak(plain, dtype))
    floors = [flops(plain, chunk, len(tokenizer(beginning)["input_ids"])) / peak for chunk in items]
    name_of_dtype = str(dtype).removeprefix("torch.")
    # A process an arm takes its time: memory is measured in the dtype that codeact takes by itself.
    usual = dtype == (torch.bfloat16 if cpu_has_bf16() else torch.float32) and len(rows) > 4 * CHUNKS and not beginning
    measured = (LOOP, PADDED, OURS) if usual else ()
    records = []
    for name, times in seconds.items():
        done = len(times)
        records.append(
            {
                "dtype": name_of_dtype,
                "what": f"{name}, a text before every question" if beginning else name,
                # Chunks differ in tokens: seconds of a chunk of average size.
                "seconds": [t * sum(tokens) / CHUNKS / n for t, n in zip(times, tokens, strict=False)],
                "rows_per_s": sum(map(len, chunks[:done])) / sum(times),
                "tokens_per_s": sum(tokens[:done]) / sum(times),
                "floor_share": sum(floors[:done]) / sum(times),
                "floor": sum(floors) / CHUNKS,
                "times_loop": Timing(tuple(a / b for a, b in zip(seconds[LOOP], times, strict=False))),
                "added_bytes": added_memory(prepare, name, name_of_dtype, few) if name in measured else None,
            }
        )
    return records, {"rows": len(rows), "tokens": sum(tokens), "flops_per_s": peak, "floor_seconds": sum(floors)}


def prepare(name: str, dtype: str, rows: list[Record]) -> Callable[[], Any]:
    """For ``added_memory``: scoring a few rows, with the model in memory already."""
    path = str(demo_models.causal_lm())
    kind = getattr(torch, dtype)
    if name == OURS:
        ours, tokenizer = load_causal_lm(path, torch.device("cpu"), kind)
        scorer = IfdScorer(ours, tokenizer)
        scorer.score(rows[:1])
        return lambda: scorer.score(rows)
    tokenizer = AutoTokenizer.from_pretrained(path)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=kind, attn_implementation="sdpa").eval()
    paper_ifd(plain, tokenizer, rows[0])
    if name == PADDED:
        return lambda: padded_batches(plain, tokenizer, rows)
    return lambda: [paper_ifd(plain, tokenizer, row) for row in rows]


def agreement(rows: list[Record]) -> dict[str, float]:
    """How bfloat16 scores order the rows against float32 scores."""
    scores = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_causal_lm(str(demo_models.causal_lm()), torch.device("cpu"), dtype)
        scores[dtype] = IfdScorer(model, tokenizer).score(rows)[0]["ifd"].to_numpy()
    single, half = scores[torch.float32], scores[torch.bfloat16]
    top = round(0.4 * len(rows))
    common = len(set(np.argsort(-single)[:top]) & set(np.argsort(-half)[:top]))
    return {
        "rows": len(rows),
        "spearman": float(spearmanr(single, half).statistic),
        "top_40_percent_in_common": common / top,
        "largest_relative_difference": float(np.abs(half / single - 1).max()),
    }


def scoring_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    return table(
        "dtype | |> rows/s |> tokens/s |> share of the floor |> x the paper's loop (chunks: least to most) |> "
        "added memory",
        (
            (
                r["dtype"],
                r["what"],
                digits(r["rows_per_s"]),
                f"{r['tokens_per_s']:,.0f}",
                f"{r['floor_share']:.0%}",
                f"{r['times_loop'].median:.2f} ({min(r['times_loop'].seconds):.2f} to "
                f"{max(r['times_loop'].seconds):.2f})",
                mebibytes(r["added_bytes"]),
            )
            for r in records
        ),
    )


def run(options: argparse.Namespace) -> Report:
    dtypes = (torch.float32, torch.bfloat16) if cpu_has_bf16() else (torch.float32,)
    if options.quick:
        dtypes = dtypes[-1:]
    most = 8 if options.quick else FULL_ROWS
    rows = read_rows(options.data, most)
    records: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    lines = []
    for dtype in dtypes:
        count = most if options.quick or options.full else ROWS[dtype]
        found, fact = measure(rows[:: max(1, len(rows) // count)][:count], dtype)
        records += found
        facts[found[0]["dtype"]] = fact
        by_name = {r["what"]: r for r in found}
        lines += [
            Line(
                what=f"IFD of a quarter of {fact['rows']} rows, SmolLM2-135M, {found[0]['dtype']}",
                ours=Timing(tuple(by_name[OURS]["seconds"])),
                peer=peer,
                theirs=Timing(tuple(by_name[peer]["seconds"])),
                floor=by_name[OURS]["floor"],
                memory=by_name[OURS]["added_bytes"],
                peer_memory=by_name[peer]["added_bytes"],
            )
            for peer in (LOOP, PADDED)
        ]
    if not options.quick:
        found, fact = measure(rows[:: len(rows) // SYSTEM_ROWS][:SYSTEM_ROWS], dtypes[-1], SYSTEM)
        records += found
        facts["a text before every question"] = fact
    notes = [
        f"{dtype}: {fact['rows']} rows, {fact['tokens']:,} tokens in both passes; floor {fact['floor_seconds']:.1f} s "
        f"at {fact['flops_per_s'] / 1e9:.0f} GFLOP/s."
        for dtype, fact in facts.items()
    ]
    if len(dtypes) == 2:
        best, loop = (
            next(r["rows_per_s"] for r in records if (r["dtype"], r["what"]) == key)
            for key in (("bfloat16", OURS), ("float32", LOOP))
        )
        facts["bf16_against_fp32_loop"] = best / loop
        notes.append(f"codeact in bfloat16 against the loop in float32: {best / loop:.2f}x rows/s.")
    elif not options.quick:
        notes.append("This CPU has no bfloat16 arithmetic: codeact scores in float32 here, bfloat16 was not timed.")
    a = facts["bf16_agreement"] = agreement(rows[: 4 if options.quick else 40])
    notes.append(
        f"bfloat16 against float32 on {a['rows']} rows: Spearman {a['spearman']:.4f}, "
        f"{a['top_40_percent_in_common']:.0%} of the top 40 % in common, "
        f"largest difference {a['largest_relative_difference']:.1%}."
    )
    plain = [{**r, "times_loop": r["times_loop"].seconds} for r in records]
    return Report(
        sections=["## IFD of real rows", scoring_table(records), "\n".join(notes)],
        lines=lines,
        figures={**facts, "records": plain},
    )


if __name__ == "__main__":
    main(run, __doc__, data="Alpaca-form JSON; default: harvested functions", full="200 rows in each dtype: 6 minutes")
