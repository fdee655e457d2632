"""The steps between a layer's products against PyTorch's own chains of operations, as transformers writes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import codeact._native as _native
from codeact.ops.layers import fusable, rms_norm, rotate, silu_multiply
from codeact.ops.layers_reference import rms_norm_reference, rotate_reference, silu_multiply_reference

DTYPES = (torch.float32, torch.bfloat16)
INSTRUCTIONS = _native.instruction_sets()
WIDTHS = (1, 2, 15, 16, 17, 48, 63, 576)


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request, monkeypatch):
    monkeypatch.setenv("CODEACT_NATIVE_ISA", request.param)
    return request.param


def draw(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_alike(ours, theirs):
    """Equal, but for the last bit of a few: sums have another order, and exp is another one."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=2 * torch.finfo(torch.float32).eps)
    if ours.dtype == torch.bfloat16 and ours.numel() > 1000:
        assert (ours == theirs).float().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm(instructions, dtype, width):
    x, weight = draw((3, 37, width), dtype), draw((width,), dtype, 1)
    assert_alike(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    sparse = draw((37, 2 * width), dtype)[:, :width]  # rows with a gap between them
    assert_alike(rms_norm(sparse, weight, 1e-6), rms_norm_reference(sparse, weight, 1e-6))
    zeros = torch.zeros(2, width, dtype=dtype)
    assert_alike(rms_norm(zeros, weight, 1e-6), rms_norm_reference(zeros, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_gate(instructions, dtype, width):
    gate, up = draw((2, 37, width), dtype) * 4, draw((2, 37, width), dtype, 1)
    assert_alike(silu_multiply(gate, up), silu_multiply_reference(gate, up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_at_the_ends(instructions, dtype):
    values = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 30.0, 86.0, 88.8, 200.0, 1e30, 3e38], dtype=dtype)
    gate = torch.cat([values, -values])
    exact = torch.nn.functional.silu(gate.double())
    ours = silu_multiply(gate, torch.ones_like(gate))
    # The exponent is rounded before its exponential is taken, so the error grows with the gate.
    bound = torch.finfo(dtype).eps * (exact.abs() if dtype == torch.bfloat16 else exact.abs() * (4 + gate.abs()))
    open_enough = gate > -87
    assert ((ours - exact).abs() <= bound)[open_enough].all()
    assert float(ours[~open_enough].abs().max()) < 4e-36  # shut
    beyond = torch.tensor([float("nan"), float("inf")], dtype=dtype)
    assert not silu_multiply(beyond, torch.ones_like(beyond)).isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 6, 32, 34, 64, 128])
def test_rotation(instructions, dtype, width):
    heads, tokens = 3, 11
    cosine, sine = draw((tokens, width), dtype, 1), draw((tokens, width), dtype, 2)
    for x in (draw((heads, tokens, width), dtype), draw((tokens, heads, width), dtype).transpose(0, 1)):
        assert_alike(rotate(x, cosine, sine), rotate_reference(x, cosine, sine))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_whatever_is_beside_it(dtype):
    x, weight = draw((200, 576), dtype), draw((576,), dtype, 1)
    whole = rms_norm(x, weight, 1e-5), silu_multiply(x, x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(rms_norm(x[7:9], weight, 1e-5), whole[0][7:9])
            assert torch.equal(silu_multiply(x[7:9], x[7:9]), whole[1][7:9])
    finally:
        torch.set_num_threads(before)


def test_what_is_not_fused():
    x = torch.ones(3)
    assert fusable(x, x)
    assert not fusable(x, x.bfloat16())
    assert not fusable(x.double())
    assert not fusable(x.to("meta"))
    assert not fusable(x.requires_grad_())
    with torch.no_grad():
        assert fusable(x)


ROWS = np.ones((4, 6), np.float32)
HEADS = np.ones((2, 4, 6), np.float32)


@pytest.mark.parametrize(
    ("name", "operands", "error"),
    [
        ("rms_norm", (ROWS, ROWS[0, :5], 1e-5, ROWS.copy()), ValueError),
        ("rms_norm", (ROWS, np.ones(12, np.float32)[::2], 1e-5, ROWS.copy()), ValueError),
        ("rms_norm", (ROWS, ROWS[0], 1e-5, ROWS[:3].copy()), ValueError),
        ("rms_norm", (ROWS, ROWS[0].astype(np.uint16), 1e-5, ROWS.copy()), TypeError),
        ("rms_norm", (ROWS[0], ROWS[0], 1e-5, ROWS.copy()), ValueError),
        ("silu_multiply", (ROWS, ROWS[:3], ROWS.copy()), ValueError),
        ("silu_multiply", (ROWS.astype(np.float64), ROWS, ROWS.copy()), TypeError),
        ("rotate", (HEADS, ROWS[:3], ROWS, HEADS.copy()), ValueError),
        ("rotate", (HEADS, ROWS, ROWS, HEADS[:1].copy()), ValueError),
        ("rotate", (HEADS[..., :5], ROWS[:, :5], ROWS[:, :5], HEADS[..., :5].copy()), ValueError),
    ],
)
def test_the_compiled_core_refuses_what_does_not_fit(name, operands, error):
    with pytest.raises(error):
        getattr(_native, name)(*operands, 1, INSTRUCTIONS[0])


def test_an_output_that_cannot_be_written_to_is_refused():
    output = ROWS.copy()
    output.setflags(write=False)
    with pytest.raises(ValueError, match=r"read-only|writeable"):
        _native.silu_multiply(ROWS, ROWS, output, 1, INSTRUCTIONS[0])
