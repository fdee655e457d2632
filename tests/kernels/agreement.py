"""What the Triton kernels must satisfy, as functions of the implementation: the tests feed them the real one, and
``test_mutants.py`` broken copies, each of which must fail."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from codeact.ops.nll_reference import token_nll_reference
from tests.ops.test_loss_and_slope import exact as exact_slopes
from tests.ops.test_loss_and_slope import problem as slope_problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Nll = Callable[..., Tensor]


def problem(tokens: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Hidden states, a head and targets, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[3::4] = -100
    return hidden.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE)


def random_bias(vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(9)).to(dtype).to(DEVICE)


def check_close(nll: Nll, hidden: Tensor, weight: Tensor, targets: Tensor, **more) -> None:
    """Within float32 rounding of the equation in float64, whatever the operands' dtype: their products are exact."""
    ours = nll(hidden, weight, targets, **more)
    assert ours.dtype == torch.float32
    expected = token_nll_reference(hidden, weight, targets, **more)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(ours.double(), expected, atol=2e-6 * scale, rtol=0)


def check_ragged_vocabulary_under_a_small_cap(nll: Nll) -> None:
    """With cap 5 a masked column that was capped afterwards would count as exp(-5), not as 0."""
    for vocabulary in (1, 31, 33, 100):
        check_close(nll, *problem(5, vocabulary, 8), softcap=5.0)


def check_bias_comes_before_softcap(nll: Nll) -> None:
    check_close(nll, *problem(5, 40, 8), bias=random_bias(40), softcap=5.0)


def check_many_vocabulary_tiles(nll: Nll) -> None:
    """More tiles than K2 merges at once, and a largest logit that comes late, so that earlier sums must be rescaled."""
    hidden, weight, targets = problem(6, 2100, 4)
    check_close(nll, hidden, weight * torch.linspace(0.1, 6, 2100, device=DEVICE)[:, None], targets)


def check_tokens_forbidden_by_the_bias(nll: Nll) -> None:
    """-inf over more than a whole tile, as heads padded to a round size have it; the loss of such a target is inf."""
    hidden, weight, targets = problem(6, 300, 8)
    bias = random_bias(300)
    bias[10:290] = -torch.inf
    targets = torch.tensor([0, 5, 9, 290, 299, 100], device=DEVICE)
    ours = nll(hidden, weight, targets, bias=bias)
    assert ours[5] == torch.inf
    assert ours[:5].isfinite().all()
    check_close(nll, hidden[:5], weight, targets[:5], bias=bias)


def poisoned(tensor: Tensor) -> Tensor:
    """The same values as a view into a larger tensor that holds NaN (or, of integers, nonsense) everywhere else."""
    filling = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2
    around = torch.full([size + 70 for size in tensor.shape], filling, dtype=tensor.dtype, device=tensor.device)
    view = around[tuple(slice(33, 33 + size) for size in tensor.shape)]
    view.copy_(tensor)
    return view


def check_inside_poisoned_buffers(nll: Nll, dtype: torch.dtype = torch.float32, width: int = 21) -> None:
    """Nothing outside the operands counts. Loads out of bounds are silent; their NaN is not."""
    hidden, weight, targets = problem(19, 37, width, dtype)
    bias = random_bias(37, dtype)
    operands = [poisoned(t) for t in (hidden, weight, targets, bias)]
    assert torch.equal(nll(*operands), nll(hidden, weight, targets, bias))


def check_same_bits_in_any_batch(nll: Nll) -> None:
    """Alone, in pieces, in another order, beside other rows: a row keeps its bits. 1056 = 33 tiles: two steps of K2.

    The operands are eighths, whose products and sums are exact: the interpreter's products come from the CPU's BLAS,
    whose order of sums depends on the place of a row in the tile, as a GPU's does not.
    """
    hidden, weight, _ = problem(35, 1056, 12)
    hidden, weight = (hidden * 8).round() / 8, (weight * 8).round() / 8
    # Log-sum-exps near 0 and the likeliest targets: small losses, in which the last bit of a sum shows.
    bias = torch.full((1056,), -12.5, device=DEVICE)
    targets = (hidden @ weight.T).argmax(dim=1)
    together = nll(hidden, weight, targets, bias=bias)
    for first, last in ((0, 1), (16, 35), (7, 26)):
        assert torch.equal(nll(hidden[first:last], weight, targets[first:last], bias=bias), together[first:last])
    order = torch.randperm(35, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert torch.equal(nll(hidden[order], weight, targets[order], bias=bias), together[order])


def sparse(numbers: int, dtype: torch.dtype) -> Tensor:
    """So many zeros, of which only touched pages take memory."""
    if DEVICE.type == "cuda":
        return torch.zeros(numbers, dtype=dtype, device=DEVICE)
    MAP_NORESERVE = 0x4000  # Linux; Python's mmap does not name it
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, numbers * dtype.itemsize, flags=flags), dtype=dtype)


def check_strides_past_2_31(nll: Nll, align: int = 1) -> None:
    """Rows and columns so far apart that their offsets need 33 bits.

    The operands start in the middle of the allocation: offsets that wrapped around 2^31 would read its zeros, and not
    crash the tests.
    """
    half = (1 << 31) + (1 << 12)
    middle = sparse(2 * half, torch.bfloat16)[half:]

    def far_apart(tensor: Tensor, dim: int) -> Tensor:
        stride = -(-(1 << 31) // (tensor.shape[dim] - 1) // align) * align
        strides = [1, 1]
        strides[dim] = stride
        view = middle.as_strided(tensor.shape, strides, middle.storage_offset())
        view.zero_().copy_(tensor)
        return view

    # 17: the one number in the second tile along D lies 2^31 from the first.
    hidden, weight, targets = problem(9, 33, 17 if align == 1 else 24, torch.bfloat16)
    expected = nll(hidden, weight, targets)
    assert torch.equal(nll(far_apart(hidden, 0), weight, targets), expected)
    assert torch.equal(nll(hidden, far_apart(weight, 0), targets), expected)
    if align == 1:
        assert torch.equal(nll(far_apart(hidden, 1), weight, targets), expected)
        assert torch.equal(nll(hidden, far_apart(weight, 1), targets), expected)


def check_slopes(loss_and_slope: Callable[..., Tensor]) -> None:
    """K4 on rows of one block, of several and of a part of one, with and without all that changes a logit."""
    for columns, softcap, with_bias, scaled in (
        (37, None, False, True),
        (2048, 5.0, True, False),
        (4101, 5.0, True, True),
    ):
        logits, targets, bias, scale = (t.to(DEVICE) for t in slope_problem(5, columns, torch.float32))
        more = (bias if with_bias else None, softcap)
        losses, slopes = exact_slopes(logits, targets, *more, scale if scaled else None)
        wide = torch.full((5, columns + 2057), 7.0, device=DEVICE)  # rows that lie more than a block apart
        wide[:, :columns] = logits
        arguments = (*more, -100, scale if scaled else None, True)
        ours = loss_and_slope(wide[:, :columns], targets, *arguments)
        torch.testing.assert_close(ours.double(), losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(wide[:, :columns].double(), slopes, rtol=1e-5, atol=2e-6)
        assert (wide[:, columns:] == 7).all()


def check_slopes_past_2_31(loss_and_slope: Callable[..., Tensor]) -> None:
    """Rows 2^30 numbers apart, in the middle of memory, as in ``check_strides_past_2_31``."""
    half = (1 << 31) + (1 << 12)
    logits, targets, *_ = (t.to(DEVICE) for t in slope_problem(3, 40, torch.bfloat16))
    apart = sparse(2 * half, torch.bfloat16)[half:].as_strided((3, 40), ((1 << 30) + 16, 1), half)
    apart.copy_(logits)
    targets[:] = 7
    expected = loss_and_slope(logits, targets, None, None, -100, None, True)
    assert torch.equal(loss_and_slope(apart, targets, None, None, -100, None, True), expected)
    assert torch.equal(apart, logits)


CHECKS = (
    check_ragged_vocabulary_under_a_small_cap,
    check_bias_comes_before_softcap,
    check_many_vocabulary_tiles,
    check_tokens_forbidden_by_the_bias,
    check_inside_poisoned_buffers,
    check_same_bits_in_any_batch,
    check_strides_past_2_31,
)
