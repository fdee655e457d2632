"""Packs in files that other trainers read: a plan of all rows, and the packs in the form of a library's own reader.

    DATA -> token ids in a file, lengths in memory -> plan -> packs, a block at a time -> OUTPUT, and its plan beside it

Only a block of rows, or of packs, is ever held as Python objects: beside it a row costs 24 bytes of memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from codeact.base.console import percent
from codeact.base.errors import InputError, one_of
from codeact.base.files import TEMPORARY_PREFIX, atomic_path
from codeact.data.records import RecordSet, open_records
from codeact.packing.packs import Packs, pack, token_places
from codeact.text.conversations import BLOCK_ROWS, IGNORE, Refused, Sample, encode_conversations

FORMATS = ("index", "trl", "megatron", "ms-swift", "llama-factory")
_BLOCK_TOKENS = 1 << 22  # of packs that are laid out at a time
_TURN = pa.struct({"role": pa.string(), "content": pa.string(), "loss": pa.bool_()})
_SWIFT = pa.schema({"messages": pa.list_(_TURN), "lengths": pa.list_(pa.int32())})

_Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackFiles:
    """What was written: ``plan``, and ``output`` (the same for the format "index"), of which rows, in which packs."""

    output: Path
    plan: Path
    rows: int
    refused: Counter[str]
    packs: Packs

    def summary(self) -> str:
        """One line."""
        packs, samples = self.packs, len(self.packs.indices)
        refused = _listed(self.refused) or "none"
        return (
            f"{samples:,} samples of {self.rows:,} rows (refused: {refused}), {packs.tokens:,} tokens, "
            f"in {len(packs):,} packs of at most {packs.capacity:,}, {percent(packs.fill)} full; "
            f"no plan has fewer than {packs.lower_bound:,}"
        )


def _listed(refused: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(refused.items()))


def write_packs(
    data: Any,
    output: str | Path,
    form: str,
    capacity: int,
    tokenizer: Any = None,
    template: str = "chat",
    on_overflow: str = "truncate",
) -> PackFiles:
    """Plan packs, best-fit decreasing, over all rows, and write them for another trainer.

    Args:
        data: what ``open_records`` opens; or, for the format "index", a FILE.npy of lengths, (rows,) integer.
        output: "index", "trl" and "megatron" write a Parquet file, "ms-swift" and "llama-factory" a folder of
            ``save_to_disk``. The plan goes beside it, to NAME.plan.parquet: a row a pack, ``rows`` (positions in the
            data, list of int64) and ``tokens`` (int32); "index" writes nothing else, and to ``output`` itself.
        form: one of ``FORMATS``; docs/pack.md says how each library reads it.
        capacity: most tokens of a pack.
        tokenizer: of transformers; not needed for a file of lengths.
        template: as ``model_type`` of ``encode_conversations``.
        on_overflow: as there.

    Raises:
        InputError: data or tokenizer do not fit, no row gives a sample, or ``output`` is there as a folder already.
    """
    one_of("format", form, FORMATS)
    output = Path(output)
    if output.is_dir():
        raise InputError(f"{output} is a folder that is there already; remove it, or choose another --output")
    plan = output if form == "index" else output.with_name(f"{output.name.removesuffix('.parquet')}.plan.parquet")
    output.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, str | Path) and str(data).endswith(".npy"):
        if form != "index":
            raise InputError(f"{data} holds lengths only, which is enough for --format index; give rows for {form}")
        lengths = _read_lengths(Path(data))
        packs, refused, count = pack(lengths, capacity), Counter[str](), len(lengths)
        _write_plan(plan, packs, np.arange(count), lengths)
    elif tokenizer is None:
        raise InputError("rows need a --tokenizer: a model's folder or hub name")
    else:
        records = open_records(data)
        encode = partial(
            encode_conversations, tokenizer=tokenizer, model_type=template, max_length=capacity, on_overflow=on_overflow
        )
        with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=output.parent) as folder:
            store = _Store(Path(folder), form)
            refused, count = store.fill(records, encode), len(records)
            lengths = store.lengths
            packs = pack(lengths, capacity)
            if form in _LAYOUTS:
                pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
                blocks = _laid_out(packs, lengths, store.ids, store.labels, _LAYOUTS[form], pad)
                if form == "llama-factory":
                    _save(_arrow(blocks, Path(folder) / "packs.arrow"), output, Path(folder) / "packs")
                else:
                    _write_parquet(output, blocks, group=500)  # as Megatron-Bridge: it reads a group for every row
            elif form == "ms-swift":
                _save(store.dataset().select(packs.indices), output, Path(folder) / "packs")
            _write_plan(plan, packs, np.array(store.rows, np.int64), lengths)
    return PackFiles(output=output, plan=plan, rows=count, refused=refused, packs=packs)


class _Store:
    """Samples in the order of the data: in files, so much of each as the format needs.

    ``rows`` (samples,): the position of each in the data; ``lengths`` (samples,) int64.
    """

    def __init__(self, folder: Path, form: str) -> None:
        self._form, self.rows, self._lengths = form, array("q"), array("q")
        self._ids, self._labels, self._messages = folder / "ids", folder / "labels", folder / "messages.arrow"

    def fill(self, records: RecordSet, encode: Callable[..., list[Sample | Refused]]) -> Counter[str]:
        """Encode all rows, a block at a time; returns how many were refused, by reason.

        Raises:
            InputError: there is no other row.
        """
        refused: Counter[str] = Counter()
        with (
            self._ids.open("wb") as ids,
            self._labels.open("wb") as labels,
            pa.ipc.new_stream(str(self._messages), _SWIFT) as messages,
        ):
            for start in range(0, len(records), BLOCK_ROWS):
                rows = records.rows(start, start + BLOCK_ROWS)
                results = encode(rows)
                refused.update(result.reason for result in results if isinstance(result, Refused))
                kept = [(r, s) for r, s in zip(rows, results, strict=True) if isinstance(s, Sample)]
                self.rows.extend(row.row for row, _ in kept)
                self._lengths.extend(len(sample.input_ids) for _, sample in kept)
                if self._form in _LAYOUTS:
                    for _, sample in kept:
                        ids.write(sample.input_ids.tobytes())
                        labels.write(sample.labels.tobytes())
                elif self._form == "ms-swift":
                    talks = [{"messages": _messages(row), "lengths": [len(sample.input_ids)]} for row, sample in kept]
                    messages.write_table(pa.Table.from_pylist(talks, _SWIFT))
        if not self.rows:
            raise InputError(f"{records.source}: no row gives a sample that fits ({_listed(refused)})")
        return refused

    @property
    def lengths(self) -> _Ints:
        return np.array(self._lengths, np.int64)

    @property
    def ids(self) -> _Ints:
        """(tokens,) int32."""
        return np.memmap(self._ids, np.int32, "r")

    @property
    def labels(self) -> _Ints:
        """(tokens,) int32."""
        return np.memmap(self._labels, np.int32, "r")

    def dataset(self) -> Any:
        """The messages, as a data set of ``datasets``."""
        import datasets

        return datasets.Dataset.from_file(str(self._messages))


def _messages(row: Any) -> list[dict[str, Any]]:
    """ms-swift's: ``loss`` false where an answer is not to be learnt."""
    return [
        {"role": role, "content": text, "loss": False if number in row.context else None}
        for number, (role, text) in enumerate(row.turns)
    ]


def _read_lengths(path: Path) -> _Ints:
    try:
        lengths: _Ints = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; give a file of numpy.save with integers") from None
    if not lengths.size:
        raise InputError(f"{path} holds no lengths; give one with at least one")
    return lengths


# ----------------------------------------------------------------------------------------- packs as libraries read them

# ids, labels: of the packs of a block laid end to end, (T,) int32; sizes: tokens of each sample, (N,); first: the
# number of each pack's first sample, (P + 1,); capacity, and the token to pad with.
_Layout = Callable[[_Ints, _Ints, _Ints, _Ints, int, int], pa.Table]


def _lists(offsets: _Ints, values: _Ints) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def _trl(ids: _Ints, labels: _Ints, sizes: _Ints, first: _Ints, _capacity: int, _pad: int) -> pa.Table:
    """The columns of TRL's ``pack_dataset``."""
    bounds = np.concatenate([[0], np.cumsum(sizes)])[first]
    return pa.table(
        {
            "input_ids": _lists(bounds, ids),
            "labels": _lists(bounds, labels),
            "seq_lengths": _lists(first, sizes.astype(np.int32)),
        }
    )


def _megatron(ids: _Ints, labels: _Ints, sizes: _Ints, first: _Ints, _capacity: int, _pad: int) -> pa.Table:
    """Megatron-Bridge's: the mask stands where a token is predicted, one before it."""
    ends = np.cumsum(sizes)
    bounds = np.concatenate([[0], ends])[first]
    mask = np.append(labels[1:] != IGNORE, False)
    starts = ends - sizes - np.repeat(bounds[:-1], np.diff(first))
    return pa.table(
        {
            "input_ids": _lists(bounds, ids),
            "loss_mask": _lists(bounds, mask.astype(np.int8)),
            "seq_start_id": _lists(first, starts.astype(np.int32)),
        }
    )


def _llama_factory(ids: _Ints, labels: _Ints, sizes: _Ints, first: _Ints, capacity: int, pad: int) -> pa.Table:
    """LLaMA-Factory's ``neat_packing``: rows padded to one length, the mask numbers a pack's samples from 1."""
    ends = np.cumsum(sizes)
    fills = np.diff(np.concatenate([[0], ends])[first])
    width = -(-(capacity + 1) // 8) * 8  # one more as there; its collator pads all but the positions to a multiple of 8
    places = token_places(np.arange(len(fills)) * width, fills)
    number = np.arange(len(sizes)) - np.repeat(first[:-1], np.diff(first)) + 1
    columns = {
        "input_ids": (ids, pad, np.int32),
        "attention_mask": (np.repeat(number, sizes), 0, np.int32),
        "position_ids": (token_places(np.zeros_like(sizes), sizes), 0, np.int32),
        "labels": (labels, IGNORE, np.int32),
    }
    table = {}
    for name, (values, padding, kind) in columns.items():
        rows = np.full(len(fills) * width, padding, kind)
        rows[places] = values
        table[name] = _lists(np.arange(len(fills) + 1) * width, rows)
    return pa.table(table)


_LAYOUTS: dict[str, _Layout] = {"trl": _trl, "megatron": _megatron, "llama-factory": _llama_factory}


def _laid_out(packs: Packs, lengths: _Ints, ids: _Ints, labels: _Ints, layout: _Layout, pad: int) -> Iterator[pa.Table]:
    """The packs in order, some thousand rows of tokens at a time."""
    starts = np.cumsum(lengths) - lengths
    step = max(1, _BLOCK_TOKENS // (packs.capacity + 1))
    for begin in range(0, len(packs), step):
        first = packs.offsets[begin : begin + step + 1]
        members = packs.indices[first[0] : first[-1]]
        sizes = lengths[members]
        places = token_places(starts[members], sizes)
        of_samples = labels[places]
        of_samples[np.cumsum(sizes) - sizes] = IGNORE  # nothing comes before a sample's first token to predict it from
        yield layout(ids[places], of_samples, sizes, first - first[0], packs.capacity, pad)


def _write_plan(path: Path, packs: Packs, rows: _Ints, lengths: _Ints) -> None:
    def blocks(step: int = 1 << 18) -> Iterator[pa.Table]:
        for begin in range(0, len(packs), step):
            first = packs.offsets[begin : begin + step + 1]
            members = packs.indices[first[0] : first[-1]]
            tokens = np.add.reduceat(lengths[members], first[:-1] - first[0], dtype=np.int64)
            yield pa.table({"rows": _lists(first - first[0], rows[members]), "tokens": tokens.astype(np.int32)})

    _write_parquet(path, blocks())


def _write_parquet(path: Path, blocks: Iterator[pa.Table], group: int | None = None) -> None:
    with atomic_path(path) as place:
        head = next(blocks)
        with pq.ParquetWriter(place, head.schema) as writer:
            for block in chain([head], blocks):
                writer.write_table(block, row_group_size=group)


def _arrow(blocks: Iterator[pa.Table], path: Path) -> Any:
    """A data set of `datasets` over a new file."""
    import datasets

    head = next(blocks)
    with pa.ipc.new_stream(str(path), head.schema) as writer:
        for block in chain([head], blocks):
            writer.write_table(block)
    return datasets.Dataset.from_file(str(path))


def _save(rows: Any, path: Path, temporary: Path) -> None:
    """Write a data set as a folder, whole or not at all."""
    try:
        rows.save_to_disk(str(temporary))
        os.replace(temporary, path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another --output") from None
