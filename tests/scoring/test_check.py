"""Scores of a small model beside those of a large one: the sample, the agreement, and what the command says of them."""

from __future__ import annotations

import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from codeact.data.records import write_jsonl
from codeact.scoring.check import overlap_at, partial_correlation, sample_rows
from codeact.scoring.length import rank_correlation
from tests.conftest import make_records


def ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])


def residuals(values: np.ndarray, given: np.ndarray) -> np.ndarray:
    """What is left of the ranks of values after a straight line through those of given."""
    x, y = ranks(given), ranks(values)
    slope, offset = np.polyfit(x, y, 1)
    return y - slope * x - offset


@pytest.mark.parametrize("seed", range(5))
def test_partial_correlation_is_that_of_what_length_leaves(seed):
    generator = np.random.default_rng(seed)
    length = generator.integers(1, 40, 200).astype(float)
    a = length + 10 * generator.normal(size=200)
    b = length + 0.5 * a + 10 * generator.normal(size=200)
    expected = np.corrcoef(residuals(a, length), residuals(b, length))[0, 1]
    assert partial_correlation(a, b, length) == pytest.approx(expected, abs=1e-12)


def test_scores_that_are_nothing_but_length_have_none():
    length = np.arange(50.0)
    assert rank_correlation(length, 2 * length) == pytest.approx(1)
    assert partial_correlation(length, 2 * length, length) is None
    assert partial_correlation(np.ones(50), length, length) is None


def test_overlap_is_counted_among_the_highest():
    small = np.array([5.0, 4, 3, 2, 1, 0, -1, -2, -3, -4])
    assert overlap_at(small, small, 0.4) == (1.0, 1.0, 1.0)
    assert overlap_at(small, -small, 0.4)[0] == 0
    large = np.array([5.0, -9, 3, -9, 1, 0, -1, -2, -3, -4])
    share, low, high = overlap_at(small, large, 0.4)
    assert share == 0.5  # rows 0 and 2 of 0 to 3
    assert low <= share <= high
    assert overlap_at(np.ones(10), np.ones(10), 0.4)[0] == 1  # ties by place
    assert overlap_at(small[:2], large[:2], 0.1)[0] == 1  # at least one


def test_the_interval_holds_what_it_says():
    """Of 100 samples of 60 rows about 95 intervals hold the overlap of all rows."""
    generator = np.random.default_rng(0)
    small = generator.normal(size=5000)
    large = small + generator.normal(size=5000)
    truth = overlap_at(small, large, 0.4)[0]
    held = 0
    for _ in range(100):
        rows = generator.integers(5000, size=60)
        _, low, high = overlap_at(small[rows], large[rows], 0.4)
        held += low <= truth <= high
    assert 85 <= held <= 100


def test_the_sample_is_of_scored_rows_and_grows_by_count():
    ifd = np.where(np.arange(100) % 3 == 0, np.nan, 0.5)
    table = pa.table({"ifd": pa.array(ifd, from_pandas=True)})
    few, many = sample_rows(table, 10), sample_rows(table, 30)
    assert len(few) == 10
    assert set(few) < set(many)
    assert (np.diff(many) > 0).all()
    assert (many % 3 != 0).all()
    assert len(sample_rows(table, 1000)) == 66


@pytest.fixture
def other_model_path(tmp_path, tokenizer):
    """As ``tiny_model_path``, with other random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, initializer_range=0.3)).save_pretrained(
        tmp_path / "other"
    )
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_the_command(codeact, tmp_path, monkeypatch, tiny_model_path, other_model_path):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": record.question, "answer": record.answer} for record in make_records(30)]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, {"question": "no answer", "answer": ""}])
    score = ("score", "rows.jsonl", "--model", tiny_model_path, "--max-length", 256, "--output", "scores")
    code, out, err = codeact(*score, "--check-with", tiny_model_path, "--check-rows", 20)
    assert code == 0, err
    assert re.search(r"checked +20 rows with \S+\n", out), out
    assert "Spearman 1.00; with the answer's length held fixed 1.00" in out
    assert "100.0% of the top 40% are in both [100.0%, 100.0%]; by chance 40%" in out
    assert re.search(r"cost +[\d,]+ ms a row and [\d,]+ ms by it: all rows would take it ", out), out
    code, out, err = codeact(*score, "--check-with", other_model_path, "--check-rows", 20)
    assert code == 0, err
    checked = pq.read_table("scores/check.parquet")
    scores = pq.read_table("scores/scores.parquet")
    small = scores["ifd"].to_numpy()[np.asarray(checked["row"])]
    raw = rank_correlation(small, checked["ifd"].to_numpy())
    assert raw < 0.99
    assert f"Spearman {raw:.2f}" in out
    stamp = os.stat("scores/check.parquet").st_mtime_ns
    code, again, err = codeact(*score, "--check-with", other_model_path, "--check-rows", 20)
    assert (code, again.splitlines()[-6:]) == (0, out.splitlines()[-6:])
    assert os.stat("scores/check.parquet").st_mtime_ns == stamp
    assert "checking with" not in err
    code, _, err = codeact(*score, "--check-with", "./nowhere")
    assert code == 2
    assert "nowhere" in err


def test_a_dry_run_shows_it(codeact, tmp_path, monkeypatch, tiny_model_path, other_model_path, embedder_path):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": record.question, "answer": record.answer} for record in make_records(40)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    content = {"output": "run", "data": {"source": "rows.jsonl"}, "embed": {"model": str(embedder_path)}}
    content["score"] = {"model": str(tiny_model_path), "max_length": 256}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))

    def tokens(*changes: str) -> tuple[float, str]:
        code, out, err = codeact("run", "run.yaml", "--dry-run", *changes)
        assert code == 0, err
        number, unit = re.search(r"score +to do +40 +([\d.,]+)(k?)", out).groups()
        return float(number.replace(",", "")) * (1000 if unit else 1), out

    alone, out = tokens()
    assert "check of the scores" not in out
    half, out = tokens("--set", f"score.check_with={other_model_path}", "--set", "score.check_rows=20")
    assert f"check of the scores: {other_model_path}: its config.json, 20 rows" in out
    assert half == pytest.approx(1.5 * alone, rel=0.01)
