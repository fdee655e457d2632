"""Causal models: loading them safely, fingerprinting them, and proving that a pack keeps their samples apart."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash

from codeact.base.errors import InputError
from codeact.ops.attention import PackedBatch, isolating_attention


def quiet_transformers() -> None:
    """Keep the bars and notices of transformers, and warnings of peft's use of it, out of a command's own output."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_causal_lm(
    name: str, device: torch.device | None, dtype: torch.dtype, quantization: Any = None
) -> tuple[PreTrainedModel, Any]:
    """Load model and tokenizer from a folder or the hub: safetensors only, and none of the model's own code.

    Args:
        name: folder or hub name.
        device: where it goes, with the attention for packs there. None, for training: where transformers puts it, with
            the attention that it chooses; a Trainer moves and shards.
        dtype: of the weights.
        quantization: a configuration of transformers to hold them in fewer bits.

    Raises:
        InputError: there is no such model, or it cannot be loaded under those rules.
    """
    attention = None if device is None else isolating_attention(device)
    name = _existing(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=quantization,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"cannot load model {name!r}: {reason or type(error).__name__}; give a folder with config.json and "
            "*.safetensors, or a hub name that this machine can reach"
        ) from None
    # transformers fills in what a checkpoint lacks with random numbers, and says so in a log only.
    lacking = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if lacking:
        raise InputError(
            f"model {name!r} lacks {len(lacking)} weights of a {type(model).__name__}, such as {lacking[0]}: it is no "
            "complete causal language model"
        )
    return model.eval() if device is None else model.eval().to(device), tokenizer


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model's folder or hub name.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(_existing(name), trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot load tokenizer {name!r}: {reason}; give a model's folder or hub name") from None


def _existing(name: str) -> str:
    """The name, with a home folder put in; what looks like a path must be there."""
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    if name.startswith(("/", "./", "../")) and not Path(name).is_dir():
        raise InputError(f"no such folder: {name}; give one with config.json and *.safetensors, or a hub name")
    return name


def model_fingerprint(name: str, model: PreTrainedModel) -> str:
    """Return the hub commit that was loaded, or the sha256 of a local folder's configuration, tokenizer and weights."""
    folder = Path(name).expanduser()
    return folder_fingerprint(folder) if folder.is_dir() else f"hub:{getattr(model.config, '_commit_hash', None)}"


def model_identity(name: str) -> str:
    """Return what ``model_fingerprint`` does, without loading the weights.

    Raises:
        InputError: there is no such folder, and no such name on the hub or in its cache.
    """
    folder = Path(_existing(name)).expanduser()
    if folder.is_dir():
        return folder_fingerprint(folder)
    try:
        path = cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"cannot load model {name!r}: {reason}; give a folder or a name this machine can reach"
        ) from None
    return f"hub:{extract_commit_hash(str(path), None)}"


def folder_fingerprint(folder: Path) -> str:
    """Return the sha256 of a model folder's configuration, tokenizer and weights."""
    digest = hashlib.sha256()
    for path in sorted(
        p for p in folder.rglob("*") if p.suffix in {".json", ".safetensors", ".jinja", ".model", ".txt"}
    ):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def _refusals_of(model: PreTrainedModel) -> Iterator[None]:
    """Turn what an attention refuses (a dtype, a softcap, sinks) into one line."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        attention, dtype = model.config._attn_implementation, model.dtype
        raise InputError(f"{type(model).__name__} in {dtype} cannot be packed with {attention}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHead:
    """What turns hidden states into logits. ``weight``: (V, D); ``bias``: (V,) or None."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None


def split_head(model: PreTrainedModel) -> tuple[torch.nn.Module, LmHead]:
    """Split a causal model into its trunk (ids -> hidden states) and its LM head, and prove both on a small pack.

    Two samples are run through the trunk in one pack and through the whole model one by one. The logits must agree:
    this catches an attention that lets samples see each other, a recurrent state carried from one to the next, and
    a head that does more than ``hidden @ weight.T`` (a scale, say), whatever the architecture.

    Raises:
        InputError: they do not agree, or the model has no such head.
    """
    trunk, output = model.base_model, model.get_output_embeddings()
    if output is None or trunk is model:
        raise InputError(f"{type(model).__name__} is no causal language model with an LM head")
    text_config = model.config.get_text_config()
    softcap = getattr(text_config, "final_logit_softcapping", None)
    head = LmHead(weight=output.weight, bias=getattr(output, "bias", None), softcap=softcap)

    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(head.weight.shape[0], (n,), generator=generator).numpy() for n in (5, 9, 7)]
    device = head.weight.device
    with torch.inference_mode(), _refusals_of(model):
        packed = trunk(**PackedBatch.from_samples(samples).model_inputs(device)).last_hidden_state[0]
        logits = torch.nn.functional.linear(packed, head.weight, head.bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        alone = torch.cat(
            [model(**PackedBatch.from_samples([sample]).model_inputs(device)).logits[0] for sample in samples]
        )
    # bfloat16 keeps 8 bits and the two runs round in another order; a leak changes logits by much more than that.
    tolerance = (1e-3 if packed.dtype == torch.float32 else 5e-2) * float(alone.float().abs().max())
    difference = float((logits.float() - alone.float()).abs().max())
    if not difference <= tolerance:
        raise InputError(
            f"{type(model).__name__} cannot be packed: the samples of a pack get other logits than alone (difference "
            f"{difference:.2g}); its attention ({model.config._attn_implementation}) or its LM head is not supported"
        )
    return trunk, head
