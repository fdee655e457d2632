"""What "auto" means for a device and for a dtype."""

from __future__ import annotations

import torch

from codeact.base.errors import InputError, one_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """Return CUDA (or ROCm) where there is a device, else the CPU; or the device asked for by name.

    Raises:
        InputError: the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown; say auto, cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"device {name!r} is not here (CUDA devices: {count}); use --device cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return bfloat16 where ``device`` computes it natively, else float32; or the dtype asked for by name."""
    if name != "auto":
        return _DTYPES[one_of("dtype", name, _DTYPES)]
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move to ``device``; to CUDA from pinned memory, so that the copy does not wait for the kernels before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); without it, it is slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
