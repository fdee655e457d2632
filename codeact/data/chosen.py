"""What a run's folder says of the chosen rows: which they are, and how many tokens they had when they were scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from codeact.base.errors import InputError
from codeact.base.parsing import parse_json
from codeact.data.tables import read_table


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


def row_tokens(table: pa.Table) -> NDArray[np.int64]:
    """Question + answer tokens of every row of a score table, (rows,)."""
    return np.asarray(table["prompt_tokens"], np.int64) + np.asarray(table["answer_tokens"], np.int64)


def chosen_tokens(scores: Path, ids: pa.Array) -> int:
    """Question + answer tokens of the rows of a score table (.parquet) that have one of these ids."""
    table = read_table(scores, "score again", columns=["id", "prompt_tokens", "answer_tokens"])
    chosen = np.asarray(pc.is_in(table["id"].cast(pa.large_string()), value_set=ids))
    return int(row_tokens(table)[chosen].sum())
