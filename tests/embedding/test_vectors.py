"""Embedding: order, unit length, truncation counts, hostile texts, models that are none."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeact.base.errors import InputError
from codeact.embedding import vectors as embedding
from codeact.embedding.vectors import embed, embed_texts, load_embedder
from tests.helpers.fake_embedder import FakeEmbedder


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


def test_a_causal_model_is_no_embedder_and_told_so(tiny_model_path, embedder_path, caplog):
    with caplog.at_level(logging.WARNING, "codeact"):
        load_embedder(embedder_path)
        assert not [record for record in caplog.records if record.name == "codeact"]
        load_embedder(tiny_model_path)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "codeact"]
    assert "is LlamaForCausalLM and no sentence-transformers model" in message
