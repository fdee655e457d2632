"""IFD end to end: codeact against the paper's one-row-at-a-time loop and against padded batches, on real rows.

    python -m benchmarks.scoring [--quick] [--rows N] [--data FILE] [--json FILE]

Model: SmolLM2-135M-Instruct. Rows: ``--data`` (columns instruction, input, output), by default functions harvested from
this Python's standard library. The rows are cut into chunks; every arm scores every chunk, in random order, so that a
machine whose speed drifts is fair to all. Scores are compared before anything is timed.

The floor: the multiply-adds of every linear layer on every token that is computed, and of the LM head on every token
that is scored, at the best speed that torch.mm reaches on the model's own shapes in the same process.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from codeact import embedded, ifd, token_nll
from codeact._ifd_reference import seed_ifd
from codeact.devices import cpu_has_bf16
from codeact.harvest import write_harvest
from codeact.ifd import IfdScorer
from codeact.models import load_causal_lm
from codeact.records import Columns, Record, open_records
from codeact.templates import PromptBuilder
from codeact.tokens import PROTOCOLS, tokenize

CHUNKS = 4
BATCH = 16
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
    tokenizer = AutoTokenizer.from_pretrained(embedded.causal_lm())
    prompts = PromptBuilder(tokenizer, "qa")
    both = [tokenize(rows, tokenizer, prompts, MAX_LENGTH, protocol) for protocol in PROTOCOLS]
    return [row for row, exact, seed in zip(rows, *both, strict=True) if exact.status == seed.status == "ok"][:count]


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


def flops(model: Any, items: Sequence[Any]) -> float:
    """Multiply-adds, counted as two, that no scorer of these sequences can avoid."""
    linear = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Linear))
    head = model.get_output_embeddings().weight.numel()
    tokens = sum(len(item.conditional) + len(item.unconditional) for item in items)
    scored = sum(2 * (len(item.unconditional) - item.unconditional_start) for item in items)
    return 2.0 * (linear * tokens + head * scored)


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


def measure(rows: list[Record], dtype: torch.dtype) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time every arm on every chunk in one dtype."""
    path = str(embedded.causal_lm())
    ours, tokenizer = load_causal_lm(path, torch.device("cpu"), dtype)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()
    exact, seed = IfdScorer(ours, tokenizer), IfdScorer(ours, tokenizer, protocol="seed")

    def score(chunk: list[Record], scorer: IfdScorer = exact, lacking: str | None = None) -> list[float]:
        with without(lacking) if lacking else nullcontext():
            return scorer.score(chunk)[0]["ifd"].to_pylist()

    arms: dict[str, Callable[[list[Record]], Any]] = {
        "seed's loop": lambda chunk: [seed_ifd(plain, tokenizer, row) for row in chunk],
        f"padded batches of {BATCH}": lambda chunk: padded_batches(plain, tokenizer, chunk),
        "codeact, exact": score,
        "codeact, exact, NLL in PyTorch": lambda chunk: score(chunk, lacking="nll"),
        "codeact, exact, all in PyTorch": lambda chunk: score(chunk, lacking="kernels"),
        "codeact, seed": lambda chunk: score(chunk, seed),
    }
    # The slow loop and the arms that only explain another one take fewer chunks.
    most_chunks = {f"padded batches of {BATCH}": 1} | {name: 2 for name in arms if "PyTorch" in name}
    few = rows[: 2 * BATCH : 4]
    got = {name: np.array(arm(few)) for name, arm in arms.items()}
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    np.testing.assert_allclose(got["codeact, exact"], got[f"padded batches of {BATCH}"], rtol=tolerance)
    np.testing.assert_allclose(got["codeact, seed"], got["seed's loop"], rtol=tolerance)

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
    floors = [flops(plain, chunk) / peak for chunk in items]
    records = []
    for name, times in seconds.items():
        ratios = [loop / ours for loop, ours in zip(seconds["seed's loop"], times, strict=False)]
        total = sum(times)
        records.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "what": name,
                "seconds": total,
                "rows_per_s": sum(map(len, chunks[: len(times)])) / total,
                "tokens_per_s": sum(tokens[: len(times)]) / total,
                "floor_share": sum(floors[: len(times)]) / total,
                "times_seed_loop": statistics.median(ratios),
                "times_seed_loop_range": [min(ratios), max(ratios)],
            }
        )
    return records, {"tokens": sum(tokens), "matmul_flops_per_s": peak, "floor_seconds": sum(floors)}


def agreement(rows: list[Record]) -> dict[str, float]:
    """How bfloat16 scores order the rows against float32 scores."""
    scores = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_causal_lm(str(embedded.causal_lm()), torch.device("cpu"), dtype)
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


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| dtype | | rows/s | tokens/s | share of the floor | x the seed's loop (chunks: least to most) |"]
    lines.append("|:--|:--|--:|--:|--:|--:|")
    for r in records:
        low, high = r["times_seed_loop_range"]
        lines.append(
            f"| {r['dtype']} | {r['what']} | {r['rows_per_s']:.2f} | {r['tokens_per_s']:,.0f} | "
            f"{r['floor_share']:.0%} | {r['times_seed_loop']:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="16 rows: does it still work?")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--data", type=Path, metavar="FILE", help="Alpaca-form JSON; default: harvested functions")
    options = parser.parse_args()
    rows = read_rows(options.data, 16 if options.quick else options.rows)

    records, facts = measure(rows, torch.float32)
    if cpu_has_bf16():
        half, half_facts = measure(rows, torch.bfloat16)
        records += half
        facts["bfloat16"] = half_facts
        loop = next(r for r in records if r["what"] == "seed's loop")
        best = next(r for r in half if r["what"] == "codeact, exact")
        facts["bf16_against_fp32_loop"] = best["rows_per_s"] / loop["rows_per_s"]
    facts["bf16_agreement"] = agreement(rows[: 8 if options.quick else 60])
    print(f"## IFD of {len(rows)} rows, {facts['tokens']:,} tokens in both passes\n\n{table(records)}\n")
    print(f"Floor: {facts['floor_seconds']:.1f} s at {facts['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s (float32).")
    if "bf16_against_fp32_loop" in facts:
        print(f"codeact in bfloat16 against the loop in float32: {facts['bf16_against_fp32_loop']:.2f}x rows/s.")
    else:
        print("This CPU has no bfloat16 arithmetic, so codeact scores in float32 here and bfloat16 was not timed.")
    a = facts["bf16_agreement"]
    print(
        f"bfloat16 against float32 on {a['rows']} rows: Spearman {a['spearman']:.4f}, "
        f"{a['top_40_percent_in_common']:.0%} of the top 40 % in common, "
        f"largest difference {a['largest_relative_difference']:.1%}."
    )
    if options.json:
        machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**machine, **facts, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
