"""Parquet files of ours, read where somebody may have damaged them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from codeact.base.errors import InputError
from codeact.base.parsing import refuse_pipes


def read_table(path: Path, remedy: str, **options: Any) -> pa.Table:
    """Read a Parquet file.

    Args:
        path: the file.
        remedy: what to do where it is damaged.
        options: of ``pyarrow.parquet.read_table``.

    Raises:
        InputError: it is cut, is no file, or has not these columns.
    """
    try:
        refuse_pipes(path)
        return pq.read_table(path, **options)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is damaged ({reason}): {remedy}") from None
