"""The loss of every token, and its gradients, without logits: codeact against PyTorch.

    python -m benchmarks.nll [--quick] [--json FILE]

Correctness first: every arm's losses are compared with float64. Then all arms run in random order, several rounds; the
median counts. Peak memory is that of a process of its own per arm, above what its operands take.

The floor is arithmetic: 2 T D V operations at the most that this CPU does (benchmarks/matmul_peak.cpp, which
is compiled for this machine). torch.mm alone is beside it: it computes no loss, and leaves T V logits in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codeact import _native, linear_cross_entropy, token_nll
from codeact._nll_reference import token_nll_reference

# SmolLM2-135M; the width of a model of 1.3 billion parameters with Llama 2's vocabulary.
SHAPES = ((4096, 576, 49152), (2048, 2048, 32000))
GRADIENT_SHAPE = (8192, 576, 49152)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def multiplier_peak() -> dict[str, float]:
    """FLOP/s of this machine's multipliers for each dtype; empty without a compiler for x86-64."""
    compiler = next(filter(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")), None)
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        return {}
    source = Path(__file__).parent / "matmul_peak.cpp"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        command = [compiler, "-std=c++20", "-O2", "-march=native", "-pthread", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        lines = subprocess.check_output([str(program), str(torch.get_num_threads())], text=True).splitlines()
    return {name: float(rate) for name, rate in (line.split() for line in lines)}


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a head that give logits of about a model's size."""
    tokens, width, vocabulary = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).mul_(2 / width**0.5).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """PyTorch's own loss without logits."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options)


def with_isa(name: str, *tensors: Tensor) -> Tensor:
    os.environ["CODEACT_NATIVE_ISA"] = name
    try:
        return token_nll(*tensors, backend="native")
    finally:
        del os.environ["CODEACT_NATIVE_ISA"]


def nll_arms(dtype: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name -> losses (T,); torch.mm returns logits."""
    sets = [isa for isa in _native.instruction_sets() if dtype == "bfloat16" or isa != "avx512bf16"]
    return {
        "torch.mm alone, no loss": lambda h, w, y: torch.mm(h, w.T),
        "PyTorch, all logits": lambda h, w, y: F.cross_entropy((h @ w.T).float(), y, reduction="none"),
        "PyTorch, linear_cross_entropy in chunks": lambda h, w, y: chunked(h, w, y, "none"),
        "codeact, torch": lambda h, w, y: token_nll(h, w, y, backend="torch"),
        **{f"codeact, native {isa}": lambda h, w, y, isa=isa: with_isa(isa, h, w, y) for isa in sets},
    }


def gradient_arms() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name -> mean loss, to be differentiated."""
    return {
        "PyTorch, all logits": lambda h, w, y: F.cross_entropy((h @ w.T).float(), y),
        "PyTorch, linear_cross_entropy in chunks": lambda h, w, y: chunked(h, w, y, "mean"),
        "codeact": linear_cross_entropy,
    }


def step(arm: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    arm(hidden, weight, targets).backward()
    hidden.grad = weight.grad = None


def seconds(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Wall time of every function in every round, in random order; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    shuffle = random.Random(0)
    for number in range(rounds + 1):
        for name in shuffle.sample(list(functions), len(functions)):
            begin = time.perf_counter()
            functions[name]()
            if number:
                times[name].append(time.perf_counter() - begin)
    return times


def peak_memory(kind: str, name: str, shape: tuple[int, int, int], dtype: str) -> int | None:
    """Most bytes that an arm adds to a process that holds its operands (and, where they are made, their gradients)."""
    if sys.platform != "linux":
        return None
    command = [sys.executable, "-m", "benchmarks.nll", "--memory-of", kind, name, dtype, *map(str, shape)]
    return int(subprocess.check_output(command, text=True, cwd=Path(__file__).parent.parent))


def print_memory(kind: str, name: str, dtype: str, *shape: str) -> None:
    """What ``peak_memory`` runs."""

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))

    hidden, weight, targets = operands((int(shape[0]), int(shape[1]), int(shape[2])), DTYPES[dtype])
    gradients = kind == "gradient"
    arm = gradient_arms()[name] if gradients else nll_arms(dtype)[name]
    # A small call first: code is loaded and threads are started.
    few = [t[:64].clone().requires_grad_(gradients and t.is_floating_point()) for t in (hidden, weight)]
    small = arm(few[0], few[1], targets[:64] % 64)
    if gradients:
        small.backward()
        hidden.requires_grad_()
        weight.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    result = arm(hidden, weight, targets)
    if gradients:
        result.backward()
    made = sum(t.numel() * t.element_size() for t in (hidden, weight)) if gradients else 0
    print(max(resident("VmHWM") - before - made, 0))


def measure_nll(shape: tuple[int, int, int], dtype: str, rounds: int, peak: float | None) -> list[dict[str, Any]]:
    hidden, weight, targets = operands(shape, DTYPES[dtype])
    arms = nll_arms(dtype)
    some = slice(0, 256)
    expected = token_nll_reference(hidden[some], weight, targets[some])
    errors = {}
    with torch.inference_mode():
        for name, arm in arms.items():
            if name != "torch.mm alone, no loss":
                errors[name] = float((arm(hidden, weight, targets)[some].double() - expected).abs().max())
                assert errors[name] < (0.1 if dtype == "bfloat16" else 1e-3), (name, errors[name])
        times = seconds({name: lambda a=arm: a(hidden, weight, targets) for name, arm in arms.items()}, rounds)
    # A process an arm takes its time: the widest logits show what there is to see.
    return records("nll", shape, dtype, times, 2, peak, errors, memory=shape == SHAPES[0])


def measure_gradient(shape: tuple[int, int, int], dtype: str, rounds: int, peak: float | None) -> list[dict[str, Any]]:
    hidden, weight, targets = operands(shape, DTYPES[dtype])
    hidden.requires_grad_()
    weight.requires_grad_()
    arms = gradient_arms()
    # The gradient of some rows against float64.
    rows = slice(0, 128)
    exact = hidden[rows].detach().double().requires_grad_()
    F.cross_entropy(exact @ weight.detach().double().T, targets[rows]).backward()
    errors = {}
    for name, arm in arms.items():
        arm(hidden[rows], weight, targets[rows]).backward()
        difference = hidden.grad[rows].double() - exact.grad  # type: ignore[index]
        errors[name] = float(difference.abs().max() / exact.grad.abs().max())  # type: ignore[union-attr]
        hidden.grad = weight.grad = None
    times = seconds({name: lambda a=arm: step(a, hidden, weight, targets) for name, arm in arms.items()}, rounds)
    return records("gradient", shape, dtype, times, 6, peak, errors)


def records(
    kind: str,
    shape: tuple[int, int, int],
    dtype: str,
    times: dict[str, list[float]],
    operations: int,
    peak: float | None,
    errors: dict[str, float],
    memory: bool = True,
) -> list[dict[str, Any]]:
    work = float(operations * np.prod(shape, dtype=np.float64))
    plain = statistics.median(times["PyTorch, all logits"])
    result = []
    for name, values in times.items():
        median = statistics.median(values)
        result.append(
            {
                "kind": kind,
                "shape": shape,
                "dtype": dtype,
                "what": name,
                "median_ms": 1e3 * median,
                "min_ms": 1e3 * min(values),
                "max_ms": 1e3 * max(values),
                "gflops_per_s": work / median / 1e9,
                "floor_share": None if peak is None else work / median / peak,
                "times_plain": plain / median,
                "error": errors.get(name),
                "extra_bytes": peak_memory(kind, name, shape, dtype) if memory else None,
            }
        )
    return result


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| T, D, V | dtype | | ms (min to max) | GFLOP/s | share of the floor | x all logits | error | extra MiB |"
    ]
    lines.append("|:--|:--|:--|--:|--:|--:|--:|--:|--:|")
    for r in rows:
        share = "" if r["floor_share"] is None else f"{r['floor_share']:.0%}"
        error = "" if r["error"] is None else f"{r['error']:.1e}"
        memory = "" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 2**20:,.0f}"
        lines.append(
            f"| {', '.join(map(str, r['shape']))} | {r['dtype']} | {r['what']} | {r['median_ms']:,.0f} "
            f"({r['min_ms']:,.0f} to {r['max_ms']:,.0f}) | {r['gflops_per_s']:,.0f} | {share} | "
            f"{r['times_plain']:.2f} | {error} | {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it still work?")
    parser.add_argument("--memory-of", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print_memory(*options.memory_of)
        return
    shapes = ((256, 64, 1000),) if options.quick else SHAPES
    gradient_shape = (256, 64, 1000) if options.quick else GRADIENT_SHAPE
    peak = multiplier_peak()
    losses, gradients = [], []
    for dtype in DTYPES:
        for shape in shapes:
            losses += measure_nll(shape, dtype, 5 if dtype == "bfloat16" else 3, peak.get(dtype))
        gradients += measure_gradient(gradient_shape, dtype, 2, peak.get(dtype))
    for name, rate in peak.items():
        print(f"Multipliers, {torch.get_num_threads()} threads: {rate / 1e9:,.0f} GFLOP/s in {name}.")
    print(f"\n## Loss of every token\n\n{table(losses)}\n\n## Mean loss and the gradients of hidden and head\n")
    print(table(gradients))
    if options.json:
        machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__, "peak": peak}
        options.json.write_text(json.dumps({**machine, "records": losses + gradients}, indent=1) + "\n")


if __name__ == "__main__":
    main()
