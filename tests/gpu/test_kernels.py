"""What only a device can show. Written without one: whoever has it runs ``pytest -m gpu``.

All other tests of this folder run on the device too, where there is one, through real launches.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from codeact_kernels.linear_nll import linear_nll
from codeact_kernels.segments import segment_sums

from codeact import linear_cross_entropy, token_nll
from codeact.ops import layers
from codeact.ops.layers_reference import rms_norm_reference, rotate_reference, silu_multiply_reference
from codeact.ops.nll_reference import token_nll_reference

pytestmark = pytest.mark.gpu


def large_problem(tokens, width, vocabulary, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, device="cuda", dtype=dtype)
    weight = torch.randn(vocabulary, width, generator=generator, device="cuda", dtype=dtype) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device="cuda")
    return hidden, weight, targets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [(1000, 576, 49152), (300, 4096, 128256), (129, 1000, 32016)])
def test_no_worse_than_pytorch_in_the_same_dtype(dtype, size):
    hidden, weight, targets = large_problem(*size, dtype)
    exact = token_nll_reference(hidden, weight, targets)
    theirs = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    ours = linear_nll(hidden, weight, targets)
    error, accepted = ((x.double() - exact).abs().max().item() for x in (ours, theirs))
    # In float32 both are at rounding level, where who is ahead is luck.
    assert error <= max(accepted, 1e-5), (error, accepted)


def test_token_nll_takes_the_kernels_by_itself():
    hidden, weight, targets = large_problem(300, 576, 49152, torch.bfloat16)
    assert torch.equal(token_nll(hidden, weight, targets), linear_nll(hidden, weight, targets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_bits_in_any_batch_and_every_time(dtype):
    """Real products this time, not only exact ones; and again, since a race would show on a device only."""
    hidden, weight, targets = large_problem(2000, 1024, 50000, dtype)
    together = linear_nll(hidden, weight, targets)
    for _ in range(10):
        assert torch.equal(linear_nll(hidden, weight, targets), together)
    for first, last in ((0, 1), (5, 300), (127, 129), (1000, 2000)):
        assert torch.equal(linear_nll(hidden[first:last], weight, targets[first:last]), together[first:last])


def test_extra_memory_is_a_fraction_of_the_logits():
    hidden, weight, targets = large_problem(16384, 576, 49152, torch.bfloat16)
    linear_nll(hidden, weight, targets)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_nll(hidden, weight, targets)
    assert torch.cuda.max_memory_allocated() - before < 0.01 * 4 * 16384 * 49152


def test_gradients_take_a_gibibyte_beside_themselves():
    """The head's is summed in float32 and rounded in the backward pass, when the block of logits is gone."""
    hidden, weight, targets = large_problem(5000, 2048, 49152, torch.bfloat16)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, targets).backward()
    gradients = 2 * 2 * hidden.numel() + (4 + 2) * weight.numel()
    assert torch.cuda.max_memory_allocated() - before <= gradients + (1 << 30)


def test_gradients_have_the_same_bits_in_any_batch():
    hidden, weight, targets = large_problem(5000, 1024, 32016, torch.bfloat16)

    def slopes(first, last):
        rows = hidden[first:last].clone().requires_grad_()
        linear_cross_entropy(rows, weight, targets[first:last], reduction="sum").backward()
        return rows.grad

    together = slopes(0, 5000)
    for first, last in ((0, 1), (5, 300), (4000, 5000), (100, 4996)):
        assert torch.equal(slopes(first, last), together[first:last])


@pytest.mark.parametrize("name", ["norm", "gate", "rotation"])
def test_layers_are_no_worse_than_pytorch(name):
    def draw(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    ours, theirs, operands, wanted = {
        "norm": (
            lambda x, w: layers.rms_norm(x, w, 1e-5),
            lambda x, w: rms_norm_reference(x, w, 1e-5),
            (draw(1, 3001, 4096), draw(4096)),
            2,
        ),
        "gate": (layers.silu_multiply, silu_multiply_reference, (draw(1, 3001, 11008), draw(1, 3001, 11008)), 2),
        "rotation": (layers.rotate, rotate_reference, (draw(32, 3001, 128), draw(3001, 128), draw(3001, 128)), 1),
    }[name]
    slope = torch.randn_like(ours(*operands))
    results = []
    for function, dtype in ((ours, torch.bfloat16), (theirs, torch.bfloat16), (theirs, torch.float64)):
        given = [t.detach().to(dtype, copy=True).requires_grad_(place < wanted) for place, t in enumerate(operands)]
        output = function(*given)
        output.backward(slope.to(dtype))
        results.append([output.detach(), *(t.grad for t in given[:wanted])])
    for mine, plain, exact in zip(*results, strict=True):
        error, accepted = ((x.double() - exact).norm() / exact.norm() for x in (mine, plain))
        assert error <= 1.05 * accepted, (error, accepted)


def test_no_synchronisation():
    """PyTorch's own alarm for hidden waits."""
    hidden, weight, targets = large_problem(300, 576, 49152, torch.bfloat16)
    bounds = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
    linear_nll(hidden, weight, targets)
    linear_cross_entropy(hidden, weight, targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        segment_sums(linear_nll(hidden, weight, targets), bounds)
        linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
