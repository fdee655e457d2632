"""The loss per token on a CUDA or ROCm device: codeact's Triton kernels against PyTorch, Liger and cut-cross-entropy.

    python -m benchmarks.nll_cuda [--quick] [--json FILE]

Every arm computes the losses of the same bfloat16 operands. Before it is timed its error against float64 is measured on
256 rows; codeact must be no worse than plain PyTorch. Time is Triton's ``do_bench`` (median, cold L2); memory is what
an arm allocates at its peak beside the operands. Liger and cut-cross-entropy are left out where they are not installed;
Liger's loss is a mean, and is timed only. Written without a device at hand: nobody has run it yet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from codeact_kernels.linear_nll import linear_nll
from torch import Tensor

from benchmarks.measure import Line, Report, Timing, main, table
from codeact.ops.nll_reference import token_nll_reference

Arm = Callable[[Tensor, Tensor, Tensor], Tensor]
# T, D, V
SIZES = [(8192, 576, 49152), (8192, 1536, 151936), (8192, 4096, 32256), (8192, 4096, 128256)]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What one writes without a library: all logits, in float32."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own, in chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def arms() -> dict[str, Arm]:
    """By name; those of libraries that are installed."""
    found: dict[str, Arm] = {
        "codeact": linear_nll,
        "PyTorch, plain": plain,
        "PyTorch, F.linear_cross_entropy in chunks": torch_chunked,
    }
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda h, w, t: linear_cross_entropy(h, w, t, reduction="none")
    except ImportError:
        pass
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["Liger"] = liger_fused_linear_cross_entropy
    except ImportError:
        pass
    return found


def largest_error(arm: Arm, hidden: Tensor, weight: Tensor, targets: Tensor) -> float | None:
    """Against float64 on the first 256 rows; None for an arm that gives no loss per row."""
    with torch.no_grad():
        losses = arm(hidden, weight, targets)
    if losses.shape != targets.shape:
        return None
    rows = slice(256)
    exact = token_nll_reference(hidden[rows], weight, targets[rows])
    return float((losses[rows].double() - exact).abs().max())


def measure(tokens: int, width: int, vocabulary: int) -> list[dict[str, Any]]:
    """Every arm at one size."""
    from triton.testing import do_bench

    generator = torch.Generator("cuda").manual_seed(0)
    make = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, width, **make)
    weight = torch.randn(vocabulary, width, **make) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device="cuda")
    records = []
    for name, arm in arms().items():
        error = largest_error(arm, hidden, weight, targets)

        @torch.no_grad()
        def call(arm: Arm = arm) -> Tensor:
            return arm(hidden, weight, targets)

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated() - before
        milliseconds = do_bench(call, return_mode="median")
        records.append(
            {
                "tokens": tokens,
                "width": width,
                "vocabulary": vocabulary,
                "what": name,
                "ms": milliseconds,
                "tflops": 2e-9 * tokens * width * vocabulary / milliseconds,
                "extra_mib": memory / 2**20,
                "largest_error": error,
            }
        )
    ours, theirs = records[0]["largest_error"], records[1]["largest_error"]
    if ours > theirs:
        raise AssertionError(f"codeact is off by {ours}, plain PyTorch by {theirs}")
    return records


def losses_table(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    return table(
        "T, D, V | |> ms |> TFLOP/s |> extra MiB |> largest error",
        (
            (
                f"{r['tokens']}, {r['width']}, {r['vocabulary']}",
                r["what"],
                f"{r['ms']:.2f}",
                f"{r['tflops']:.0f}",
                f"{r['extra_mib']:,.0f}",
                "" if r["largest_error"] is None else f"{r['largest_error']:.1e}",
            )
            for r in records
        ),
    )


def run(options: argparse.Namespace) -> Report:
    if not torch.cuda.is_available():
        sys.exit("nll_cuda: no CUDA or ROCm device here; benchmarks.roofline has the floors by arithmetic")
    groups = [measure(*size) for size in ([(1024, 576, 49152)] if options.quick else SIZES)]
    lines = []
    for ours, *others in groups:
        peer = min(others, key=lambda r: r["ms"])
        lines.append(
            Line(
                what=f"loss per token on the device, T {ours['tokens']}, D {ours['width']}, V {ours['vocabulary']}",
                ours=Timing((ours["ms"] / 1e3,)),
                peer=peer["what"],
                theirs=Timing((peer["ms"] / 1e3,)),
                memory=int(ours["extra_mib"] * 2**20),
                peer_memory=int(peer["extra_mib"] * 2**20),
            )
        )
    records = [record for group in groups for record in group]
    device = torch.cuda.get_device_name()
    title = f"## Loss per token on {device}, bfloat16"
    return Report(
        sections=[title, losses_table(records)],
        lines=lines,
        figures={"device": device, "torch": torch.__version__, "records": records},
    )


if __name__ == "__main__":
    main(run, __doc__)
