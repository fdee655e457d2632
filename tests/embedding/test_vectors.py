"""Embedding: order, unit length, truncation counts, hostile texts, and the pair of files under kills and mix-ups."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeact.base.errors import InputError
from codeact.data.records import Columns, open_records
from codeact.embedding import vectors as embedding
from codeact.embedding.vectors import (
    EmbeddingMetadata,
    embed,
    embed_records,
    embed_texts,
    load_embedder,
    read_embeddings,
    write_embeddings,
)


class FakeEmbedder:
    """As much of a SentenceTransformer as is used: a token is a word, a vector depends on the text alone."""

    max_seq_length = 8
    dimension = 5

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


def unit(vector):
    return vector / np.linalg.norm(vector.astype(np.float64))


def assert_unit(vectors):
    assert vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max(initial=0) < 1e-6


# ------------------------------------------------------------------------------------------ vectors


@settings(deadline=None)
@given(st.lists(st.text(max_size=40), max_size=30), st.integers(1, 12))
def test_every_text_gets_its_own_unit_vector_in_order(texts, batch_size):
    encoder = FakeEmbedder()
    vectors = embed(texts, encoder, batch_size=batch_size)
    assert vectors.shape == (len(texts), FakeEmbedder.dimension)
    assert_unit(vectors)
    for text, vector in zip(texts, vectors, strict=True):
        clean = text.encode("utf-8", "replace").decode()
        np.testing.assert_allclose(vector, unit(encoder.vector(clean)), atol=1e-6)


def test_batches_are_of_like_lengths_and_the_longest_comes_first():
    encoder = FakeEmbedder()
    embed(["a", "a b c d", "a b", "a b c", "b", "a b c d e"], encoder, batch_size=2)
    lengths = [[len(text.split()) for text in batch] for batch in encoder.batches]
    assert lengths == [[5, 4], [3, 2], [1, 1]]


@pytest.mark.parametrize(("room", "sizes"), [(10**9, [6]), (12, [1, 1, 1, 2, 1]), (1, [1] * 6)])
def test_a_batch_of_long_texts_is_smaller(monkeypatch, room, sizes):
    """64 texts of 8,192 tokens would take tens of GiB."""
    texts = ["w " * count for count in (5, 6, 6, 4, 3, 2)]  # and two tokens each, up to 8
    encoder = FakeEmbedder()
    monkeypatch.setattr(embedding, "_tokens_that_fit", lambda _: room)
    vectors = embed(texts, encoder)
    assert [len(batch) for batch in encoder.batches] == sizes
    monkeypatch.undo()
    np.testing.assert_array_equal(vectors, embed(texts, FakeEmbedder(), batch_size=1))


def test_the_tokens_of_a_batch_follow_the_memory_and_the_model(embedder_path, monkeypatch):
    encoder = load_embedder(embedder_path, device="cpu", dtype="float32")
    a_token = (4 * 384 + 4 * 384 + 4 * 1536) * 4
    monkeypatch.setattr(embedding, "free_memory", lambda *_: a_token * 1000)
    assert embedding._tokens_that_fit(encoder) == 400
    monkeypatch.setattr(embedding, "free_memory", lambda *_: 2**20)
    with pytest.raises(InputError, match=r"the weights of embedding model .* take .* MiB, and .* MiB are left"):
        load_embedder(embedder_path, device="cpu", dtype="float32")


def test_truncated_texts_are_counted_and_logged(caplog):
    # two special tokens: six words fill the eight tokens, seven are too many
    texts = ["w " * 6, "w " * 7, "w " * 100, ""]
    result = embed_texts(texts, FakeEmbedder())
    assert (result.truncated, result.tokens) == (2, 8 + 8 + 8 + 2)
    with caplog.at_level(logging.WARNING, "codeact"):
        embed(texts, FakeEmbedder())
    assert "2 of 4 texts were cut to the embedder's 8 tokens" in caplog.text


def test_a_models_default_prompt_counts():
    encoder = FakeEmbedder()
    encoder.prompts, encoder.default_prompt_name = {"query": "find this: "}, "query"
    assert embed_texts(["w " * 5], encoder).truncated == 1
    encoder.default_prompt_name = None
    assert embed_texts(["w " * 5], encoder).truncated == 0


def test_a_model_without_a_maximum_truncates_nothing():
    encoder = FakeEmbedder()
    encoder.max_seq_length = None
    assert embed_texts(["w " * 500], encoder).truncated == 0


def test_every_batch_is_reported():
    seen = []
    embed_texts(["a b", "a", "a"], FakeEmbedder(), batch_size=2, on_batch=lambda *counts: seen.append(counts))
    assert seen == [(2, 7), (1, 3)]
    embed(["a"], FakeEmbedder(), progress=True)


def test_half_a_surrogate_pair_becomes_a_question_mark():
    vectors = embed(["cut \ud83d", "cut ?"], FakeEmbedder())
    assert np.array_equal(vectors[0], vectors[1])


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_vector_that_cannot_have_unit_length_is_named(value):
    texts = ["a b c", "x", "bad", "a b"]
    what = "is zero" if value == 0 else "is not finite"
    with pytest.raises(InputError, match=f"the vector of text 2 {what}"):
        embed(texts, FakeEmbedder({"bad": value}))


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("one string", {}, "texts must be a list of strings"),
        (["a", None], {}, "text 1 is not a string but NoneType"),
        (["a", b"b"], {}, "text 1 is not a string but bytes"),
        (["a"], {"batch_size": 0}, "batch_size must be at least 1"),
        (["a"], {"dtype": "float32"}, "a loaded model keeps its device and dtype"),
        (["a"], {"device": "cpu"}, "a loaded model keeps its device and dtype"),
    ],
)
def test_wrong_arguments_are_refused(texts, options, message):
    with pytest.raises(InputError, match=message):
        embed(texts, FakeEmbedder(), **options)


def test_a_batch_that_does_not_fit_says_what_to_do():
    import torch

    encoder = FakeEmbedder()

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    encoder.encode = out_of_memory
    with pytest.raises(InputError, match="a batch of 2 texts does not fit on the device; lower the batch size"):
        embed(["a", "b"], encoder)


# ------------------------------------------------------------------------------------------ a real model


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(
            InputError, match=r"cannot load the embedding model .* as the model|no such folder"
        ) as caught:
            load_embedder(str(folder))
        assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(embedder_path, tmp_path):
    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(embedder_path, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load the embedding model"):
        load_embedder(folder)


def test_code_that_a_model_brings_is_not_run(embedder_path, tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(embedder_path, folder)
    (folder / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Encoder: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "hostile", "auto_map": {"AutoConfig": "hostile.Encoder", "AutoModel": "hostile.Encoder"}}
    (folder / "config.json").write_text(json.dumps(config))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "hostile.Encoder"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match="cannot load the embedding model"):
        load_embedder(folder)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def changed(embedder_path, tmp_path):
    """The embedder with its weights changed by a function, its configuration by a dictionary."""
    from safetensors.torch import load_file, save_file

    def make(change=lambda weights: weights, **configuration) -> str:
        folder = tmp_path / "changed"
        shutil.copytree(embedder_path, folder, ignore=shutil.ignore_patterns("model.safetensors"))
        weights = {
            name: tensor.clone().contiguous()
            for name, tensor in change(load_file(embedder_path / "model.safetensors")).items()
        }
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((embedder_path / "config.json").read_text())
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps({**config, **configuration}))
        return str(folder)

    return make


LAYER = "encoder.layer.2.output.dense.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {name: tensor for name, tensor in w.items() if name != LAYER},
            f"lacks 1 weights .* such as {LAYER}",
        ),
        (lambda w: {f"x.{name}": tensor for name, tensor in w.items()}, r"lacks \d+ weights"),
        (lambda w: {**w, "encoder.layer.6.output.dense.bias": w["embeddings.LayerNorm.bias"]}, "no place for"),
        (lambda w: {**w, LAYER: w[LAYER][:, :-1]}, "cannot load the embedding model|lacks"),
        (lambda w: {**w, LAYER: w[LAYER] * np.nan}, "holds NaN or infinity"),
    ],
)
def test_weights_that_are_not_there_are_refused(changed, change, message):
    with pytest.raises(InputError, match=message) as caught:
        load_embedder(changed(change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_hidden_layers": 1}, "holds 80 weights that .* no place for"),
        ({"num_hidden_layers": 7}, "lacks 16 weights"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers in config.json is 1000000000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"hidden_act": "nothing"}, "cannot load the embedding model"),
        ({"num_attention_heads": 0}, "cannot load the embedding model"),
        ({"model_type": ["bert"]}, "cannot load the embedding model"),
    ],
)
def test_a_configuration_of_another_model(changed, more, message):
    with pytest.raises(InputError, match=message) as caught:
        load_embedder(changed(**more))
    assert "\n" not in str(caught.value)


def test_what_a_vector_does_not_need_may_lack_or_be_more(changed):
    def other(weights):
        kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
        return {**kept, "cls.predictions.bias": weights["embeddings.LayerNorm.bias"]}

    load_embedder(changed(other))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 5000),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.symlink_to(path)),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "1_Pooling/config.json"])
def test_what_is_no_file_of_a_model(changed, name, spoil):
    folder = changed()
    spoil(Path(folder, name))
    with pytest.raises(InputError, match=r"cannot load the embedding model|is no file") as caught:
        load_embedder(folder)
    assert "\n" not in str(caught.value)


def test_the_real_embedder(embedder_path):
    texts = ["Sort a list of numbers.", "word " * 5000, "", "Order these integers ascending.", "Boil an egg."]
    encoder = load_embedder(embedder_path, device="cpu", dtype="float32")
    result = embed_texts(texts, encoder, batch_size=2)
    assert result.vectors.shape == (5, 384)
    assert_unit(result.vectors)
    assert result.truncated == 1
    assert result.tokens <= 5 * encoder.max_seq_length
    alike, unlike = result.vectors[0] @ result.vectors[3], result.vectors[0] @ result.vectors[4]
    assert alike > unlike + 0.2
    reference = encoder.encode(texts, batch_size=1, normalize_embeddings=True)
    np.testing.assert_allclose(result.vectors, reference, atol=2e-6)  # float32, other padding
    assert embed([], encoder).shape == (0, 384)


def test_the_real_embedder_in_bfloat16_has_unit_length_in_float32(embedder_path):
    texts = ["Sort a list of numbers.", "Boil an egg."]
    exact = embed(texts, embedder_path, device="cpu", dtype="float32")
    coarse = embed(texts, embedder_path, device="cpu", dtype="bfloat16")
    assert_unit(coarse)
    assert ((exact * coarse).sum(axis=1) > 0.999).all()


# ------------------------------------------------------------------------------------------ the pair of files


def metadata(rows, **changes):
    values = {"model": "m", "data_fingerprint": "f", "rows": rows, "skipped": 1, "truncated": 2, "tokens": 3}
    return EmbeddingMetadata(**values | changes)


def vectors_of(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)


@pytest.mark.parametrize("rows", [0, 1, 7, 70_000])
def test_what_is_written_is_read(tmp_path, rows):
    path = tmp_path / "deep" / "e.npy"
    vectors, numbers = vectors_of(rows), list(range(3, 3 + 2 * rows, 2))
    write_embeddings(path, vectors, [f"ä{number}" for number in numbers], numbers, metadata(rows))
    table = read_embeddings(path)
    assert np.array_equal(table.vectors, vectors)
    assert (table.vectors.dtype, table.vectors.shape) == (np.float32, (rows, 4))
    assert not rows or isinstance(table.vectors, np.memmap)
    assert table.ids.to_pylist() == [f"ä{number}" for number in numbers]
    assert table.rows.tolist() == numbers
    assert table.metadata == metadata(rows)
    assert np.array_equal(np.load(path, allow_pickle=False), vectors)
    assert sorted(file.name for file in path.parent.iterdir()) == ["e.npy", "e.rows.parquet"]


@pytest.mark.parametrize(
    ("vectors", "ids", "rows"),
    [
        (vectors_of(2), ["a"], [0, 1]),
        (vectors_of(2), ["a", "b"], [0]),
        (vectors_of(3), ["a", "b", "c"], [0, 1, 2]),
        (vectors_of(2)[0], ["a", "b"], [0, 1]),
        (vectors_of(2), ["a", "b"], [1, 0]),
        (vectors_of(2), ["a", "b"], [1, 1]),
        (vectors_of(2), ["a", "b"], [-1, 0]),
    ],
)
def test_parts_that_do_not_fit_are_not_written(tmp_path, vectors, ids, rows):
    with pytest.raises(InputError):
        write_embeddings(tmp_path / "e.npy", vectors, ids, rows, metadata(2))
    assert list(tmp_path.iterdir()) == []


def test_another_name_than_npy_is_refused(tmp_path):
    for call in (
        lambda path: write_embeddings(path, vectors_of(1), ["a"], [0], metadata(1)),
        read_embeddings,
        lambda path: embed_records(None, path, FakeEmbedder()),
    ):
        with pytest.raises(InputError, match=r"must end in \.npy"):
            call(tmp_path / "e.bin")


def write_pair(path, seed, rows=5):
    write_embeddings(path, vectors_of(rows, seed), [str(row) for row in range(rows)], range(rows), metadata(rows))


@pytest.mark.parametrize("rows", [5, 200_000])
@pytest.mark.parametrize("part", [".npy", ".rows.parquet"])
def test_halves_of_two_runs_are_never_taken_for_one(tmp_path, part, rows):
    write_pair(tmp_path / "a.npy", 1, rows)
    write_pair(tmp_path / "b.npy", 2, rows)
    os.replace((tmp_path / "b.npy").with_suffix(part), (tmp_path / "a.npy").with_suffix(part))
    with pytest.raises(InputError, match="are not of one run, or one is damaged; run codeact embed again"):
        read_embeddings(tmp_path / "a.npy")


def test_a_missing_cut_or_foreign_half_is_refused(tmp_path):
    path, sidecar = tmp_path / "a.npy", tmp_path / "a.rows.parquet"
    with pytest.raises(InputError, match=r"a\.npy is missing"):
        read_embeddings(path)
    write_pair(path, 1)
    npy, rows = path.read_bytes(), sidecar.read_bytes()
    sidecar.unlink()
    with pytest.raises(InputError, match=r"a\.rows\.parquet is missing"):
        read_embeddings(path)
    for cut in (0, 10, len(rows) // 2, len(rows) - 1):
        sidecar.write_bytes(rows[:cut])
        with pytest.raises(InputError, match="cannot be read"):
            read_embeddings(path)
    sidecar.write_bytes(rows)
    for cut in (0, 10, len(npy) - 1):
        path.write_bytes(npy[:cut])
        with pytest.raises(InputError, match="are not of one run"):
            read_embeddings(path)
    path.write_bytes(npy)
    pq.write_table(pa.table({"row": [0], "id": ["0"]}), sidecar)
    with pytest.raises(InputError, match="was not written by codeact embed"):
        read_embeddings(path)
    pq.write_table(pa.table({"other": [0]}), sidecar)
    with pytest.raises(InputError):
        read_embeddings(path)


def rewrite_metadata(path, **changes):
    """Make the sidecar vouch for whatever the other file now is, with ``changes`` to what it says."""
    sidecar = path.with_suffix(".rows.parquet")
    stored = json.loads(pq.read_metadata(sidecar).metadata[embedding._METADATA_KEY])
    stored |= {"npy_digest": embedding._digest(path), **changes}
    table = pq.read_table(sidecar).replace_schema_metadata({embedding._METADATA_KEY: json.dumps(stored)})
    pq.write_table(table, sidecar)


def test_a_newer_format_is_refused(tmp_path):
    write_pair(tmp_path / "a.npy", 1)
    rewrite_metadata(tmp_path / "a.npy")
    read_embeddings(tmp_path / "a.npy")
    rewrite_metadata(tmp_path / "a.npy", version=99)
    with pytest.raises(InputError, match="has format 99, this codeact reads 1"):
        read_embeddings(tmp_path / "a.npy")


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was loaded')",))


@pytest.mark.parametrize("content", ["pickle", "objects", "float64", "one dimension", "too few"])
def test_a_numpy_file_of_another_kind_is_refused_and_no_pickle_is_loaded(tmp_path, content):
    path = tmp_path / "a.npy"
    write_pair(path, 1)
    if content == "pickle":
        path.write_bytes(pickle.dumps(Hostile()))
    elif content == "objects":
        np.save(path, np.array([Hostile()] * 5, dtype=object), allow_pickle=True)
    else:
        wrong = {"float64": np.zeros((5, 4)), "one dimension": np.zeros(5, np.float32), "too few": vectors_of(4)}
        np.save(path, wrong[content])
    rewrite_metadata(path)
    with pytest.raises(InputError, match="run codeact embed again"):
        read_embeddings(path)


KILLED_WRITER = """
import os, sys
import numpy as np
from codeact.embedding.vectors import EmbeddingMetadata, write_embeddings

steps = int(sys.argv[2])
def counted(real):
    def step(*args, **kwargs):
        global steps
        if steps == 0:
            os.kill(os.getpid(), 9)
        steps -= 1
        return real(*args, **kwargs)
    return step
os.replace, os.fsync, os.unlink = counted(os.replace), counted(os.fsync), counted(os.unlink)
rows = 5
metadata = EmbeddingMetadata(model="new", data_fingerprint="f", rows=rows, skipped=0, truncated=0, tokens=0)
write_embeddings(sys.argv[1], np.full((rows, 4), 7, np.float32), ["x"] * rows, range(rows), metadata)
"""


def test_a_kill_at_any_step_leaves_the_old_pair_the_new_pair_or_a_refusal(tmp_path):
    outcomes = []
    for step in range(20):
        path = tmp_path / f"{step}.npy"
        write_pair(path, 1)
        process = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path), str(step)], check=False)
        try:
            table = read_embeddings(path)
        except InputError as error:
            assert "only count together; run codeact embed again" in str(error)  # noqa: PT017 - any of three is right
            outcomes.append("refused")
        else:
            new = table.metadata.model == "new"
            assert np.array_equal(table.vectors, np.full((5, 4), 7) if new else vectors_of(5, 1))
            assert table.ids.to_pylist() == (["x"] * 5 if new else list("01234"))
            outcomes.append("new" if new else "old")
        if process.returncode == 0:
            break
    assert outcomes == sorted(outcomes, key=["old", "refused", "new"].index)
    assert set(outcomes) == {"old", "refused", "new"}


# ------------------------------------------------------------------------------------------ records


def data(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return open_records(path, Columns(question="q", answer="a"))


def test_readable_records_are_embedded_block_by_block_and_bad_rows_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "_BLOCK_ROWS", 4)
    rows = [{"q": f"question {row}" + " w" * row, "a": "a"} for row in range(11)]
    rows[2] = "{broken"
    rows[8] = rows[9] = rows[10] = {"q": 5, "a": "a"}  # the last block holds no record at all
    record_set = data(tmp_path / "d.jsonl", rows)
    encoder = FakeEmbedder()
    written = embed_records(record_set, tmp_path / "e.npy", encoder, batch_size=3, progress=True)
    table = read_embeddings(tmp_path / "e.npy")
    assert table.metadata == written
    assert (written.rows, written.skipped, written.truncated) == (7, 4, 3)
    assert written.data_fingerprint == record_set.fingerprint
    assert table.rows.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert table.ids.to_pylist() == ["0", "1", "3", "4", "5", "6", "7"]
    expected = embed([rows[row]["q"] for row in table.rows], encoder)
    assert np.array_equal(table.vectors, expected)


def test_no_readable_record_at_all(tmp_path):
    record_set = data(tmp_path / "d.jsonl", [{"q": 5, "a": "a"}])
    written = embed_records(record_set, tmp_path / "e.npy", FakeEmbedder())
    assert (written.rows, written.skipped) == (0, 1)
    assert read_embeddings(tmp_path / "e.npy").vectors.shape == (0, FakeEmbedder.dimension)


def test_a_bad_vector_names_row_and_id_and_leaves_the_old_files(tmp_path):
    record_set = data(tmp_path / "d.jsonl", [{"q": "good", "a": "a"}, {"q": 5, "a": "a"}, {"q": "bad", "a": "a"}])
    write_pair(tmp_path / "e.npy", 1)
    with pytest.raises(InputError, match=r"the vector of row 2 \(id '2'\) is not finite"):
        embed_records(record_set, tmp_path / "e.npy", FakeEmbedder({"bad": np.nan}))
    assert np.array_equal(read_embeddings(tmp_path / "e.npy").vectors, vectors_of(5, 1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["d.jsonl", "e.npy", "e.rows.parquet"]


def test_the_models_name_is_kept(embedder_path, tmp_path):
    record_set = data(tmp_path / "d.jsonl", [{"q": "good", "a": "a"}])
    assert embed_records(record_set, tmp_path / "e.npy", embedder_path).model == str(embedder_path)
    encoder = FakeEmbedder()
    encoder.model_card_data = types.SimpleNamespace(base_model="org/name")
    assert embed_records(record_set, tmp_path / "e.npy", encoder).model == "org/name"


def test_a_causal_model_is_no_embedder_and_told_so(tiny_model_path, embedder_path, caplog):
    with caplog.at_level(logging.WARNING, "codeact"):
        load_embedder(embedder_path)
        assert not [record for record in caplog.records if record.name == "codeact"]
        load_embedder(tiny_model_path)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "codeact"]
    assert "is LlamaForCausalLM and no sentence-transformers model" in message


def test_rows_in_memory_are_embedded(tmp_path):
    rows = [{"instruction": "a", "input": "b", "output": "c"}, {"instruction": "d", "output": ""}]
    assert embed_records(rows, tmp_path / "e.npy", FakeEmbedder()).skipped == 1
    assert np.allclose(read_embeddings(tmp_path / "e.npy").vectors, embed(["a\nb"], FakeEmbedder()))


def test_both_files_of_a_pair_get_their_names_under_one_lock(tmp_path, named_under_lock):
    named = named_under_lock(tmp_path)
    write_pair(tmp_path / "e.npy", 1)
    assert named == ["e.npy", "e.rows.parquet"]
