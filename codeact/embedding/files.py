"""The pair of files that keeps vectors: FILE.npy, and FILE.rows.parquet with their rows and ids."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from codeact.base.errors import InputError
from codeact.base.files import atomic_path, locked_folder
from codeact.base.parsing import parse_json

FORMAT_VERSION = 1
ROWS_SCHEMA = pa.schema([("row", pa.int64()), ("id", pa.string())])

_METADATA_KEY = b"codeact.embeddings"
_DIGEST_BLOCKS = 64
_DIGEST_BLOCK_BYTES = 65_536
_AGAIN = "run codeact embed again"

Vectors = NDArray[np.float32]


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

    def is_of(self, *, model: str, data_fingerprint: str, model_fingerprint: str, dtype: str) -> bool:
        """Whether the vectors are of this data and model; its name counts only where it has no fingerprint."""
        same_name = bool(model_fingerprint) or self.model == model
        theirs = (self.data_fingerprint, self.model_fingerprint, self.dtype)
        return same_name and theirs == (data_fingerprint, model_fingerprint, dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingTable:
    """``vectors`` (N, D) float32, a read-only memory map; ``ids`` (N,) strings, ``rows`` (N,) int64, ascending."""

    vectors: Vectors
    ids: pa.ChunkedArray
    rows: NDArray[np.int64]
    metadata: EmbeddingMetadata


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
    write_pair(Path(path), [(vectors, ids, rows)], lambda: metadata)


def read_embeddings(path: str | Path) -> EmbeddingTable:
    """Open a pair of files that `write_embeddings` or `codeact embed` wrote; the vectors stay on disk.

    Raises:
        InputError: a file is missing or damaged, or the two are not of one run.
    """
    path, sidecar = Path(path), sidecar_path(path)
    metadata = read_metadata(path)
    try:
        table = pq.read_table(sidecar, columns=["row", "id"])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{sidecar} cannot be read: {str(error).splitlines()[0]}; {_AGAIN}") from None
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


def read_metadata(path: str | Path) -> EmbeddingMetadata:
    """What a pair of files is of, as the second says, which is of one run with FILE.npy.

    Raises:
        InputError: it is not, or one of the two is missing or damaged.
    """
    path, sidecar = Path(path), sidecar_path(path)
    for file in (path, sidecar):
        if not file.is_file():
            raise InputError(f"{file} is missing, and {path.name} and {sidecar.name} only count together; {_AGAIN}")
    metadata, digest = _header(sidecar)
    if _digest(path) != digest:
        raise InputError(f"{path} and {sidecar.name} are not of one run, or one is damaged; {_AGAIN}")
    return metadata


def _header(sidecar: Path) -> tuple[EmbeddingMetadata, str]:
    """The metadata, and the digest of the vectors."""
    try:
        stored = pq.read_metadata(sidecar).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{sidecar} cannot be read: {str(error).splitlines()[0]}; {_AGAIN}") from None
    try:
        header = parse_json(stored[_METADATA_KEY])
        version, digest = header["version"], str(header["npy_digest"])
        metadata = EmbeddingMetadata(**{field.name: header[field.name] for field in fields(EmbeddingMetadata)})
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{sidecar} was not written by codeact embed; {_AGAIN}") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{sidecar} has format {version}, this codeact reads {FORMAT_VERSION}; {_AGAIN}")
    return metadata, digest


Block = tuple[Vectors, Sequence[str], Sequence[int] | NDArray[np.int64]]


def write_pair(path: Path, blocks: Iterable[Block], metadata: Callable[[], EmbeddingMetadata]) -> None:
    """Write a pair from blocks as they come: vectors, ids, rows; ``metadata`` is called after the last one.

    Errors as of `write_embeddings`.
    """
    sidecar = sidecar_path(path)
    # the inner file is renamed first, so the sidecar, which vouches for it, appears last
    with ExitStack() as lock, atomic_path(sidecar) as temporary_sidecar, atomic_path(path) as temporary:
        shape = (0, 0)
        last_row = -1
        with (
            temporary.open("wb") as file,
            pq.ParquetWriter(temporary_sidecar, ROWS_SCHEMA, compression="zstd") as table,
        ):
            for vectors, ids, rows in blocks:
                if not file.tell():
                    _write_npy_header(file, (0, vectors.shape[1]))
                row_numbers = np.asarray(rows, dtype=np.int64)
                if (np.diff(row_numbers, prepend=last_row) <= 0).any():
                    raise InputError(f"cannot write {path}: rows must be 0 or more and ascending")
                last_row = int(row_numbers[-1]) if len(row_numbers) else last_row
                if vectors.shape[1] != shape[1] and shape[0]:
                    raise InputError(f"cannot write {path}: vectors of {shape[1]} and of {vectors.shape[1]} numbers")
                file.write(np.ascontiguousarray(vectors, dtype="<f4").data)
                table.write_table(pa.table([pa.array(row_numbers), pa.array(ids, pa.string())], schema=ROWS_SCHEMA))
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


def sidecar_path(path: str | Path) -> Path:
    """Return FILE.rows.parquet of FILE.npy.

    Raises:
        InputError: the name ends otherwise.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise InputError(f"{path} must end in .npy")
    return path.with_suffix(".rows.parquet")
