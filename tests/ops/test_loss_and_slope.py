"""The loss of rows of logits and its slope in their place, by every backend, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from codeact import _native
from codeact.ops.cross_entropy import loss_and_slope
from tests.helpers.pairwise import pairwise
from tests.ops.conftest import HERE

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float64: 1e-12}
# One of each; just over and under vectors and stored groups of 8, 16, 32 and 64; more than one block of Triton's.
SIZES = [(1, 1), (3, 7), (5, 16), (4, 65), (2, 127), (9, 1000), (2, 5000)]


@pytest.fixture
def forced(backend, monkeypatch) -> str:
    monkeypatch.setenv("CODEACT_BACKEND", backend)
    return backend


def problem(rows, columns, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (6 * torch.randn(rows, columns, generator=generator)).to(dtype)
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[2::3] = -100
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return logits, targets, torch.randn(columns, generator=generator, dtype=sums), torch.randn(rows, dtype=sums)


def exact(logits, targets, bias, softcap, scale):
    rounded = logits.to(torch.float64, copy=True).requires_grad_()
    z = rounded if bias is None else rounded + bias.double()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, targets, reduction="none")
    (losses if scale is None else losses * scale.double()).sum().backward()
    return losses.detach(), rounded.grad


@pytest.mark.parametrize(
    ("size", "dtype", "bias", "softcap", "scaled"),
    pairwise(SIZES, [*DTYPES], [False, True], [None, 5.0], [False, True]),
)
def test_equals_autograd(forced, size, dtype, bias, softcap, scaled):
    logits, targets, offset, scale = problem(*size, dtype)
    more = (offset if bias else None, softcap)
    losses, slopes = exact(logits, targets, *more, scale if scaled else None)
    seen = loss_and_slope(logits.clone(), targets, *more, slope=False)
    before = logits.clone()
    untouched = loss_and_slope(logits, targets, *more, slope=False)
    assert torch.equal(logits, before)
    ours = loss_and_slope(logits, targets, *more, scale=scale if scaled else None)
    assert torch.equal(ours, seen)
    assert torch.equal(ours, untouched)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours.double(), losses, rtol=min(DTYPES[dtype], 1e-5), atol=min(DTYPES[dtype], 1e-5))
    room = 1e-6 * (float(scale.abs().max()) if scaled else 1.0)  # near a softcap's end 1 - tanh^2 is a small difference
    # Triton's interpreter cuts bfloat16 off, where a device rounds to nearest.
    near = DTYPES[dtype] * (2 if forced == "triton" and dtype == torch.bfloat16 else 1)
    torch.testing.assert_close(logits.double(), slopes, rtol=near, atol=max(room, near * room))
    assert (logits[2::3] == 0).all()
    assert (ours[2::3] == 0).all()


def test_a_row_has_the_same_bits_in_any_block_and_on_any_number_of_threads(forced):
    logits, targets, bias, scale = problem(40, 3000, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads, size in ((1, 40), (2, 40), (2, 7), (1, 1)):
            torch.set_num_threads(threads)
            own = logits.clone()
            parts = [slice(first, first + size) for first in range(0, 40, size)]
            losses = [loss_and_slope(own[p], targets[p], bias, 30.0, scale=scale[p]) for p in parts]
            results.append((torch.cat(losses), own))
    finally:
        torch.set_num_threads(before)
    for losses, slopes in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(slopes, results[0][1])


def test_rows_may_lie_apart_and_what_lies_between_is_left_alone(forced):
    logits, targets, *_ = problem(5, 37, torch.bfloat16)
    wide = torch.full((5, 50), 7.0, dtype=torch.bfloat16)
    wide[:, :37] = logits
    losses = loss_and_slope(wide[:, :37], targets)
    assert torch.equal(losses, loss_and_slope(logits, targets))
    assert torch.equal(wide[:, :37], logits)
    assert (wide[:, 37:] == 7).all()


def test_values_that_are_not_numbers(forced):
    logits = torch.zeros(5, 40)
    logits[0, 3] = torch.nan
    logits[1] = torch.tensor([1e30, -1e30] * 20)
    logits[2, :39] = -torch.inf
    logits[3] = torch.nan
    logits[4, 0] = torch.inf
    losses = loss_and_slope(logits, torch.tensor([0, 1, 39, -100, 1]))
    assert losses[0].isnan()
    assert losses[1] == 2e30
    assert losses[2] == 0
    assert losses[3] == 0, "an ignored row has no loss whatever it holds"
    assert (logits[3] == 0).all()
    assert not losses[4].isfinite()
    assert (logits[2].abs() < 1e-30).all()


def test_the_compiled_kernel_refuses_what_does_not_fit():
    if not HERE:
        pytest.skip("no instruction set of the native backend")
    logits = torch.zeros(2, 5).numpy()
    targets = torch.tensor([0, 5]).numpy()
    rest = (None, -100, None, True, 1, HERE[0])
    with pytest.raises(ValueError, match=r"targets\[1\] is 5, outside \[0, 5\)"):
        _native.loss_and_slope(logits, targets, None, *rest)
    with pytest.raises(ValueError, match="one value a column"):
        _native.loss_and_slope(logits, targets % 5, logits[0, :4].copy(), *rest)
    with pytest.raises(ValueError, match="one value a row of logits"):
        _native.loss_and_slope(logits, targets[:1] * 0, None, *rest)
    logits.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        _native.loss_and_slope(logits, targets % 5, None, *rest)
