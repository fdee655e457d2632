"""Packs for other trainers: every form is read as its library reads it, and says what `encode_conversations` says.

TRL is here and reads by itself. The readers of the others are written down as their own code has them (Megatron-Bridge
067f987, ms-swift 3602360, LLaMA-Factory ff6d4d1), which was run on such files once.
"""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from codeact.base.errors import InputError
from codeact.data.records import open_records
from codeact.integrations.pack_files import FORMATS, write_packs
from codeact.packing.packs import pack
from codeact.packing.reference import pack_reference
from codeact.text.conversations import IGNORE, Sample, encode_conversations
from tests.conftest import make_records

CAPACITY = 112


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Long ones that are cut, one that is refused, and one with an answer that is context."""
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "not learnt", "weight": 0},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "learnt"},
    ]
    pairs = [
        [{"role": "user", "content": record.question}, {"role": "assistant", "content": record.answer}]
        for record in make_records(40)
    ]
    return [{"messages": talk} for talk in [*pairs[:7], turns, [{"role": "user", "content": "no answer"}], *pairs[7:]]]


@pytest.fixture(scope="module")
def samples(rows, tokenizer) -> list[Sample | None]:
    """Of every row; first tokens without a label, as nothing predicts them."""
    results = encode_conversations(rows, tokenizer, max_length=CAPACITY)
    found = [result if isinstance(result, Sample) else None for result in results]
    assert sum(sample is None for sample in found) == 1
    assert any(sample is not None and sample.truncated for sample in found)
    for sample in found:
        if sample is not None:
            sample.labels[0] = IGNORE
    return found


@pytest.fixture
def written(rows, tokenizer, tmp_path):
    """Files of a format, and the rows of each pack."""

    def write(form: str):
        files = write_packs(rows, tmp_path / form, form, CAPACITY, tokenizer)
        assert files.refused == {"bad_conversation": 1}
        assert files.rows == len(rows)
        assert len(list(tmp_path.iterdir())) == 1 + (form != "index")  # nothing else is left there
        return files, pq.read_table(files.plan)["rows"].to_pylist()

    return write


@pytest.mark.parametrize(
    "lengths",
    [[1], [8] * 5, [1, 8, 1, 7, 8, 2], np.random.default_rng(0).integers(1, 9, 4000), np.array([3, 5, 2], np.uint16)],
    ids=["one", "all full", "few", "many", "uint16"],
)
def test_a_plan_of_lengths(lengths, tmp_path):
    np.save(tmp_path / "lengths.npy", np.asarray(lengths))
    write_packs(tmp_path / "lengths.npy", tmp_path / "plan.parquet", "index", 8)
    plan = pq.read_table(tmp_path / "plan.parquet")
    assert plan["rows"].to_pylist() == pack_reference(list(map(int, lengths)), 8)
    assert plan["tokens"].to_pylist() == [sum(int(lengths[row]) for row in rows) for rows in plan["rows"].to_pylist()]


def test_a_million_lengths_are_never_python_objects(tmp_path):
    count = 1_000_000
    np.save(tmp_path / "lengths.npy", np.random.default_rng(1).integers(1, 2049, count, np.int32))
    tracemalloc.start()
    write_packs(tmp_path / "lengths.npy", tmp_path / "plan.parquet", "index", 2048)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / count < 64  # bytes a row: arrays; a list of Python integers alone has 36
    assert sum(map(len, pq.read_table(tmp_path / "plan.parquet")["rows"].chunks)) > count / 4


def test_the_plan_names_every_row_that_fits_once(written, samples):
    files, plan = written("index")
    assert sorted(row for rows in plan for row in rows) == [n for n, sample in enumerate(samples) if sample is not None]
    assert files.output == files.plan
    assert all(sum(len(samples[row].input_ids) for row in rows) <= CAPACITY for rows in plan)
    assert f"{len(plan)} packs of at most {CAPACITY}" in files.summary()
    assert "(refused: 1 bad_conversation)" in files.summary()


def laid_end_to_end(samples, rows, what):
    return [int(value) for row in rows for value in getattr(samples[row], what)]


def test_trl(written, samples, tiny_model, tokenizer, tmp_path):
    """Its trainer takes the file as it is, and its loss is that of the samples alone."""
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra dev)")
    import codeact

    files, plan = written("trl")
    packs = datasets.load_dataset("parquet", data_files=str(files.output), split="train", cache_dir=str(tmp_path / "c"))
    for pack_, members in zip(packs, plan, strict=True):
        assert pack_["input_ids"] == laid_end_to_end(samples, members, "input_ids")
        assert pack_["labels"] == laid_end_to_end(samples, members, "labels")
        assert pack_["seq_lengths"] == [len(samples[row].input_ids) for row in members]
    codeact.isolate(tiny_model, max_length=CAPACITY)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "o"), max_steps=1, per_device_train_batch_size=len(packs), learning_rate=0.0,
        padding_free=True, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(tiny_model, args=arguments, train_dataset=packs, processing_class=tokenizer)
    loss = trainer.train().training_loss
    total = count = 0
    for sample in samples:
        if sample is not None:
            ids, labels = (
                torch.tensor(values, dtype=torch.int64)[None] for values in (sample.input_ids, sample.labels)
            )
            number = int((labels[:, 1:] != IGNORE).sum())
            total += tiny_model(input_ids=ids, labels=labels).loss.item() * number
            count += number
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_the_same_packs_as_trls_own(written, samples):
    trl = pytest.importorskip("trl.data_utils", reason="TRL is not installed (extra dev)")
    import pyarrow as pa

    kept = [sample for sample in samples if sample is not None]
    table = pa.table({name: [getattr(sample, name) for sample in kept] for name in ("input_ids", "labels")})
    files, _ = written("trl")
    assert pq.read_table(files.output).to_pylist() == trl._pack_bfd(table, CAPACITY).to_pylist()


def test_megatron(written, samples):
    """As its collator reads a row: labels are the ids one later, within a sample, where the mask is 1."""
    files, plan = written("megatron")
    for row, members in zip(pq.read_table(files.output).to_pylist(), plan, strict=True):
        bounds = [*row["seq_start_id"], len(row["input_ids"])]
        assert len(row["loss_mask"]) == len(row["input_ids"])
        for (start, stop), member in zip(pairwise(bounds), members, strict=True):
            tokens, labels = row["input_ids"][start : stop - 1], row["input_ids"][start + 1 : stop]
            mask = row["loss_mask"][start : stop - 1]
            assert [tokens[0], *labels] == samples[member].input_ids.tolist()
            learnt = [label if learn else IGNORE for label, learn in zip(labels, mask, strict=True)]
            assert learnt == samples[member].labels[1:].tolist()
    schema = pq.read_schema(files.output)
    assert [str(schema.field(name).type.value_type) for name in schema.names] == ["int32", "int8", "int32"]


def test_llama_factory(written, samples, tokenizer):
    """Rows of one length; the mask numbers the samples, which its collator makes a block-diagonal mask of."""
    files, plan = written("llama-factory")
    packs = datasets.load_from_disk(str(files.output))
    for row, members in zip(packs, plan, strict=True):
        ids = laid_end_to_end(samples, members, "input_ids")
        padding = CAPACITY + 8 - len(ids)
        assert row["input_ids"] == ids + [tokenizer.pad_token_id] * padding
        assert row["labels"] == laid_end_to_end(samples, members, "labels") + [IGNORE] * padding
        numbers = [n for n, member in enumerate(members, 1) for _ in samples[member].input_ids]
        assert row["attention_mask"] == numbers + [0] * padding
        positions = [n for member in members for n in range(len(samples[member].input_ids))]
        assert row["position_ids"] == positions + [0] * padding


def next_fit(lengths, capacity):
    """ms-swift's ``packing_strategy sequential``: one open pack, closed when the next sample does not fit."""
    packs, current, tokens = [], [], 0
    for number, length in enumerate(lengths):
        if current and tokens + length > capacity:
            packs.append(current)
            current, tokens = [], 0
        current.append(number)
        tokens += length
        if tokens >= capacity:
            packs.append(current)
            current, tokens = [], 0
    return [*packs, current] if current else packs


def test_ms_swift(written, samples, rows):
    """It packs what it reads by next fit, which makes our packs of rows in our order."""
    files, plan = written("ms-swift")
    packs = datasets.load_from_disk(str(files.output))
    order = [row for members in plan for row in members]
    assert packs["lengths"][:] == [[len(samples[row].input_ids)] for row in order]
    assert [len(members) for members in next_fit([n for (n,) in packs["lengths"]], CAPACITY)] == list(map(len, plan))
    for row, message in zip(order, packs["messages"], strict=True):
        told = [{key: turn[key] for key in ("role", "content")} for turn in rows[row]["messages"]]
        assert [{key: turn[key] for key in ("role", "content")} for turn in message] == told
        assert [turn["loss"] for turn in message] == [
            False if "weight" in turn else None for turn in rows[row]["messages"]
        ]


@pytest.mark.parametrize("seed", range(20))
def test_next_fit_in_the_order_of_best_fit_makes_the_same_packs(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, rng.integers(2, 40), rng.integers(1, 500))
    packs = pack(lengths, 40)
    again = next_fit(lengths[packs.indices].tolist(), 40)
    assert [len(members) for members in again] == np.diff(packs.offsets).tolist()


def test_blocks_of_packs_are_joined(rows, tokenizer, tmp_path, monkeypatch):
    """As where there are more tokens than are laid out at a time."""
    for form in ("trl", "megatron"):
        whole = pq.read_table(write_packs(rows, tmp_path / f"{form}1", form, CAPACITY, tokenizer).output)
        monkeypatch.setattr("codeact.integrations.pack_files._BLOCK_TOKENS", 3 * (CAPACITY + 1))
        monkeypatch.setattr("codeact.integrations.pack_files.BLOCK_ROWS", 4)
        parts = pq.read_table(write_packs(rows, tmp_path / f"{form}2", form, CAPACITY, tokenizer).output)
        assert parts.equals(whole)
        monkeypatch.undo()


def test_what_cannot_be_written(rows, tokenizer, tmp_path, codeact):
    np.save(tmp_path / "lengths.npy", np.array([3, 200]))
    with pytest.raises(InputError, match="holds lengths only, which is enough for format index; give rows for trl"):
        write_packs(tmp_path / "lengths.npy", tmp_path / "p", "trl", 64)
    with pytest.raises(InputError, match="200"):
        write_packs(tmp_path / "lengths.npy", tmp_path / "p", "index", 64)
    np.save(tmp_path / "none.npy", np.array([], np.int64))
    with pytest.raises(InputError, match="holds no lengths"):
        write_packs(tmp_path / "none.npy", tmp_path / "p", "index", 64)
    (tmp_path / "broken.npy").write_text("no array")
    with pytest.raises(InputError, match=r"cannot read .*broken.npy"):
        write_packs(tmp_path / "broken.npy", tmp_path / "p", "index", 64)
    with pytest.raises(InputError, match="rows need a tokenizer"):
        write_packs(rows, tmp_path / "p", "trl", 64)
    with pytest.raises(InputError, match=f"choose one of: {'.*'.join(sorted(FORMATS[:1]))}"):
        write_packs(rows, tmp_path / "p", "idx", 64, tokenizer)
    with pytest.raises(InputError, match="is a folder that is there already; remove it"):
        write_packs(rows, tmp_path, "ms-swift", 64, tokenizer)
    with pytest.raises(InputError, match=r"no row gives a sample that fits \(2 no_label_left\)"):
        write_packs(open_records(rows[:2]), tmp_path / "p", "trl", 2, tokenizer)
    for flags, message in (("--format trll", "format 'trll' is"), ("--on-overflow cut", "on_overflow 'cut' is")):
        code, _, err = codeact("pack", tmp_path / "none.npy", *flags.split(), "--output", "p", "--max-length", 9)
        assert (code, message in err) == (2, True)  # whatever the data is
    assert {path.name for path in tmp_path.iterdir()} == {"lengths.npy", "none.npy", "broken.npy"}
    assert (
        codeact("pack", tmp_path / "lengths.npy", "--capacity", 256, "--output_dir", tmp_path / "plan.parquet")[0] == 0
    )
