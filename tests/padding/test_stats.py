"""Every number of every strategy, computed again in plain Python; and the picture, the table and the data stage."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeact.base.errors import InputError, MissingExtraError
from codeact.data.records import Columns, open_records, write_jsonl
from codeact.ops.flops import ModelShape
from codeact.packing.reference import pack_reference
from codeact.padding.figure import plot_packs
from codeact.padding.stats import pack_stats, stats_for_data, strategy_table
from codeact.padding.strategies import STRATEGIES, plan
from codeact.text.conversations import Sample, encode_conversations
from tests.conftest import make_records

SHAPE = ModelShape(layers=2, hidden=8, intermediate=20, query_width=12, key_width=4, vocabulary=50)


def batches(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def packs_of(batch, lengths, capacity, algorithm):
    return [[batch[i] for i in p] for p in pack_reference([lengths[i] for i in batch], capacity, algorithm)]


def forwards_by_hand(strategy, lengths, capacity, batch_size, seed):
    """Forward passes of rows of samples."""
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    if strategy == "dynamic_pack_epoch":
        return [[row] for row in packs_of(list(range(len(lengths))), lengths, capacity, "bfd")]
    if strategy == "dynamic_pack_batch":
        return [packs_of(batch, lengths, capacity, "bfd") for batch in batches(order, batch_size)]
    if strategy == "paper_pack":
        return [packs_of(batch, lengths, capacity, "next_fit") for batch in batches(order, batch_size)]
    if strategy == "dynamic_pad_sorted":
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [[[i] for i in batch] for batch in batches(order, batch_size)]


def stats_by_hand(strategy, lengths, supervised, capacity, batch_size, seed):
    computed = squared = rows = 0
    forwards, logits = [], []
    made = forwards_by_hand(strategy, lengths, capacity, batch_size, seed)
    for forward in made:
        sums = [sum(lengths[i] for i in row) for row in forward]
        ours = strategy.startswith("dynamic_pack")
        if ours:
            widths = sums
            squared += sum(lengths[i] ** 2 for row in forward for i in row)
        else:
            widths = [capacity if strategy == "max_length" else max(sums)] * len(forward)
            squared += sum(width**2 for width in widths)
        rows += len(forward)
        computed += sum(widths)
        forwards.append(sum(widths))
        logits.append(sum(supervised[i] for row in forward for i in row) if ours else sum(widths))
    return {
        "strategy": strategy,
        "samples": len(lengths),
        "tokens": sum(lengths),
        "supervised": sum(supervised),
        "padding": computed - sum(lengths),
        "rows": rows,
        "forwards": len(made),
        "largest_forward": max(forwards),
        "squared_lengths": squared,
        "attention_flops": 6 * 2 * 12 * squared,
        "activation_bytes": max(forwards) * 2 * (4 * 8 + 2 * 12 + 2 * 4 + 4 * 20) * 2,
        "logit_bytes": max(logits) * 50 * 8,
    }


@st.composite
def sample_sets(draw):
    capacity = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=40))
    supervised = [draw(st.integers(0, length)) for length in lengths]
    return lengths, supervised, capacity, draw(st.integers(1, 7)), draw(st.integers(0, 3))


@settings(deadline=None)
@given(sample_sets())
def test_every_number_is_that_of_plain_python(samples):
    lengths, supervised, capacity, batch_size, seed = samples
    found = pack_stats(lengths, supervised, capacity, batch_size=batch_size, shape=SHAPE, seed=seed)
    assert [stats.strategy for stats in found] == list(STRATEGIES)
    for stats in found:
        wanted = stats_by_hand(stats.strategy, lengths, supervised, capacity, batch_size, seed)
        assert {name: getattr(stats, name) for name in wanted} == wanted
        assert stats.fill == sum(lengths) / (wanted["rows"] * capacity)
        assert stats.padding_share == wanted["padding"] / (sum(lengths) + wanted["padding"])


@settings(deadline=None)
@given(sample_sets())
def test_what_always_holds(samples):
    lengths, supervised, capacity, batch_size, seed = samples
    found = {s.strategy: s for s in pack_stats(lengths, supervised, capacity, batch_size=batch_size, seed=seed)}
    assert len({stats.tokens for stats in found.values()}) == 1
    assert all(stats.padding >= 0 for stats in found.values())
    paper_pack = found["paper_pack"]
    for ours in (found["dynamic_pack_batch"], found["dynamic_pack_epoch"]):
        assert ours.padding == 0 <= paper_pack.padding
        assert ours.squared_lengths <= min(s.squared_lengths for s in found.values())
        assert ours.largest_forward <= max(capacity, found["dynamic_pad"].largest_forward)
    # Inside one micro-batch best-fit decreasing never opens more packs than any next fit does.
    assert found["dynamic_pack_batch"].rows <= paper_pack.rows <= found["dynamic_pad"].rows
    assert found["dynamic_pad"].padding <= found["max_length"].padding
    if len(lengths) % batch_size == 0:  # else the sort may put a long sample into the full batch
        assert found["dynamic_pad_sorted"].padding <= found["dynamic_pad"].padding


def test_over_the_epoch_ours_has_fewer_rows_on_real_shapes():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.8, 0.7, 2000), 1, 2048).astype(np.int64)
    found = {s.strategy: s for s in pack_stats(lengths, lengths, 2048)}
    assert found["dynamic_pack_epoch"].rows < 0.9 * found["paper_pack"].rows
    assert found["dynamic_pack_epoch"].fill > 0.99


def test_a_worked_example():
    """The paper's figure: six samples of 4, 3, 5, 11, 7 and 6 tokens; rows of 16, or packs of 13."""
    lengths, labels = [4, 3, 5, 11, 7, 6], [1] * 6
    wide = {s.strategy: s for s in pack_stats(lengths, labels, 16, batch_size=6)}
    packs = {s.strategy: s for s in pack_stats(lengths, labels, 13, batch_size=6)}
    assert (wide["max_length"].padding, wide["dynamic_pad"].padding) == (6 * 16 - 36, 6 * 11 - 36)
    assert (packs["paper_pack"].rows, packs["paper_pack"].padding) == (3, 3 * 13 - 36)
    assert packs["paper_pack"].squared_lengths == 3 * 13**2
    assert packs["dynamic_pack_epoch"].squared_lengths == 16 + 9 + 25 + 121 + 49 + 36


def test_lengths_of_any_kind_and_without_a_model():
    plain = pack_stats([3, 5], [1, 2], 8)
    assert plain == pack_stats(np.array([3, 5], np.int32), np.array([1, 2]), 8)
    assert plain[0].attention_flops is plain[0].activation_bytes is plain[0].logit_bytes is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 8), "no sample"),
        (([3, 9], [1, 1], 8), "9"),
        (([0], [0], 8), "0"),
        (([3, 4], [1], 8), "same samples"),
        (([3], [4], 8), "over the sample's length"),
        (([3], [-1], 8), "below 0"),
        (([3], [1], 0), "capacity is 0"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        pack_stats(*arguments)


def test_a_bad_batch_size_and_an_unknown_strategy_are_refused():
    with pytest.raises(InputError, match="batch_size is 0"):
        pack_stats([3], [1], 8, batch_size=0)
    with pytest.raises(InputError, match="dynamic_pad"):
        plan("dynamic", np.array([3]), 8, 1, 0)


def test_the_table_is_markdown_whose_columns_line_up():
    for shape, columns in ((None, 8), (SHAPE, 10)):
        table = strategy_table(pack_stats([3, 5, 8], [1, 2, 3], 8, batch_size=2, shape=shape)).splitlines()
        assert len(table) == 2 + len(STRATEGIES)
        assert {len(line) for line in table} == {len(table[0])}
        assert {line.count("|") for line in table} == {columns + 1}
        assert [line.split("|")[1].strip() for line in table[2:]] == list(STRATEGIES.values())
    assert "8 tokens" in table[-1]


# ------------------------------------------------------------------------------------------------------------- picture


def test_the_picture_is_a_png_with_padding_where_padding_is(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    rng = np.random.default_rng(1)
    path = tmp_path / "packs.png"
    plot_packs(np.clip(rng.lognormal(5, 0.8, 300), 1, 1024).astype(int), 1024, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)[..., :3]
    height, width = pixels.shape[:2]
    assert height > 800
    assert width > 1500
    coloured = np.ptp(pixels, axis=-1) > 0.2
    panels = [coloured[: height // 2, : width // 3], coloured[height // 2 :, 2 * width // 3 :]]
    shares = [panel.mean() for panel in panels]
    assert min(shares) > 0.01
    assert max(shares) < 2 * min(shares), "the samples have the same area in every panel"


@pytest.mark.parametrize("count", [1, 3, 70])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_picture_of_few_samples_and_of_any_batch(tmp_path, count, batch_size):
    pytest.importorskip("matplotlib")
    if (count, batch_size) in {(1, 1), (3, 2), (70, 64), (70, 1)}:
        path = tmp_path / "packs.svg"
        plot_packs([1 + i % 9 for i in range(count)], 9, path, batch_size=batch_size)
        assert "<svg" in path.read_text()


def test_the_picture_refuses_what_it_cannot_draw(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match="no sample"):
        plot_packs([], 8, tmp_path / "packs.png")
    with pytest.raises(InputError, match=r"choose \.png"):
        plot_packs([1], 8, tmp_path / "packs.xyz")
    with pytest.raises(InputError, match="9"):
        plot_packs([9], 8, tmp_path / "packs.png")


def test_without_matplotlib_the_extra_is_named_and_the_table_is_still_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'pip install "codeact\[report\]"'):
        plot_packs([1], 8, tmp_path / "packs.png")
    assert "max_length" in strategy_table(pack_stats([3], [1], 8))


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def data_path(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": r.question, "output": r.answer} for r in make_records(30)]
    rows[4]["output"] = " "
    rows[9]["instruction"] = "def " * 200
    write_jsonl(path, rows)
    return path


def test_data_is_counted_as_training_encodes_it(data_path, tmp_path, tiny_model_path, tokenizer):
    capacity = 120
    report = stats_for_data(data_path, str(tiny_model_path), capacity, batch_size=4)
    results = encode_conversations(open_records(data_path), tokenizer, max_length=capacity)
    samples = [result for result in results if isinstance(result, Sample)]
    assert report.lengths.tolist() == [len(sample.input_ids) for sample in samples]
    assert report.rows == 30
    assert report.refused == {"empty_answer": 1, "no_label_left": 1}
    assert report.truncated == sum(sample.truncated for sample in samples)
    labels = [sum(label != -100 for label in sample.labels[1:].tolist()) for sample in samples]
    assert report.shape is not None
    assert report.shape.layers == 2
    assert report.strategies == pack_stats(report.lengths, labels, capacity, batch_size=4, shape=report.shape)
    assert "1 empty_answer, 1 no_label_left" in report.summary()
    assert report.table() == strategy_table(report.strategies)
    report.write_json(tmp_path / "stats.json")
    content = json.loads((tmp_path / "stats.json").read_text())
    assert content["capacity"] == capacity
    assert [s["padding"] for s in content["strategies"]] == [s.padding for s in report.strategies]
    assert content["strategies"][0]["padding_share"] == report.strategies[0].padding_share
    assert "lengths" not in content


def test_columns_and_overflow_are_passed_on(data_path, tiny_model_path):
    columns = Columns(question="output", answer="instruction")
    records = open_records(data_path, columns)
    report = stats_for_data(records, str(tiny_model_path), 1000, on_overflow="drop")
    assert report.refused == {"empty_question": 1}
    with pytest.raises(InputError, match="tokens are more than 40"):
        stats_for_data(data_path, str(tiny_model_path), 40, on_overflow="error")


def test_data_that_gives_no_sample_and_a_missing_tokenizer_are_refused(data_path, tmp_path, tiny_model_path):
    with pytest.raises(InputError, match="no row gives a sample of at most 3 tokens"):
        stats_for_data(data_path, str(tiny_model_path), 3)
    with pytest.raises(InputError, match="no such folder"):
        stats_for_data(data_path, str(tmp_path / "nothing"), 40)


def test_a_tokenizer_without_a_model_gives_no_estimates(data_path, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    report = stats_for_data(data_path, str(tmp_path / "tokenizer"), 120)
    assert report.shape is None
    assert "sum of length²" in report.table()
