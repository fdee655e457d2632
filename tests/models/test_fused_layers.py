"""Layers that are fused while a model scores: which ones, that they compute the same, and that all is undone."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from codeact.models.fused_layers import fused_layers

SIZE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def make(kind, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZE | settings)).to(dtype).eval()
    for parameter in model.parameters():  # norms begin at ones, which would hide that their weights are not read
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
    return model


def fused_parts(model):
    """Kinds of the modules that have a forward of their own, and whether the rotary embedding is replaced."""
    kinds = {type(module).__name__ for module in model.modules() if "forward" in module.__dict__}
    home = sys.modules[type(model).__module__]
    return kinds, getattr(home, "apply_rotary_pos_emb", None)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(60)[None] % 97).logits


@pytest.mark.parametrize(
    ("kind", "kinds", "rotary"),
    [
        ("llama", {"LlamaRMSNorm", "LlamaMLP"}, True),
        ("mistral", {"MistralRMSNorm", "MistralMLP"}, True),
        ("qwen2", {"Qwen2RMSNorm", "Qwen2MLP"}, True),
        ("qwen3", {"Qwen3RMSNorm", "Qwen3MLP"}, True),
        ("phi3", {"Phi3RMSNorm"}, None),  # gate and up are one product
        ("gemma2", set(), True),  # weights of 1 + w, GELU
        ("gpt_neox", set(), None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families(kind, kinds, rotary, dtype):
    model = make(kind, dtype)
    _, function = fused_parts(model)
    plain = logits(model)
    with fused_layers(model):
        found, replaced = fused_parts(model)
        fused = logits(model)
    assert found == kinds
    if rotary is not None:
        assert (replaced is not function) == rotary
    assert fused_parts(model) == (set(), function)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert float((fused - plain).abs().max()) <= tolerance * float(plain.abs().max())
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_an_mlp_with_another_activation_stays(act):
    model = make("llama", hidden_act=act)
    with fused_layers(model):
        assert fused_parts(model)[0] == {"LlamaRMSNorm"}


def test_all_is_undone_after_an_error_and_forwards_of_others_stay():
    model = make("llama")
    _, function = fused_parts(model)

    def own(x):
        return x * 0

    norm = model.model.norm
    norm.forward = own

    def fail():
        with fused_layers(model):
            assert norm.forward is own
            assert not logits(model).any()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert norm.forward is own
    del norm.forward
    assert fused_parts(model) == (set(), function)


def test_gradients_take_the_plain_way():
    model = make("llama")
    ids = torch.arange(20)[None]
    with fused_layers(model):
        loss = model(ids, labels=ids).loss
    loss.backward()
    grown = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(grown[name], parameter.grad)


def test_lora_on_the_mlp_is_called():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        make("llama"), LoraConfig(target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    )
    model.eval()
    plain = logits(model)
    with fused_layers(model):
        assert "LlamaMLP" in fused_parts(model)[0]
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-5)
