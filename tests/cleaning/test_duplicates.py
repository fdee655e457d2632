"""Duplicates: MinHash against exact Jaccard of all pairs, vectors against all cosines, and hostile inputs."""

from __future__ import annotations

import functools
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeact.cleaning import duplicates
from codeact.cleaning.duplicates import ShingleStore, exact_repeats, near_repeats, similar_questions
from codeact.cleaning.shingles import MOST_TEXTS, HashBlock

WORDS = [f"w{n}" for n in range(40)]
needs_rensa = pytest.mark.usefixtures("rensa")


@pytest.fixture
def rensa():
    pytest.importorskip("rensa", reason="rensa is in the extra clean")


def tokens(text: str) -> list[str]:
    """Words, single characters of scripts without spaces between words, signs."""
    unspaced = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
    return re.findall(rf"[{unspaced}]|(?:(?![{unspaced}])\w)+|[^\w\s]", text.casefold())


@functools.cache
def grams(text: str, n: int = 5) -> set[tuple[str, ...]]:
    found = tokens(text)
    return {tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1))} if found else set()


def jaccard(one: str, other: str) -> float:
    a, b = grams(one), grams(other)
    return len(a & b) / len(a | b) if a and b else 0.0


def reference(texts: list[str], threshold: float) -> list[list[int]]:
    """For every row the rows before it that stay and are as near: it is marked if there is one."""
    partners: list[list[int]] = []
    for row, text in enumerate(texts):
        partners.append([i for i in range(row) if not partners[i] and jaccard(texts[i], text) >= threshold])
    return partners


def stored(texts: list[str], folder) -> ShingleStore:
    store = ShingleStore(len(texts), folder)
    for start in range(0, len(texts), MOST_TEXTS):
        store.add(HashBlock.tokens_of(texts[start : start + MOST_TEXTS]).grams(5))
    return store


def near(texts: list[str], folder, threshold: float = 0.7):
    return near_repeats(stored(texts, folder), np.ones(len(texts), bool), threshold)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "one",
        "a b",
        "x = y + 1;",
        "a b c d e",
        "a b c d e f a b c d e f",
        "Ünïcode Straße ΣΑΣ",
        "漢字かな交じり文です",
        "ภาษาไทยไม่มีช่องว่าง",
        "한국어 문장",
        "नमस्ते दुनिया",
        "שלום עולם",
        "😀😀 👍🏽",
        "\u200b",
        "_a_ 1_000 ... ___",
    ],
)
def test_grams_are_those_of_the_reference(text):
    block = HashBlock.tokens_of(["before it", text, "after"])
    assert [int(n) for n in np.bincount(block.owners, minlength=3)] == [2, len(tokens(text)), 1]
    for n in (1, 5, 8):
        sets = block.grams(n).distinct()
        assert int((sets.owners == 1).sum()) == len(grams(text, n))


def test_equal_grams_have_equal_hashes_wherever_they_stand():
    texts = ["a b c d e f", "x a b c d e", "c d e f", "a b c d e"]
    sets = [set(HashBlock.tokens_of([text]).grams(5).hashes.tolist()) for text in texts]
    together = HashBlock.tokens_of(texts).grams(5)
    assert [set(together.hashes[together.owners == n].tolist()) for n in range(4)] == sets
    assert sets[3] < sets[0]
    assert sets[3] < sets[1]
    assert not sets[2] & sets[0]  # a text of four tokens is one gram of four


@needs_rensa
@settings(max_examples=60)
@given(
    pairs=st.lists(
        st.tuples(st.lists(st.sampled_from(WORDS), max_size=30), st.integers(0, 30)), min_size=1, max_size=12
    )
)
def test_the_store_says_exact_jaccard(pairs, tmp_path_factory):
    texts = [" ".join(words) for words, _ in pairs] + [" ".join(words[:cut]) for words, cut in pairs]
    store = stored(texts, tmp_path_factory.getbasetemp())
    rows, others = map(np.ravel, np.meshgrid(np.arange(len(texts)), np.arange(len(texts))))
    expected = [jaccard(texts[a], texts[b]) for a, b in zip(rows, others, strict=True)]
    np.testing.assert_array_equal(store.jaccard(rows, others), expected)


def changed_texts(generator: np.random.Generator, count: int) -> list[str]:
    """Texts of 3 to 120 words, half of them an earlier one with some words changed, or cut short."""
    texts: list[str] = []
    for _ in range(count):
        if texts and generator.random() < 0.6:
            words = texts[generator.integers(len(texts))].split()
            for place in generator.integers(len(words), size=generator.integers(0, 1 + len(words) // 15)):
                words[place] = f"w{generator.integers(10**6)}"
            texts.append(" ".join(words[: max(1, len(words) - generator.integers(0, 5))]))
        else:
            texts.append(" ".join(f"w{n}" for n in generator.integers(10**6, size=generator.integers(3, 120))))
    return texts


@needs_rensa
@pytest.mark.parametrize(("threshold", "misses"), [(0.6, 0.05), (0.7, 0.02), (0.9, 0)])
def test_near_rows_are_those_of_exact_jaccard(tmp_path, threshold, misses):
    texts = changed_texts(np.random.default_rng(3), 400)
    found = near(texts, tmp_path, threshold)
    marked = found.partner >= 0
    for row in np.flatnonzero(marked):
        assert found.partner[row] < row
        assert not marked[found.partner[row]]
        assert found.similarity[row] == jaccard(texts[row], texts[found.partner[row]]) >= threshold
    for row in np.flatnonzero(~marked & (found.nearest >= 0)):
        assert found.similarity[row] == jaccard(texts[row], texts[found.nearest[row]]) < threshold
    # Of pairs that lie at the threshold one in a hundred shares no bucket, of 0.6 one in seven, of 0.9 none.
    stay = np.flatnonzero(~marked)
    missed = sum(any(jaccard(texts[i], texts[j]) >= threshold for i in stay[stay < j]) for j in stay)
    assert missed <= misses * marked.sum()
    wanted = sum(map(bool, reference(texts, threshold)))
    assert wanted > 40
    assert abs(int(marked.sum()) - wanted) <= misses * wanted


@needs_rensa
def test_who_is_near_only_to_a_marked_row_stays(tmp_path):
    """A chain in which every row is near to the next alone: every second one is left, whatever the bands find first."""
    words = [f"w{n}" for n in range(400)]
    texts = [" ".join(words[10 * n : 10 * n + 100]) for n in range(25)]
    assert jaccard(texts[0], texts[1]) > 0.8 > jaccard(texts[0], texts[2])
    found = near(texts, tmp_path, 0.8)
    assert found.partner.tolist() == [n - 1 if n % 2 else -1 for n in range(25)]


@needs_rensa
def test_rows_of_few_tokens_and_none(tmp_path):
    found = near(["", "one", "", "two", "ONE", "漢字", "漢子", "漢字", "a b c d", "a b c d e"], tmp_path)
    assert found.partner.tolist() == [-1, -1, -1, -1, 1, -1, -1, 5, -1, -1]


@needs_rensa
def test_scripts_without_spaces_are_not_one_word(tmp_path):
    text = "与えられた数の階乗を計算する関数を書いてください。再帰を使わずに実装し、負の数では例外を送出すること。"
    found = near([text, text.replace("階乗", "平方")], tmp_path, 0.6)
    assert found.partner.tolist() == [-1, 0]


@needs_rensa
@pytest.mark.parametrize("kind", ["equal", "near", "in one bucket and not near"])
def test_comparisons_do_not_grow_with_the_square(tmp_path, monkeypatch, kind):
    """Of n rows that all look alike, at most MOST_COMPARED n pairs are looked at; of equal and near ones, a few n."""
    count = 3000
    base = [f"w{n}" for n in range(60)]
    texts = [" ".join(base if kind == "equal" else [*base, f"own{n}"]) for n in range(count)]
    store = stored(texts, tmp_path)
    compared = 0
    real = ShingleStore.jaccard

    def counted(self, rows, others):
        nonlocal compared
        compared += len(rows)
        if kind == "in one bucket and not near":
            return np.full(len(rows), 0.5) - others / 1e9
        return real(self, rows, others)

    monkeypatch.setattr(ShingleStore, "jaccard", counted)
    if kind == "in one bucket and not near":
        monkeypatch.setattr(ShingleStore, "buckets", lambda self, band: np.zeros(count, np.uint64))
    found = near_repeats(store, np.ones(count, bool), 0.7)
    if kind == "in one bucket and not near":
        assert (found.partner < 0).all()
        assert compared <= duplicates.MOST_COMPARED * count
    else:
        assert found.partner.tolist() == [-1] + [0] * (count - 1)
        assert compared < 10 * count


def test_equal_texts_name_the_first_that_is_allowed():
    digests = np.array([[1, 2], [3, 4], [1, 2], [1, 5], [3, 4], [1, 2]], np.uint64)
    allowed = np.array([True, False, True, True, True, True])
    assert exact_repeats(digests, allowed).tolist() == [-1, -1, 0, -1, -1, 0]
    assert exact_repeats(np.zeros((0, 2), np.uint64), np.zeros(0, bool)).tolist() == []


def test_a_million_equal_rows_take_a_moment():
    begin = time.process_time()
    partner = exact_repeats(np.ones((10**6, 2), np.uint64), np.ones(10**6, bool))
    assert (partner[1:] == 0).all()
    assert time.process_time() - begin < 20  # all pairs would take hours


# --------------------------------------------------------------------------------------------------------- by vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def questions(count: int, share: float, seed: int = 0) -> np.ndarray:
    """Unit vectors, of which a share is an earlier one moved a little."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(count, 32))
    for row in np.flatnonzero(generator.random(count) < share)[1:]:
        vectors[row] = vectors[generator.integers(row)] + 0.1 * generator.normal(size=32)
    return unit(vectors)


def all_pairs(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """Whether every row is as near to an earlier one that stays."""
    cosines, marked = vectors @ vectors.T, np.zeros(len(vectors), bool)
    for row in range(len(vectors)):
        marked[row] = (cosines[row, :row][~marked[:row]] >= threshold).any()
    return marked


def test_similar_questions_are_those_of_all_pairs():
    vectors = questions(5000, 0.5)
    rows = np.arange(5000) * 2 + 1
    allowed = np.ones(10_001, bool)
    found = similar_questions(vectors, rows, allowed, 0.95)
    np.testing.assert_array_equal(found.partner[rows] >= 0, all_pairs(vectors, 0.95))
    marked = np.flatnonzero(found.partner >= 0)
    cosines = (vectors[(marked - 1) // 2] * vectors[(found.partner[marked] - 1) // 2]).sum(axis=1)
    np.testing.assert_allclose(found.similarity[marked], cosines, atol=1e-6)
    assert (found.partner[found.partner[marked]] < 0).all()
    assert (found.partner[::2] < 0).all()


def test_cells_miss_few(monkeypatch):
    monkeypatch.setattr(duplicates, "_CELL", 200)
    monkeypatch.setattr(duplicates, "_BLOCK", 64)
    vectors = questions(4000, 0.5, seed=1)
    found = similar_questions(vectors, np.arange(4000), np.ones(4000, bool), 0.95)
    wanted = all_pairs(vectors, 0.95)
    assert not (found.partner >= 0)[~wanted].all()
    assert (found.partner >= 0)[wanted].mean() > 0.85


def test_rows_that_are_not_allowed_are_nobodys_partner():
    vectors = unit(np.ones((4, 8)))
    found = similar_questions(vectors, np.arange(4), np.array([False, True, True, False]), 0.9)
    assert found.partner.tolist() == [-1, -1, 1, -1]


def test_equal_vectors_do_not_take_the_square(monkeypatch):
    monkeypatch.setattr(duplicates, "_CELL", 100)
    monkeypatch.setattr(duplicates, "_BLOCK", 256)
    multiplied = 0
    real = duplicates._nearest

    def counted(found, cosines, *rest):
        nonlocal multiplied
        multiplied += cosines.size
        real(found, cosines, *rest)

    monkeypatch.setattr(duplicates, "_nearest", counted)
    vectors = unit(np.ones((20_000, 4)))
    found = similar_questions(vectors, np.arange(20_000), np.ones(20_000, bool), 0.9)
    assert found.partner.tolist() == [-1] + [0] * 19_999
    assert multiplied < 5 * 20_000
