"""Compile every kernel for every chip ahead of time, without a GPU, and report what the compilers made of it.

    python -m codeact_kernels.compile_report [--chip sm_90 ...] [--json FILE]

What is compiled is what ``linear_nll``, ``loss_and_slope``, ``segment_sums`` and ``layers`` launch for one realistic
problem, through Triton's own launch path with a driver that only names a chip. Registers and stack (spilled registers
show there) are ptxas's and LLVM's numbers; matrix instructions are counted in the machine code. Exit code 1 if a kernel
spills, needs more shared memory than the chip has, or lacks the matrix instructions that its dtype should get.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from codeact_kernels import layers, linear_nll, loss_slope, segments, tiles
from codeact_kernels.tiles import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Largest shared memory of one block: CUDA programming guide, table "Technical specifications per compute capability"
# (163, 227, 227 KiB); AMD CDNA 3 ISA guide, section 1 (64 KiB of LDS). sm_86, sm_89 and sm_120 take the tile of sm_80,
# and have 99 KiB.
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# Machine instructions that multiply matrices, and (TMA) those that copy tiles by a descriptor.
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA|v_mfma_\w+)\b")
COPY = re.compile(r"\bUTMALDG\b")
_MATRIX_OF_CHIP = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}

# T is odd on purpose: it must not matter. D and V are Llama-3-8B's.
_T, _D, _V, _WIDE, _SAMPLES = 1023, 4096, 128256, 14336, 7


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One compiled kernel. ``stack`` and ``shared`` in bytes; ``matrix`` and ``copies`` are counts of instructions."""

    chip: str
    kernel: str
    variant: str
    registers: int
    stack: int
    shared: int
    matrix: dict[str, int]
    copies: int

    def faults(self) -> list[str]:
        """What is wrong with it; empty if nothing is."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of registers spilled")
        if self.shared > SHARED_LIMIT[self.chip]:
            found.append(f"{self.shared} bytes of shared memory, {self.chip} has {SHARED_LIMIT[self.chip]}")
        # Exact float32 products have matrix instructions on AMD only.
        products = self.kernel.startswith("partial_nll") and ("float32" not in self.variant or self.chip == "gfx942")
        if products and not any(name.startswith(_MATRIX_OF_CHIP[self.chip]) for name in self.matrix):
            found.append(f"no {_MATRIX_OF_CHIP[self.chip]} instruction")
        if self.kernel == "partial_nll_descriptors" and not self.copies:
            found.append("no TMA instruction")
        return found


class NamedChip:
    """Stands in for Triton's driver where there is no device: compiles for ``target``, launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        """The chip to compile for."""
        return self._target

    def get_current_device(self) -> str:
        """One for every chip: Triton keeps what it compiled by device."""
        return str(self._target)

    def get_current_stream(self, device: str) -> int:
        """Nothing is launched on it."""
        return 0


def problems(chip: str) -> list[tuple[str, list[Launch]]]:
    """(variant, launches) of every default configuration for ``chip``, on tensors that have shapes only."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    found: list[tuple[str, list[Launch]]] = []
    for dtype in tiles.DTYPES:
        bias = meta(_V, dtype=dtype)
        variants = [
            ("", None, None, 0, tiles.tile_for(dtype, chip)),
            (" bias softcap", bias, 30.0, 0, tiles.tile_for(dtype, chip, softcap=True)),
            # Rows that lie 1 number apart from a multiple of 16 bytes: no descriptor, no wide loads.
            (" unaligned", None, None, 1, tiles.tile_for(dtype, chip)),
        ]
        if dtype == torch.bfloat16:
            for tile in tiles.candidates_for(chip)[1:]:
                shape = f"{tile.block_t} x {tile.block_v} x {tile.block_d}, {tile.stages} stages"
                variants.append((f" bias, to try: {shape}", bias, None, 0, tile))
        for name, offset, softcap, padding, tile in variants:
            hidden = meta(_T, _D + padding, dtype=dtype)[:, :_D]
            weight = meta(_V, _D + padding, dtype=dtype)[:, :_D]
            partials, target_logits = meta(triton.cdiv(_V, tile.block_v) * _T), meta(_T)
            operands = (hidden, weight, offset, meta(_T, dtype=torch.int64), partials, target_logits, meta(_T))
            k1, k2 = linear_nll.launches(*operands, softcap, -100, tile)
            variant = f"{str(dtype).removeprefix('torch.')}{name}"
            found.append((variant, [k1]))
            if dtype == torch.bfloat16 and not name:
                found.append(("", [k2]))
    for dtype in tiles.DTYPES:
        for name, words, of_words, softcap, scale in (
            ("", _V, None, None, None),
            (" odd vocabulary, bias softcap scale", _V + 1, meta(_V + 1), 30.0, meta(_T)),
        ):
            logits, labels = meta(_T, _V + 16, dtype=dtype)[:, :words], meta(_T, dtype=torch.int64)
            k4 = loss_slope.loss_slope_launch(logits, labels, of_words, softcap, -100, scale, True, meta(_T))
            found.append((f"{str(dtype).removeprefix('torch.')}{name}", [k4]))
    half = torch.bfloat16
    x, gates, weight = meta(_T, _D, dtype=half), meta(_T, _WIDE, dtype=half), meta(_D, dtype=half)
    scales, parts = meta(_T), meta(triton.cdiv(_T, 32), _D)
    heads, angles = meta(_T, 32, 128, dtype=half).transpose(0, 1), meta(_T, 128, dtype=half)
    for variant, launch in (
        ("bfloat16", layers.norm_launch(x, weight, 1e-5, x, scales)),
        ("bfloat16", layers.norm_slopes_launch(x, x, weight, scales, x, parts)),
        ("bfloat16", layers.gate_launch(gates, gates, gates)),
        ("bfloat16", layers.gate_slopes_launch(gates, gates, gates, gates, gates)),
        ("bfloat16", layers.rotation_launch(heads, angles, angles, heads, False)),
        ("bfloat16 backward", layers.rotation_launch(heads, angles, angles, heads, True)),
    ):
        found.append((variant, [launch]))
    for variant, targets in (("", None), ("targets", meta(_T, dtype=torch.int64))):
        outputs = (meta(_SAMPLES, dtype=torch.float64), meta(_SAMPLES, dtype=torch.int32))
        bounds = meta(_SAMPLES + 1, dtype=torch.int32)
        found.append((variant, [segments.segment_launch(meta(_T), targets, bounds, *outputs, -100)]))
    return found


def compile_one(chip: str, number: int) -> list[Report]:
    """Compile the launches of problem ``number`` of ``chip``, in this process."""
    driver.set_active(NamedChip(TARGETS[chip]))
    variant, launches = problems(chip)[number]
    reports = []
    for kernel, grid, arguments, options in launches:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        read = _read_amd if chip.startswith("gfx") else _read_nvidia
        registers, stack, code = read(compiled)
        matrix: dict[str, int] = {}
        for name in MATRIX.findall(code):
            matrix[name] = matrix.get(name, 0) + 1
        reports.append(
            Report(
                chip=chip,
                kernel=kernel.fn.__name__,
                variant=variant,
                registers=registers,
                stack=stack,
                shared=compiled.metadata.shared,
                matrix=matrix,
                copies=len(COPY.findall(code)),
            )
        )
    return reports


def _read_nvidia(compiled: Any) -> tuple[int, int, str]:
    """Registers, stack and machine code, by the tools that come with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin.name)
        code = _output(tools / "nvdisasm", "-c", cubin.name)
    registers, stack = (int(re.findall(rf"\b{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    return registers, stack, code


def _read_amd(compiled: Any) -> tuple[int, int, str]:
    """Registers and stack from the code object's metadata, which the assembly ends with."""
    code = compiled.asm["amdgcn"]
    vector, accumulation, scratch = (
        int(re.findall(rf"\.{name}:\s*(\d+)", code)[-1])
        for name in ("vgpr_count", "agpr_count", "private_segment_fixed_size")
    )
    return max(vector, accumulation), scratch, code


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_all(chips: Iterable[str], workers: int | None = None) -> list[Report]:
    """Compile every problem of ``chips``, a process per CPU."""
    jobs = [(chip, number) for chip in chips for number in range(len(problems(chip)))]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or len(os.sched_getaffinity(0)), context) as pool:
        return [report for reports in pool.map(compile_one, *zip(*jobs, strict=True)) for report in reports]


def table(reports: Iterable[Report]) -> str:
    """Markdown, one line a kernel."""
    lines = [
        "| chip | kernel | variant | registers | stack | shared KiB | matrix instructions | TMA loads | |",
        "|:--|:--|:--|--:|--:|--:|:--|--:|:--|",
    ]
    for r in reports:
        matrix = ", ".join(f"{count} {name}" for name, count in r.matrix.items())
        lines.append(
            f"| {r.chip} | {r.kernel} | {r.variant} | {r.registers} | {r.stack} | {r.shared / 1024:.1f} | {matrix} | "
            f"{r.copies or ''} | {'; '.join(r.faults()) or 'ok'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compile every kernel for every chip; the exit code is 1 where one has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", action="append", choices=list(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args()
    if tiles.interpreting():
        sys.exit("compile_report: unset TRITON_INTERPRET, under which nothing is compiled")
    reports = compile_all(options.chip or TARGETS)
    print(table(reports))
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(report) for report in reports], indent=1) + "\n")
    faults = [f"{r.chip} {r.kernel} {r.variant}: {fault}" for r in reports for fault in r.faults()]
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
