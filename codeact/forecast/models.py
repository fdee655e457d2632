"""Shapes of the models that a forecast is about: from their configurations, or assumed. No weights are read."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets
import huggingface_hub.constants as hub
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

from codeact.base.errors import InputError
from codeact.base.parsing import read_json
from codeact.ops.flops import ModelFacts


def model_facts(name: str, assumed: float | None) -> ModelFacts:
    """Read a model's configuration, or take the usual shape of a model of ``assumed`` parameters; no weights.

    Raises:
        InputError: neither is there.
    """
    config, source = _config(name), f"{name}: its config.json"
    if config is None and assumed is None:
        raise InputError(
            f"cannot reach the configuration of {name}; add to the settings: forecast: {{parameters: 6.7e9}}"
        )
    if config is None and assumed is not None:
        # 12 hidden^2 parameters a layer, beside embeddings and head; hidden / 128 layers, as Llama has.
        hidden = max(128, 128 * round((assumed * 128 / 12) ** (1 / 3) / 128))
        config, source = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=round(8 / 3 * hidden / 64) * 64,
            num_hidden_layers=max(1, round((assumed - 2 * 32_000 * hidden) / (12 * hidden**2))),
            num_attention_heads=hidden // 128,
            num_key_value_heads=hidden // 128,
            vocab_size=32_000,
        ), f"{name} is not here: a Llama of the usual shape is assumed"  # fmt: skip
    return _facts_of(name, config, source)


def embedder_facts(name: str) -> tuple[ModelFacts, int, str]:
    """The same of an embedding model, the tokens it takes, and a name to load its tokenizer by ("": there is none)."""
    config = _config(name)
    if config is None:  # as all-mpnet-base-v2: 12 layers of 768
        source = f"{name} is not here: 12 layers of width 768 are assumed"
        return _facts_of(name, BertConfig(), source, causal=False), 384, ""
    length = int(getattr(config, "max_position_embeddings", 512))
    with suppress(OSError, ValueError, TypeError, KeyError):
        path = Path(name).expanduser() / "sentence_bert_config.json"
        length = int(read_json(path)["max_seq_length"])
    return _facts_of(name, config, f"{name}: its config.json", causal=False), length, name


def _config(name: str) -> Any:
    with suppress(OSError, ValueError, ImportError):
        name = str(Path(name).expanduser()) if name.startswith("~") else name
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    return None


def _facts_of(name: str, config: Any, source: str, causal: bool = True) -> ModelFacts:
    """Build the model without memory for its weights, and count."""
    with torch.device("meta"):
        model = (AutoModelForCausalLM if causal else AutoModel).from_config(config, trust_remote_code=False)
    facts = ModelFacts.of(model, source)
    if facts is None:
        why = "lacks a width, or is a mixture of experts, whose cost is not known here"
        raise InputError(f"the configuration of {name} {why}")
    return facts


def weight_bytes(name: str) -> int:
    """Of the weights in a model's folder; 0 where they are on the hub."""
    folder = Path(name).expanduser()
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) if folder.is_dir() else 0


@contextmanager
def hub_if_reached() -> Iterator[None]:
    """Let hub clients look into their caches only while the hub does not answer; they would try again for a minute."""
    places: tuple[Any, ...] = (hub, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in places]
    try:
        if not any(before) and not _answers(hub.ENDPOINT):
            for module in places:
                module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(places, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _answers(endpoint: str, seconds: float = 3.0) -> bool:
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True  # only the client knows how to ask
    place = urlsplit(endpoint)
    with suppress(OSError):
        address = (place.hostname or "", place.port or (443 if place.scheme == "https" else 80))
        socket.create_connection(address, timeout=seconds).close()
        return True
    return False
