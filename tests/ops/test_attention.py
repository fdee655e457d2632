"""No sample of a pack sees another, whatever way the model is called."""

from __future__ import annotations

import functools
import inspect
import itertools

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from codeact.base.errors import InputError
from codeact.ops import attention as varlen
from codeact.ops.attention import ATTENTION, PackedBatch, isolating_attention, varlen_attention

CPU = torch.device("cpu")


@pytest.fixture
def packed_model(tiny_model):
    tiny_model.set_attn_implementation(ATTENTION)
    return tiny_model


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 1000, size) for size in (7, 1, 30, 2, 13)]


def alone(model, samples):
    with torch.inference_mode():
        return torch.cat([model(torch.as_tensor(sample)[None], use_cache=False).logits[0] for sample in samples])


def test_packed_batch_restarts_positions_and_counts():
    batch = PackedBatch.from_samples([[5, 6, 7], [8], [9, 10]])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_length == 3


@pytest.mark.parametrize("samples", [[], [[1], []]])
def test_packed_batch_refuses_nothing(samples):
    with pytest.raises(ValueError, match="at least one"):
        PackedBatch.from_samples(samples)


def test_pack_equals_samples_alone_with_cu_seqlens(packed_model, tiny_model_path, samples):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        packed = packed_model(**PackedBatch.from_samples(samples).model_inputs(CPU)).logits[0]
    torch.testing.assert_close(packed, alone(reference.eval(), samples), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("extra", ["none", "all-ones mask", "cache"])
def test_pack_is_found_in_positions_alone(packed_model, samples, extra):
    inputs = PackedBatch.from_samples(samples).model_inputs(CPU)
    call = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "use_cache": extra == "cache"}
    if extra == "all-ones mask":
        call["attention_mask"] = torch.ones_like(call["input_ids"])
    with torch.inference_mode():
        packed = packed_model(**call).logits[0]
    torch.testing.assert_close(packed, alone(packed_model, samples), atol=2e-5, rtol=1e-5)


def test_isolation_test_can_fail(packed_model, samples):
    """Without restarting positions and boundaries the same pack leaks: the tests above see more than rounding."""
    ids = PackedBatch.from_samples(samples).input_ids
    with torch.inference_mode():
        leaked = packed_model(ids, use_cache=False).logits[0]
    assert (leaked - alone(packed_model, samples)).abs().max() > 0.1


def test_two_rows_of_packs(packed_model, samples):
    """Rows of equal length, each a pack of its own; only positions tell."""
    first, second = samples[:3], [samples[4], samples[2][: 38 - 13]]
    rows = [PackedBatch.from_samples(part) for part in (first, second)]
    with torch.inference_mode():
        both = packed_model(
            torch.cat([row.input_ids for row in rows]),
            position_ids=torch.cat([row.position_ids for row in rows]),
            use_cache=False,
        ).logits
    torch.testing.assert_close(both[0], alone(packed_model, first), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(both[1], alone(packed_model, second), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_sdpa(packed_model, tiny_model_path, side):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32, attn_implementation="sdpa")
    ids = torch.randint(0, 1000, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.long)
    for row, padding in enumerate((0, 4, 7)):
        mask[row, slice(0, padding) if side == "left" else slice(9 - padding, 9)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        ours = packed_model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        theirs = reference.eval()(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_padding_and_cache_equals_sdpa(packed_model, tiny_model_path, tokenizer, cache):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer.padding_side = "left"
    inputs = tokenizer(["def f(x):", "import os\n\n\ndef main(argument):"], return_tensors="pt", padding=True)
    call = {**inputs, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "cache_implementation": cache}
    if cache == "dynamic":
        del call["cache_implementation"]
    assert packed_model.generate(**call).tolist() == reference.eval().generate(**call).tolist()


def test_gradients_in_a_pack_equal_those_alone(packed_model, samples):
    packed_model.double()  # so that only a leak can show, not the order of sums

    def gradients(batches):
        packed_model.zero_grad()
        for batch in batches:
            packed_model(**batch.model_inputs(CPU)).logits.square().sum().backward()
        return [p.grad.clone() for p in packed_model.parameters()]

    packed = gradients([PackedBatch.from_samples(samples)])
    for one, other in zip(packed, gradients([PackedBatch.from_samples([s]) for s in samples]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9 * float(other.abs().max()), rtol=1e-7)


def test_sliding_window_equals_eager(samples):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=5, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    expected = alone(model, samples)
    model.set_attn_implementation(ATTENTION)
    with torch.inference_mode():
        packed = model(**PackedBatch.from_samples(samples).model_inputs(CPU)).logits[0]
    torch.testing.assert_close(packed, expected, atol=2e-5, rtol=1e-5)


def test_softcap_equals_eager(samples):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2", vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, initializer_range=0.5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    expected = alone(model, samples)
    model.set_attn_implementation(ATTENTION)
    with torch.inference_mode():
        packed = model(**PackedBatch.from_samples(samples).model_inputs(CPU)).logits[0]
    torch.testing.assert_close(packed, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_sinks_are_keys_without_a_value(heads, window):
    """Against the definition, sample by sample: one more column of scores before the softmax, left out behind it."""
    torch.manual_seed(0)
    lengths, (many, few) = [5, 1, 7], heads
    q, k, v = (torch.randn(1, n, sum(lengths), 8, requires_grad=True) for n in (many, few, few))
    sinks = torch.randn(many, requires_grad=True)
    bounds = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    parts = []
    for start, end in itertools.pairwise(bounds.tolist()):
        queries, keys, values = (t[0, :, start:end] for t in (q, k, v))
        keys, values = (t.repeat_interleave(many // few, 0) for t in (keys, values))
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        seen = seen if window is None else seen.triu(1 - window)
        scores = (queries @ keys.mT * 8**-0.5).masked_fill(~seen, -torch.inf)
        weights = torch.cat([scores, sinks[:, None, None].expand(-1, end - start, 1)], -1).softmax(-1)[..., :-1]
        parts.append((weights @ values).transpose(0, 1))
    expected = torch.cat(parts)[None]
    ours, _ = varlen_attention(
        torch.nn.Module(), q, k, v, None, cu_seq_lens_q=bounds, sliding_window=window, s_aux=sinks
    )
    torch.testing.assert_close(ours, expected)
    slope = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(out, (q, k, v, sinks), slope) for out in (ours, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)
    # a step with a cache, and a padded batch
    step, _ = varlen_attention(torch.nn.Module(), q[:, :, 12:], k[:, :, 6:], v[:, :, 6:], None, s_aux=sinks)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    masked, _ = varlen_attention(torch.nn.Module(), q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], mask, s_aux=sinks)
    if window is None:
        torch.testing.assert_close(step, expected[:, 12:])
        torch.testing.assert_close(masked, expected[:, 6:])


@pytest.mark.parametrize("name", ["head_mask", "position_bias"])
def test_what_it_does_not_compute_is_refused(name):
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=name):
        varlen_attention(torch.nn.Module(), x, x, x, None, **{name: torch.zeros(1)})


def test_bidirectional_attention_is_refused():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="bidirectional"):
        varlen_attention(torch.nn.Module(), x, x, x, None, is_causal=False)


class TestCuda:
    """The CUDA route on fake tensors: devices, dtypes, shapes and arguments; no kernel was run on a device."""

    @pytest.mark.parametrize(
        ("fa3", "fa2", "capability", "expected"),
        [
            (True, True, (9, 0), "flash_attention_3"),
            (False, True, (8, 0), "flash_attention_2"),
            (False, False, (8, 0), ATTENTION),
            (True, False, (8, 0), ATTENTION),
        ],
    )
    def test_choice(self, monkeypatch, fa3, fa2, capability, expected):
        monkeypatch.setattr(varlen, "is_flash_attn_3_available", lambda: fa3)
        monkeypatch.setattr(varlen, "is_flash_attn_2_available", lambda: fa2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert isolating_attention("cuda") == expected

    @pytest.mark.parametrize("device", ["cuda", "mps"])
    def test_no_choice_is_refused(self, monkeypatch, device):
        monkeypatch.setattr(varlen, "is_flash_attn_3_available", lambda: True)
        monkeypatch.setattr(varlen, "is_flash_attn_2_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        with pytest.raises(InputError, match="keeps the samples of a pack apart"):
            isolating_attention(device)

    @pytest.mark.parametrize(("window", "left"), [(None, -1), (128, 127)])
    def test_call(self, monkeypatch, window, left):
        calls = []
        real = varlen.varlen_attn

        @functools.wraps(real)  # its signature too, which says what may be passed
        def recorded(*args, **kw):
            calls.append((args, kw))
            return real(*args, **kw)

        monkeypatch.setattr(varlen, "varlen_attn", recorded)
        # PyTorch 2.15 asks what card it is before it chooses a kernel, and a CUDA build then looks for a driver.
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        with FakeTensorMode():
            q = torch.empty(1, 8, 40, 64, dtype=torch.bfloat16, device="cuda")
            k = torch.empty(1, 2, 40, 64, dtype=torch.bfloat16, device="cuda")
            bounds = torch.empty(4, dtype=torch.int32, device="cuda")
            out, _ = varlen_attention(
                torch.nn.Module(),
                q,
                k,
                k,
                None,
                scaling=0.5,
                cu_seq_lens_q=bounds,
                max_length_q=20,
                sliding_window=window,
            )
        assert (out.shape, out.dtype, out.device.type) == ((1, 40, 8, 64), torch.bfloat16, "cuda")
        ((args, kw),) = calls
        assert [tuple(t.shape) for t in args[:3]] == [(40, 8, 64), (40, 2, 64), (40, 2, 64)]
        assert args[3] is bounds
        assert args[4] is bounds
        assert args[5:] == (20, 20)
        options = {"enable_gqa": True, "num_splits": 1}  # as this PyTorch has them
        options = {name: value for name, value in options.items() if name in inspect.signature(real).parameters}
        assert kw == {"scale": 0.5, "window_size": (left, 0), **options}

    @pytest.mark.parametrize(
        ("dtype", "more", "message"),
        [
            (torch.float32, {}, "bfloat16 and float16"),
            (torch.bfloat16, {"dropout": 0.1}, "dropout"),
            (torch.bfloat16, {"softcap": 30.0}, "softcap"),
        ],
    )
    def test_refusals(self, dtype, more, message):
        with FakeTensorMode():
            q = torch.empty(1, 2, 8, 16, dtype=dtype, device="cuda")
            bounds = torch.empty(2, dtype=torch.int32, device="cuda")
            with pytest.raises(ValueError, match=message):
                varlen_attention(torch.nn.Module(), q, q, q, None, cu_seq_lens_q=bounds, max_length_q=8, **more)
