"""TRL's packing by our planner: the packs of ``packing_strategy="bfd"`` and "bfd_split", in a fraction of the time.

import codeact.integrations.trl
codeact.integrations.trl.install()      # then SFTTrainer(..., args=SFTConfig(packing=True, ...)) as ever
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from codeact.base.errors import InputError, one_of
from codeact.packing.packs import pack, token_places


def install() -> None:
    """Let TRL of this process, ``pack_dataset`` and every trainer, pack with ``pack_table``.

    Raises:
        InputError: TRL is absent, or another one than we know.
    """
    try:
        import trl.data_utils as data_utils
    except ImportError:
        raise InputError("TRL is not installed: pip install trl") from None
    if not hasattr(data_utils, "_pack_bfd"):
        raise InputError("this TRL packs in another way than 1.16 does; use pack_table with dataset.map instead")
    data_utils._pack_bfd = pack_table


def pack_table(table: pa.Table, seq_length: int, on_seq_length_overflow: str = "truncate") -> pa.Table:
    """Pack rows of tokens, best-fit decreasing, as TRL's ``pack_dataset`` does with the batches of a data set.

    Args:
        table: columns of lists, all of one length in a row, as ``input_ids`` and ``labels``. Empty rows are left out.
        seq_length: most tokens of a pack.
        on_seq_length_overflow: of a longer row "truncate" keeps the first tokens, "split" makes several pieces.

    Returns:
        A row a pack: the same columns, and ``seq_lengths``, the tokens of each of its samples.

    Raises:
        InputError: a column holds no lists, or the lists of a row differ in length.
    """
    split = one_of("on_seq_length_overflow", on_seq_length_overflow, ("truncate", "split")) == "split"
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    for name, column in columns.items():
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise InputError(f"column {name!r} is {column.type}, not lists of tokens; leave it out before packing")
    offsets = {name: column.offsets.to_numpy() for name, column in columns.items()}
    first = next(iter(offsets))
    starts, lengths = offsets[first][:-1].astype(np.int64), np.diff(offsets[first]).astype(np.int64)
    for name in columns:
        if not np.array_equal(np.diff(offsets[name]), lengths):
            raise InputError(f"columns {first!r} and {name!r} have lists of different lengths in one row")
    if split:
        pieces = -(-lengths // seq_length)
        before = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(starts, pieces) + before * seq_length
        lengths = np.repeat(lengths, pieces) - before * seq_length
    lengths = np.minimum(lengths, seq_length)
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    packs = pack(lengths, seq_length)
    sizes = lengths[packs.indices]
    tokens = token_places(starts[packs.indices], sizes)
    bounds = np.concatenate([[0], np.cumsum(sizes)])[packs.offsets]
    packed = {}
    for name, column in columns.items():
        base = int(offsets[name][0]) - int(offsets[first][0])
        values = column.values.take(pa.array(tokens + base))
        packed[name] = type(column).from_arrays(bounds.astype(offsets[name].dtype), values)
    counts = pa.array(sizes.astype(offsets[first].dtype))
    return pa.table({**packed, "seq_lengths": pa.ListArray.from_arrays(packs.offsets.astype(np.int32), counts)})
