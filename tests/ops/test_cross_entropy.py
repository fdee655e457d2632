"""linear_cross_entropy against autograd through every logit."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from codeact.base.errors import InputError
from codeact.ops import cross_entropy as module
from codeact.ops.cross_entropy import linear_cross_entropy
from tests.helpers.pairwise import pairwise

# Blocks this small only wait for a second thread, and for long where the machine is busy.
pytestmark = pytest.mark.usefixtures("one_thread")


def problem(tokens, width, vocabulary, dtype=torch.float32, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    offset = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden, weight, targets, offset


def reference(hidden, weight, targets, bias, softcap, reduction):
    logits = F.linear(hidden, weight, bias)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction=reduction)


def loss_and_gradients(function, operands, upstream, **more):
    hidden, weight, targets, bias = operands
    for operand in (hidden, weight, bias):
        if operand is not None:
            operand.grad = None
    loss = function(hidden, weight, targets, bias, **more)
    (loss * upstream).sum().backward()
    return [loss.detach(), *(None if t is None else t.grad for t in (hidden, weight, bias))]


def assert_near(ours, theirs, tolerance):
    """Within ``tolerance`` of the largest value: single gradients cancel to nothing."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            scale = float(other.abs().max()) if other.numel() else 0.0
            torch.testing.assert_close(one.double(), other.double(), atol=tolerance * scale + 1e-30, rtol=0)


# One of each; primes that no block divides; one row a block; one block for all; more rows than words.
SIZES = [(1, 1, 2), (37, 40, 101), (5, 8, 3000), (20, 16, 32), (301, 8, 13)]
# bfloat16 has 8 bits: the logits, their slopes and the gradients are rounded to it.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}
EXTRAS = ["plain", "bias", "softcap", "both"]


@pytest.mark.parametrize(
    ("size", "dtype", "extra", "reduction"), pairwise(SIZES, [*TOLERANCES], EXTRAS, ["mean", "sum", "none"])
)
def test_equals_autograd_through_all_logits(monkeypatch, size, dtype, extra, reduction):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 8000)
    monkeypatch.setattr(module, "_PART", 64)
    operands = problem(*size, dtype=dtype, bias=extra in ("bias", "both"))
    operands[2][1::4] = -100
    upstream = torch.linspace(0.5, 2.0, size[0]) if reduction == "none" else torch.tensor(0.7)
    more = {"softcap": 3.0 if extra in ("softcap", "both") else None, "reduction": reduction}
    ours = loss_and_gradients(linear_cross_entropy, operands, upstream, **more)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in operands[:2]]
    bias = None if operands[3] is None else operands[3].detach().double().requires_grad_()
    theirs = loss_and_gradients(reference, (*exact, operands[2], bias), upstream, **more)
    assert_near(ours, theirs, TOLERANCES[dtype])
    assert (ours[1][1::4] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(monkeypatch, reduction, softcap):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 21 * 8)  # three rows a block
    hidden, weight, targets, bias = problem(5, 3, 7, dtype=torch.float64, bias=True)
    targets[2] = -100
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, targets, b, softcap, reduction=reduction), (hidden, weight, bias)
    )


@pytest.mark.parametrize("frozen", [0, 1, 3])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_frozen_operand_gets_no_gradient(frozen, reduction):
    operands = problem(9, 4, 11, bias=True)
    expected = loss_and_gradients(linear_cross_entropy, operands, torch.tensor(1.0), reduction=reduction)
    operands[frozen].requires_grad_(False)
    ours = loss_and_gradients(linear_cross_entropy, operands, torch.tensor(1.0), reduction=reduction)
    expected[min(frozen, 2) + 1] = None
    assert_near(ours, expected, 1e-6)


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch):
    operands = problem(9, 4, 11)
    monkeypatch.setattr(module, "_add_product", None)
    real = module.loss_and_slope

    def without_slope(*arguments):
        assert not arguments[-1]
        return real(*arguments)

    monkeypatch.setattr(module, "loss_and_slope", without_slope)
    with torch.no_grad():
        loss = linear_cross_entropy(*operands[:3])
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(*operands, None, "mean"))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_autocast_is_that_of_a_linear_layer(reduction):
    operands = problem(50, 32, 97, bias=True)
    more = {"softcap": None, "reduction": reduction}
    exact = loss_and_gradients(reference, operands, torch.tensor(1.0), **more)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = loss_and_gradients(reference, operands, torch.tensor(1.0), **more)
        ours = loss_and_gradients(linear_cross_entropy, operands, torch.tensor(1.0), **more)
    assert [t.dtype for t in ours] == [torch.float32] * 4
    assert_near(ours, exact, 2e-2)
    # About as far from the truth as autocast itself, and not nearer: it did run in bfloat16.
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert 0 < (one - truth).norm() <= 2 * (other.float() - truth).norm() + 1e-3 * truth.norm()


def test_autocast_takes_two_dtypes_and_plain_mode_does_not():
    hidden, weight, targets, _ = problem(6, 4, 7)
    half = hidden.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            linear_cross_entropy(half, weight, targets), linear_cross_entropy(hidden, weight, targets)
        )
    with pytest.raises(ValueError, match="one floating-point dtype"):
        linear_cross_entropy(half, weight, targets)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hits_are_the_rows_whose_target_is_the_likeliest(monkeypatch, reduction, dtype):
    """In blocks, with ignored rows and a bias; the backward pass counts none again."""
    monkeypatch.setattr(module, "_BLOCK_BYTES", 5 * 41 * 8)
    drawn = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=drawn, dtype=dtype, requires_grad=True) for n in (23, 41))
    bias = 3 * torch.randn(41, generator=drawn, dtype=dtype)
    targets = (hidden @ weight.T + bias).argmax(1)
    targets[::3], targets[::4] = 0, -100
    expected = int(((hidden @ weight.T + bias).argmax(1) == targets).sum())
    assert 5 < expected < 15
    hits = torch.tensor(100)
    linear_cross_entropy(hidden, weight, targets, bias, 2.0, reduction=reduction, hits=hits).sum().backward()
    assert int(hits) == 100 + expected


@pytest.mark.parametrize("ignored", ["no rows", "every row"])
def test_nothing_to_predict(ignored):
    hidden, weight, targets, bias = problem(0 if ignored == "no rows" else 3, 4, 7, bias=True)
    targets[:] = -100
    total = linear_cross_entropy(hidden, weight, targets, bias, reduction="sum")
    assert total == 0
    total.backward()  # a rank whose pack is a dummy still takes part in the gradients' exchange
    assert [float(t.grad.abs().sum()) for t in (hidden, weight, bias)] == [0, 0, 0]
    assert linear_cross_entropy(hidden, weight, targets, reduction="none").tolist() == [0] * len(targets)
    assert linear_cross_entropy(hidden, weight, targets).isnan() == F.cross_entropy(hidden[:, :4], targets).isnan()


def test_an_ignored_row_costs_nothing_whatever_it_holds():
    hidden, weight, targets, _ = problem(3, 4, 7)
    with torch.no_grad():
        hidden[1] = torch.inf
    targets[1] = -100
    linear_cross_entropy(hidden, weight, targets).backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4, 0.0], [0.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 2]), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([2e4, 1.0986123]))
    loss.sum().backward()
    torch.testing.assert_close(hidden.grad[0], torch.tensor([2.0, 0.0]))


class _LargestResult(TorchDispatchMode):
    """The most elements of any tensor that an operation returned, gradients of operands aside."""

    def __init__(self, but):
        super().__init__()
        self.but, self.largest = but, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) not in self.but:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_holds_no_more_than_a_block_of_logits(monkeypatch, reduction):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4096 * 4)
    hidden, weight, targets, _ = problem(600, 2, 1000)
    watch = _LargestResult(but={(1000, 2), (2, 1000)})
    with watch:
        linear_cross_entropy(hidden, weight, targets, softcap=9.0, reduction=reduction).sum().backward()
    assert 0 < watch.largest <= 4096
    with watch:
        reference(hidden, weight, targets, None, 9.0, reduction)
    assert watch.largest == 600_000  # the watch sees what it should


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, "do not fit"),
        ({"hidden": torch.zeros(4)}, "do not fit"),
        ({"targets": torch.zeros(3)}, "targets must be"),
        ({"targets": torch.tensor([0, 7, 1])}, r"targets\[1\] is 7, outside \[0, 7\)"),
        ({"bias": torch.zeros(6)}, "bias must be"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"weight": torch.empty(7, 4, device="meta")}, "one device"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(zip(("hidden", "weight", "targets"), problem(3, 4, 7), strict=False))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **change})


@pytest.mark.parametrize("shape", [(2, 6), (1, 12), (2, 3, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_of_a_batch_are_its_tokens_end_to_end(shape, reduction):
    hidden, weight, targets, _ = problem(12, 16, 50)
    targets[3:5] = -100
    flat, batch = (tensor.detach().requires_grad_() for tensor in (hidden, hidden.view(*shape, 16)))
    expected = linear_cross_entropy(flat, weight, targets, reduction=reduction)
    losses = linear_cross_entropy(batch, weight, targets.view(shape), reduction=reduction)
    torch.testing.assert_close(losses, expected.view(losses.shape), rtol=0, atol=0)
    assert losses.shape == (shape if reduction == "none" else ())
    expected.sum().backward()
    losses.sum().backward()
    torch.testing.assert_close(batch.grad.view(12, 16), flat.grad, rtol=0, atol=0)


def test_unknown_reduction():
    with pytest.raises(InputError, match="reduction 'means' is unknown; choose one of: mean"):
        linear_cross_entropy(*problem(3, 4, 7)[:3], reduction="means")


@pytest.fixture
def on_device(monkeypatch):
    """``on_device(*tensors)``: they lie on a mock device with blocks of 16 rows; it raises where the host would wait.

    No kernel was run on a real one.
    """
    if torch.cuda.is_available():
        pytest.skip("the mock stands in for a device that is here")
    pytest.importorskip("triton", reason="Triton is not installed")
    from tests.helpers.mock_cuda import MockCuda, OnDevice

    monkeypatch.setattr(module, "_DEVICE_BLOCK_ROWS", 16)
    monkeypatch.setattr(module, "_DEVICE_PART", 80)
    with MockCuda(monkeypatch) as mode:
        yield mode, lambda *tensors: [None if t is None else OnDevice(t) for t in tensors]


def head_of(dtype, softcap=3.0):
    return module._Head(softcap=softcap, ignore_index=-100, product_dtype=dtype, sum_dtype=torch.float32)


@pytest.mark.parametrize(
    ("tokens", "dtype", "backend", "hip", "scaled"),
    pairwise([5, 32, 37], [torch.float32, torch.bfloat16], ["triton", "torch"], [None, "7.0"], [False, True]),
)
def test_on_a_device_every_product_has_one_shape_and_the_host_never_waits(
    monkeypatch, on_device, tokens, dtype, backend, hip, scaled
):
    mode, move = on_device
    monkeypatch.setenv("CODEACT_BACKEND", backend)
    monkeypatch.setattr(torch.version, "hip", hip)
    operands = [operand.detach() for operand in problem(tokens, 8, 50, dtype, bias=True)]
    operands[2][1::4] = -100
    scale = torch.linspace(0.5, 2.0, tokens) if scaled else None
    theirs = loss_and_gradients(
        reference,
        [o if o.dtype == torch.int64 else o.double().requires_grad_() for o in operands],
        1.0 if scale is None else scale.double(),
        softcap=3.0,
        reduction="none",
    )
    operands[0][1] = torch.inf  # of a row that is ignored
    hidden, weight, targets, bias, upstream = move(*operands, scale)
    losses, gradients = module._in_blocks(hidden, weight, bias, targets, head_of(dtype), (True, True, True), upstream)
    aten = torch.ops.aten
    products = [[tuple(t.shape) for t in args[:2]] for func, args, _ in mode.seen if func is aten.mm.out]
    blocks = -(-tokens // 16)
    assert products == [[(16, 8), (8, 50)], [(16, 50), (50, 8)]] * blocks
    sums = [args[1].shape for func, args, _ in mode.seen if func is aten.addmm.dtype_out]
    assert sums == ([(50, 16)] * blocks if dtype == torch.bfloat16 and hip is None else [])
    # ROCm's sums are of products that were rounded.
    assert gradients[1].inner.dtype == torch.float32
    assert_near([tensor.inner for tensor in (losses, *gradients)], theirs, TOLERANCES[dtype])
    assert (gradients[0].inner[1::4] == 0).all()
    total = linear_cross_entropy(hidden, weight, targets, bias, 3.0)
    kept = operands[2] != -100
    torch.testing.assert_close(total.inner.double(), theirs[0][kept].mean(), rtol=TOLERANCES[dtype], atol=0)


def test_on_a_device_a_row_has_the_same_bits_in_any_batch_and_a_frozen_head_costs_nothing(on_device):
    """Eighths, whose products are exact: the order of sums of a CPU's product depends on the place of a row."""
    mode, move = on_device
    operands = [operand.detach() for operand in problem(37, 8, 50)[:3]]
    operands[:2] = [(t * 8).round() / 8 for t in operands[:2]]

    def losses_of(first, last):
        hidden, weight, targets = move(operands[0][first:last], operands[1], operands[2][first:last])
        return module._in_blocks(hidden, weight, None, targets, head_of(torch.float32), (True, False, False))

    together, gradients = losses_of(0, 37)
    assert gradients[1:] == (None, None)
    assert not any(func in (torch.ops.aten.addmm_.default, torch.ops.aten.mm.default) for func, *_ in mode.seen)
    for first, last in ((0, 1), (3, 20), (20, 37)):
        assert torch.equal(losses_of(first, last)[0].inner, together.inner[first:last])


class _MostMemory(TorchDispatchMode):
    """``most``: the bytes that tensors made in it held at most, aside from ``but`` and those of their shapes."""

    def __init__(self, but):
        super().__init__()
        self.but, self.most = {tuple(tensor.shape) for tensor in but}, 0
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in but}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = 0 if tuple(tensor.shape) in self.but else storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata)
                self.most = max(self.most, sum(self.alive.values()))
        return result


@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "dtype", "backend", "rows"),
    [
        (8192, 4096, 49_152, torch.bfloat16, "triton", 4096),
        (8192, 4096, 128_256, torch.bfloat16, "torch", 2048),
        (9001, 3584, 152_064, torch.bfloat16, "triton", 2048),
        (100, 4096, 128_256, torch.bfloat16, "triton", 2048),
        (3000, 576, 49_153, torch.float32, "torch", 4096),
    ],
)
def test_on_a_device_a_gibibyte_suffices_beside_operands_and_gradients(
    monkeypatch, tokens, width, vocabulary, dtype, backend, rows
):
    """Counted over tensors that have shapes only; what else is made is far below what the gradients take."""
    monkeypatch.setattr(module, "nll_backend", lambda operand: backend)
    hidden = torch.empty(tokens, width, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(vocabulary, width, dtype=dtype, device="meta", requires_grad=True)
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    assert module._rows_of_block(vocabulary, hidden, dtype) == rows
    watch = _MostMemory(but=(hidden, weight))
    with watch:  # autocast, which the public function asks about, knows no such device
        module._SummedLoss.apply(hidden, weight, None, targets, head_of(dtype), True).backward()
    block = rows * vocabulary * dtype.itemsize
    assert block <= watch.most <= 1 << 30, watch.most
    assert (hidden.grad.shape, weight.grad.dtype) == (hidden.shape, dtype)
