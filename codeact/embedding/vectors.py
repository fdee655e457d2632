"""Texts -> unit vectors by a sentence-transformers model."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from codeact.base.console import Progress
from codeact.base.errors import InputError, require
from codeact.base.machine import free_memory
from codeact.embedding.files import Vectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_MODEL = "sentence-transformers/all-mpnet-base-v2"

_TOKENIZE_TEXTS = 1_000  # texts whose token ids are in memory at a time, only to be counted
_MEMORY_SHARE = 0.4  # of what is free, for the activations of a layer

logger = logging.getLogger("codeact")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embeddings:
    """``vectors`` (N, D) float32, unit length; how many of the N texts were cut to the model's maximum; tokens read."""

    vectors: Vectors
    truncated: int
    tokens: int


def embed(
    texts: Sequence[str],
    model: str | os.PathLike[str] | SentenceTransformer = DEFAULT_MODEL,
    *,
    batch_size: int = 64,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = False,
) -> Vectors:
    """Embed ``texts``; equal texts give equal vectors up to rounding, whatever stands beside them.

    Args:
        texts: N strings. Those longer than the model's maximum are cut at their end, and their number is logged.
        model: a hub name, a folder, or a loaded model, which keeps its own device and dtype. Only safetensors weights
            are read and no code of the model's repository is run. The default is the embedder of CodeACT
            (arXiv 2408.02193).
        batch_size: texts a batch, fewer where so many long ones would not fit into the memory that is free; batches are
            of texts of about the same length.
        dtype: of the computation: float32, bfloat16, float16, or auto (bfloat16 where the device has it natively).
        progress: show a bar with texts and tokens per second.

    Returns:
        (N, D) float32 of unit length; (0, D) for no texts.

    Raises:
        InputError: no such model, an argument is not as described, or a vector is not finite (named by its position).
    """
    if isinstance(texts, str):
        raise InputError("texts must be a list of strings, not one string")
    encoder = load_embedder(model, device=device, dtype=dtype)
    texts = list(texts)
    with Progress(len(texts), "texts", "embedding", show=progress) as bar:
        result = embed_texts(texts, encoder, batch_size=batch_size, on_batch=bar)
    _log_truncated(result.truncated, len(texts), encoder)
    return result.vectors


def load_embedder(
    model: str | os.PathLike[str] | SentenceTransformer, *, device: str = "auto", dtype: str = "auto"
) -> SentenceTransformer:
    """Return ``model`` if it is loaded already, else load it. Arguments and errors as in `embed`."""
    if not isinstance(model, str | os.PathLike):
        if (device, dtype) != ("auto", "auto"):
            raise InputError("a loaded model keeps its device and dtype; pass its name or folder to choose them")
        require("model", model, "tokenizer", "a SentenceTransformer, or the name or folder of one")
        return model
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import is_sentence_transformer_model

    from codeact.base.devices import resolve_device, resolve_dtype
    from codeact.models.loading import check_config_of_folder, check_weights, existing_model, refused
    from codeact.models.weight_files import check_fits, loaded_bytes

    torch_device = resolve_device(device)
    name = existing_model(os.fspath(model))
    what = f"embedding model {name!r}"
    check_config_of_folder(what, name)
    model_kwargs = {"use_safetensors": True, "dtype": (kind := resolve_dtype(dtype, torch_device))}
    check_fits(what, 2 * loaded_bytes(name, kind.itemsize), free_memory(), "this machine")  # see _loading_report
    with refused(f"cannot load the {what}", "give a folder with safetensors weights or a hub name as the model"):
        encoder = SentenceTransformer(
            name, device=str(torch_device), model_kwargs=model_kwargs, trust_remote_code=False
        )
        report = _loading_report(getattr(encoder[0], "auto_model", None))
    check_weights(what, encoder, report)
    with suppress(OSError):  # the hub was reached a moment ago
        if not is_sentence_transformer_model(name):
            kind = (getattr(encoder[0].auto_model.config, "architectures", None) or ["a model"])[0]
            logger.warning(
                "%s is %s and no sentence-transformers model (it has no modules.json): a vector is the mean over its "
                "last layer, which it was not trained for; give an embedding model, such as %s",
                name,
                kind,
                DEFAULT_MODEL,
            )
    return encoder


def _loading_report(trunk: Any) -> dict[str, list[str]] | None:
    """What transformers said of a model's weights when it loaded them, which sentence-transformers does not hand on.

    So they are loaded once more. A head, which a trunk leaves out, and a pooler, whose output no vector has in it, are
    no weights that lack or are too many. None where there is no such model.
    """
    place = getattr(getattr(trunk, "config", None), "_name_or_path", "")
    if not place:
        return None
    _, report = type(trunk).from_pretrained(
        place, config=trunk.config, use_safetensors=True, dtype=trunk.dtype, output_loading_info=True
    )
    own = {name for name, _ in trunk.named_children()} - {"pooler"}

    def of_trunk(key: Any) -> bool:
        name = str(key[0] if isinstance(key, tuple) else key).removeprefix(f"{trunk.base_model_prefix}.")
        return name.partition(".")[0] in own

    return {kind: list(filter(of_trunk, keys)) for kind, keys in report.items() if kind.endswith("_keys")}


def embed_texts(
    texts: Sequence[str],
    encoder: SentenceTransformer,
    *,
    batch_size: int = 64,
    names: Sequence[str] | None = None,
    on_batch: Callable[[int, int], object] | None = None,
) -> Embeddings:
    """Embed ``texts`` with a loaded model.

    Args:
        names: what to call each text in an error; by default its position.
        on_batch: called after every batch with its number of texts and of tokens.

    Raises:
        InputError: as in `embed`.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")

    def name(position: int) -> str:
        return names[position] if names else f"text {position}"

    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{name(position)} is not a string but {type(text).__name__}")
    # half of a surrogate pair (a cut emoji) is no text: tokenizers refuse it, so it becomes a question mark
    texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    if not texts:
        return Embeddings(vectors=np.empty((0, _encode([""], encoder).shape[1]), np.float32), truncated=0, tokens=0)

    full_lengths = _token_counts(texts, encoder)
    limit = getattr(encoder, "max_seq_length", None)
    lengths = full_lengths if limit is None else np.minimum(full_lengths, limit)
    # longest first: a batch that does not fit in memory is the first one, not the one after hours
    order = np.argsort(-lengths, kind="stable")
    vectors: Vectors | None = None
    start, most = 0, _tokens_that_fit(encoder)
    while start < len(order):
        batch = order[start : start + max(1, min(batch_size, most // max(1, int(lengths[order[start]]))))]
        start += len(batch)
        raw = _encode([texts[position] for position in batch], encoder)
        norms = np.linalg.norm(raw.astype(np.float64), axis=1)
        bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
        if len(bad):
            what = "is zero" if norms[bad[0]] == 0 else "is not finite"
            raise InputError(f"the vector of {name(int(batch[bad[0]]))} {what}; try dtype float32 or another model")
        if vectors is None:
            vectors = np.empty((len(texts), raw.shape[1]), np.float32)
        vectors[batch] = raw / norms[:, None]
        if on_batch:
            on_batch(len(batch), int(lengths[batch].sum()))
    assert vectors is not None
    return Embeddings(
        vectors=vectors,
        truncated=0 if limit is None else int((full_lengths > limit).sum()),
        tokens=int(lengths.sum()),
    )


def embedder_fingerprint(model: str | os.PathLike[str] | SentenceTransformer) -> str:
    """Sha256 of a model folder's files; empty for a hub name or a loaded model."""
    if not isinstance(model, str | os.PathLike) or not Path(model).is_dir():
        return ""
    from codeact.models.loading import folder_fingerprint

    return folder_fingerprint(Path(model))


def _encode(texts: list[str], encoder: SentenceTransformer) -> Vectors:
    import torch

    try:
        vectors = encoder.encode(texts, batch_size=len(texts), convert_to_numpy=True, show_progress_bar=False)
    except torch.OutOfMemoryError:
        raise InputError(f"a batch of {len(texts)} texts does not fit on the device; lower the batch size") from None
    # length 1 is made here and not by the model, whose dtype may hold it to three digits only
    return np.asarray(vectors, dtype=np.float32)


def _tokens_that_fit(encoder: SentenceTransformer) -> int:
    """Tokens of a batch, padding included, whose activations take a part of the memory that is free.

    Embedders that read 8,192 tokens and more would need tens of GiB for a batch of 64 such texts.
    """
    from codeact.ops.flops import ModelShape

    trunk = getattr(encoder[0], "auto_model", None) if hasattr(encoder, "__getitem__") else None
    shape = ModelShape.from_config(trunk.config) if trunk is not None else None
    if trunk is None or shape is None:
        return sys.maxsize
    a_layer = shape.activation_bytes(1, trunk.dtype.itemsize) / shape.layers
    return int(_MEMORY_SHARE * free_memory(encoder.device) / a_layer)


def _token_counts(texts: list[str], encoder: SentenceTransformer) -> NDArray[np.int64]:
    """Tokens of each text before truncation, special tokens and the model's default prompt included."""
    prompt = (getattr(encoder, "prompts", None) or {}).get(getattr(encoder, "default_prompt_name", None), "")
    counts = np.empty(len(texts), dtype=np.int64)
    for start in range(0, len(texts), _TOKENIZE_TEXTS):
        chunk = [prompt + text for text in texts[start : start + _TOKENIZE_TEXTS]]
        # verbose=False: the tokenizer's own warning about long texts comes once and without their number
        ids = encoder.tokenizer(chunk, truncation=False, verbose=False)["input_ids"]
        counts[start : start + len(chunk)] = [len(text_ids) for text_ids in ids]
    return counts


def _log_truncated(truncated: int, texts: int, encoder: SentenceTransformer) -> None:
    if truncated:
        limit = getattr(encoder, "max_seq_length", None)
        logger.warning("%d of %d texts were cut to the embedder's %s tokens", truncated, texts, limit)
