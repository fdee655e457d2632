"""What computes losses, for tests that ask the same of each."""

from __future__ import annotations

import pytest
import torch

from codeact import _native

HERE = _native.instruction_sets()
BACKENDS = ["torch", "triton", *(f"native:{isa}" for isa in ("avx512bf16", "avx512", "avx2"))]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Every backend, and of the native one every instruction set; Triton's in its interpreter."""
    name, _, isa = request.param.partition(":")
    if name == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("these operands are on the CPU; tests/kernels runs on the device")
        request.getfixturevalue("interpreted_bf16")
    if isa:
        if isa not in HERE:
            pytest.skip(f"this CPU has {', '.join(HERE) or 'no instruction set of the native backend'}")
        monkeypatch.setenv("CODEACT_NATIVE_ISA", isa)
    return name
