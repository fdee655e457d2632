"""The Triton kernels between a layer's products against float64, forward and backward; broken copies of them fail."""

from __future__ import annotations

import sys

import pytest
import torch
from codeact_kernels import layers

from codeact.ops.layers_reference import rms_norm_reference, rotate_reference, silu_multiply_reference
from tests.helpers.pairwise import pairwise
from tests.kernels.agreement import DEVICE, poisoned
from tests.kernels.test_mutants import broken

# Triton's interpreter cuts bfloat16 off, where a device rounds to nearest.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]


def check(ours, reference, operands, *more, differentiable=None):
    """Result and gradients within rounding of those in float64, for operands inside of larger tensors that hold NaN."""
    dtype = operands[0].dtype
    slope = draw(reference(*operands, *more).shape, dtype=dtype, seed=7)[0]
    sides = []
    for function, given, upstream in (
        (ours, [poisoned(t) for t in operands], slope),
        (reference, [t.double() for t in operands], slope.double()),
    ):
        wanted = given[:differentiable]
        for tensor in wanted:
            tensor.requires_grad_()
        result = function(*given, *more)
        result.backward(upstream)
        sides.append([result.detach(), *(tensor.grad for tensor in wanted)])
    assert all(one.dtype == dtype for one in sides[0])
    for one, exact in zip(*sides, strict=True):
        scale = max(1.0, float(exact.abs().max()))
        torch.testing.assert_close(one.double(), exact, atol=TOLERANCES[dtype] * scale, rtol=0)


def check_norm(module, dtype=torch.float32, rows=70, width=48):
    x, weight = draw((2, rows, width), (width,), dtype=dtype)
    check(module.rms_norm, rms_norm_reference, [x * 3, weight], 1e-2)


def check_wide_norm(module):
    """A row a program, and more than one part of the weight's gradient."""
    check_norm(module, rows=20, width=2050)


def check_gate(module, dtype=torch.float32, rows=70, width=48):
    check(module.silu_multiply, silu_multiply_reference, draw((rows, width), (rows, width), dtype=dtype))


def check_rotation(module, dtype=torch.float32, heads=3, tokens=70, width=10):
    operands = draw((heads, tokens, width), (tokens, width), (tokens, width), dtype=dtype)
    check(module.rotate, rotate_reference, operands, differentiable=1)


# One row; more rows than a program, or a part of the weight's gradient, takes; widths that are no power of two.
@pytest.mark.parametrize(("rows", "width", "dtype"), pairwise([1, 70], [1, 48, 2050], [*TOLERANCES]))
@pytest.mark.parametrize("checked", [check_norm, check_gate])
def test_norm_and_gate(checked, rows, width, dtype):
    checked(layers, dtype, rows, width)


@pytest.mark.parametrize(
    ("heads", "tokens", "width", "dtype"), pairwise([1, 3, 33], [1, 70], [2, 10, 64], [*TOLERANCES])
)
def test_rotation(heads, tokens, width, dtype):
    check_rotation(layers, dtype, heads, tokens, width)


def test_the_rotation_is_laid_out_by_tokens():
    x, angles = draw((70, 3, 10), (70, 10))
    assert layers.rotate(x.transpose(0, 1), angles, angles).transpose(0, 1).is_contiguous()


def test_gates_at_the_ends():
    gate = torch.tensor([0.0, 1e-30, 30.0, 89.0, 200.0, 1e30, -1e-30, -30.0, -89.0, -200.0, -1e30], device=DEVICE)
    up = torch.ones_like(gate)
    gate.requires_grad_()
    ours = layers.silu_multiply(gate, up)
    torch.testing.assert_close(ours, torch.nn.functional.silu(gate), rtol=1e-5, atol=1e-30)
    ours.sum().backward()
    torch.testing.assert_close(gate.grad, (gate.detach() > 0).float(), rtol=0, atol=0.51)
    assert gate.grad.isfinite().all()


def test_a_row_has_the_same_bits_in_any_batch():
    x, weight = draw((90, 48), (48,))
    whole = layers.rms_norm(x, weight, 1e-5)
    for first, last in ((0, 1), (41, 90)):
        assert torch.equal(layers.rms_norm(x[first:last], weight, 1e-5), whole[first:last])


def test_nothing_at_all():
    x, weight = (t.requires_grad_() for t in draw((0, 48), (48,)))
    (layers.rms_norm(x, weight, 1e-5).sum() + layers.silu_multiply(x, x).sum()).backward()
    assert (weight.grad == 0).all()
    assert layers.rotate(*draw((3, 0, 10), (0, 10), (0, 10))).shape == (3, 0, 10)


@pytest.mark.parametrize(
    ("old", "new", "checked"),
    [
        pytest.param("axis=1) / D + epsilon", "axis=1) / D", check_norm, id="no epsilon"),
        pytest.param("axis=1) / D + epsilon", "axis=1) / BLOCK + epsilon", check_norm, id="a mean over the block"),
        pytest.param("result = (normal * factor[None, :])", "result = normal", check_norm, id="no weight"),
        pytest.param("g *= factor[None, :]", "g *= 1.0", check_norm, id="no weight backward"),
        pytest.param("normal * mean[:, None]", "normal * 0.0", check_norm, id="the mean's gradient"),
        pytest.param("(program * STEPS + step) * ROWS", "program * ROWS", check_wide_norm, id="a row's gradient twice"),
        pytest.param("total += tl.sum(g * normal", "total = tl.sum(g * normal", check_wide_norm, id="the last rows"),
        pytest.param(
            "mask=inside, other=0.0).to(tl.float32)\n    scale",
            "mask=(rows < R)[:, None], other=0.0).to(tl.float32)\n    scale",
            check_norm, id="numbers beyond a row",
        ),
        pytest.param("(opened * up)", "opened", check_gate, id="no gate"),
        pytest.param("(sigmoid + opened * (1.0 - sigmoid))", "sigmoid", check_gate, id="half of SiLU's derivative"),
        pytest.param("(g * opened)", "(g * x)", check_gate, id="the other's gradient"),
        pytest.param("-second * first_sine", "second * first_sine", check_rotation, id="turned the other way"),
        pytest.param("-first * first_sine", "first * first_sine", check_rotation, id="turned the other way backward"),
        pytest.param("second * second_sine,", "second * first_sine,", check_rotation, id="the other half's angle"),
        pytest.param("heads * x_stride_h", "heads * x_stride_t", check_rotation, id="another head"),
        pytest.param("tokens * sine_stride", "tokens * D", check_rotation, id="angles that lie apart"),
    ],
)  # fmt: skip
def test_broken_layers_are_caught(tmp_path, old, new, checked):
    copy = broken(layers, tmp_path, old, new)
    with pytest.raises(AssertionError):
        checked(copy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the model here is on the CPU")
def test_a_model_learns_through_them_as_it_does_by_itself(monkeypatch):
    """Every replaced part, forward and backward, in a model of transformers: the gradients of all its weights."""
    from codeact.models.fused_layers import fused_layers
    from codeact.ops import layers as dispatch
    from tests.models.test_fused_layers import fused_parts, make

    model = make("qwen3", num_hidden_layers=1)
    ids = torch.arange(20)[None]
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(dispatch, "_on_gpu", lambda tensor: True)
    launched = set()

    def recorded(launch, device, run=layers._run):
        launched.add(launch[0].fn.__name__ if hasattr(launch[0], "fn") else launch[0].__name__)
        run(launch, device)

    monkeypatch.setattr(layers, "_run", recorded)
    with fused_layers(model):
        assert fused_parts(model)[0] == {"Qwen3RMSNorm", "Qwen3MLP"}
        model(ids, labels=ids).loss.backward()
    assert launched == {"rms_norm_rows", "rms_norm_slopes", "gate", "gate_slopes", "rotation"}
    for name, parameter in model.named_parameters():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-5 * scale + 1e-9, msg=name)
    assert sys.modules[type(model).__module__].apply_rotary_pos_emb.__module__.startswith("transformers")
