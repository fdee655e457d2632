"""What a device can do and what a process has taken: peak FLOP/s, peak memory."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from codeact.base.gpus import find_gpu


def known_peak(device_name: str) -> float | None:
    """16-bit FLOP/s of a GPU by the name that its driver gives, such as "NVIDIA A100-SXM4-80GB"; None if unknown."""
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.flops


def resolve_peak(wanted: float | str | None, device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """FLOP/s of one device, and where the number comes from."""
    if wanted == "measure":
        return _measured_peak(device, dtype), f"measured: a {str(dtype).removeprefix('torch.')} matrix multiplication"
    if wanted == "auto":
        peak = None
        if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
            peak = known_peak(torch.cuda.get_device_name(device))
        return peak, "unknown" if peak is None else "data sheet"
    return (None, "unknown") if wanted is None else (float(wanted), "given")


@cache
def _measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best of five multiplications of 2048 x 2048 matrices (17 GFLOP each), in FLOP/s."""
    size, best = 2048, float("inf")
    a = torch.randn(size, size, dtype=dtype, device=device)  # a GPU clocks higher on constant data
    for _ in range(5):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # a value on the host means that the device is done
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def reset_peaks(device: torch.device) -> str:
    """Forget peaks of memory from before; returns since when the resident set's peak counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to the present resident set
        # Some sandboxes take the write and do nothing. The kernel's counters are 16 MiB inexact at worst.
        if _status("VmHWM") <= _status("VmRSS") + 2**24:
            return "begin of training"
    return "start of the process"


def peak_memory(device: torch.device) -> list[int]:
    """Bytes: peak resident set of this process, peak allocated and reserved on the device (0 where it is no GPU)."""
    if device.type == "cuda":
        return [_peak_resident(), torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]
    return [_peak_resident(), 0, 0]


def _peak_resident() -> int:
    """Bytes."""
    with suppress(OSError):
        return _status("VmHWM")
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int:
    """A line of Linux's account of this process, in bytes; an OSError elsewhere."""
    with open("/proc/self/status", "rb") as lines:
        for line in lines:
            if line.startswith(f"{name}:".encode()):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
