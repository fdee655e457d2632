"""Tiny random models of many families, and what a sample by itself gets from one: what packs are held against."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
SWITCH, WINDOW, LONGEST = 32, 16, 128  # where RoPE changes, what a sliding window spans, and positions of a model

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LONGEST,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 5.0, 7.0],
    "original_max_position_embeddings": SWITCH,
}  # fmt: skip
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    "phi3 longrope": {"rope_parameters": _LONGROPE, "original_max_position_embeddings": SWITCH},
    "llama longrope": {"rope_parameters": _LONGROPE},
    "mistral sliding": {"sliding_window": WINDOW},
    "gemma2": {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gpt_neo": {
        "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW
    },
    "llama4_text": {
        "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32, "attention_chunk_size": WINDOW,
        "floor_scale": SWITCH + 1, "attn_scale": 0.5, "no_rope_layers": [1, 0],
    },
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "doge": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": WINDOW},
    "mamba": {"state_size": 8},
    "jamba": {"num_hidden_layers": 5, "num_experts": 2, "mamba_d_state": 8, "use_mamba_kernels": False},
    "qwen3_next": {
        "num_hidden_layers": 4, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "lfm2": {},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **_MAMBA, "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"],
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "minimax": {
        "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": WINDOW},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
    # Beyond 2 blocks of 32 keys it chooses among them; beyond 24 keys the next one among all.
    "minimax_m3_vl_text": {
        "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "index_block_size": 32, "index_topk_blocks": 2,
        "index_n_heads": 2, "index_head_dim": 8, "layer_types": ["full_attention", "minimax_m3_sparse"],
    },
    "deepseek_v32": {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 16, "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_group": 1,
        "topk_group": 1, "n_shared_experts": 1, "index_topk": 24, "index_n_heads": 2, "index_head_dim": 16,
    },
}  # fmt: skip
# Its scores of keys are a sum over heads, each after a ReLU: of two heads every fourth is 0, of many hardly one. All of
# them are of a token whose embedding is 0, as that of padding.
_CONFIGS["deepseek_v32 many heads"] = {**_CONFIGS["deepseek_v32"], "index_n_heads": 32, "pad_token_id": None}


def make_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of that name, in evaluation mode; its weights are large enough for a leak to show."""
    torch.manual_seed(0)
    sizes = {**_SIZES, "max_position_embeddings": SWITCH} if name == "llama dynamic" else _SIZES
    config = AutoConfig.for_model(name.partition(" ")[0], **{**sizes, **_CONFIGS[name]})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    return model


def known(name: str) -> bool:
    """Whether the installed transformers has that architecture."""
    return name.partition(" ")[0] in CONFIG_MAPPING


def share_the_pass(model: Any, how: str, room: int = 0) -> Any:
    """Make a model compute something of all tokens of a pass, once there are more than ``room``.

    ``capacity``: the feed-forward network takes half of the tokens, the first ones, as experts do that drop what is too
    many; ``statistics``: it divides by the largest number of the pass, as dynamic quantization of activations does;
    ``mean``: it takes the mean of the pass away, as a batch norm does in training.
    """
    for layer in model.model.layers:
        plain = layer.mlp.forward

        def forward(hidden: torch.Tensor, plain: Any = plain) -> torch.Tensor:
            tokens = hidden.shape[0] * hidden.shape[1]
            if tokens <= room:
                return plain(hidden)
            if how == "statistics":
                return plain(hidden / hidden.abs().max())
            if how == "mean":
                return plain(hidden - hidden.mean((0, 1)))
            kept = torch.arange(tokens).view(hidden.shape[:2]) < max(room, tokens // 2)
            return plain(hidden) * kept[..., None]

        layer.mlp.forward = forward
    return model


def logits_alone(model: Any, ids: list[int]) -> torch.Tensor:
    """Float64 (L, V) of a sample by itself, without a cache, by a copy that has seen nothing before."""
    with torch.inference_mode():
        logits: torch.Tensor = copy.deepcopy(model)(torch.tensor([ids]), use_cache=False).logits[0].double()
    return logits


def nll_alone(model: Any, ids: list[int], start: int) -> float:
    """Nats of ``ids[start:]``, of a sample by itself."""
    losses = -logits_alone(model, ids).log_softmax(-1)
    return float(sum(losses[place - 1, ids[place]] for place in range(start, len(ids))))


def random_ids(length: int, seed: int) -> list[int]:
    """Token ids of a sample."""
    ids: list[int] = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids
