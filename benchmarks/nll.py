"""The loss of every token, and its gradients, without logits: codeact against PyTorch and cut-cross-entropy.

    python -m benchmarks.nll [--quick | --full] [--json FILE]

Correctness first: every arm's losses, and the gradients of some rows, are compared with float64. cut-cross-entropy is
its torch.compile path, the one that runs on a CPU (its kernels want a GPU: benchmarks.nll_cuda); compiling, some 20 s
in all, is not counted. Added memory is measured at the first shape, where logits are widest, and for the gradients.

The floor is arithmetic: 2 T D V operations (6 T D V with both gradients) at the most that this CPU does
(benchmarks/matmul_peak.cpp, which is compiled for this machine). torch.mm alone is beside it: it computes no loss, and
leaves T V logits in memory.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import (
    Line,
    Report,
    Timing,
    added_memory,
    digits,
    interleave,
    main,
    mebibytes,
    multiplier_peak,
    share,
    table,
)
from codeact import _native, linear_cross_entropy, token_nll
from codeact.ops.nll_reference import token_nll_reference

Shape = tuple[int, int, int]
Arm = Callable[[Tensor, Tensor, Tensor], Tensor]

# T, D, V: SmolLM2-135M; the width of a model of 1.3 billion parameters with Llama 2's vocabulary.
SHAPES = ((4096, 576, 49152), (2048, 2048, 32000))
GRADIENT_SHAPE, FULL_GRADIENT_SHAPE = (2048, 576, 49152), (8192, 576, 49152)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Largest error of a loss against float64: bfloat16 logits, which most arms make, are off by up to 2^-9 of their size.
LOSS_TOLERANCE = {"bfloat16": 0.1, "float32": 1e-3}
# Of a gradient, relative to the largest one.
GRADIENT_TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
MM, PLAIN = "torch.mm alone, no loss", "PyTorch, all logits"
CHUNKED, COMPILED = "PyTorch, linear_cross_entropy in chunks", "cut-cross-entropy, torch.compile"
PEERS = (PLAIN, CHUNKED, COMPILED)


def operands(shape: Shape, dtype: str, gradients: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a head that give logits of about a model's size."""
    tokens, width, vocabulary = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(DTYPES[dtype])
    weight = torch.randn(vocabulary, width, generator=generator).mul_(2 / width**0.5).to(DTYPES[dtype])
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden.requires_grad_(gradients), weight.requires_grad_(gradients), targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """What one writes without a library."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction=reduction)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """PyTorch's own loss without logits."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options)


def compiled(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Apple's fallback for machines without a GPU."""
    import cut_cross_entropy

    return cut_cross_entropy.linear_cross_entropy(hidden, weight, targets, reduction=reduction, impl="torch_compile")


def with_isa(name: str, *tensors: Tensor) -> Tensor:
    os.environ["CODEACT_NATIVE_ISA"] = name
    try:
        return token_nll(*tensors, backend="native")
    finally:
        del os.environ["CODEACT_NATIVE_ISA"]


def peer_arms(reduction: str) -> dict[str, Arm]:
    return {
        name: functools.partial(arm, reduction=reduction)
        for name, arm in zip(PEERS, (plain, chunked, compiled), strict=True)
    }


def nll_arms(dtype: str) -> dict[str, Arm]:
    """Name -> losses (T,); torch.mm returns logits. codeact's own instruction sets stand best first."""
    sets = [isa for isa in _native.instruction_sets() if dtype == "bfloat16" or isa != "avx512bf16"]
    return {
        MM: lambda h, w, y: torch.mm(h, w.T),
        **peer_arms("none"),
        **{f"codeact, native {isa}": functools.partial(with_isa, isa) for isa in sets},
        "codeact, torch": functools.partial(token_nll, backend="torch"),
    }


def gradient_arms() -> dict[str, Arm]:
    """Name -> mean loss, to be differentiated."""
    return {**peer_arms("mean"), "codeact": linear_cross_entropy}


def step(arm: Arm, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Loss and gradients, and nothing of them kept."""
    arm(hidden, weight, targets).backward()
    hidden.grad = weight.grad = None


def prepare(kind: str, name: str, shape: Shape, dtype: str) -> Callable[[], Any]:
    """For ``added_memory``: the gradients themselves, which no arm can save, are there before the call."""
    hidden, weight, targets = operands(shape, dtype, kind == "gradient")
    if kind == "nll":
        arm = nll_arms(dtype)[name]
        arm(hidden[:64], weight[:64].clone(), targets[:64] % 64)
        return lambda: arm(hidden, weight, targets)
    arm = gradient_arms()[name]
    few = (hidden[:64].detach().requires_grad_(), weight[:64].detach().requires_grad_(), targets[:64] % 64)
    arm(*few).backward()
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    hidden.grad += 1  # fresh zeros are no memory yet
    weight.grad += 1
    return lambda: arm(hidden, weight, targets).backward()


def measure_nll(shape: Shape, dtype: str, rounds: int) -> list[dict[str, Any]]:
    hidden, weight, targets = operands(shape, dtype)
    arms = nll_arms(dtype)
    first = shape == SHAPES[0]
    if not first:  # what the other instruction sets are worth is seen at the first shape
        natives = [name for name in arms if "native" in name]
        arms = {name: arm for name, arm in arms.items() if name not in natives[1:]}
    some = slice(0, 256)
    expected = token_nll_reference(hidden[some], weight, targets[some])
    errors = {}
    with torch.inference_mode():
        for name, arm in arms.items():
            if name != MM:
                errors[name] = float((arm(hidden, weight, targets)[some].double() - expected).abs().max())
                assert errors[name] < LOSS_TOLERANCE[dtype], (name, errors[name])
        calls = {name: functools.partial(arm, hidden, weight, targets) for name, arm in arms.items()}
        # Every arm has just run once.
        times = interleave(calls, rounds, {CHUNKED: 2, "codeact, native avx2": 2}, warm=False)
    # A process an arm takes its time: the widest logits show what there is to see.
    measured = [MM, *PEERS, next(name for name in arms if name.startswith("codeact"))] if first else []
    return records("nll", shape, dtype, times, errors, measured)


def measure_gradient(shape: Shape, dtype: str, rounds: int) -> list[dict[str, Any]]:
    hidden, weight, targets = operands(shape, dtype, gradients=True)
    arms = gradient_arms()
    # The gradient of some rows against float64.
    rows = slice(0, 128)
    exact = hidden[rows].detach().double().requires_grad_()
    F.cross_entropy(exact @ weight.detach().double().T, targets[rows]).backward()
    errors = {}
    for name, arm in arms.items():
        arm(hidden[rows], weight, targets[rows]).backward()
        errors[name] = float((hidden.grad[rows].double() - exact.grad).abs().max() / exact.grad.abs().max())
        assert errors[name] < GRADIENT_TOLERANCE[dtype], (name, errors[name])
        hidden.grad = weight.grad = None
    calls = {name: functools.partial(step, arm, hidden, weight, targets) for name, arm in arms.items()}
    slow = {CHUNKED: calls.pop(CHUNKED)}  # as long as all the others together: not in turns with them, nor warm
    times = interleave(calls, rounds) | interleave(slow, 2, warm=False)
    return records("gradient", shape, dtype, times, errors, list(arms) if dtype == "bfloat16" else [])


def records(
    kind: str,
    shape: Shape,
    dtype: str,
    times: dict[str, Timing],
    errors: dict[str, float],
    measured: Sequence[str],
) -> list[dict[str, Any]]:
    """One an arm; ``measured`` are those whose memory is."""
    tokens, width, vocabulary = shape
    work = float((2 if kind == "nll" else 6) * tokens * width * vocabulary)
    peak = multiplier_peak().get(dtype)
    return [
        {
            "kind": kind,
            "shape": shape,
            "dtype": dtype,
            "what": name,
            "timing": timing,
            "gflops_per_s": work / timing.median / 1e9,
            "floor": None if peak is None else work / peak,
            "times_plain": times[PLAIN].median / timing.median,
            "error": errors.get(name),
            "added_bytes": added_memory(prepare, kind, name, shape, dtype) if name in measured else None,
        }
        for name, timing in times.items()
    ]


def nll_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    return table(
        "T, D, V | dtype | |> median (least to most) |> GFLOP/s |> share of the floor |> x all logits |> error |> "
        "added memory",
        (
            (
                ", ".join(map(str, r["shape"])),
                r["dtype"],
                r["what"],
                r["timing"],
                digits(r["gflops_per_s"]),
                share(r["floor"], r["timing"]),
                f"{r['times_plain']:.2f}",
                "" if r["error"] is None else f"{r['error']:.1e}",
                mebibytes(r["added_bytes"]),
            )
            for r in rows
        ),
    )


def lines(rows: Sequence[dict[str, Any]]) -> list[Line]:
    """codeact's best arm against the peer that is fastest, for each kind, shape and dtype."""
    found = []
    for key in dict.fromkeys((r["kind"], r["shape"], r["dtype"]) for r in rows):
        group = [r for r in rows if (r["kind"], r["shape"], r["dtype"]) == key]
        ours = min((r for r in group if r["what"].startswith("codeact")), key=lambda r: r["timing"].median)
        peer = min((r for r in group if r["what"] in PEERS), key=lambda r: r["timing"].median)
        what = "loss per token" if key[0] == "nll" else "mean loss and gradients"
        found.append(
            Line(
                what=f"{what}, {key[2]}, T {key[1][0]}, D {key[1][1]}, V {key[1][2]}",
                ours=ours["timing"],
                peer=peer["what"],
                theirs=peer["timing"],
                floor=ours["floor"],
                memory=ours["added_bytes"],
                peer_memory=peer["added_bytes"],
            )
        )
    return found


def run(options: argparse.Namespace) -> Report:
    shapes = ((256, 64, 1000),) if options.quick else SHAPES
    gradient_shape = (256, 64, 1000) if options.quick else FULL_GRADIENT_SHAPE if options.full else GRADIENT_SHAPE
    losses: list[dict[str, Any]] = []
    gradients: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for shape in shapes if dtype == "bfloat16" or options.full else shapes[:1]:
            losses += measure_nll(shape, dtype, 5 if dtype == "bfloat16" else 3)
        gradients += measure_gradient(gradient_shape, dtype, 3)
    peak = multiplier_peak()
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in peak.items())
    return Report(
        sections=[
            "## Loss of every token",
            f"Multipliers of this CPU, {torch.get_num_threads()} threads: {rates or 'not measured here'}.",
            nll_table(losses),
            "## Mean loss, and the gradients of hidden states and head",
            nll_table(gradients),
        ],
        lines=lines([*losses, *gradients]),
        figures={
            "multiplier_peak": peak,
            "records": [{**r, "timing": r["timing"].seconds} for r in [*losses, *gradients]],
        },
    )


if __name__ == "__main__":
    main(run, __doc__, full="gradients of 8,192 tokens, and both shapes in float32")
