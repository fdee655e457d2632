"""How fast K1 could be: FLOPs, bytes and the time floor per model and chip, against logits that are held in memory.

    python -m benchmarks.roofline [--json FILE]

Arithmetic from published peak figures. NO DEVICE TIME WAS MEASURED: a real kernel reaches a part of the floor's speed;
``python -m benchmarks.nll_cuda`` measures it where there is a device.

K1's bytes are its own plan: both operands once for every group of token tiles that shares the vocabulary's tiles (what
stays in the L2 cache inside a group is not counted again), the partial results written and read, targets and losses.
Plain PyTorch is ``F.cross_entropy((hidden @ weight.T).float(), targets)``: 2-byte logits written and read, float32
logits written and read, log-probabilities written: 16 bytes of traffic and 8 of memory per token and word.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable

import torch
from codeact_kernels.linear_nll import MAX_TOKENS
from codeact_kernels.tiles import tile_for

from benchmarks.measure import Report, main, table
from codeact.base.devices import find_gpu

TOKENS = 8192

# D, V of the LM head, from each model's config.json.
MODELS = {
    "SmolLM2-135M": (576, 49152),
    "Qwen2.5-Coder-1.5B": (1536, 151936),
    "Qwen2.5-Coder-7B": (3584, 152064),
    "CodeLlama-7B": (4096, 32016),
    "DeepSeek-Coder-6.7B": (4096, 32256),
    "Llama-3-8B": (4096, 128256),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Published peaks: dense bfloat16 FLOP/s with float32 sums, memory bytes/s; the tiles it takes; the source."""

    flops: float
    bandwidth: float
    architecture: str
    source: str


def _chip(name: str, architecture: str, source: str) -> Chip:
    gpu = find_gpu(name)
    assert gpu is not None, name
    return Chip(flops=gpu.flops, bandwidth=gpu.bandwidth, architecture=architecture, source=source)


CHIPS = {
    "A100": _chip("A100", "sm_80", "NVIDIA A100 datasheet, SXM 80 GB"),
    "H100": _chip("H100", "sm_90", "NVIDIA H100 datasheet, SXM, dense"),
    "B200": _chip("B200", "sm_100", "NVIDIA DGX B200 datasheet / 8, dense"),
    "MI300X": _chip("MI300X", "gfx942", "AMD Instinct MI300X data sheet"),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """One model on one chip. Bytes are memory traffic; ``extra`` is memory beside the operands; times in seconds."""

    model: str
    chip: str
    tokens: int
    flops: float
    k1_bytes: float
    k1_seconds: float
    k1_bound: str
    k1_extra: float
    plain_bytes: float
    plain_seconds: float
    plain_extra: float


def floor(model: str, chip_name: str, tokens: int) -> Floor:
    """The floor of K1 (and K2, whose traffic is counted) and of plain logits, in bfloat16."""
    D, V = MODELS[model]
    chip = CHIPS[chip_name]
    tile = tile_for(torch.bfloat16, chip.architecture)
    flops = 2.0 * tokens * D * V
    tiles_v = -(-V // tile.block_v)
    groups = sum(
        -(-min(MAX_TOKENS, tokens - first) // (tile.group_t * tile.block_t)) for first in range(0, tokens, MAX_TOKENS)
    )
    operands, results = 2.0 * (tokens * D + V * D), 12.0 * tokens
    k1_bytes = 2.0 * tokens * D + 2.0 * V * D * groups + 8.0 * tokens * tiles_v + results
    times = {"compute": flops / chip.flops, "memory": k1_bytes / chip.bandwidth}
    bound = max(times, key=lambda name: times[name])
    plain_bytes = operands + 16.0 * tokens * V + results
    # The matrix product writes 2 of the 16 bytes while it computes; the rest comes after it.
    product = max(flops / chip.flops, (operands + 2.0 * tokens * V) / chip.bandwidth)
    return Floor(
        model=model,
        chip=chip_name,
        tokens=tokens,
        flops=flops,
        k1_bytes=k1_bytes,
        k1_seconds=times[bound],
        k1_bound=bound,
        k1_extra=4.0 * min(tokens, MAX_TOKENS) * (tiles_v + 1),
        plain_bytes=plain_bytes,
        plain_seconds=product + 14.0 * tokens * V / chip.bandwidth,
        plain_extra=8.0 * tokens * V,
    )


def floors_table(floors: Iterable[Floor]) -> str:
    """Markdown, one line a model and chip."""
    return table(
        "model (D, V) | chip |> TFLOP |> K1 GB |> K1 floor, ms |> bound by |> plain GB |> plain floor, ms |> "
        "extra memory: K1, plain",
        (
            (
                f"{f.model} {MODELS[f.model]}",
                f.chip,
                f"{f.flops / 1e12:.2f}",
                f"{f.k1_bytes / 1e9:.2f}",
                f"{1e3 * f.k1_seconds:.2f}",
                f.k1_bound,
                f"{f.plain_bytes / 1e9:.1f}",
                f"{1e3 * f.plain_seconds:.2f}",
                f"{f.k1_extra / 2**20:.0f} MiB, {f.plain_extra / 2**30:.1f} GiB",
            )
            for f in floors
        ),
    )


def run(_: argparse.Namespace) -> Report:
    floors = [floor(model, chip, TOKENS) for model in MODELS for chip in CHIPS]
    peaks = "; ".join(
        f"{name} {chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e12:.2f} TB/s ({chip.source})"
        for name, chip in CHIPS.items()
    )
    title = f"## Floor of the loss on a GPU, {TOKENS:,} tokens, bfloat16: arithmetic, no device was timed"
    figures = {"records": [dataclasses.asdict(f) for f in floors]}
    return Report(sections=[title, floors_table(floors), f"Peaks: {peaks}."], lines=[], figures=figures)


if __name__ == "__main__":
    main(run, __doc__)
