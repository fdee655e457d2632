"""Low-rank adapters on a model (LoRA), or on one held in 4 or 8 bits (QLoRA), and their merge into a full model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from codeact.base.errors import InputError, import_extra
from codeact.models.loading import check_weights, existing_model, load_causal_lm, refused
from codeact.text.chat import time_limit

PATTERN_SECONDS = 60.0
"""Of the processor, for an adapter to find its layers: its patterns are regular expressions, which may never end."""


def quantization_config(quantize: str, compute: torch.dtype) -> Any:
    """Return what ``load_causal_lm`` takes as ``quantization``: None for "none".

    Args:
        quantize: "nf4": 4-bit normal floats with their scales in 8 bits, the QLoRA paper's; "int8": LLM.int8().
        compute: dtype of the matrix products of nf4, and of its storage, so that FSDP can shard it.

    Raises:
        MissingExtraError: bitsandbytes is absent.
    """
    if quantize == "none":
        return None
    import_extra("bitsandbytes", "train", f"--quantize {quantize}")
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=compute,
    )


def add_lora(model: Any, rank: int, alpha: int, dropout: float, targets: str, checkpointing: bool = False) -> Any:
    """Freeze a model and put trainable adapters on its linear layers.

    Args:
        model: a causal model of transformers, quantised or not.
        rank, alpha: an adapter adds ``alpha / rank * B @ A``, A of ``rank`` rows.
        dropout: before A, in training.
        targets: comma-separated module names, or "all-linear": every linear layer but the LM head.
        checkpointing: whether activations will be recomputed, which a quantised model has to know.

    Returns:
        peft's wrapper; the adapters are float32.

    Raises:
        InputError: the model has no layer of one of these names.
        MissingExtraError: peft is absent.
    """
    peft = import_extra("peft", "train", "--lora True")
    names = check_targets(model, targets)
    if getattr(model, "is_quantized", False):
        # An evaluation on a CPU with AVX512-BF16 would pack 4-bit weights for inference, and they stay so in training,
        # where the packed product passes no gradient on (bitsandbytes 0.50).
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if names == ["all-linear"] else names,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def apply_adapter(model: Any, folder: str | Path) -> Any:
    """Return the model with the adapter in a folder added to its weights; it costs nothing while computing.

    Args:
        model: a causal model of transformers; it is changed.
        folder: ``adapter_config.json`` and ``adapter_model.safetensors``, as peft saves them.

    Raises:
        InputError: it does not fit the model: it names other layers, lacks weights, has more or of other shapes, or
            holds NaN. peft by itself warns, and goes on with the base model or random numbers.
        MissingExtraError: peft is absent.
    """
    peft = import_extra("peft", "train", "an adapter")
    existing_model(str(folder))
    with refused(f"adapter {folder} does not fit the model", "give the folder that its training wrote"):
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        with time_limit(PATTERN_SECONDS):
            adapted = peft.get_peft_model(model, config)
        weights = peft.load_peft_weights(str(folder), device="cpu")
        expected = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        peft.set_peft_model_state_dict(adapted, weights)
    report = {"missing_keys": expected - set(weights), "unexpected_keys": set(weights) - expected}
    check_weights(f"adapter {folder}", adapted, report)
    with refused(f"adapter {folder} does not fit the model", "its numbers, or those of its configuration, cannot be"):
        return adapted.merge_and_unload(safe_merge=True).eval()  # which looks for NaN


def merge_adapters(base: str, adapters: str | Path, output: str | Path, dtype: torch.dtype) -> None:
    """Write the model that ``base`` with ``adapters`` is, as a full model with its tokenizer.

    The base is loaded anew and unquantised, and the sum is made in float32: weights in 4 bits could not hold it.

    Args:
        base: folder or hub name of the model that was trained on.
        adapters: folder of the adapters and the tokenizer.
        output: folder to write.
        dtype: of the weights that are written.

    Raises:
        InputError: the base cannot be loaded, or the adapters do not fit it.
    """
    from transformers import AutoTokenizer

    model, _ = load_causal_lm(base, None, torch.float32)
    generation = Path(adapters) / "generation_config.json"
    merged = apply_adapter(model, adapters)
    if generation.exists():
        merged.generation_config = type(merged.generation_config).from_pretrained(adapters)
    merged.to(dtype).save_pretrained(output)
    AutoTokenizer.from_pretrained(adapters).save_pretrained(output)


def check_targets(model: Any, targets: str) -> list[str]:
    """The names of the layers that get adapters; arguments and errors as in ``add_lora``."""
    names = [name.strip() for name in targets.split(",") if name.strip()]
    if names == ["all-linear"]:
        return names
    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
    missing = [name for name in names if name not in layers]
    if missing:
        linear = {
            name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        }
        raise InputError(
            f"--lora_target_modules: {type(model).__name__} has no layer named {', '.join(missing)}; its linear layers "
            f"are {', '.join(sorted(linear))}; or say all-linear"
        )
    return names
