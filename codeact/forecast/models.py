"""Shapes of the models that a forecast is about: from their configurations, or assumed. No weights are read."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from codeact.base.errors import InputError
from codeact.forecast.cost import ModelFacts
from codeact.ops.flops import ModelShape, ParameterCounts


def model_facts(name: str, assumed: float | None) -> ModelFacts:
    """Read a model's configuration, or take the usual shape of a model of ``assumed`` parameters; no weights.

    Raises:
        InputError: neither is there.
    """
    from transformers import LlamaConfig

    config = _config(name)
    if config is not None:
        facts = _facts_of(config, f"{name}: its config.json")
        if facts is None:
            raise InputError(
                f"the configuration of {name} lacks a width, or is a mixture of experts, whose cost is not known here"
            )
        return facts
    if assumed is None:
        raise InputError(
            f"cannot reach the configuration of {name}; add to the settings: forecast: {{parameters: 6.7e9}}"
        )
    # 12 hidden^2 parameters a layer, beside embeddings and head; hidden / 128 layers, as Llama has.
    hidden = max(128, 128 * round((assumed * 128 / 12) ** (1 / 3) / 128))
    layers = max(1, round((assumed - 2 * 32_000 * hidden) / (12 * hidden**2)))
    width = round(8 / 3 * hidden / 64) * 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        vocab_size=32_000,
    )
    facts = _facts_of(config, f"{name} is not here: a Llama of the usual shape is assumed")
    assert facts is not None
    return facts


def embedder_facts(name: str) -> tuple[ModelFacts, int, str]:
    """The same of an embedding model, the tokens it takes, and a name to load its tokenizer by ("": there is none)."""
    from transformers import BertConfig

    config, place = _config(name), name
    if config is None:
        config, place = BertConfig(), ""  # as all-mpnet-base-v2: 12 layers of 768
        source = f"{name} is not here: 12 layers of width 768 are assumed"
    else:
        source = f"{name}: its config.json"
    facts = _facts_of(config, source, causal=False)
    if facts is None:
        raise InputError(f"the configuration of the embedding model {name} lacks a width")
    length = 384 if not place else int(getattr(config, "max_position_embeddings", 512))
    with suppress(OSError, ValueError, TypeError, KeyError):
        path = Path(name).expanduser() / "sentence_bert_config.json"
        length = int(json.loads(path.read_text(encoding="utf-8"))["max_seq_length"])
    return facts, length, place


def _config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(Path(name).expanduser()) if name.startswith("~") else name, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError):
        return None


def _facts_of(config: Any, source: str, causal: bool = True) -> ModelFacts | None:
    """Build the model without memory for its weights, and count."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    shape = ModelShape.from_config(config)
    if shape is None:
        return None
    with torch.device("meta"):
        model = (AutoModelForCausalLM if causal else AutoModel).from_config(config, trust_remote_code=False)
    counts = ParameterCounts.of(model)
    head = counts.head_trained
    lookup = sum(p.numel() for p in model.parameters()) - counts.trained - head
    output = model.get_output_embeddings()
    layers = tuple(
        (name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    )
    return ModelFacts(shape=shape, trunk=counts.trained, head=head, lookup=lookup, layers=layers, source=source)


def weight_bytes(name: str) -> int:
    """Of the weights in a model's folder; 0 where they are on the hub."""
    folder = Path(name).expanduser()
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) if folder.is_dir() else 0


@contextmanager
def hub_if_reached() -> Iterator[None]:
    """Let hub clients look into their caches only while the hub does not answer; they would try again for a minute."""
    import datasets
    import huggingface_hub.constants as hub

    places = ((hub, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in places]
    offline = not any(before) and not _answers(hub.ENDPOINT)
    try:
        for module, name in places if offline else ():
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _answers(endpoint: str, seconds: float = 3.0) -> bool:
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True  # only the client knows how to ask
    place = urlsplit(endpoint)
    try:
        address = (place.hostname or "", place.port or (443 if place.scheme == "https" else 80))
        with socket.create_connection(address, timeout=seconds):
            return True
    except OSError:
        return False
