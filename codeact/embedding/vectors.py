"""Texts -> unit vectors by a sentence-transformers model, and the pair of files that keeps them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from codeact.base.console import Progress
from codeact.base.errors import InputError, require
from codeact.base.files import atomic_path, locked_folder
from codeact.base.machine import free_memory
from codeact.base.parsing import parse_json
from codeact.data.records import Record, open_records

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_MODEL = "sentence-transformers/all-mpnet-base-v2"
_BLOCK_ROWS = 10_000  # rows of a data set that are in memory at a time
FORMAT_VERSION = 1

_TOKENIZE_TEXTS = 1_000  # texts whose token ids are in memory at a time, only to be counted
_METADATA_KEY = b"codeact.embeddings"
_DIGEST_BLOCKS = 64
_DIGEST_BLOCK_BYTES = 65_536
_AGAIN = "run codeact embed again"
_MEMORY_SHARE = 0.4  # of what is free, for the activations of a layer

logger = logging.getLogger("codeact")

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embeddings:
    """``vectors`` (N, D) float32, unit length; how many of the N texts were cut to the model's maximum; tokens read."""

    vectors: Vectors
    truncated: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingMetadata:
    """What a pair of embedding files is of. ``skipped`` counts the rows of the data that hold no record."""

    model: str
    data_fingerprint: str
    rows: int
    skipped: int
    truncated: int
    tokens: int
    model_fingerprint: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingTable:
    """``vectors`` (N, D) float32, a read-only memory map; ``ids`` (N,) strings, ``rows`` (N,) int64, ascending."""

    vectors: Vectors
    ids: pa.ChunkedArray
    rows: NDArray[np.int64]
    metadata: EmbeddingMetadata


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


def embed_records(
    data: Any,
    path: str | Path,
    model: str | os.PathLike[str] | SentenceTransformer = DEFAULT_MODEL,
    *,
    batch_size: int = 64,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = False,
) -> EmbeddingMetadata:
    """Embed the questions of all readable records and write them to ``path`` as `write_embeddings` does.

    Reads, embeds and writes `_BLOCK_ROWS` rows at a time, so memory does not grow with the data.

    Args:
        data: whatever `codeact.data.records.open_records` opens.

    Returns:
        What was written: how many rows, how many were skipped because they hold no record, how many were truncated.

    Raises:
        InputError: as in `embed` (a vector is named by row and id), or ``path`` cannot be written.
    """
    _sidecar_path(path)  # a wrong name fails now, not after the model has loaded
    record_set = open_records(data)
    encoder = load_embedder(model, device=device, dtype=dtype)
    rows_done = skipped = truncated = tokens = 0

    def blocks() -> Iterator[_Block]:
        nonlocal rows_done, skipped, truncated, tokens
        with Progress(len(record_set), "rows", "embedding", show=progress) as bar:
            # the block of no rows gives the file its number of dimensions where no record is readable
            for start in range(0, max(len(record_set), 1), _BLOCK_ROWS):
                block = record_set.rows(start, min(start + _BLOCK_ROWS, len(record_set)))
                records = [record for record in block if isinstance(record, Record)]
                result = embed_texts(
                    [record.question for record in records],
                    encoder,
                    batch_size=batch_size,
                    names=[f"row {record.row} (id {record.id!r})" for record in records],
                    on_batch=bar,
                )
                bar(len(block) - len(records), 0)
                rows_done += len(records)
                skipped += len(block) - len(records)
                truncated += result.truncated
                tokens += result.tokens
                yield result.vectors, [record.id for record in records], [record.row for record in records]

    def metadata() -> EmbeddingMetadata:
        return EmbeddingMetadata(
            model=_model_name(model),
            data_fingerprint=record_set.fingerprint,
            rows=rows_done,
            skipped=skipped,
            truncated=truncated,
            tokens=tokens,
            model_fingerprint=embedder_fingerprint(model),
            dtype=str(getattr(encoder, "dtype", "")).removeprefix("torch."),
        )

    _write_pair(Path(path), blocks(), metadata)
    _log_truncated(truncated, rows_done, encoder)
    return metadata()


def embedder_fingerprint(model: str | os.PathLike[str] | SentenceTransformer) -> str:
    """Sha256 of a model folder's files; empty for a hub name or a loaded model."""
    if not isinstance(model, str | os.PathLike) or not Path(model).is_dir():
        return ""
    from codeact.models.loading import folder_fingerprint

    return folder_fingerprint(Path(model))


def write_embeddings(
    path: str | Path,
    vectors: Vectors,
    ids: Sequence[str],
    rows: Sequence[int] | NDArray[np.int64],
    metadata: EmbeddingMetadata,
) -> None:
    """Write ``vectors`` to FILE.npy (float32) and ids and rows to FILE.rows.parquet beside it.

    The second file holds the metadata and a digest of the first, and is removed before a new first one appears: a kill
    at any moment leaves the old pair, the new pair, or a FILE.npy alone, which `read_embeddings` refuses.

    Args:
        path: must end in ``.npy``.
        vectors: (N, D). ``ids`` and ``rows``: (N,), the rows ascending.

    Raises:
        InputError: the arguments do not fit each other, or the files cannot be written.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or not len(vectors) == len(ids) == len(rows) == metadata.rows:
        raise InputError(
            f"vectors of shape {vectors.shape}, {len(ids)} ids, {len(rows)} rows and metadata of {metadata.rows} rows "
            "do not fit each other"
        )
    _write_pair(Path(path), [(vectors, ids, rows)], lambda: metadata)


def read_embeddings(path: str | Path) -> EmbeddingTable:
    """Open a pair of files that `write_embeddings` or `embed_records` wrote; the vectors stay on disk.

    Raises:
        InputError: a file is missing or damaged, or the two are not of one run.
    """
    path = Path(path)
    sidecar = _sidecar_path(path)
    for file in (path, sidecar):
        if not file.is_file():
            raise InputError(f"{file} is missing, and {path.name} and {sidecar.name} only count together; {_AGAIN}")
    try:
        stored = pq.read_metadata(sidecar).metadata or {}
        table = pq.read_table(sidecar, columns=["row", "id"])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{sidecar} cannot be read: {str(error).splitlines()[0]}; {_AGAIN}") from None
    try:
        header = parse_json(stored[_METADATA_KEY])
        version, digest = header["version"], header["npy_digest"]
        metadata = EmbeddingMetadata(**{field.name: header[field.name] for field in fields(EmbeddingMetadata)})
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{sidecar} was not written by codeact embed; {_AGAIN}") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{sidecar} has format {version}, this codeact reads {FORMAT_VERSION}; {_AGAIN}")
    if _digest(path) != digest:
        raise InputError(f"{path} and {sidecar.name} are not of one run, or one is damaged; {_AGAIN}")
    try:
        vectors = np.load(path, mmap_mode="r" if table.num_rows else None, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}; {_AGAIN}") from None
    rows = table.column("row").to_numpy()
    if vectors.ndim != 2 or vectors.dtype != np.float32 or not len(vectors) == len(rows) == metadata.rows:
        raise InputError(
            f"{path} has shape {vectors.shape} and type {vectors.dtype}, but {sidecar.name} lists {len(rows)} rows; "
            f"{_AGAIN}"
        )
    return EmbeddingTable(vectors=vectors, ids=table.column("id"), rows=rows, metadata=metadata)


_Block = tuple[Vectors, Sequence[str], Sequence[int] | NDArray[np.int64]]


def _write_pair(path: Path, blocks: Iterable[_Block], metadata: Callable[[], EmbeddingMetadata]) -> None:
    """Write blocks as they come; ``metadata`` is called after the last one, when its counts are known."""
    sidecar = _sidecar_path(path)
    schema = pa.schema([("row", pa.int64()), ("id", pa.string())])
    # the inner file is renamed first, so the sidecar, which vouches for it, appears last
    with ExitStack() as lock, atomic_path(sidecar) as temporary_sidecar, atomic_path(path) as temporary:
        shape = (0, 0)
        last_row = -1
        with temporary.open("wb") as file, pq.ParquetWriter(temporary_sidecar, schema, compression="zstd") as table:
            for vectors, ids, rows in blocks:
                if not file.tell():
                    _write_npy_header(file, (0, vectors.shape[1]))
                row_numbers = np.asarray(rows, dtype=np.int64)
                if (np.diff(row_numbers, prepend=last_row) <= 0).any():
                    raise InputError(f"cannot write {path}: rows must be 0 or more and ascending")
                last_row = int(row_numbers[-1]) if len(row_numbers) else last_row
                file.write(np.ascontiguousarray(vectors, dtype="<f4").data)
                table.write_table(pa.table([pa.array(row_numbers), pa.array(ids, pa.string())], schema=schema))
                shape = (shape[0] + len(vectors), vectors.shape[1])
            # numpy pads the header so that the number of rows can grow in place
            file.seek(0)
            _write_npy_header(file, shape)
            file.flush()
            os.fsync(file.fileno())
            header = {"version": FORMAT_VERSION, "npy_digest": _digest(temporary), **asdict(metadata())}
            table.add_key_value_metadata({_METADATA_KEY: json.dumps(header).encode()})
        lock.enter_context(locked_folder(path.parent, wait=True))  # or another process's file could come in between
        sidecar.unlink(missing_ok=True)


def _write_npy_header(file: BinaryIO, shape: tuple[int, int]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


def _digest(path: Path) -> str:
    """A digest of a file's size and of blocks spread evenly over it, first and last included.

    It tells two runs apart in milliseconds where reading hundreds of gigabytes would take minutes. It is no protection
    against a flipped bit, for which the file system answers.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(_DIGEST_BLOCKS):
            file.seek(max(size - _DIGEST_BLOCK_BYTES, 0) * index // (_DIGEST_BLOCKS - 1))
            digest.update(file.read(_DIGEST_BLOCK_BYTES))
    return digest.hexdigest()


def _sidecar_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".npy":
        raise InputError(f"{path} must end in .npy")
    return path.with_suffix(".rows.parquet")


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


def _model_name(model: str | os.PathLike[str] | SentenceTransformer) -> str:
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    card = getattr(model, "model_card_data", None)
    return str(getattr(card, "base_model", None) or type(model).__name__)


def _log_truncated(truncated: int, texts: int, encoder: SentenceTransformer) -> None:
    if truncated:
        limit = getattr(encoder, "max_seq_length", None)
        logger.warning("%d of %d texts were cut to the embedder's %s tokens", truncated, texts, limit)
