"""Causal models: loading them safely, refusing weights that are not there, and fingerprinting what was loaded."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash

from codeact.base.devices import resolve_device, resolve_dtype
from codeact.base.errors import InputError, NotHereError, require
from codeact.base.machine import free_memory
from codeact.models.weight_files import check_fits, loaded_bytes


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
        device: where it goes. None, for training: where transformers puts it; a Trainer moves and shards.
        dtype: of the weights.
        quantization: a configuration of transformers to hold them in fewer bits.

    Raises:
        InputError: there is no such model, or it cannot be loaded under those rules.
    """
    name = existing_model(name)
    _check_room(f"model {name!r}", name, dtype, device, quantization)
    with refused(
        f"cannot load model {name!r}",
        "give a folder with config.json and *.safetensors, or a hub name that this machine can reach",
    ):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        check_config(f"model {name!r}", AutoConfig.from_pretrained(name, trust_remote_code=False))
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            quantization_config=quantization,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    check_weights(f"model {name!r}", model, report)
    model = model.eval() if device is None else model.eval().to(device)
    _check_computes(f"model {name!r}", model)
    return model, tokenizer


def _check_room(what: str, name: str, dtype: torch.dtype, device: torch.device | None, quantization: Any) -> None:
    """Refuse weights that do not fit into the CPU's memory, where they are loaded, or where they go from there.

    Raises:
        NotHereError: they do not.
    """
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        return  # every process keeps a part
    number = float(dtype.itemsize)
    if quantization is not None:
        number = 0.5 if getattr(quantization, "load_in_4bit", False) else 1.0
    needed = loaded_bytes(name, number)
    remedy = "take a smaller model" + (", or say --dtype bfloat16" if number == 4 else "")
    check_fits(what, needed, free_memory(), "this machine", remedy)
    if device is not None and device.type == "cuda":
        check_fits(what, needed, free_memory(device), str(device), remedy)


@torch.inference_mode()
def _check_computes(what: str, model: PreTrainedModel) -> None:
    """Refuse a model that makes NaN or infinity of finite weights, as by a number of its configuration.

    Raises:
        InputError: it does.
    """
    if any(weight.is_meta or hasattr(weight, "ds_id") for weight in model.parameters()):  # they come later
        return
    if getattr(model, "is_quantized", False):  # a first pass without gradients changes layers that are trained through
        return
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(_TRIAL, device=embedding.device)[None] % len(embedding)
    with refused(f"{what} does not run", "is its config.json that of its weights?"):
        logits = model(input_ids=ids, use_cache=False).logits
    if not logits.isfinite().all():
        wider = "" if model.dtype == torch.float32 else f", or its numbers are too large for {model.dtype}: "
        raise InputError(
            f"{what} computes NaN or infinity from finite weights: a number of its config.json cannot be right"
            + (f"{wider}say --dtype float32" if wider else "")
        )


def model_and_tokenizer(
    model: PreTrainedModel | str | os.PathLike[str], tokenizer: Any, dtype: str, device: str, call: str
) -> tuple[PreTrainedModel, Any]:
    """Both, loaded where ``model`` is a name or folder.

    Args:
        model: a causal model, or the name or folder of one.
        tokenizer: its tokenizer; may be None where the model is loaded here.
        dtype, device: of one that is loaded here.
        call: how it is called with a tokenizer, for messages.

    Raises:
        InputError: the model cannot be loaded, or there is no tokenizer.
    """
    if isinstance(model, str | os.PathLike):
        place = resolve_device(device)
        model, loaded = load_causal_lm(os.fspath(model), place, resolve_dtype(dtype, place))
        tokenizer = tokenizer or loaded
    require(f"the first argument of {call}", model, "get_input_embeddings", "a causal model of transformers, or a name")
    if tokenizer is None:
        raise InputError(f"a loaded model needs its tokenizer: {call}")
    require(f"the second argument of {call}", tokenizer, "convert_ids_to_tokens", "a tokenizer of transformers")
    return model, tokenizer


_LARGEST_DEPTH = 1000  # layers; the deepest models have some 130
_LARGEST_EPSILON = 0.1  # added before a division by what is about 1; models have 1e-3 and less
_TRIAL = 8  # tokens


def check_config(what: str, config: Any) -> None:
    """Refuse a configuration without layers, with so many that making them would not end, or with impossible numbers.

    Raises:
        InputError: it is one; ``what`` names the model.
    """
    depth = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not isinstance(depth, int) or not 1 <= depth <= _LARGEST_DEPTH:
        raise InputError(f"{what}: num_hidden_layers in config.json is {depth!r}, not 1 to {_LARGEST_DEPTH}; mend it")
    for name, number in _numbers(config.to_dict()):
        nan = isinstance(number, float) and math.isnan(number)  # infinity is a limit of Mamba's
        if nan or (name.endswith(("eps", "epsilon")) and not 0 <= number <= _LARGEST_EPSILON):
            raise InputError(f"{what}: {name} in config.json is {number}, which cannot be; mend it")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in what JSON holds, with the key above it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from _numbers(item, str(key))
    for item in value if isinstance(value, list | tuple) else ():
        yield from _numbers(item, name)


def check_config_of_folder(what: str, name: str) -> None:
    """``check_config`` of every model in a folder, or of the hub's; for libraries that load by themselves.

    Raises:
        InputError: one is refused.
    """
    folders = [str(path.parent) for path in sorted(Path(name).rglob("config.json"))] if Path(name).is_dir() else [name]
    for folder in folders:
        config = None
        with suppress(Exception):  # of a pooling layer, say; what is no configuration of a model is refused later
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config is not None:
            check_config(what, config)


def check_weights(what: str, model: torch.nn.Module, report: Mapping[str, Collection[Any]] | None = None) -> None:
    """Refuse weights that are not there: missing, unexpected, of another shape, or not finite; and layers that are not.

    Args:
        what: names the model or the adapter in the message.
        model: what was loaded.
        report: ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys`` of the loading; each may be absent.

    Raises:
        InputError: something of that kind is there. transformers and peft fill in what a file lacks with random numbers
            or leave it out, and say so in a log only.
    """
    kind = type(model).__name__
    if hasattr(config := getattr(model, "config", None), "get_text_config"):
        check_config(what, config)
    report = report or {}
    lacking = sorted(map(str, {*report.get("missing_keys", ()), *map(_first, report.get("mismatched_keys", ()))}))
    if lacking:
        raise InputError(
            f"{what} lacks {len(lacking)} weights of a {kind}, such as {lacking[0]}: the file is not complete, or is "
            "of another model"
        )
    # A table of angles that older versions saved, and that follows from the configuration.
    unknown = sorted(key for key in report.get("unexpected_keys", ()) if not key.endswith((".inv_freq", ".attn.bias")))
    if unknown:
        raise InputError(
            f"{what} holds {len(unknown)} weights that a {kind} has no place for, such as {unknown[0]}: it is of "
            "another model, or its configuration says something else than its weights"
        )
    named = [
        (name, tensor)
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_meta and tensor.numel()
        if not hasattr(tensor, "quant_state")  # bytes of 4-bit weights, which may lie there as another dtype
    ]
    # One wait for the device, not one a tensor.
    finite = [torch.stack(tensor.detach().aminmax()).isfinite().all() for _, tensor in named]
    bad = [name for (name, _), good in zip(named, finite, strict=True) if not good] if finite else []
    if bad and bad[0] not in model.state_dict():  # not of the file: made from the configuration
        raise InputError(f"{what} makes NaN or infinity in {bad[0]}: a number of its config.json cannot be right")
    if bad:
        raise InputError(
            f"{what} holds NaN or infinity in {len(bad)} of {len(named)} weights, such as {bad[0]}: it was damaged, or "
            "its training diverged"
        )


def _first(key: Any) -> Any:
    """The name of a weight of another shape, which comes with both shapes."""
    return key[0] if isinstance(key, tuple) else key


@contextmanager
def refused(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises over files that it did not write into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise NotHereError(f"{what}: {reason or type(error).__name__}; {remedy}") from None


def config_of(name: str) -> Any:
    """A model's configuration, or None: it cannot be had."""
    with suppress(OSError, ValueError, ImportError):
        name = str(Path(name).expanduser()) if name.startswith("~") else name
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    return None


def positions_of(config: Any) -> int | None:
    """Most tokens of a sequence by a model's configuration; None: it names no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model's folder or hub name.

    Raises:
        InputError: there is none.
    """
    name = existing_model(name)
    with refused(f"cannot load tokenizer {name!r}", "give a model's folder or hub name"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def existing_model(name: str) -> str:
    """The name, with a home folder put in; what looks like a path must be there, and a folder hold files only.

    Raises:
        InputError: it is not there, or holds a pipe, socket or device: reading one would wait for ever.
    """
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    if name.startswith(("/", "./", "../")) and not Path(name).is_dir():
        raise InputError(f"no such folder: {name}; give one with config.json and *.safetensors, or a hub name")
    for path in Path(name).rglob("*") if Path(name).is_dir() else ():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is no file; a model's folder holds files only")
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
    folder = Path(existing_model(name)).expanduser()
    if folder.is_dir():
        return folder_fingerprint(folder)
    with refused(f"cannot load model {name!r}", "give a folder or a name this machine can reach"):
        path = cached_file(name, "config.json")
    return f"hub:{extract_commit_hash(str(path), None)}"


def folder_fingerprint(folder: Path) -> str:
    """Return the sha256 of a model folder's configuration, tokenizer and weights."""
    digest = hashlib.sha256()
    for path in sorted(
        p
        for p in folder.rglob("*")
        if p.suffix in {".json", ".safetensors", ".jinja", ".model", ".txt"} and p.is_file()
    ):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"
