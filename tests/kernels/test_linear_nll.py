"""K1 and K2 against float64 with every logit in memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from codeact_kernels import linear_nll as module
from codeact_kernels import tiles
from codeact_kernels.linear_nll import linear_nll
from codeact_kernels.tiles import DTYPES, architecture_of, tile_for
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import agreement
from tests.kernels.agreement import check_close, problem, random_bias


@pytest.fixture(params=["pointers", "descriptors"])
def variant(request, monkeypatch, device):
    """Both forms of K1, whatever this architecture takes by itself; counts the launches of the one with descriptors."""
    if request.param == "descriptors" and device.type == "cuda" and architecture_of(device) not in ("sm_90", "sm_100"):
        pytest.skip("this device has no TMA")
    launched = []

    def chosen(*arguments):
        return dataclasses.replace(tile_for(*arguments), descriptors=request.param == "descriptors")

    def recorded(*arguments):
        found = real(*arguments)
        launched.append(found[0][0].__name__)
        return found

    real = module.launches
    monkeypatch.setattr(module, "tile_for", chosen)
    monkeypatch.setattr(module, "launches", recorded)
    return request.param, launched


# T, V, D: odd everywhere; one token and fewer numbers than a tile; just over a vocabulary tile on a GPU.
@pytest.mark.parametrize("size", [(37, 101, 40), (1, 5, 3), (50, 257, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", ["plain", "bias", "softcap", "both"])
def test_equals_reference(variant, size, dtype, extra):
    hidden, weight, targets = problem(*size, dtype=dtype)
    more = {}
    if extra in ("bias", "both"):
        more["bias"] = random_bias(size[1], dtype)
    if extra in ("softcap", "both"):
        more["softcap"] = 5.0
    check_close(linear_nll, hidden, weight, targets, **more)
    name, launched = variant
    # Rows of 3 numbers are no multiple of 16 bytes: those go through pointers in any case.
    expected = "partial_nll_descriptors" if name == "descriptors" and size[2] > 3 else "partial_nll"
    assert set(launched) == {expected}


@pytest.mark.parametrize("check", agreement.CHECKS)
def test_agreement(check):
    check(linear_nll)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 24, 33])
def test_inside_poisoned_buffers(dtype, width):
    agreement.check_inside_poisoned_buffers(linear_nll, dtype, width)


def test_descriptors_past_2_31(variant):
    agreement.check_strides_past_2_31(linear_nll, align=8)


def test_descriptors_read_zeros_outside(variant):
    """Rows that a descriptor can read (multiples of 16 bytes) between rows of NaN."""
    hidden, weight, targets = problem(19, 37, 40, torch.bfloat16)
    around = torch.full((60, 64), torch.nan, dtype=torch.bfloat16, device=hidden.device)
    inside = around[8:27, 8:48]
    inside.copy_(hidden)
    assert torch.equal(linear_nll(inside, weight, targets), linear_nll(hidden, weight, targets))


def test_both_variants_give_the_same_bits(monkeypatch, device):
    hidden, weight, targets = problem(20, 70, 48, torch.bfloat16)
    tile = tile_for(torch.bfloat16, architecture_of(device))
    results = []
    for descriptors in (False, True):
        if descriptors and device.type == "cuda" and architecture_of(device) not in ("sm_90", "sm_100"):
            pytest.skip("this device has no TMA")
        monkeypatch.setattr(module, "tile_for", lambda *_, d=descriptors: dataclasses.replace(tile, descriptors=d))
        results.append(linear_nll(hidden, weight, targets))
    assert torch.equal(*results)


def test_targets_at_the_edges_of_tiles(device):
    tile = tile_for(torch.float32, architecture_of(device))
    vocabulary = 2 * tile.block_v + 5
    edges = [0, 1, tile.block_v - 1, tile.block_v, 2 * tile.block_v - 1, 2 * tile.block_v, vocabulary - 1]
    for tokens in (tile.block_t - 1, tile.block_t, tile.block_t + 1):
        hidden, weight, _ = problem(tokens, vocabulary, 8)
        targets = torch.tensor(edges, device=device).repeat(tokens)[:tokens]
        check_close(linear_nll, hidden, weight, targets)


@pytest.mark.parametrize("ignore_index", [-100, 3, 10**12])
def test_an_ignored_row_costs_nothing_whatever_it_holds(ignore_index):
    hidden, weight, targets = problem(20, 40, 8)
    targets[targets == -100] = 7
    clean = linear_nll(hidden, weight, targets, ignore_index=ignore_index)
    ignored = [1, 4, 15, 16]
    hidden[1], hidden[4], hidden[15], hidden[16, 2] = torch.nan, torch.inf, -torch.inf, torch.nan
    targets[ignored] = ignore_index
    ours = linear_nll(hidden, weight, targets, ignore_index=ignore_index)
    assert (ours[ignored] == 0).all()
    others = [row for row in range(20) if row not in ignored]
    assert torch.equal(ours[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_stays_alone(dtype, value):
    hidden, weight, targets = problem(18, 40, 20, dtype)
    targets[:] = 5
    clean = linear_nll(hidden, weight, targets)
    hidden[2, 19] = value
    ours = linear_nll(hidden, weight, targets)
    assert ours[2].isnan()
    others = [row for row in range(18) if row != 2]
    assert torch.equal(ours[others], clean[others])


def test_a_head_that_is_not_finite_is_seen_in_every_row():
    hidden, weight, targets = problem(5, 40, 8)
    weight[35, 1] = torch.nan
    ours = linear_nll(hidden, weight, targets)
    assert ours.isnan().tolist() == [True, True, True, False, True]  # row 3 is ignored


def test_a_target_outside_the_vocabulary_is_nan():
    """Not what happened to lie in memory; the host does not wait for the device to look."""
    hidden, weight, targets = problem(6, 40, 8)
    targets[:] = torch.tensor([40, -1, 0, 39, 2**33, -(2**33)])
    assert linear_nll(hidden, weight, targets).isnan().tolist() == [True, True, False, False, True, True]


def test_extreme_logits_stay_finite(device):
    hidden = torch.tensor([[1e4, 0.0], [0.0, 0.0]], device=device)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], device=device)
    ours = linear_nll(hidden, weight, torch.tensor([1, 2], device=device))
    torch.testing.assert_close(ours, torch.tensor([2e4, 1.0986123], device=device))


@pytest.mark.parametrize("cap", [1e-3, 0.5, 30.0, 1e6])
def test_softcaps_small_and_large(cap):
    check_close(linear_nll, *problem(5, 40, 8), softcap=cap)


@triton.jit
def _tanh_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, module._tanh(tl.load(x + at)))


def test_tanh(device):
    magnitudes = torch.cat([torch.logspace(-30, 3, 1000), torch.linspace(0.5, 0.75, 1021)])
    x = torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 3e38, 0.625])])
    x = torch.nn.functional.pad(x, (0, 4096 - len(x)), value=0.1).to(device)
    y = torch.empty_like(x)
    _tanh_kernel[(1,)](x, y, N=4096)
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=3e-7, atol=0, equal_nan=True)


def test_operands_of_any_strides():
    hidden, weight, targets = problem(20, 45, 18)
    bias = random_bias(45)
    expected = linear_nll(hidden, weight, targets, bias)
    strided = (
        hidden.T.contiguous().T,
        weight.repeat_interleave(3, 0)[::3].repeat_interleave(2, 1)[:, ::2],
        targets.repeat_interleave(2)[::2],
        bias.repeat_interleave(2)[::2],
    )
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(linear_nll(*strided), expected)
    same_row = hidden[:1].expand(20, -1)
    assert torch.equal(linear_nll(same_row, weight, targets), linear_nll(same_row.contiguous(), weight, targets))


def test_bias_of_another_dtype():
    hidden, weight, targets = problem(5, 40, 8, torch.bfloat16)
    check_close(linear_nll, hidden, weight, targets, bias=random_bias(40))


def test_launches_of_few_tokens_give_the_same_bits(monkeypatch):
    hidden, weight, targets = problem(70, 70, 8)
    together = linear_nll(hidden, weight, targets)
    monkeypatch.setattr(module, "MAX_TOKENS", 32)
    assert torch.equal(linear_nll(hidden, weight, targets), together)


def test_scratch_memory_is_bounded_and_never_read_before_it_is_written(monkeypatch):
    """In deterministic mode PyTorch fills new memory with NaN."""
    hidden, weight, targets = problem(100, 70, 8)
    expected = linear_nll(hidden, weight, targets)
    monkeypatch.setattr(module, "MAX_TOKENS", 32)
    sizes = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.new_empty.default and args[1] != [0]:  # the interpreter makes empty ones
                sizes.append(args[1])
            return func(*args, **(kwargs or {}))

    torch.use_deterministic_algorithms(True)
    try:
        with Recorded():
            ours = module.compute_nll(hidden, weight, targets, None, None, -100)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(ours, expected)
    tile = tile_for(torch.float32, architecture_of(hidden.device))
    assert sizes == [[100], [32 * triton.cdiv(70, tile.block_v)], [32]]


@pytest.mark.parametrize("size", [(0, 5, 3), (0, 0, 3), (3, 5, 0)])
def test_empty_operands(size):
    hidden, weight, _ = problem(size[0], max(size[1], 1), size[2])
    weight = weight[: size[1]]
    targets = torch.zeros(size[0], dtype=torch.int64, device=hidden.device)
    check_close(linear_nll, hidden, weight, targets) if size[0] else None
    assert linear_nll(hidden, weight, targets).shape == (size[0],)


def test_no_vocabulary():
    hidden, weight, _ = problem(2, 1, 3)
    ours = linear_nll(hidden, weight[:0], torch.tensor([-100, 0], device=hidden.device))
    assert ours[0] == 0
    assert ours[1].isnan()


def test_the_host_never_waits():
    """No value of a tensor reaches Python, and nothing is copied between devices."""
    forbidden = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten._to_copy.default}

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in forbidden, func
            return func(*args, **(kwargs or {}))

    operands = problem(5, 40, 8)
    bias = random_bias(40)
    with Watched():
        module.compute_nll(*operands, bias, 5.0, -100)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            operands[0][0, 0].item()


def test_carries_no_gradient():
    hidden, weight, targets = problem(5, 40, 8)
    assert not linear_nll(hidden.requires_grad_(), weight.requires_grad_(), targets).requires_grad


def test_fake_tensors_know_the_result():
    """What torch.compile and the tests of the CUDA route see."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden = torch.empty(5, 8, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(40, 8, dtype=torch.bfloat16, device="cuda")
        targets = torch.empty(5, dtype=torch.int64, device="cuda")
        ours = linear_nll(hidden, weight, targets)
    assert (ours.shape, ours.dtype, ours.device.type) == ((5,), torch.float32, "cuda")


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        linear_nll(*problem(3, 4, 5, torch.float64))
    monkeypatch.setattr(tiles, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="need a CUDA or ROCm device, not cpu"):
        linear_nll(*(t.cpu() for t in problem(3, 4, 5)))


@pytest.mark.parametrize(
    ("hip", "capability", "expected"),
    [
        ("7.0", None, "gfx942"),
        (None, (8, 0), "sm_80"),
        (None, (8, 9), "sm_80"),
        (None, (9, 0), "sm_90"),
        (None, (10, 0), "sm_100"),
        (None, (12, 0), "sm_80"),
        (None, (7, 5), None),
    ],
)
def test_architecture_of_a_device(monkeypatch, hip, capability, expected):
    monkeypatch.setattr(tiles, "interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if expected is None:
        with pytest.raises(ValueError, match=r"8\.0 or newer"):
            architecture_of(torch.device("cuda"))
    else:
        assert architecture_of(torch.device("cuda")) == expected


@triton.jit
def _dot_kernel(a, b, c):
    rows, columns = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    product = tl.dot(tl.load(a + rows * 16 + columns), tl.load(b + rows * 16 + columns))
    tl.store(c + rows * 16 + columns, product)


def test_canary_bfloat16_products_in_the_interpreter(device):
    """Fails where the fixture ``interpreted_bf16`` stops working: every bfloat16 test here stands on it."""
    a, b = (torch.randint(-9, 10, (16, 16), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    c = torch.empty(16, 16, device=device)
    _dot_kernel[(1,)](a.bfloat16().to(device), b.bfloat16().to(device), c)
    assert torch.equal(c.cpu(), (a @ b).float())
