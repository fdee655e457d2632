"""The loss per token on a CUDA or ROCm device: codeact's Triton kernels against PyTorch, Liger and cut-cross-entropy.

    python -m benchmarks.nll_cuda [--quick] [--json FILE]

Every arm computes the losses of the same bfloat16 operands. Before it is timed its error against float64 is measured on
256 rows; codeact must be no worse than plain PyTorch. Time is Triton's ``do_bench`` (median, cold L2); memory is what
an arm allocates at its peak beside the operands. Liger and cut-cross-entropy are left out where they are not installed;
Liger's loss is a mean, and is timed only. Written without a device at hand: nobody has run it yet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from codeact_kernels.linear_nll import linear_nll
from torch import Tensor

from codeact._nll_reference import token_nll_reference

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


def table(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| T, D, V | | ms | TFLOP/s | extra MiB | largest error |", "|:--|:--|--:|--:|--:|--:|"]
    for r in records:
        error = "" if r["largest_error"] is None else f"{r['largest_error']:.1e}"
        lines.append(
            f"| {r['tokens']}, {r['width']}, {r['vocabulary']} | {r['what']} | {r['ms']:.2f} | {r['tflops']:.0f} | "
            f"{r['extra_mib']:,.0f} | {error} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="one small size: does it still work?")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("nll_cuda: no CUDA or ROCm device here; benchmarks.roofline has the floors by arithmetic")
    sizes = [(1024, 576, 49152)] if options.quick else SIZES
    records = [record for size in sizes for record in measure(*size)]
    print(f"## Loss per token on {torch.cuda.get_device_name()}, bfloat16\n\n{table(records)}\n")
    if options.json:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**machine, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
