"""Scoring as on CUDA, on a mock device (``mock_cuda.py``): devices, dtypes, no hidden wait, and the right scores.

No kernel was run on a device. What runs here is every line of Python of that route, the attention by its definition and
the Triton kernels in their interpreter.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from codeact.models import fused_layers
from codeact.models.isolation import set_attention
from codeact.ops import attention as varlen
from codeact.ops import nll
from codeact.ops.attention import ATTENTION, PackedBatch
from codeact.scoring import ifd
from codeact.scoring.ifd import IfdScorer
from tests.helpers.mock_cuda import CUDA, HiddenSyncError, MockCuda, OnDevice, WrongDeviceError, move_module

pytestmark = [
    pytest.mark.usefixtures("interpreted_bf16"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the mock stands in for a device that is here"),
]

VOCABULARY = 97
SAMPLES = [list(range(5, 25)), [3, 4], list(range(40, 70)), [90, 91, 92]]
SPANS = [[(11, 20)], [(1, 2)], [(1, 30)], [(2, 3)]]


@pytest.fixture
def make_scorer(monkeypatch, tokenizer):
    """Returns a function that makes a scorer of the same random bfloat16 model, on a device or on the CPU."""

    def make(device: str) -> IfdScorer:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        if device == "cuda":
            # Making a scorer runs the model alone and packed, and compares on the host: that is once, not per pack.
            monkeypatch.setattr(ifd, "split_head", split_without_check)
            monkeypatch.setattr(ifd, "prove_isolation", lambda *_: None)
            monkeypatch.setattr(fused_layers, "_same", lambda *_: True)  # so are the layers compared
            move_module(model)
        scorer = IfdScorer(model, tokenizer, max_length=64, tokens_per_pack=64)
        set_attention(model, scorer.attention)  # as while it scores
        return scorer

    def split_without_check(model):
        from codeact.models.isolation import LmHead

        return model.model, LmHead(weight=model.lm_head.weight, bias=None, softcap=None)

    monkeypatch.setattr(varlen, "is_flash_attn_2_available", lambda: False)
    # The mock's tensors keep count of their versions, which inference mode does not.
    monkeypatch.setattr(IfdScorer, "_run_pack", torch.no_grad()(IfdScorer._run_pack.__wrapped__))
    return make


@pytest.fixture
def mock(monkeypatch):
    with MockCuda(monkeypatch) as mode:
        yield mode


def test_a_pack_has_the_sums_of_the_cpu(make_scorer, monkeypatch):
    expected = make_scorer("cpu")._run_pack(SAMPLES, SPANS)
    with MockCuda(monkeypatch) as mode:
        scorer = make_scorer("cuda")
        assert scorer.device == CUDA
        assert scorer.trunk.config._attn_implementation == ATTENTION
        mode.seen.clear()
        sums = scorer._run_pack(SAMPLES, SPANS)
        assert isinstance(sums, OnDevice)
        assert (sums.dtype, sums.shape) == (torch.float64, (4,))
    # bfloat16 trunks that add up in another order; the CPU's own attention and loss.
    np.testing.assert_allclose(sums.inner.numpy(), expected.numpy(), rtol=0.02)
    names = [func.name() for func, _, _ in mode.seen]
    assert names.count("torch_attn::_varlen_attn") == 2  # one a layer, not one a sample
    assert names.count("codeact::segment_sums") == 1
    assert names.count("codeact::linear_nll") == 1
    assert mode.transformers_waits == 1


def test_the_loss_gets_bfloat16_operands_and_gives_float32(make_scorer, mock, monkeypatch):
    calls = []

    def watched(*arguments):
        calls.append((arguments, nll.token_nll(*arguments)))
        return calls[-1][1]

    scorer = make_scorer("cuda")
    monkeypatch.setattr(ifd, "token_nll", watched)
    scorer._run_pack(SAMPLES, SPANS)
    (((hidden, weight, targets, _, _), result),) = calls
    assert [t.dtype for t in (hidden, weight, targets, result)] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.int64,
        torch.float32,
    ]
    assert {t.device for t in (hidden, weight, targets, result)} == {CUDA}


def test_all_packs_take_one_transfer_to_the_host(make_scorer, mock):
    scorer = make_scorer("cuda")
    sequences, spans = SAMPLES * 3, SPANS * 3
    mock.transfers_allowed = 1
    mock.seen.clear()
    with fused_layers.fused_layers(scorer.model):  # as while it scores
        sums, cost = scorer._nll_sums(sequences, spans, None)
    assert cost.packs > 2
    names = [func.name() for func, _, _ in mock.seen]
    per_pack = {"codeact::rms_norm": 5, "codeact::silu_multiply": 2, "codeact::rotate": 4}
    assert {name: names.count(name) / cost.packs for name in per_pack} == per_pack
    assert mock.transfers_allowed == 0
    assert np.isfinite(sums).all()
    assert sums[:4] == pytest.approx(sums[4:8], rel=0.02)
    with pytest.raises(HiddenSyncError, match="to the host"):
        scorer._nll_sums(sequences, spans, None)


@pytest.mark.parametrize(("place", "call"), [(ifd, 0), (ifd, 1), (ifd, 2), (varlen, 0), (varlen, 1), (varlen, 2)])
def test_a_tensor_left_on_the_cpu_is_caught(make_scorer, mock, monkeypatch, place, call):
    """Each of the copies to the device in turn is forgotten."""
    scorer = make_scorer("cuda")
    real, calls = place.to_device, []

    def forgetful(tensor, device):
        calls.append(tensor)
        return tensor if len(calls) == call + 1 else real(tensor, device)

    monkeypatch.setattr(place, "to_device", forgetful)
    with pytest.raises((WrongDeviceError, ValueError)):
        scorer._run_pack(SAMPLES, SPANS)
    assert len(calls) > call


def test_a_copy_from_pageable_memory_is_caught(make_scorer, mock, monkeypatch):
    """It waits for what is queued on the device before it."""
    scorer = make_scorer("cuda")
    monkeypatch.setattr(ifd, "to_device", lambda tensor, device: tensor.to(device, non_blocking=True))
    with pytest.raises(HiddenSyncError, match="not pinned"):
        scorer._run_pack(SAMPLES, SPANS)


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (lambda t: t.sum().item(), "_local_scalar_dense"),
        (lambda t: t.tolist(), "tolist"),
        (lambda t: t.cpu(), "to the host"),
        (lambda t: bool(t.isnan().any()), "_local_scalar_dense|is_nonzero"),
        (lambda t: t[t > 0], "mask"),
        (lambda t: t.nonzero(), "nonzero"),
    ],
    ids=["item", "tolist", "cpu", "bool", "mask", "nonzero"],
)
def test_a_look_at_a_value_is_caught(make_scorer, mock, monkeypatch, look, message):
    scorer = make_scorer("cuda")
    real = ifd.token_nll

    def looking(*arguments):
        result = real(*arguments)
        look(result)
        return result

    monkeypatch.setattr(ifd, "token_nll", looking)
    with pytest.raises(HiddenSyncError, match=message):
        scorer._run_pack(SAMPLES, SPANS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_dtype_is_caught(make_scorer, mock, dtype):
    """float32 has no varlen attention on CUDA."""
    scorer = make_scorer("cuda")
    for part in scorer.trunk.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = torch.nn.Parameter(OnDevice(parameter.inner.to(dtype)), requires_grad=False)
    with pytest.raises(ValueError, match="bfloat16 and float16"):
        scorer._run_pack(SAMPLES, SPANS)


def test_a_head_of_another_dtype_is_caught(make_scorer, mock):
    scorer = make_scorer("cuda")
    wide = OnDevice(scorer.head.weight.inner.float())
    scorer.head = type(scorer.head)(weight=wide, bias=None, softcap=None)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        scorer._run_pack(SAMPLES, SPANS)


def test_boundaries_of_another_dtype_are_caught(make_scorer, mock, monkeypatch):
    """The kernels read int32; int64 numbers would be read as pairs of them."""
    real = PackedBatch.from_samples.__func__

    def wide(cls, samples, prefixes=None):
        batch = real(cls, samples, prefixes)
        object.__setattr__(batch, "cu_seqlens", batch.cu_seqlens.long())
        return batch

    monkeypatch.setattr(PackedBatch, "from_samples", classmethod(wide))
    scorer = make_scorer("cuda")
    with pytest.raises(AssertionError):
        scorer._run_pack(SAMPLES, SPANS)


@pytest.mark.parametrize("extra", [{}, {"bias": True}, {"softcap": 5.0}, {"backend": "torch"}])
def test_token_nll_on_the_device(mock, extra):
    """What is asked for by "auto", and PyTorch's own blocks, which must not wait either."""
    hidden, weight = torch.randn(20, 16).bfloat16(), torch.randn(VOCABULARY, 16).bfloat16()
    targets = torch.randint(VOCABULARY, (20,))
    targets[::5] = -100
    more = dict(extra)
    host = dict(extra)
    if extra.get("bias"):
        host["bias"] = torch.randn(VOCABULARY).bfloat16()
        more["bias"] = OnDevice(host["bias"])
    ours = nll.token_nll(OnDevice(hidden), OnDevice(weight), OnDevice(targets), **more)
    assert (ours.dtype, ours.device) == (torch.float32, CUDA)
    host["backend"] = "torch"
    expected = nll.token_nll(hidden, weight, targets, **host)
    torch.testing.assert_close(ours.inner, expected, atol=0.1, rtol=0)
    assert (ours.inner[::5] == 0).all()
