"""How much of (tokens, vocabulary, hidden size) one program of K1 computes, per architecture and dtype: tiles.toml.

A tile never depends on the number of tokens: with it the order of every sum is fixed, and a row has the same bits in
whatever batch it stands.
"""

from __future__ import annotations

import contextlib
import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

# A kernel, its grid, its arguments and its compile-time options.
Launch = tuple[Any, tuple[int], tuple[Any, ...], dict[str, Any]]

# Said here because Triton's default changes with 3.10, and with it every last bit.
ROUNDING = {"enable_fp_fusion": True}

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Shape of K1's tile, its warps and pipeline stages; how many token tiles share the vocabulary's; its TMA.

    ``group_t`` token tiles run beside one another on one vocabulary tile while it is in the L2 cache: 16 x 128 rows of
    D = 4096 bfloat16 are 16 MiB. ``descriptors``: the chip's copy engine feeds it, by tensor descriptors.
    """

    block_t: int
    block_v: int
    block_d: int
    warps: int
    stages: int
    group_t: int = 16
    descriptors: bool = False


TABLE = Path(__file__).with_name("tiles.toml")
_SHAPE = tuple(field.name for field in fields(Tile) if field.name != "descriptors")


def read_table(path: Path = TABLE) -> dict[str, dict[str, list[Tile]]]:
    """Architecture -> "half", "softcap" and "single" (a tile each) and "candidates", as a file like ours has them."""
    table: dict[str, Any] = tomllib.loads(path.read_text())

    def tile(shape: list[int], descriptors: bool) -> Tile:
        return Tile(**dict(zip(_SHAPE, shape, strict=True)), descriptors=descriptors)

    def tiles(name: str, entry: Any, descriptors: bool) -> list[Tile]:
        shapes = entry if name == "candidates" else [entry]
        return [tile(shape, descriptors and name != "single") for shape in shapes]

    return {
        architecture: {k: tiles(k, v, entries["descriptors"]) for k, v in entries.items() if k != "descriptors"}
        for architecture, entries in table.items()
        if isinstance(entries, dict)
    }


def with_tile(text: str, architecture: str, tile: Tile, source: str) -> str:
    """The text of such a file with another tile for bfloat16 and float16, and with where that choice comes from."""
    before, name, after = text.partition(f"\n[{architecture}]\n")
    shape = [getattr(tile, field) for field in _SHAPE]
    after = re.sub(r"^half = .*$", f"half = {shape}", after, count=1, flags=re.MULTILINE)
    return re.sub(r"^source = .*$", f"source = '{source}'", before, count=1, flags=re.MULTILINE) + name + after


_TILES = read_table()
# A tile costs the interpreter 6 to 25 ms whatever its size; small ones meet more edges.
_INTERPRETED = Tile(block_t=16, block_v=32, block_d=16, warps=1, stages=1)

ARCHITECTURES = tuple(_TILES)


_INTERPRETING = bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """Whether our kernels run in Triton's interpreter: TRITON_INTERPRET=1 counts when they are imported, not later."""
    return _INTERPRETING


def tile_for(dtype: torch.dtype, architecture: str, softcap: bool = False) -> Tile:
    """Return K1's tile for operands of ``dtype`` on ``architecture``: one of ARCHITECTURES, or "interpreter"."""
    if architecture == "interpreter":
        return _INTERPRETED
    kind = "single" if dtype == torch.float32 else "softcap" if softcap else "half"
    return _TILES[architecture][kind][0]


def candidates_for(architecture: str) -> list[Tile]:
    """Return the tiles for bfloat16 and float16 to try on ``architecture``, first the one that is taken."""
    if architecture == "interpreter":
        return [_INTERPRETED, replace(_INTERPRETED, block_t=32)]
    return [*_TILES[architecture]["half"], *_TILES[architecture]["candidates"]]


def architecture_of(device: torch.device) -> str:
    """Return the name of the tiles for ``device``.

    Raises:
        ValueError: no kernel runs there.
    """
    if interpreting():
        return "interpreter"
    if device.type != "cuda":
        raise ValueError(
            f"codeact_kernels need a CUDA or ROCm device, not {device} (TRITON_INTERPRET=1 runs on the CPU)"
        )
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise ValueError(f"codeact_kernels need compute capability 8.0 or newer; {device} has {capability}")
    if capability < (9, 0) or capability >= (12, 0):
        return "sm_80"
    return "sm_90" if capability < (10, 0) else "sm_100"


def takes_descriptor(operand: Tensor) -> bool:
    """Whether a tensor descriptor can read this (rows, D) operand: contiguous rows at multiples of 16 bytes."""
    return (
        operand.numel() > 0
        and operand.stride(1) == 1
        and operand.stride(0) * operand.itemsize % 16 == 0
        and operand.data_ptr() % 16 == 0
    )


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` the current one: Triton launches there, wherever the operands are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
