"""TRL packs the same with our planner: its own function is what ours is held against."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from codeact.base.errors import InputError
from codeact.integrations.trl import install, pack_table

trl = pytest.importorskip("trl.data_utils", reason="TRL is not installed (extra dev)")
THEIRS = trl._pack_bfd


def random_table(rng: np.random.Generator, longest: int) -> pa.Table:
    lengths = rng.integers(0, longest, int(rng.integers(1, 300)))
    ids = [rng.integers(1000, size=length).tolist() for length in lengths]
    return pa.table({"input_ids": ids, "labels": [[-token for token in row] for row in ids]})


@pytest.mark.parametrize("overflow", ["truncate", "split"])
@pytest.mark.parametrize("seed", range(10))
def test_the_same_packs(seed, overflow):
    rng = np.random.default_rng(seed)
    table, capacity = random_table(rng, longest=60), int(rng.integers(3, 50))
    assert pack_table(table, capacity, overflow).equals(THEIRS(table, capacity, overflow))


@pytest.mark.parametrize("overflow", ["truncate", "split"])
@pytest.mark.parametrize(
    "lengths",
    [[8] * 9, [9], [1], [17, 16, 8, 0, 1], [4] * 7, [5, 4, 4, 3, 3, 2, 2, 1], range(9), [7, 1] * 5, [100, 1]],
    ids=str,
)
def test_the_same_packs_of_awkward_lengths(lengths, overflow):
    rows = [list(range(length)) for length in lengths]
    table = pa.table({name: pa.array(rows, pa.list_(pa.int64())) for name in ("input_ids", "labels")})
    assert pack_table(table, 8, overflow).to_pylist() == THEIRS(table, 8, overflow).to_pylist()


def test_a_slice_of_a_table_and_large_lists():
    """As a batched map hands them out: their offsets do not begin at 0."""
    table = random_table(np.random.default_rng(0), 30)
    large = table.cast(pa.schema([(name, pa.large_list(pa.int64())) for name in table.column_names]))
    for part in (table.slice(7, 40), large, large.slice(3, 9)):
        assert pack_table(part, 32).equals(THEIRS(part, 32))
    apart = pa.table({"a": table["input_ids"].slice(5, 20), "b": table["labels"].slice(5, 20).to_pylist()})
    assert pack_table(apart, 32).to_pydict()["b"] == [
        [-t for t in row] for row in pack_table(apart, 32).to_pydict()["a"]
    ]


def test_what_cannot_be_packed():
    with pytest.raises(InputError, match="column 'text' is string"):
        pack_table(pa.table({"text": ["a"]}), 4)
    with pytest.raises(InputError, match="'a' and 'b' have lists of different lengths"):
        pack_table(pa.table({"a": [[1]], "b": [[1, 2]]}), 4)
    assert pack_table(pa.table({"a": pa.array([[]], pa.list_(pa.int64()))}), 4).num_rows == 0


def test_trl_uses_it(monkeypatch):
    from datasets import Dataset

    data = Dataset.from_dict(random_table(np.random.default_rng(1), 40).to_pydict())
    expected = {
        strategy: trl.pack_dataset(data, 32, strategy).to_dict() for strategy in ("bfd", "bfd_split", "wrapped")
    }
    monkeypatch.setattr(trl, "_pack_bfd", THEIRS)  # and its own again afterwards
    install()
    assert trl._pack_bfd is pack_table
    for strategy, columns in expected.items():
        assert trl.pack_dataset(data, 32, strategy).to_dict() == columns
    monkeypatch.delattr(trl, "_pack_bfd")
    with pytest.raises(InputError, match="packs in another way"):
        install()
