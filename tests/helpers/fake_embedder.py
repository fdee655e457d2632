"""An embedder without a model."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np

from codeact.data.records import Columns, open_records
from codeact.embedding.folder import EmbeddingFolder
from codeact.workers.engines import Job, Place


class FakeEmbedder:
    """As much of a SentenceTransformer as is used: a token is a word, a vector depends on the text alone."""

    max_seq_length = 8
    dimension = 5
    dtype = "float32"

    def __init__(self, broken=None):
        self.broken = broken or {}  # text -> value that its vector is filled with
        self.batches = []

    def tokenizer(self, texts, *, truncation, verbose):
        assert truncation is False
        return {"input_ids": [[1, *range(len(text.split())), 2] for text in texts]}

    def encode(self, texts, *, batch_size, convert_to_numpy, show_progress_bar):
        assert all(text.encode() is not None for text in texts)  # no lone surrogate comes this far
        assert (batch_size, convert_to_numpy, show_progress_bar) == (len(texts), True, False)
        self.batches.append(list(texts))
        return np.stack([self.vector(text) for text in texts])

    def vector(self, text):
        if text in self.broken:
            return np.full(self.dimension, self.broken[text], np.float32)
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        return np.random.default_rng(seed).normal(size=self.dimension).astype(np.float32) * 100


def prepare(source: Path, output: Path, shard_size: int, place: Place | None = None, first: bool = True) -> Job:
    """A job without PyTorch, as processes that are started import it afresh; see ``codeact.workers.engines.Begin``."""
    records = open_records(source, Columns(question="q", answer="a"))
    known = {
        "data": {"rows": len(records), "fingerprint": records.fingerprint},
        "model": {"name": "fake", "fingerprint": ""},
        "dtype": "float32",
        "shard_size": shard_size,
    }
    folder = EmbeddingFolder(EmbeddingFolder.beside(output), known)
    folder.claim()
    return Job(folder, partial(folder.embed, records, FakeEmbedder(), 3))
