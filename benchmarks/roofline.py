"""How fast K1 could be, per model and chip, against logits that are held in memory; and how fast scoring could be.

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
from codeact.base.devices import default_tokens_per_pack, find_gpu
from codeact.ops.flops import ModelFacts, ModelShape, inference_memory

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


def facts(layers: int, hidden: int, intermediate: int, keys: int, vocabulary: int, tied: bool = False) -> ModelFacts:
    """A model of the Llama kind by its sizes; ``keys``: width of the keys; ``tied``: its head is its lookup too."""
    shape = ModelShape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        query_width=hidden,
        key_width=keys,
        vocabulary=vocabulary,
    )
    trunk = layers * hidden * (2 * hidden + 2 * keys + 3 * intermediate)
    head = vocabulary * hidden
    return ModelFacts(
        shape=shape, trunk=trunk, head=head, lookup=0 if tied else head, layers=(), source="its configuration"
    )


# Sizes from each model's config.json.
SCORED = {
    "SmolLM2-135M": facts(layers=30, hidden=576, intermediate=1536, keys=192, vocabulary=49152, tied=True),
    "DeepSeek-Coder-1.3B": facts(layers=24, hidden=2048, intermediate=5504, keys=2048, vocabulary=32256),
    "CodeLlama-7B": facts(layers=32, hidden=4096, intermediate=11008, keys=4096, vocabulary=32016),
    "CodeLlama-34B": facts(layers=48, hidden=8192, intermediate=22016, keys=1024, vocabulary=32000),
}
SCORED_ON = ("H100", "H200", "A100", "MI300X")
QUESTION, ANSWER = 200, 400  # tokens of a row
# Shares of the peaks that the parts are taken to reach: the vendor's products, attention of packs, K1, bytes.
REACHED = {"products": 0.78, "attention": 0.5, "K1": 0.6, "bytes": 0.88}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Scoring of rows of 200 + 400 tokens in bfloat16: tokens are those of both passes, times in seconds a row."""

    model: str
    chip: str
    tokens_per_pack: int
    memory: float
    floor_seconds: float
    code_seconds: float

    @property
    def tokens(self) -> int:
        """Of a row: question and answer, then the answer alone."""
        return QUESTION + 2 * ANSWER


def scoring(model_name: str, chip_name: str) -> Scoring:
    """The floor is all operations at the peak; the present code adds up its parts, nothing beside another."""
    model, gpu = SCORED[model_name], find_gpu(chip_name)
    assert gpu is not None, chip_name
    shape, tokens = model.shape, QUESTION + 2 * ANSWER
    attention = model.forward_flops(0, (QUESTION + ANSWER) ** 2 + ANSWER**2, 0)
    products, head = model.forward_flops(tokens, 0, 0), model.forward_flops(0, 0, 2 * ANSWER)
    # Elements read and written between the products of a layer: two norms and two sums of the residual, the rotary
    # embedding, SiLU x gate.
    passed = 10 * shape.hidden + 2 * (shape.query_width + shape.key_width) + 3 * shape.intermediate
    code = products / REACHED["products"] + attention / REACHED["attention"] + head / REACHED["K1"]
    per_pack = default_tokens_per_pack("cuda", model.parameters)
    return Scoring(
        model=model_name,
        chip=chip_name,
        tokens_per_pack=per_pack,
        memory=inference_memory(model, 2, per_pack, 0.0).total,
        floor_seconds=(products + attention + head) / gpu.flops,
        code_seconds=code / gpu.flops + 2.0 * tokens * shape.layers * passed / (REACHED["bytes"] * gpu.bandwidth),
    )


def scoring_table(rows: Iterable[Scoring]) -> str:
    """Markdown, one line a model and chip; the last column is for whoever has one."""
    return table(
        "model | chip |> tokens a pack |> GB |> tokens/s, floor |> by the code's arithmetic |> 80,000 rows |> "
        "10^8 rows |> measured",
        (
            (
                s.model,
                s.chip,
                f"{s.tokens_per_pack:,}",
                f"{s.memory / 1e9:.1f}",
                f"{s.tokens / s.floor_seconds:,.0f}",
                f"{s.tokens / s.code_seconds:,.0f}",
                f"{80_000 * s.code_seconds / 60:.1f} min",
                f"{1e8 * s.code_seconds / 86400:.1f} days",
                "",
            )
            for s in rows
        ),
    )


def run(_: argparse.Namespace) -> Report:
    scored = [scoring(model, chip) for model in SCORED for chip in SCORED_ON]
    floors = [floor(model, chip, TOKENS) for model in MODELS for chip in CHIPS]
    peaks = "; ".join(
        f"{name} {chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e12:.2f} TB/s ({chip.source})"
        for name, chip in CHIPS.items()
    )
    title = f"## Floor of the loss on a GPU, {TOKENS:,} tokens, bfloat16: arithmetic, no device was timed"
    figures = {"records": [dataclasses.asdict(f) for f in floors], "scoring": [dataclasses.asdict(s) for s in scored]}
    reached = ", ".join(f"{name} {share:.0%}" for name, share in REACHED.items())
    sections = [
        title,
        floors_table(floors),
        f"Peaks: {peaks}.",
        f"## Scoring rows of {QUESTION} + {ANSWER} tokens, bfloat16, one chip: arithmetic, no device was timed",
        scoring_table(scored),
        f"The code's arithmetic takes these shares of the peaks: {reached}.",
    ]
    return Report(sections=sections, lines=[], figures=figures)


if __name__ == "__main__":
    main(run, __doc__)
