"""The compiled attention and its gradients against float64, sample by sample."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codeact import _native
from codeact.ops import attention as varlen
from codeact.ops.attention import varlen_attention
from tests.helpers.pairwise import pairwise

HERE = _native.instruction_sets()


ISAS = ["avx512bf16", "avx512", "avx2"]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    if request.param not in HERE:
        pytest.skip(f"this CPU has {', '.join(HERE) or 'no instruction set of the compiled kernels'}")
    monkeypatch.setenv("CODEACT_NATIVE_ISA", request.param)
    return request.param


class Layer(torch.nn.Module):
    is_causal = True


def operands(lengths, heads=4, groups=2, width=16, dtype=torch.float32, value_width=None, seed=0):
    """As a model has them: (1, H, T, D), a transposed view of (1, T, H, D)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, width), (groups, width), (groups, value_width or width))
    tensors = [torch.randn(1, sum(lengths), h, d, generator=generator).to(dtype).transpose(1, 2) for h, d in sizes]
    return *tensors, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def attend(query, key, value, bounds, **more):
    return varlen_attention(Layer(), query, key, value, None, cu_seq_lens_q=bounds, **more)[0][0]


def reference(query, key, value, bounds, scale=None):
    """Softmax attention of every sample by its definition, in float64: (T, H, E)."""
    repeat = query.shape[1] // key.shape[1]
    q, k, v = (t[0].double() for t in (query, key, value))
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    parts = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        scores = (
            q[:, start:end] @ k[:, start:end].transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        )
        future = torch.ones(end - start, end - start).triu(1).bool()
        parts.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, start:end])
    return torch.cat(parts, 1).transpose(0, 1)


# Lengths: one token; under, at and over a tile of 6 or 8 queries and a panel of 16 or 48 keys; over one piece of 256.
LENGTHS = [[1], [5, 6, 7, 8, 9], [15, 16, 17, 47, 48, 49], [300, 1, 257], [1] * 40]


# A path of its own through the code for every instruction set and dtype.
KERNELS = [*itertools.product(ISAS, (torch.float32, torch.bfloat16))]
# Heads: each its own keys; grouped; one for all. Widths: of real models; odd, which pairs of bfloat16 do not divide.
SHAPES = [(2, 2, 64), (6, 2, 128), (4, 1, 17), (3, 3, 1)]


@pytest.mark.parametrize(
    ("isa", "dtype", "lengths", "shape"),
    [(*kernel, lengths, shape) for kernel, lengths, shape in pairwise(KERNELS, LENGTHS, SHAPES)],
    indirect=["isa"],
    ids=str,
)
def test_equals_the_definition(isa, dtype, lengths, shape):
    heads, groups, width = shape
    given = operands(lengths, heads, groups, width, dtype)
    with torch.inference_mode():
        ours = attend(*given)
    assert ours.dtype == dtype
    tolerance = (
        1e-5 if dtype == torch.float32 else 2**-8
    )  # float32 rounds sums; of bfloat16 the result itself is rounded
    torch.testing.assert_close(ours.double(), reference(*given), atol=tolerance, rtol=tolerance)


def gradients(tensors, slope, attention=attend, **more):
    """Of query, key and value, for this gradient of the output (T, H, E)."""
    *given, bounds = tensors
    leaves = [t.detach().requires_grad_() for t in given]
    return torch.autograd.grad(attention(*leaves, bounds, **more), leaves, slope)


def true_gradients(tensors, slope, **more):
    *given, bounds = tensors
    return gradients((*(t.double() for t in given), bounds), slope.double(), reference, **more)


def slope_of(query, key, value, bounds, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(query.shape[2], query.shape[1], value.shape[3], generator=generator).to(query.dtype)


def error(ours, true):
    """The largest of a tensor, relative to the tensor's largest element."""
    return float((ours.double() - true).abs().max() / true.abs().max().clamp(min=1e-300))


# Lengths: as above; blocks of 48 queries; 800 makes two pieces and 1200 three, whose sums are added.
@pytest.mark.parametrize(
    ("isa", "lengths", "shape"),
    [
        *pairwise(
            ISAS, [*LENGTHS, [47, 48, 49, 96, 97]], [(2, 2, 64, 64), (6, 2, 96, 128), (4, 1, 17, 70), (3, 3, 1, 1)]
        ),
        *((isa, [800, 3, 1200], (2, 1, 20, 30)) for isa in ISAS),
    ],
    indirect=["isa"],
    ids=str,
)
def test_gradients_equal_the_definition(isa, lengths, shape):
    heads, groups, width, value_width = shape
    given = operands(lengths, heads, groups, width, value_width=value_width)
    slope = slope_of(*given)
    # Of one token the softmax is 1, whatever its score: those gradients are nothing but rounding.
    scored = (True, True, True) if max(lengths) > 1 else (False, False, True)
    for ours, true, has_score in zip(gradients(given, slope), true_gradients(given, slope), scored, strict=True):
        assert ours.shape == true.shape
        assert error(ours, true) < 1e-5 if has_score else ours.abs().max() < 1e-5


@pytest.mark.parametrize("lengths", [[5, 9, 48], [300, 1, 257]], ids=str)
@pytest.mark.parametrize(("heads", "groups", "width"), [(6, 2, 64), (4, 1, 17)])
def test_gradients_of_bfloat16_are_as_exact_as_those_of_pytorch(isa, lengths, heads, groups, width, monkeypatch):
    given = operands(lengths, heads, groups, width, torch.bfloat16)
    slope = slope_of(*given)
    ours = gradients(given, slope)
    monkeypatch.setenv("CODEACT_BACKEND", "torch")
    theirs = gradients(given, slope)
    for our, their, true in zip(ours, theirs, true_gradients(given, slope), strict=True):
        assert our.dtype == torch.bfloat16
        assert error(our, true) < max(error(their, true), 2**-8)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_gradients_equal_the_definition_on_anything(data):
    if not HERE:
        pytest.skip("this CPU has no instruction set of the compiled kernels")
    lengths = [*data.draw(st.lists(st.integers(0, 70), max_size=6)), data.draw(st.integers(2, 70))]
    groups, each = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    width, value_width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    scale = data.draw(st.sampled_from([None, 0.01, 1.0]))
    tensors = operands(lengths, groups * each, groups, width, value_width=value_width)
    slope = slope_of(*tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODEACT_NATIVE_ISA", data.draw(st.sampled_from(HERE)))
        ours = gradients(tensors, slope, scaling=scale)
    for our, true in zip(ours, true_gradients(tensors, slope, scale=scale), strict=True):
        # Where few tokens have a second one to look at, differences of large numbers are all there is.
        torch.testing.assert_close(our.double(), true, atol=2e-5 * max(1.0, (scale or 1.0) * width**0.5), rtol=1e-5)


@given(data=st.data())
@settings(max_examples=60)
def test_equals_the_definition_on_anything(data):
    if not HERE:
        pytest.skip("this CPU has no instruction set of the compiled kernels")
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=8))
    groups, each = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    width, value_width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    scale = data.draw(st.sampled_from([None, 0.01, 1.0, 20.0]))
    tensors = operands(lengths, groups * each, groups, width, value_width=value_width)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setenv("CODEACT_NATIVE_ISA", data.draw(st.sampled_from(HERE)))
        ours = attend(*tensors, scaling=scale)
    # Scores of hundreds have fewer bits behind the point.
    sharp = max(1.0, (scale or 1.0) * width**0.5)
    torch.testing.assert_close(ours.double(), reference(*tensors, scale), atol=1e-5 * sharp, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_has_the_same_bits_in_any_pack_on_any_threads(isa, dtype):
    lengths = [70, 300, 9, 1]
    query, key, value, bounds = operands(lengths, dtype=dtype)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                packed = attend(query, key, value, bounds)
                for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                    part = (t[:, :, start:end] for t in (query, key, value))
                    assert torch.equal(attend(*part, torch.tensor([0, end - start]).int()), packed[start:end])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_of_a_sample_have_the_same_bits_in_any_pack_on_any_threads(isa, dtype):
    given = operands([70, 800, 9, 1], dtype=dtype)
    slope, bounds = slope_of(*given), given[3]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            packed = gradients(given, slope)
            for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                part = *(t[:, :, start:end] for t in given[:3]), torch.tensor([0, end - start]).int()
                for alone, together in zip(gradients(part, slope[start:end]), packed, strict=True):
                    assert torch.equal(alone, together[:, :, start:end])
    finally:
        torch.set_num_threads(before)


def test_gradients_of_any_layout(isa):
    """Strided, broadcast and transposed operands and slopes, and an operand that wants none."""
    query, key, value, bounds = operands([20, 30])
    slope = slope_of(query, key, value, bounds)
    expected = gradients((query, key, value, bounds), slope)
    spread = [torch.stack([t, t + 1], -1)[..., 0] for t in (query, key, value)]
    plain = [t.contiguous() for t in (query, key, value)]
    transposed = slope.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for layout in (spread, plain):
        ours = gradients((*layout, bounds), transposed)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    ones = torch.ones(())
    broadcast = gradients((query, key, value, bounds), ones.expand(slope.shape))
    whole = gradients((query, key, value, bounds), torch.ones(slope.shape))
    assert all(torch.equal(a, b) for a, b in zip(broadcast, whole, strict=True))
    value.requires_grad_()
    attend(query, key, value, bounds).backward(slope)
    assert torch.equal(value.grad, expected[2])
    assert query.grad is None


def test_gradients_of_nothing(isa):
    """No token, samples without one, no head that looks at the keys."""
    query, key, value, bounds = operands([])
    assert [g.shape for g in gradients((query, key, value, bounds), slope_of(query, key, value, bounds))] == [
        query.shape,
        key.shape,
        value.shape,
    ]
    given = operands([0, 7, 0, 0, 5, 0])
    slope = slope_of(*given)
    expected = gradients((*given[:3], torch.tensor([0, 7, 12], dtype=torch.int32)), slope)
    for ours, same in zip(gradients(given, slope), expected, strict=True):
        assert torch.equal(ours, same)
    _, of_keys, of_values = gradients((given[0][:, :0], *given[1:]), slope[:, :0])
    assert not of_keys.any()
    assert not of_values.any()


def test_a_bad_sample_spoils_only_its_own_gradients(isa):
    given = operands([20, 30, 10, 500])
    slope = slope_of(*given)
    clean = gradients(given, slope)
    for bad in range(4):
        for what in (torch.nan, torch.inf):
            spoilt = [t.clone() for t in given[:3]], slope.clone()
            if bad < 3:
                spoilt[0][bad][:, :, 20:50] = what  # the second sample
            else:
                spoilt[1][20:50] = what
            for ours, right in zip(gradients((*spoilt[0], given[3]), spoilt[1]), clean, strict=True):
                assert torch.equal(ours[:, :, :20], right[:, :, :20])
                assert torch.equal(ours[:, :, 50:], right[:, :, 50:])
    # Scores so large that all weight is on one key: no NaN.
    query, key, value, bounds = operands([40, 60])
    for ours in gradients((query * 1e4, key * 1e4, value, bounds), slope_of(query, key, value, bounds)):
        assert ours.isfinite().all()


def test_nothing_leaks_from_other_samples_or_from_later_tokens(isa):
    query, key, value, bounds = operands([20, 30, 10])
    with torch.inference_mode():
        clean = attend(query, key, value, bounds)
        for tensor in (query, key, value):
            tensor[:, :, 20:50] = torch.nan  # the second sample
        assert torch.equal(attend(query, key, value, bounds)[:20], clean[:20])
        assert torch.equal(attend(query, key, value, bounds)[50:], clean[50:])
        query, key, value, bounds = operands([64])
        clean = attend(query, key, value, bounds)
        for tensor in (key, value):
            tensor[:, :, 30:] += 100
        assert torch.equal(attend(query, key, value, bounds)[:30], clean[:30])


def test_calls_from_several_threads(isa):
    problems = [operands([50 + i, 20], seed=i) for i in range(6)]
    with torch.inference_mode():
        alone = [attend(*p) for p in problems]

        def call(problem):
            with torch.inference_mode():
                return attend(*problem)

        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(call, problems * 4))
    assert all(torch.equal(a, b) for a, b in zip(alone * 4, together, strict=True))
    slopes = [slope_of(*p) for p in problems]
    alone = [gradients(p, slope) for p, slope in zip(problems, slopes, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradients, problems * 4, slopes * 4))
    for one, other in zip(alone * 4, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.skipif(not HERE, reason="this CPU has no instruction set of the compiled kernels")
def test_who_uses_it(monkeypatch):
    """Everything that it computes goes to it, and nothing else."""
    calls = []
    real = varlen._native_varlen
    monkeypatch.setattr(varlen, "_native_varlen", lambda *a: calls.append(1) or real(*a))
    given = operands([5, 9])

    def count(tensors=given, **more):
        before = len(calls)
        attend(*tensors, **more)
        return len(calls) - before

    assert count() == 1
    assert count(sliding_window=14) == 1
    assert count(sliding_window=4) == 0
    assert count(softcap=20.0) == 0
    assert count(dropout=0.5) == 0
    assert count(operands([5, 9], dtype=torch.float64)) == 0
    query, key, value, bounds = operands([5, 9])
    assert count((query.requires_grad_(), key, value, bounds)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        # What a float32 model has there: the projections are bfloat16, the rotary embeddings are not.
        mixed = query, key, value.bfloat16(), bounds
        assert count(mixed) == 1
        ours, slope = attend(*mixed), slope_of(*mixed)
        assert ours.dtype == torch.bfloat16
        of_mixed = gradients(mixed, slope.bfloat16())
    assert [g.dtype for g in of_mixed] == [torch.float32, torch.float32, torch.bfloat16]
    assert all(error(our, true) < 2**-6 for our, true in zip(of_mixed, true_gradients(mixed, slope), strict=True))
    monkeypatch.setenv("CODEACT_BACKEND", "torch")
    assert count() == 0


def test_it_agrees_with_the_loop_that_it_replaces(isa, monkeypatch):
    given = operands([5, 90, 3])
    ours = attend(*given)
    monkeypatch.setenv("CODEACT_BACKEND", "torch")
    torch.testing.assert_close(ours, attend(*given), atol=1e-5, rtol=1e-5)


NATIVE = {
    "query": np.zeros((4, 6, 8), np.float32),
    "key": np.zeros((2, 6, 8), np.float32),
    "value": np.zeros((2, 6, 8), np.float32),
    "cu_seqlens": np.array([0, 2, 6], np.int32),
    "scale": 1.0,
    "threads": 1,
    "instruction_set": HERE[0] if HERE else "none",
}


@pytest.mark.skipif(not HERE, reason="this CPU has no instruction set of the compiled kernels")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.zeros((4, 6, 8))}, "must all be float32"),
        ({"value": np.zeros((2, 6, 8), np.uint16)}, "must all be float32"),
        ({"query": np.zeros((6, 8), np.float32)}, "three dimensions"),
        ({"query": np.zeros((4, 6, 16), np.float32)[..., ::2]}, "side by side"),
        ({"query": np.zeros((3, 6, 8), np.float32)}, "do not fit"),
        ({"key": np.zeros((2, 5, 8), np.float32)}, "do not fit"),
        ({"value": np.zeros((1, 6, 8), np.float32)}, "do not fit"),
        ({"cu_seqlens": np.array([0, 2, 7], np.int32)}, "rise from 0 to 6"),
        ({"cu_seqlens": np.array([1, 6], np.int32)}, "rise from 0 to 6"),
        ({"cu_seqlens": np.array([0, 4, 2, 6], np.int32)}, "rise from 0 to 6"),
        ({"cu_seqlens": np.array([], np.int32)}, "rise from 0 to 6"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"instruction_set": "sse2"}, "not on this machine"),
    ],
)
def test_the_compiled_core_checks_for_itself(change, message):
    """It reads raw memory, so it does not rely on its caller."""
    with pytest.raises((TypeError, ValueError), match=message):
        _native.varlen_attention(**{**NATIVE, **change})
    slope = np.zeros((4, 6, 8), np.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        _native.varlen_attention_backward(slope, **{**NATIVE, **change})


@pytest.mark.skipif(not HERE, reason="this CPU has no instruction set of the compiled kernels")
@pytest.mark.parametrize(
    ("slope", "message"),
    [
        (np.zeros((4, 6, 8), np.uint16), "must all be float32"),
        (np.zeros((6, 8), np.float32), "three dimensions"),
        (np.zeros((4, 6, 16), np.float32)[..., ::2], "side by side"),
        (np.zeros((2, 6, 8), np.float32), "output_gradient does not fit"),
        (np.zeros((4, 5, 8), np.float32), "output_gradient does not fit"),
        (np.zeros((4, 6, 9), np.float32), "output_gradient does not fit"),
    ],
)
def test_the_compiled_core_checks_the_gradient_of_the_output(slope, message):
    with pytest.raises((TypeError, ValueError), match=message):
        _native.varlen_attention_backward(slope, **NATIVE)


# ------------------------------------------------------------------------------------- samples that go on a beginning


def beginnings(lengths, goes_on, *tensors):
    """Each sample with what it goes on before it, as a pack of its own: ``(operands, its own tokens)``."""
    ends = np.cumsum(lengths)
    places = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    for own, before in zip(places, goes_on, strict=True):
        whole = np.concatenate([places[before], own]) if before >= 0 else own
        yield (*(t[:, :, whole] for t in tensors), torch.tensor([0, len(whole)], dtype=torch.int32)), own


# Under, at and over a panel of 16 or 48 keys, over a piece of 256; one of another in between, one that none goes on.
BEGINNINGS = [
    ([1, 1], [-1, 0]),
    ([5, 9, 7, 3], [-1, 0, 0, 0]),
    *(([keys, 1, 20, 48, 30], [-1, 0, -1, 0, 2]) for keys in (15, 16, 17, 47, 48, 49, 96)),
    ([300, 7, 260, 1], [-1, 0, 0, 0]),
    ([4, 300], [1, -1]),
]


@pytest.mark.parametrize(
    ("isa", "dtype", "case", "shape"),
    [(*kernel, case, shape) for kernel, case, shape in pairwise(KERNELS, BEGINNINGS, SHAPES)],
    indirect=["isa"],
    ids=str,
)
def test_a_beginning_apart_changes_no_bit(isa, dtype, case, shape):
    lengths, goes_on = case
    heads, groups, width = shape
    *tensors, bounds = operands(lengths, heads, groups, width, dtype)
    with torch.inference_mode():
        ours = attend(*tensors, bounds, prefix_samples=torch.tensor(goes_on, dtype=torch.int32))
        for alone, own in beginnings(lengths, goes_on, *tensors):
            assert torch.equal(ours[own], attend(*alone)[-len(own) :])


@pytest.mark.parametrize(
    "more",
    [
        {"sliding_window": 5},
        {"sliding_window": 20},
        {"softcap": 2.0},
        {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0]), "sliding_window": 9},
        {"scaling": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_beginning_apart_with_all_that_a_model_asks_for(more, backend, monkeypatch):
    if backend == "torch":
        monkeypatch.setenv("CODEACT_BACKEND", "torch")
    lengths, goes_on = [17, 1, 9, 6, 30], [-1, 0, 0, -1, 3]
    *tensors, bounds = operands(lengths)
    with torch.inference_mode():
        ours = attend(*tensors, bounds, prefix_samples=torch.tensor(goes_on, dtype=torch.int32), **more)
        for alone, own in beginnings(lengths, goes_on, *tensors):
            torch.testing.assert_close(ours[own], attend(*alone, **more)[-len(own) :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("goes_on", [[-1], [-1, 0, 0, 0], [-1, 3, -1], [-1, -2, -1], [1, 0, -1], [0, -1, -1]], ids=str)
def test_beginnings_that_cannot_be_are_refused(goes_on):
    *tensors, bounds = operands([3, 4, 5])
    with torch.inference_mode(), pytest.raises(ValueError, match="name, for each sample, one that has no prefix"):
        attend(*tensors, bounds, prefix_samples=torch.tensor(goes_on, dtype=torch.int32))


def test_beginnings_have_no_gradients_and_no_chunks():
    *tensors, bounds = operands([3, 4])
    goes_on = torch.tensor([-1, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match="without gradients"):
        attend(tensors[0].requires_grad_(), *tensors[1:], bounds, prefix_samples=goes_on)
