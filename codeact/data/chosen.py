"""What a run's folder says of the chosen rows: which they are, and how many tokens they had when they were scored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from codeact.base.errors import InputError
from codeact.base.files import atomic_path
from codeact.base.parsing import parse_json
from codeact.data.forms import Turn
from codeact.data.records import write_jsonl
from codeact.data.tables import read_table

_TURNS = {
    name: pa.list_(pa.struct({role: pa.string(), text: pa.string(), "weight": pa.int8()}))
    for name, role, text in (("messages", "role", "content"), ("conversations", "from", "value"))
}
_TEXTS = {name: pa.string() for name in ("id", "instruction", "input", "output", "system", "extra")}
_TYPES = {**_TEXTS, **_TURNS, "history": pa.list_(pa.list_(pa.string())), "ifd": pa.float64(), "cluster": pa.int32()}
_BLOCK = 1024  # rows of a write


def write_chosen(path: str | Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write chosen rows, whole or not at all: Parquet where the name ends so, else one JSON object a line.

    Parquet has one type a column and ``extra`` may hold anything, so it is text there: JSON.

    Raises:
        InputError: the file cannot be written, or a row holds what JSON cannot.
    """
    if Path(path).suffix != ".parquet":
        write_jsonl(path, rows)
        return
    with atomic_path(path) as temporary:
        writer = None
        while (block := list(islice(rows, _BLOCK))) or writer is None:
            if writer is None:
                schema = pa.schema([(name, kind) for name, kind in _TYPES.items() if not block or name in block[0]])
                writer = pq.ParquetWriter(temporary, schema)
            texts = [{**row, "extra": json.dumps(row["extra"], ensure_ascii=False)} for row in block]
            writer.write_table(pa.Table.from_pylist(texts, schema))
        writer.close()


def chosen_ids(selected: Path) -> pa.Array:
    """The ids in a file of chosen rows, one a line.

    Raises:
        InputError: a line is no chosen row.
    """
    ids = []
    with selected.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                ids.append(parse_json(line)["id"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{selected}, line {number}: no chosen row ({error}); select again") from None
    return pa.array(ids, pa.large_string())


def chosen_turns(line: dict[str, Any]) -> tuple[Turn, ...]:
    """The turns of a chosen row; their column had another name before, which is read until the next release."""
    turns = line["messages"] if "messages" in line else line["conversation"]
    return tuple((str(turn["role"]), str(turn["content"])) for turn in turns)


def row_tokens(table: pa.Table) -> NDArray[np.int64]:
    """Question + answer tokens of every row of a score table, (rows,)."""
    return np.asarray(table["prompt_tokens"], np.int64) + np.asarray(table["answer_tokens"], np.int64)


def chosen_tokens(scores: Path, ids: pa.Array) -> int:
    """Question + answer tokens of the rows of a score table (.parquet) that have one of these ids."""
    table = read_table(scores, "score again", columns=["id", "prompt_tokens", "answer_tokens"])
    chosen = np.asarray(pc.is_in(table["id"].cast(pa.large_string()), value_set=ids))
    return int(row_tokens(table)[chosen].sum())
