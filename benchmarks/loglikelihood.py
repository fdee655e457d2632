"""Log-likelihoods as lm-eval asks for them: our packs against its own ``hf`` in batches of 1, 8 and 64.

    python -m benchmarks.loglikelihood [--quick] [--json FILE]

Takes three minutes, and is no part of `make bench`.

Model: SmolLM2-135M-Instruct, in the dtype that codeact takes by itself. Requests: as of hellaswag, four endings of one
context; contexts are the heads and docstrings of harvested functions, an ending the last lines of a body, its own or
another's. Before anything is timed, the sums of both have to agree to 1e-3 (bfloat16: 2 %) of the largest. What is
counted besides: how many of the results are other bits in a batch of 64 than in one of 1.

The floor: the multiply-adds of every linear layer on every token, a context once, and of the LM head on every token of
an ending, at the best speed that torch.mm reaches on the model's shapes.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Line, Report, added_memory, digits, interleave, main, mebibytes, table
from benchmarks.scoring import matmul_peak, multiply_adds
from codeact.base.devices import cpu_has_bf16
from codeact.data.harvest import write_harvest
from codeact.data.records import Record, open_records
from codeact.run import demo_models

CONTEXTS = 16
ENDINGS = 4
BATCHES = (1, 8, 64)
OURS = "codeact"


def requests(contexts: int) -> list[tuple[str, str]]:
    """(context, ending), the endings of a context side by side."""
    with tempfile.TemporaryDirectory() as folder:
        write_harvest("stdlib", Path(folder) / "rows.jsonl", limit=8 * contexts)
        rows = [row for row in open_records(Path(folder) / "rows.jsonl") if isinstance(row, Record)][::8]
    bodies = ["\n".join(row.answer.splitlines()[-3:]) for row in rows]
    draw = random.Random(0)
    return [
        (f"{row.question}\n", ending)
        for number, row in enumerate(rows)
        for ending in [bodies[number], *draw.sample(bodies, ENDINGS - 1)]
    ]


def scorer(name: str, dtype: str) -> Callable[[list[tuple[str, str]]], list[tuple[float, bool]]]:
    """One arm: the model in memory, and what scores pairs with it."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from codeact.integrations.lm_eval import PackedLM

    kind = PackedLM if name == OURS else HFLM
    batch = 1 if name == OURS else int(name.rpartition(" ")[2])
    model = kind(pretrained=str(demo_models.causal_lm()), device="cpu", dtype=dtype, batch_size=batch)

    def score(pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
        found: list[tuple[float, bool]] = model.loglikelihood(asked, disable_tqdm=True)
        return found

    return score


def prepare(name: str, dtype: str, pairs: list[tuple[str, str]]) -> Callable[[], Any]:
    """For ``added_memory``: all pairs, with the model in memory and warm."""
    score = scorer(name, dtype)
    score(pairs[:ENDINGS])
    return lambda: score(pairs)


def floor(pairs: list[tuple[str, str]], dtype: torch.dtype) -> tuple[float, int, int]:
    """Seconds, and the tokens with a context in each request and once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(demo_models.causal_lm())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype=dtype), AutoTokenizer.from_pretrained(path)
    lengths = [(len(tokenizer(context)["input_ids"]), len(tokenizer(ending)["input_ids"])) for context, ending in pairs]
    scored = sum(after for _, after in lengths)
    once = sum(before for before, _ in lengths[::ENDINGS]) + scored
    return multiply_adds(model, once, scored) / matmul_peak(model, dtype), sum(map(sum, lengths)), once


def run(options: argparse.Namespace) -> Report:
    dtype = torch.bfloat16 if cpu_has_bf16() else torch.float32
    name_of_dtype = str(dtype).removeprefix("torch.")
    pairs = requests(ENDINGS if options.quick else CONTEXTS)
    arms = [OURS, *(f"lm-eval hf, batch {size}" for size in BATCHES)]
    scorers = {name: scorer(name, name_of_dtype) for name in arms}
    found = {name: score(pairs) for name, score in scorers.items()}
    sums = {name: np.array([total for total, _ in results]) for name, results in found.items()}
    tolerance = 1e-3 if dtype == torch.float32 else 0.02
    for name in arms[1:]:
        np.testing.assert_allclose(sums[OURS], sums[name], atol=tolerance * np.abs(sums[name]).max(), rtol=0)
    # Some of ours one by one, those of hf beside its batch of 1: what a batch has to do with a result.
    alone = [scorers[OURS]([pair])[0] for pair in pairs[:: len(pairs) // 4]]
    other = {
        OURS: sum(a != b for a, b in zip(alone, found[OURS][:: len(pairs) // 4], strict=True)),
        **{name: sum(a != b for a, b in zip(found[arms[1]], found[name], strict=True)) for name in arms[1:]},
    }
    times = interleave({name: (lambda s=score: s(pairs)) for name, score in scorers.items()}, 2, warm=False)
    seconds, tokens, once = floor(pairs, dtype)
    small = pairs[: 2 * ENDINGS]
    memory = {name: added_memory(prepare, name, name_of_dtype, small) for name in (OURS, arms[-1])}
    rows = [
        (
            name,
            times[name],
            digits(len(pairs) / times[name].median),
            f"{seconds / times[name].median:.0%}",
            f"{times[arms[1]].median / times[name].median:.2f}",
            f"{other[name]} of {len(alone) if name == OURS else len(pairs)}",
            mebibytes(memory.get(name)),
        )
        for name in arms
    ]
    best = min(arms[1:], key=lambda name: times[name].median)
    return Report(
        sections=[
            "## Log-likelihoods for lm-eval",
            table("what | time |> requests/s |> share of the floor |> x batch 1 |> other bits |> added memory", rows),
            f"{name_of_dtype}: {len(pairs)} requests, {tokens:,} tokens, {once:,} with each context once; floor "
            f"{seconds:.2f} s. Other bits: beside a batch of 1; memory of {len(small)} requests.",
        ],
        lines=[
            Line(
                what=f"log-likelihoods of {len(pairs)} endings, SmolLM2-135M, {name_of_dtype}",
                ours=times[OURS],
                peer=best,
                theirs=times[best],
                floor=seconds,
                memory=memory[OURS],
                peer_memory=memory.get(best),
            )
        ],
        figures={
            "requests": len(pairs),
            "tokens": tokens,
            "tokens_once": once,
            "floor": seconds,
            "arms": {name: {"seconds": times[name].seconds, "other_bits": other[name]} for name in arms},
            "memory": memory,
        },
    )


if __name__ == "__main__":
    main(run, __doc__)
