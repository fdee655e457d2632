"""What ``codeact train`` is tried on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from codeact.data.records import write_jsonl
from tests.conftest import make_records


@pytest.fixture(autouse=True, scope="module")
def sums_in_one_order(one_thread):
    """A model this small only waits for a second thread; and sums in one order are what bit-identity means."""


@pytest.fixture(scope="module")
def selected(tmp_path_factory) -> Path:
    """What ``codeact select`` writes."""
    path = tmp_path_factory.mktemp("data") / "selected.jsonl"
    rows = [
        {
            "id": record.id,
            "messages": [
                {"role": "user", "content": record.question},
                {"role": "assistant", "content": record.answer},
            ],
            "ifd": 0.5,
            "cluster": 0,
            "extra": {},
        }
        for record in make_records(30)
    ]
    write_jsonl(path, rows)
    return path


@pytest.fixture
def train(codeact, tiny_model_path):
    """Run ``codeact train`` on the tiny model: (exit code, stdout, stderr)."""

    def run(*arguments, model=tiny_model_path) -> tuple[int, str, str]:
        return codeact("train", *arguments, *(("--model_name_or_path", model) if model else ()))

    return run


@pytest.fixture(scope="module")
def even_model_path(tmp_path_factory, tokenizer) -> Path:
    """As the tiny model, in widths that bitsandbytes can take in blocks of 32."""
    folder = tmp_path_factory.mktemp("even-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
