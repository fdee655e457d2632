"""token_nll against float64 with every logit in memory."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codeact import _native, token_nll
from codeact.base.errors import InputError
from codeact.ops import native, nll
from codeact.ops.nll_reference import token_nll_reference
from tests.helpers.pairwise import pairwise
from tests.ops.conftest import BACKENDS, HERE


@pytest.fixture
def native_backend(backend):
    if backend != "native":
        pytest.skip("of the native backend")


def problem(tokens, width, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, weight, targets


# One of each; primes that no block, tile or panel divides; odd widths, which pairs of bfloat16 do not divide; a
# vocabulary just over one block; just over one panel of 48; more tokens than one block; many parts.
SIZES = [(1, 1, 1), (1, 5, 3), (37, 40, 101), (50, 64, 257), (1100, 8, 33), (3, 4, 9000), (9, 17, 49), (4100, 2, 5)]
# Of every backend each dtype that it computes: a path of its own through the code.
KERNELS = [
    (backend, dtype)
    for backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    if backend == "torch" or dtype != torch.float64
]


def is_fast(kernel, size, extra):
    """Triton's interpreter is slow; tests/kernels has many tiles."""
    return kernel[0] != "triton" or max(size) <= 1000


@pytest.mark.parametrize(
    ("backend", "dtype", "size", "extra"),
    [
        (*kernel, size, extra)
        for kernel, size, extra in pairwise(KERNELS, SIZES, ["plain", "bias", "softcap", "both"], valid=is_fast)
    ],
    indirect=["backend"],
)
def test_equals_reference(monkeypatch, backend, dtype, size, extra):
    monkeypatch.setattr(nll, "_BLOCK_LOGITS", 5000)
    hidden, weight, targets = problem(*size, dtype=dtype)
    targets[::4] = -100
    more = {}
    if extra in ("bias", "both"):
        more["bias"] = torch.randn(size[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    if extra in ("softcap", "both"):
        more["softcap"] = 5.0
    ours = token_nll(hidden, weight, targets, **more, backend=backend)
    assert ours.dtype == torch.float32
    expected = token_nll_reference(hidden, weight, targets, **more)
    scale = max(1.0, float(expected.max()))
    # float32 rounds the products of the matrix multiplication. Products of bfloat16 are exact in float32, but the torch
    # backend rounds the logits to bfloat16 (8 bits).
    tolerance = 3e-2 if backend == "torch" and dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(ours.double(), expected, atol=tolerance * scale, rtol=0)
    assert (ours[::4] == 0).all()


@given(data=st.data())
@settings(max_examples=60)
def test_native_equals_reference_on_anything(data):
    if not HERE:
        pytest.skip("this CPU has no instruction set of the native backend")
    draw = data.draw
    size = draw(st.tuples(st.integers(0, 40), st.integers(0, 70), st.integers(1, 300)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    hidden, weight, targets = problem(*size, dtype=dtype, seed=draw(st.integers(0, 1000)))
    hidden *= draw(st.sampled_from([1e-30, 1.0, 30.0]))
    targets[torch.rand(len(targets), generator=torch.Generator().manual_seed(0)) < 0.3] = -7
    bias = torch.linspace(-3, 3, size[2]) if draw(st.booleans()) else None
    more = {"bias": bias, "softcap": draw(st.sampled_from([None, 0.5, 30.0])), "ignore_index": -7}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODEACT_NATIVE_ISA", draw(st.sampled_from(HERE)))
        ours = token_nll(hidden, weight, targets, **more, backend="native")
    expected = token_nll_reference(hidden, weight, targets, **more)
    # Logits of hundreds have fewer bits behind the point; a softcap makes them small again after that.
    scale = max(1.0, float((hidden.float() @ weight.float().T).abs().max())) if hidden.numel() else 1.0
    torch.testing.assert_close(ours.double(), expected, atol=2e-5 * scale, rtol=0)


def test_of_bfloat16_only_the_sums_are_rounded(native_backend):
    """5e-5 at the width of a real model; logits rounded to bfloat16 are off by 7e-3."""
    hidden, weight, targets = problem(64, 2048, 5000, dtype=torch.bfloat16)
    weight /= 2048**0.5
    ours = token_nll(hidden, weight, targets, backend="native")
    expected = token_nll_reference(hidden, weight, targets)
    torch.testing.assert_close(ours.double(), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("target", [0, 15, 16, 47, 48, 95, 96, 99])
def test_targets_at_the_edges_of_a_panel(backend, target):
    hidden, weight, _ = problem(9, 6, 100)
    targets = torch.full((9,), target)
    ours = token_nll(hidden, weight, targets, backend=backend)
    torch.testing.assert_close(ours.double(), token_nll_reference(hidden, weight, targets), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_nothing_beside_the_operands(backend, dtype):
    """Both operands are windows of larger matrices full of NaN."""
    hidden, weight, targets = problem(13, 9, 61, dtype=dtype)

    def window(matrix):
        around = torch.full((matrix.shape[0] + 4, matrix.shape[1] + 5), torch.nan, dtype=dtype)
        around[2:-2, 2:-3] = matrix
        return around[2:-2, 2:-3]

    ours = token_nll(window(hidden), window(weight), targets, backend=backend)
    assert torch.equal(ours, token_nll(hidden, weight, targets, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch_on_any_threads(native_backend, dtype):
    hidden, weight, targets = problem(300, 96, 3000, dtype=dtype)
    whole = token_nll(hidden, weight, targets, backend="native")
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert torch.equal(token_nll(hidden[order], weight, targets[order], backend="native"), whole[order])
            for part in (slice(0, 1), slice(1, 14), slice(290, 300)):
                assert torch.equal(token_nll(hidden[part], weight, targets[part], backend="native"), whole[part])
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_threads(native_backend):
    problems = [problem(200, 64, 2000 + i, seed=i) for i in range(8)]
    alone = [token_nll(*p, backend="native") for p in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda p: token_nll(*p, backend="native"), problems * 4))
    assert all(torch.equal(a, b) for a, b in zip(alone * 4, together, strict=True))


def test_extreme_logits_stay_finite(backend):
    hidden = torch.tensor([[1e4, 0.0], [0.0, 0.0], [-1e4, 3e37]])
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    ours = token_nll(hidden, weight, torch.tensor([1, 2, 2]), backend=backend)
    torch.testing.assert_close(ours, torch.tensor([2e4, 1.0986123, 0.0]))


def test_logits_that_rise_along_the_vocabulary(backend):
    """The running maximum moves again and again."""
    hidden = torch.tensor([[1.0], [-1.0], [0.5]])
    weight = torch.linspace(-900, 900, 1000)[:, None]
    targets = torch.tensor([0, 500, 999])
    ours = token_nll(hidden, weight, targets, backend=backend)
    torch.testing.assert_close(ours.double(), token_nll_reference(hidden, weight, targets), atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_stays_alone(backend, bad):
    hidden, weight, targets = problem(5, 4, 70)
    hidden[2, 1] = bad
    result = token_nll(hidden, weight, targets, backend=backend)
    assert result.isnan().tolist() == [False, False, True, False, False]


def test_a_word_that_is_not_finite_spoils_every_row(backend):
    hidden, weight, targets = problem(5, 4, 70)
    weight[69, 3] = torch.nan
    assert token_nll(hidden, weight, targets, backend=backend).isnan().all()


def test_a_bias_may_rule_words_out(backend):
    hidden, weight, targets = problem(5, 4, 70)
    bias = torch.zeros(70)
    bias[60:] = -torch.inf
    targets %= 60
    expected = token_nll_reference(hidden, weight[:60], targets)
    torch.testing.assert_close(token_nll(hidden, weight, targets, bias, backend=backend).double(), expected)


def test_an_ignored_row_costs_nothing_whatever_it_holds(backend):
    hidden, weight, targets = problem(3, 4, 7)
    hidden[1] = torch.inf
    targets[1] = -100
    result = token_nll(hidden, weight, targets, backend=backend)
    assert result[1] == 0
    assert result.isfinite().all()


def test_no_tokens(backend):
    hidden, weight, targets = problem(0, 4, 7)
    assert token_nll(hidden, weight, targets, backend=backend).shape == (0,)
    hidden, _, targets = problem(3, 4, 7)
    assert token_nll(hidden, torch.empty(0, 4), torch.full_like(targets, -100), backend=backend).tolist() == [0, 0, 0]


def test_no_width(backend):
    losses = token_nll(torch.empty(2, 0), torch.empty(5, 0), torch.tensor([0, 4]), backend=backend)
    torch.testing.assert_close(losses, torch.full((2,), 5.0).log())


@pytest.mark.parametrize("shape", [(2, 6), (1, 12), (12, 1), (2, 3, 2), (0, 4)])
def test_rows_of_a_batch_are_its_tokens_end_to_end(backend, shape):
    hidden, weight, targets = problem(math.prod(shape), 16, 50)
    targets[3:5] = -100
    expected = token_nll(hidden, weight, targets, backend=backend)
    for batch in (hidden.view(*shape, 16), hidden.T.contiguous().T.view(*shape, 16)):
        losses = token_nll(batch, weight, targets.view(shape), backend=backend)
        torch.testing.assert_close(losses, expected.view(shape), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_operands(backend, dtype):
    hidden, weight, targets = problem(10, 6, 20, dtype=dtype)
    ours = token_nll(
        hidden.T.contiguous().T,
        weight.repeat_interleave(2, 0)[::2],
        targets.repeat_interleave(2)[::2],
        torch.zeros(40)[::2],
        backend=backend,
    )
    torch.testing.assert_close(ours, token_nll(hidden, weight, targets, backend=backend))
    wide = hidden.requires_grad_()
    assert not token_nll(wide, weight, targets, backend=backend).requires_grad


def test_holds_no_more_than_a_block_of_logits(monkeypatch):
    """Every matrix product that it makes is at most a block."""
    monkeypatch.setattr(nll, "_BLOCK_LOGITS", 4096)
    largest = 0
    real = torch.mm

    def watched(a, b, out):
        nonlocal largest
        largest = max(largest, out.numel())
        return real(a, b, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    token_nll(*problem(2048, 4, 1000), backend="torch")
    assert 0 < largest <= 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, "do not fit"),
        ({"hidden": torch.zeros(4)}, "do not fit"),
        ({"hidden": torch.zeros(1, 3, 4)}, r"int64 \(1, 3\), not torch.int64 \(3,\)"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.bfloat16)}, "one floating-point dtype"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, "targets must be"),
        ({"targets": torch.zeros(3)}, "targets must be"),
        ({"targets": torch.tensor([0, 7, 1])}, r"targets\[1\] is 7, outside \[0, 7\)"),
        ({"targets": torch.tensor([0, 1, -1])}, r"targets\[2\] is -1"),
        ({"bias": torch.zeros(6)}, "bias must be"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"weight": torch.empty(7, 4, device="meta")}, "one device"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(zip(("hidden", "weight", "targets"), problem(3, 4, 7), strict=True))
    with pytest.raises(ValueError, match=message):
        token_nll(**{**arguments, **change})


def test_backend_by_name_and_by_environment(monkeypatch):
    arguments = problem(3, 4, 7)
    torch.testing.assert_close(token_nll(*arguments, backend="torch"), token_nll(*arguments))
    with pytest.raises(InputError, match="backend 'tritn' is unknown; choose one of: triton"):
        token_nll(*arguments, backend="tritn")
    monkeypatch.setenv("CODEACT_BACKEND", "cuda")
    with pytest.raises(InputError, match="backend 'cuda' is unknown"):
        token_nll(*arguments)
    monkeypatch.setenv("CODEACT_BACKEND", "torch")
    monkeypatch.setattr(nll, "_native_nll", None)
    token_nll(*arguments, backend="native")  # the environment decides


def test_auto_takes_the_best_and_says_so_once(monkeypatch, caplog):
    nll._say_once.cache_clear()
    used = []
    monkeypatch.setattr(nll, "_native_nll", lambda *a: used.append("native") or a[2].float())
    monkeypatch.setattr(nll, "_torch_nll", lambda *a: used.append("torch") or a[2].float())
    with caplog.at_level("INFO", logger="codeact"):
        for dtype in (torch.float32, torch.float32, torch.float16):
            token_nll(*problem(3, 4, 7, dtype=dtype))
    assert used == (["native", "native", "torch"] if HERE else ["torch"] * 3)
    assert len(caplog.messages) == 2
    assert caplog.messages[1] == "NLL of float16 on cpu: backend torch"
    monkeypatch.setattr(_native, "instruction_sets", list)
    token_nll(*problem(3, 4, 7))
    assert used[-1] == "torch"
    with pytest.raises(InputError, match="backend 'native' needs an x86-64 CPU with AVX2; choose another one"):
        token_nll(*problem(3, 4, 7), backend="native")


@pytest.mark.parametrize("lacks", ["triton", "compiler", "headers", "nothing"])
def test_a_gpu_on_which_triton_cannot_launch_takes_blocks_of_logits_and_says_why(monkeypatch, tmp_path, lacks):
    """A bare machine: the wheel of Triton is there with PyTorch, and nothing that compiles."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CODEACT_BACKEND", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(nll.importlib.util, "find_spec", lambda name: None if lacks == "triton" else name)
    monkeypatch.setattr(nll.shutil, "which", lambda name: None if lacks == "compiler" else f"/usr/bin/{name}")
    folder = tmp_path / "none" if lacks == "headers" else tmp_path
    monkeypatch.setattr(nll.sysconfig, "get_path", lambda name: str(folder))
    on_gpu = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16)
    assert nll.nll_backend(on_gpu) == ("triton" if lacks == "nothing" else "torch")
    if lacks != "nothing":
        word = {"triton": "pip install", "compiler": "install gcc", "headers": "python3-dev"}[lacks]
        with pytest.raises(InputError, match=f"backend 'triton' needs .*{word}"):
            nll.nll_backend(on_gpu, "triton")


def test_a_backend_asked_for_is_never_replaced(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="'triton' runs on cuda, and the operands are on cpu"):
        token_nll(*problem(3, 4, 7), backend="triton")
    with pytest.raises(InputError, match="'native' computes float32, bfloat16, not float64"):
        token_nll(*problem(3, 4, 7, dtype=torch.float64), backend="native")


def test_an_instruction_set_asked_for_is_never_replaced(monkeypatch):
    monkeypatch.setattr(_native, "instruction_sets", lambda: ["avx2"])
    monkeypatch.setenv("CODEACT_NATIVE_ISA", "avx512")
    with pytest.raises(InputError, match=r"CODEACT_NATIVE_ISA .* 'avx512' is unknown; choose one of: avx2"):
        native.instruction_set()


NATIVE = {
    "hidden": np.zeros((3, 4), np.float32),
    "weight": np.zeros((7, 4), np.float32),
    "targets": np.zeros(3, np.int64),
    "bias": None,
    "softcap": None,
    "ignore_index": -100,
    "threads": 1,
    "instruction_set": HERE[0] if HERE else "none",
}


@pytest.mark.skipif(not HERE, reason="this CPU has no instruction set of the native backend")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": np.zeros((3, 4))}, "must all be float32"),
        ({"weight": np.zeros((7, 4), np.uint16)}, "must all be float32"),
        ({"hidden": np.zeros((3, 5), np.float32)}, "differ in width"),
        ({"hidden": np.zeros(3, np.float32)}, "two dimensions"),
        ({"hidden": np.zeros((3, 8), np.float32)[:, ::2]}, "side by side"),
        ({"targets": np.zeros(2, np.int64)}, "one value a row of hidden"),
        ({"targets": np.array([0, 1, 7])}, r"targets\[2\] is 7, outside \[0, 7\)"),
        ({"bias": np.zeros(6, np.float32)}, "one value a row of weight"),
        ({"instruction_set": "sse2"}, "instruction set 'sse2' is not on this machine"),
    ],
)
def test_the_compiled_core_checks_for_itself(change, message):
    """It reads raw memory, so it does not rely on its caller."""
    with pytest.raises((TypeError, ValueError), match=message):
        _native.linear_nll(**{**NATIVE, **change})
