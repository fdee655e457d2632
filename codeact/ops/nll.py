"""Per-token negative log-likelihood from hidden states and the LM head, without holding the logits.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

import codeact._native as _native
from codeact.base.errors import InputError, one_of, require
from codeact.ops import native

NLL_BACKENDS = ("triton", "native", "torch")

logger = logging.getLogger(__name__)

# A block of logits of the torch backend: 4 MiB of float32. It stays in the cache while the softmax passes over it, and
# every product is written to the same memory: fresh memory for each costs more than the softmax.
_BLOCK_LOGITS = 1 << 20
_BLOCK_TOKENS = 1024


def token_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Compute ``F.cross_entropy((hidden @ weight.T + bias).float(), targets, reduction="none")`` without the logits.

    - "triton": kernels for CUDA and ROCm, in ``codeact_kernels``; float32, bfloat16, float16.
    - "native": compiled, for x86-64 with AVX2 or better; float32 and bfloat16.
    - "torch": blocks of logits; everything else.

    Products are summed in float32 and the softmax is taken in float32, so bfloat16 operands lose nothing to bfloat16
    logits (but with "torch", which rounds them as the model itself does). With "native" and "triton" a row has the same
    bits in any batch.

    Args:
        hidden: (T, D) or (B, T, D) floating point.
        weight: (V, D), same dtype and device: the LM head.
        targets: (T,) or (B, T) int64 in ``[0, V)``, or ``ignore_index``.
        bias: (V,) or None.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the softmax (Gemma 2).
        ignore_index: a target with this value has loss 0, whatever its row holds.
        backend: one of the above, or "auto" for the best one present, which it logs once. ``CODEACT_BACKEND`` forces
            one for the whole process, and ``CODEACT_NATIVE_ISA`` (avx512bf16, avx512, avx2) an instruction set.

    Returns:
        float32 in nats, of the shape of ``targets``; NaN for a row whose logits are. For scoring: without a gradient.

    Raises:
        ValueError: shapes, dtypes, devices or targets do not fit together, or the backend is unknown, is not on this
            machine or does not compute these operands.
    """
    check_operands(hidden, weight, targets, bias, softcap, ignore_index)
    name = nll_backend(hidden, backend)
    if backend == "auto":
        why = _why_not("triton", hidden) if name == "torch" and hidden.device.type == "cuda" else None
        _say_once(f"{name}, as triton {why}" if why else name, hidden.device.type, hidden.dtype)
    run = {"triton": _triton_nll, "native": _native_nll, "torch": _torch_nll}[name.partition(" ")[0]]
    with torch.no_grad():
        losses = run(hidden.flatten(0, -2), weight, targets.flatten(), bias, softcap, ignore_index)
    return losses.view(targets.shape)


def nll_backend(operand: Tensor, backend: str = "auto") -> str:
    """What ``token_nll`` computes operands like this one with: its name, of "native" also the instruction set.

    Raises:
        InputError: the backend is unknown, is not on this machine or does not compute such operands.
    """
    name = one_of("backend", os.environ.get("CODEACT_BACKEND") or backend, ("auto", *NLL_BACKENDS))
    if name == "auto":
        best = "triton" if operand.device.type == "cuda" else "native"
        name = "torch" if _why_not(best, operand) else best
    elif reason := _why_not(name, operand):
        raise InputError(f"backend {name!r} {reason}; choose another one, or auto")
    return f"{name} ({native.instruction_set()})" if name == "native" else name


_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not(backend: str, hidden: Tensor) -> str | None:
    """Why a backend cannot compute with these operands here; None where it can."""
    if backend == "native":
        return native.why_not(hidden)
    if backend == "triton":
        device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
        if hidden.device.type != device:
            return f"runs on {device}, and the operands are on {hidden.device}"
        if hidden.dtype not in _TRITON_DTYPES:
            return f"computes float32, bfloat16, float16, not {_name(hidden.dtype)}"
        return triton_lacks()
    return None


def triton_lacks() -> str | None:
    """Why Triton's kernels cannot run here; None where they can. It compiles what launches them on a GPU."""
    if importlib.util.find_spec("triton") is None:
        return 'needs Triton: pip install "codeact[gpu]"'
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))):
        return "needs a C compiler to launch kernels: install gcc, or set CC"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "needs Python's headers to launch kernels: install python3-dev"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _say_once(backend: str, device_type: str, dtype: torch.dtype) -> None:
    logger.info("NLL of %s on %s: backend %s", _name(dtype), device_type, backend)


def check_operands(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    mixed: bool = False,
) -> None:
    """Check the operands that every loss over an LM head takes; ``mixed`` lets hidden and weight differ in dtype.

    Raises:
        ValueError: one is no tensor, or shapes, dtypes, devices or targets do not fit together.
    """
    for name, operand in {"hidden": hidden, "weight": weight, "targets": targets}.items():
        require(name, operand, "is_floating_point", "a tensor of PyTorch")
    if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)}, {tuple(weight.shape)}"
        raise ValueError(f"hidden (T, D) or (B, T, D) and weight (V, D) do not fit: {shapes}")
    if not (hidden.is_floating_point() and weight.is_floating_point()) or (hidden.dtype != weight.dtype and not mixed):
        raise ValueError(f"hidden and weight need one floating-point dtype, not {hidden.dtype} and {weight.dtype}")
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
        needed, shape = tuple(hidden.shape[:-1]), tuple(targets.shape)
        raise ValueError(f"targets must be int64 {needed}, not {targets.dtype} {shape}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    if len({t.device for t in (hidden, weight, targets, bias) if t is not None}) > 1:
        raise ValueError("hidden, weight, targets and bias must be on one device")
    # On a device this look would wait for every kernel in flight, and PyTorch's own assert catches it there.
    if targets.device.type == "cpu":
        wrong = ((targets < 0) | (targets >= weight.shape[0])) & (targets != ignore_index)
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            place = ", ".join(map(str, at))
            raise ValueError(f"targets[{place}] is {int(targets[at])}, outside [0, {weight.shape[0]})")


def _triton_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, ignore_index: int
) -> Tensor:
    """kernels/codeact_kernels/linear_nll.py."""
    from codeact_kernels.linear_nll import linear_nll

    return linear_nll(hidden, weight, targets, bias, softcap, ignore_index)


def _native_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, ignore_index: int
) -> Tensor:
    """csrc/nll/linear_nll.cpp, on as many threads as PyTorch takes."""
    losses = _native.linear_nll(
        native.as_array(hidden),
        native.as_array(weight),
        targets.contiguous().numpy(),
        None if bias is None else bias.detach().float().contiguous().numpy(),
        softcap,
        ignore_index,
        torch.get_num_threads(),
        native.instruction_set(),
    )
    return native.as_tensor(losses)


def _torch_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, ignore_index: int
) -> Tensor:
    """Blocks of tokens by blocks of vocabulary: each block of the head is read once per block of tokens."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    kept = targets != ignore_index
    safe = targets.where(kept, 0)
    rows = min(max(tokens, 1), _BLOCK_TOKENS)
    width = max(1, min(vocabulary, _BLOCK_LOGITS // rows))
    block = hidden.new_empty(rows, width)
    losses = hidden.new_zeros(tokens, dtype=torch.float32)
    for first in range(0, tokens, rows):
        part, target = hidden[first : first + rows], safe[first : first + rows]
        lse = losses.new_full((len(part),), -torch.inf)
        target_logit = torch.zeros_like(lse)
        for start in range(0, vocabulary, width):
            columns = weight[start : start + width]
            logits = torch.mm(part, columns.T, out=block[: len(part), : len(columns)]).float()
            if bias is not None:
                logits += bias[start : start + width].float()
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            column = target - start
            inside = (column >= 0) & (column < len(columns))
            picked = logits.gather(1, column.clamp(0, len(columns) - 1)[:, None]).squeeze(1)
            target_logit = torch.where(inside, picked, target_logit)
            largest = logits.amax(dim=1)
            total = logits.sub_(largest[:, None]).exp_().sum(dim=1)
            lse = torch.logaddexp(lse, total.log_().add_(largest))
        losses[first : first + rows] = lse - target_logit
    # A row that is ignored loses nothing, whatever it holds.
    return torch.where(kept, losses, 0.0)
