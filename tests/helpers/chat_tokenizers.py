"""Small tokenizers with the control tokens of the model families, made from SmolLM2's."""

from __future__ import annotations

import copy
from typing import Any

# family: BOS, EOS, other control tokens, whether the tokenizer writes its BOS
_TOKENS: dict[str, tuple[str, str, tuple[str, ...], bool]] = {
    "codellama": ("<s>", "</s>", (), True),
    "codegemma": ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), True),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<|EOT|>", (), True),  # noqa: RUF001
    "starcoder2": ("<|endoftext|>", "<|endoftext|>", (), False),
    "codeqwen": ("<|endoftext|>", "<|im_end|>", ("<|im_start|>",), False),
    "llama3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        True,
    ),
}


_made: dict[str, Any] = {}


def family_tokenizer(tokenizer: Any, name: str) -> Any:
    """One for all tests: change only a copy."""
    if name not in _made:
        _made[name] = _make(tokenizer, name)
    return _made[name]


def _make(tokenizer: Any, name: str) -> Any:
    from tokenizers.processors import TemplateProcessing

    bos, eos, others, writes_bos = _TOKENS[name]
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": bos, "eos_token": eos})
    made.add_tokens(list(others), special_tokens=True)
    if writes_bos:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.convert_tokens_to_ids(bos))]
        )
    return made


def llama2_tokenizer() -> Any:
    """One that works as Llama 2's does: a space is put before every text, line breaks are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    inner.train_from_iterator(["[INST] add two numbers [/INST] def add(a, b): return a + b"] * 4, trainer)
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
