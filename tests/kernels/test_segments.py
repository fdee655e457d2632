"""K3 against exact sums."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from codeact_kernels.segments import segment_sums

from tests.kernels.agreement import DEVICE, poisoned


def expected(values, bounds, targets=None, ignore_index=-100):
    """Exact sums and counts, one Python loop a segment."""
    sums, counts = [], []
    kept = torch.ones_like(values, dtype=torch.bool) if targets is None else targets != ignore_index
    for start, end in itertools.pairwise(bounds.tolist()):
        inside = values[start:end][kept[start:end]].double().tolist()
        sums.append(math.fsum(inside))
        counts.append(len(inside))
    return torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.int32)


def check(segments, values, bounds, targets=None, **more):
    sums, counts = segments(values, bounds, targets, **more)
    assert (sums.dtype, counts.dtype) == (torch.float64, torch.int32)
    exact, number = expected(values, bounds, targets, **more)
    torch.testing.assert_close(sums.cpu(), exact, rtol=1e-14, atol=0)
    assert torch.equal(counts.cpu(), number)


def losses(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(tokens, generator=generator) * 20).to(DEVICE)


def bounds_of(*lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=DEVICE)


def check_long_sums(segments):
    """Thousands of tokens, and numbers of very different size: float32 sums would be off by 1e-5."""
    values = losses(9000)
    values[::7] *= 1e6
    check(segments, values, bounds_of(5000, 1, 1023, 1024, 1025, 927))


def check_ignored_and_empty(segments):
    values = losses(40)
    targets = torch.arange(40, device=DEVICE)
    targets[[3, 4, 11, 39]] = -100
    values[4] = torch.nan
    values[39] = torch.inf
    check(segments, values, bounds_of(0, 3, 2, 0, 0, 30, 5, 0), targets)


@pytest.mark.parametrize("function", [check_long_sums, check_ignored_and_empty])
def test_equals_exact_sums(function):
    function(segment_sums)


def test_segments_need_not_cover_everything():
    values = losses(30)
    check(segment_sums, values, torch.tensor([4, 10, 20], dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("values", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, values):
    check(segment_sums, losses(30).to(values), bounds_of(10, 20, dtype=dtype))


def test_ignore_index():
    targets = torch.arange(30, device=DEVICE) % 4
    check(segment_sums, losses(30), bounds_of(10, 0, 20), targets, ignore_index=2)


def test_nothing():
    sums, counts = segment_sums(losses(0), bounds_of())
    assert (sums.shape, counts.shape) == ((0,), (0,))
    check(segment_sums, losses(0), bounds_of(0, 0))


def test_nan_stays_in_its_segment():
    values = losses(30)
    values[15] = torch.nan
    sums, _ = segment_sums(values, bounds_of(10, 10, 10))
    assert sums.isnan().tolist() == [False, True, False]


def test_same_bits_wherever_a_segment_stands():
    values = losses(3000)
    alone, _ = segment_sums(values, bounds_of(3000))
    moved, _ = segment_sums(torch.cat([losses(77, seed=1), values, losses(5, seed=2)]), bounds_of(77, 3000, 5))
    assert torch.equal(moved[1], alone[0])


def test_inside_poisoned_buffers_and_strided():
    values, bounds, targets = losses(50), bounds_of(20, 0, 30), torch.arange(50, device=DEVICE)
    plain, _ = segment_sums(values, bounds, targets)
    assert torch.equal(segment_sums(poisoned(values), poisoned(bounds), poisoned(targets))[0], plain)
    strided = (t.repeat_interleave(2)[::2] for t in (values, bounds, targets))
    assert torch.equal(segment_sums(*strided)[0], plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(3, 4)}, "values must be"),
        ({"values": torch.zeros(3, dtype=torch.int64)}, "values must be"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens must be"),
        ({"cu_seqlens": torch.zeros(2)}, "cu_seqlens must be"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, "targets must be"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets must be"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")}, "one device"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"values": torch.zeros(3), "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        segment_sums(**{**arguments, **change})
