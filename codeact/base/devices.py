"""What "auto" means for a device and a dtype, what a device computes in a second, and how much it is given at once."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from codeact.base.errors import InputError, NotHereError, addressed, one_of

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def resolve_device(name: str = "auto") -> torch.device:
    """Return CUDA (or ROCm) where there is a device, else the CPU; or the device asked for by name.

    Raises:
        InputError: the device does not exist here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown; say auto, cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise NotHereError(f"device {name!r} is not here (CUDA devices: {count}); use --device cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return bfloat16 where ``device`` computes it natively, else float32; or the dtype asked for by name."""
    import torch

    if name != "auto":
        dtype: torch.dtype = getattr(torch, one_of("dtype", name, DTYPES))
        if device.type == "cpu" and dtype == torch.bfloat16 and not cpu_has_bf16():
            _warn_of_slow(name)
        return dtype
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


@cache
def _warn_of_slow(name: str) -> None:
    told = "dtype %s: this CPU has no instructions for it, and float32 is many times faster: leave out --dtype"
    logging.getLogger("codeact").warning(addressed(told), name)


def check_device(device: str, dtype: str) -> None:
    """Refuse a device that is not here, and a dtype that is none.

    Raises:
        InputError: it is named, and what there is.
    """
    resolve_dtype(dtype, resolve_device(device))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move to ``device``; to CUDA from pinned memory, so that the copy does not wait for the kernels before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); without it, it is slower than float32."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def default_tokens_per_pack(device: torch.device | str, parameters: float) -> int:
    """Tokens of one forward pass without gradients that keep a device busy and fit in its memory.

    On a CPU 2048: more gains nothing. On a GPU as many as make about 25e12 FLOP, so that starting kernels does not
    count, between 8,192 and 65,536.

    Args:
        device: a device, or its kind: "cpu", "cuda".
        parameters: of the model.
    """
    kind = device if isinstance(device, str) else device.type
    if kind == "cpu":
        return 2048
    return int(min(max(25e12 / (2 * max(parameters, 1)), 8192), 65536))


# ------------------------------------------------------------------------------------------------------ floating point


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """``flops``: dense 16-bit matrix products with float32 sums, FLOP/s; ``memory``: bytes; ``bandwidth``: bytes/s."""

    name: str
    flops: float
    memory: float
    bandwidth: float


def _gpu(name: str, teraflops: float, gigabytes: float, terabytes_per_second: float) -> Gpu:
    return Gpu(name=name, flops=teraflops * 1e12, memory=gigabytes * 1e9, bandwidth=terabytes_per_second * 1e12)


# From the makers' data sheets (figures "with sparsity" halved); nothing here was measured. Every word of a name must be
# part of the device's own; the first line that fits counts.
GPUS = (
    _gpu("B200", 2250, 180, 8.0),
    _gpu("H200", 989, 141, 4.8),
    _gpu("GH200", 989, 96, 4.0),
    _gpu("H100 PCIe", 756, 80, 2.0),
    _gpu("H100 NVL", 835, 94, 3.9),
    _gpu("H100", 989, 80, 3.35),
    _gpu("A100 40GB", 312, 40, 1.555),
    _gpu("A100", 312, 80, 2.039),
    _gpu("A800", 312, 80, 2.039),
    _gpu("L40S", 362, 48, 0.864),
    _gpu("L4", 121, 24, 0.3),
    _gpu("MI300X", 1307, 192, 5.3),
)


def find_gpu(name: str) -> Gpu | None:
    """Return the GPU of that name, as its driver gives it ("NVIDIA A100-SXM4-80GB") or short; None if unknown."""
    words = set(re.split(r"[\s\-_]+", name))
    return next((gpu for gpu in GPUS if words.issuperset(gpu.name.split())), None)


def resolve_peak(peak: float | str | None, device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """FLOP/s of one device, and where the number comes from.

    ``peak``: the number itself; "measure": by a matrix product; "auto": of a GPU's data sheet; None: unknown.
    """
    import torch

    if peak == "measure":
        return _measured_peak(device, dtype), f"measured: a {str(dtype).removeprefix('torch.')} matrix multiplication"
    if peak == "auto":
        sixteen_bits = dtype in (torch.bfloat16, torch.float16)
        gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" and sixteen_bits else None
        return (None, "unknown") if gpu is None else (gpu.flops, "data sheet")
    return (None, "unknown") if peak is None else (float(peak), "given")


@cache
def _measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best of five multiplications of 2048 x 2048 matrices (17 GFLOP each), in FLOP/s.

    Of smaller ones where these would take long: a CPU without instructions for 16 bits does 2 GFLOP/s.
    """
    import torch

    def seconds(size: int) -> float:
        a = torch.randn(size, size, dtype=dtype, device=device)  # a GPU clocks higher on constant data
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # a value on the host means that the device is done
        return time.perf_counter() - begin

    size = 256
    while size < 2048 and min(seconds(size), seconds(size)) < 0.02:  # the first one also loads what it needs
        size *= 2
    return 2 * size**3 / min(seconds(size) for _ in range(5))
