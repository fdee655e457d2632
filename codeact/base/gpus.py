"""What makers say of their GPUs: peak FLOP/s, memory, memory bandwidth. Nothing here was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """``flops``: dense 16-bit matrix products with float32 sums, FLOP/s; ``memory``: bytes; ``bandwidth``: bytes/s."""

    name: str
    flops: float
    memory: float
    bandwidth: float


def _gpu(name: str, teraflops: float, gigabytes: float, terabytes_per_second: float) -> Gpu:
    return Gpu(name=name, flops=teraflops * 1e12, memory=gigabytes * 1e9, bandwidth=terabytes_per_second * 1e12)


# From the makers' data sheets (figures "with sparsity" halved). Every word of a name must be part of the device's own;
# the first line that fits counts.
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
