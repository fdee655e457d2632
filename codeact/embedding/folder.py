"""The folder that grows vectors shard by shard, beside the pair of files that it becomes.

    FILE.shards/shards/00003-of-00012.npy      vectors of the rows 3 * shard_size and on that hold a record
    FILE.shards/shards/00003-of-00012.parquet  their rows and ids, and what was counted
    FILE.npy, FILE.rows.parquet                all of them, once all shards are done

Then the folder is removed.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from codeact.base.errors import InputError
from codeact.base.files import atomic_path
from codeact.data.records import Record, RecordSet
from codeact.data.tables import read_table
from codeact.embedding.files import ROWS_SCHEMA, Block, EmbeddingMetadata, read_metadata, sidecar_path, write_pair
from codeact.embedding.vectors import embed_texts
from codeact.workers.claims import clock_of, read_workers
from codeact.workers.shards import ShardFolder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from codeact.workers.engines import Step


_COUNTS = ("rows", "skipped", "truncated", "tokens")


class EmbeddingFolder(ShardFolder):
    """Embeddings that are being made; ``settings`` are data and model with their fingerprints, and the dtype."""

    COMMAND, DOING, DONE, WHAT = "codeact embed", "embedding", "embedded", "embeddings"
    IF_OTHERS = "another process is at work on them; choose another --output"

    @staticmethod
    def beside(output: str | Path) -> Path:
        """Return the folder of the shards of FILE.npy."""
        sidecar_path(output)
        return Path(output).with_suffix(".shards")

    @property
    def merged_path(self) -> Path:
        """The file that vouches for the vectors, and appears after them."""
        return sidecar_path(self._output)

    @property
    def _output(self) -> Path:
        return self.folder.with_suffix(".npy")

    @property
    def is_merged(self) -> bool:
        """Whether the pair of files is of these settings; a look at what the second one says of itself."""
        try:
            return read_metadata(self._output).is_of(**self._source)
        except InputError:
            return False

    def missing(self) -> list[int]:
        """As of every folder; none, where another worker has put them together and removed them."""
        return [] if self.is_merged else super().missing()

    def embed(self, records: RecordSet, encoder: SentenceTransformer, batch_size: int, shard: int, step: Step) -> None:
        """Embed the questions of a shard and write it.

        Raises:
            InputError: as in ``codeact.embedding.vectors.embed`` (a vector is named by row and id).
        """
        span = self.span(shard)
        rows = records.rows(span.start, span.stop)
        readable = [record for record in rows if isinstance(record, Record)]
        result = embed_texts(
            [record.question for record in readable],
            encoder,
            batch_size=batch_size,
            names=[f"row {record.row} (id {record.id!r})" for record in readable],
            on_batch=step,
        )
        step(len(rows) - len(readable), 0)
        with atomic_path(self._vectors_path(shard)) as temporary, temporary.open("wb") as file:
            np.save(file, result.vectors)
        columns = {"row": [record.row for record in readable], "id": [record.id for record in readable]}
        facts = {"skipped": len(rows) - len(readable), "truncated": result.truncated, "tokens": result.tokens}
        self.write_shard(shard, pa.table(columns, schema=ROWS_SCHEMA), facts)

    def merge(self) -> dict[str, Any]:
        """As of every folder."""
        if self.is_merged:
            return _counts(read_metadata(self._output))
        self.require_all()
        totals = Counter(dict.fromkeys(_COUNTS, 0))

        def blocks() -> Iterator[Block]:
            for shard in range(self.shards):
                facts, path = self.facts(shard), self._vectors_path(shard)
                remedy = f"delete {self.path(shard)} and run codeact embed again"
                table = read_table(self.path(shard), remedy, schema=ROWS_SCHEMA)
                try:
                    vectors = np.load(path, allow_pickle=False)
                except (OSError, ValueError, EOFError) as error:
                    raise InputError(f"{path} is damaged ({error}); {remedy}") from None
                if vectors.ndim != 2 or len(vectors) != table.num_rows:
                    raise InputError(f"{path} has shape {vectors.shape}, for {table.num_rows:,} rows; {remedy}")
                totals.update({name: facts[name] for name in ("skipped", "truncated", "tokens")}, rows=len(vectors))
                yield vectors, table["id"].to_pylist(), table["row"].to_numpy()

        write_pair(self._output, blocks(), lambda: EmbeddingMetadata(**{**self._source, **totals}))
        return dict(totals)

    @property
    def _source(self) -> dict[str, Any]:
        """What the vectors are of, as a pair's metadata have it."""
        data, model = self.settings["data"], self.settings["model"]
        return {
            "model": model["name"],
            "data_fingerprint": data["fingerprint"],
            "model_fingerprint": model["fingerprint"],
            "dtype": self.settings["dtype"],
        }

    def _vectors_path(self, shard: int) -> Path:
        return self.path(shard).with_suffix(".npy")


def _counts(metadata: EmbeddingMetadata) -> dict[str, Any]:
    return {name: getattr(metadata, name) for name in _COUNTS}


def in_use(folder: Path) -> bool:
    """Whether a worker is at work in a folder of shards."""
    return (folder / "workers").is_dir() and any(worker.lives(clock_of(folder)) for worker in read_workers(folder))


def remove_made(folder: Path) -> None:
    """Remove shards that are in the pair of files now, unless another worker has still to see that."""
    with suppress(InputError):  # another one removed them
        if EmbeddingFolder.open(folder).is_merged and not in_use(folder):
            shutil.rmtree(folder, ignore_errors=True)
