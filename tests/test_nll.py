"""token_nll against float64 with every logit in memory."""

from __future__ import annotations

import pytest
import torch

from codeact import nll, token_nll
from codeact._nll_reference import token_nll_reference
from codeact.errors import InputError


def problem(tokens, width, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, weight, targets


# Sizes: one of each; primes that no block divides; a vocabulary just over one block; more tokens than one block.
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 5, 3), (37, 40, 101), (50, 64, 257), (1100, 8, 33), (3, 4, 9000)])
# float32 rounds the products of the matrix multiplication, bfloat16 the logits themselves (8 bits).
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float64, 2e-5)])
@pytest.mark.parametrize("extra", ["plain", "bias", "softcap", "both"])
def test_equals_reference(monkeypatch, size, dtype, tolerance, extra):
    monkeypatch.setattr(nll, "_BLOCK_LOGITS", 5000)
    hidden, weight, targets = problem(*size, dtype=dtype)
    targets[::4] = -100
    more = {}
    if extra in ("bias", "both"):
        more["bias"] = torch.randn(size[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    if extra in ("softcap", "both"):
        more["softcap"] = 5.0
    ours = token_nll(hidden, weight, targets, **more)
    assert ours.dtype == torch.float32
    expected = token_nll_reference(hidden, weight, targets, **more)
    scale = max(1.0, float(expected.max()))
    torch.testing.assert_close(ours.double(), expected, atol=tolerance * scale, rtol=0)
    assert (ours[::4] == 0).all()


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4, 0.0], [0.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(token_nll(hidden, weight, torch.tensor([1, 2])), torch.tensor([2e4, 1.0986123]))


def test_a_row_that_is_not_finite_stays_alone():
    hidden, weight, targets = problem(5, 4, 7)
    hidden[2, 1] = torch.nan
    result = token_nll(hidden, weight, targets)
    assert result.isnan().tolist() == [False, False, True, False, False]


def test_an_ignored_row_costs_nothing_whatever_it_holds():
    hidden, weight, targets = problem(3, 4, 7)
    hidden[1] = torch.inf
    targets[1] = -100
    assert token_nll(hidden, weight, targets)[1] == 0


def test_no_tokens():
    hidden, weight, targets = problem(0, 4, 7)
    assert token_nll(hidden, weight, targets).shape == (0,)


def test_strided_operands():
    hidden, weight, targets = problem(10, 6, 20)
    ours = token_nll(hidden.T.contiguous().T, weight.repeat_interleave(2, 0)[::2], targets)
    torch.testing.assert_close(ours, token_nll(hidden, weight, targets))


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
    token_nll(*problem(2048, 4, 1000))
    assert 0 < largest <= 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, "do not fit"),
        ({"hidden": torch.zeros(4)}, "do not fit"),
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
    with pytest.raises(InputError, match="backend 'tritn' is unknown"):
        token_nll(*arguments, backend="tritn")
    monkeypatch.setenv("CODEACT_BACKEND", "cuda")
    with pytest.raises(InputError, match="backend 'cuda' is unknown"):
        token_nll(*arguments)
