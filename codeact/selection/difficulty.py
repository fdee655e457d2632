"""The sums of a score table -> how difficult every row is, by one of several definitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from codeact.base.errors import InputError, one_of
from codeact.selection.settings import DIFFICULTIES

NEIGHBOURS = 41
"""Rows next in length, itself among them, that a length-adjusted rank is among."""

_COLUMNS = {
    "ifd": ("ifd",),
    "ifd_length_adjusted": ("ifd", "answer_tokens"),
    "loss": ("cond_nll_sum", "scored_tokens"),
    "s_ifd": ("s_ifd",),
}
_SUMS = ("cond_nll_sum", "scored_tokens", "uncond_nll_sum", "uncond_scored_tokens")

_Floats = NDArray[np.float64]


def difficulty_scores(table: pa.Table, name: str) -> tuple[_Floats, NDArray[np.object_]]:
    """How difficult every row of a score table is, and why some may not be chosen by it.

    - ``ifd``: the quotient of the answer's perplexities with and without the question (arXiv 2402.00530), 0 to 1.
    - ``ifd_loss``: the quotient of the mean losses, as the code of arXiv 2308.12032 computes it, 0 to 1.
    - ``ifd_length_adjusted``: the share of the ``NEIGHBOURS`` rows next in answer tokens whose IFD is lower.
    - ``loss``: the mean loss of an answer token given the question, nats.
    - ``loss_gain``: by how much the question lowers the mean loss, nats: the order of IFD turned round.
    - ``s_ifd``: IFD of the tokens that the question moves (arXiv 2506.01317), from the column that scoring wrote.

    Returns:
        Values (rows,), NaN where there is none, and the reasons (rows,): empty where the row may be chosen.

    Raises:
        InputError: the name is unknown, or the table lacks what it is computed from.
    """
    one_of("difficulty", name, DIFFICULTIES)
    needs = _COLUMNS.get(name, _SUMS)
    check_columns(table, ("status", "ifd", "row"))
    ok = ok_rows(table)
    scored = ok & np.isfinite(column(table, "ifd", pa.float64()))
    # a table of an older version is read with all columns, and nothing in the new ones
    if missing := [
        n
        for n in needs
        if n not in table.column_names or (scored.any() and not table[n].is_valid().to_numpy()[scored].any())
    ]:
        again = "codeact score --keep-token-nll" if name == "s_ifd" else "codeact score"
        raise InputError(
            f"difficulty {name} needs {', '.join(missing)}, which these scores lack; score again with {again}, or "
            "choose by --difficulty ifd"
        )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if name in ("ifd", "ifd_length_adjusted", "s_ifd"):
            value = column(table, "s_ifd" if name == "s_ifd" else "ifd", pa.float64())
        else:
            value = column(table, "cond_nll_sum", pa.float64()) / column(table, "scored_tokens", pa.int64())
            if name != "loss":
                alone = column(table, "uncond_nll_sum", pa.float64())
                alone = alone / column(table, "uncond_scored_tokens", pa.int64())
                value = alone - value if name == "loss_gain" else value / alone
    value = np.where(ok & np.isfinite(value), value, np.nan)
    reasons = np.full(len(value), "", object)
    kind = "ifd" if name == "ifd_length_adjusted" else name
    if name == "loss_gain":
        reasons[value <= 0] = "no_loss_gain"
    elif name != "loss":
        reasons[value >= 1], reasons[value <= 0] = f"{kind}_at_least_1", f"{kind}_not_positive"
    reasons[np.isnan(value)] = "nonfinite"
    status = np.asarray(pc.fill_null(table["status"].cast(pa.string()), "nonfinite"), object)
    reasons[~ok] = status[~ok]
    if name == "ifd_length_adjusted":
        chosen_from = np.flatnonzero(reasons == "")
        tokens, rows = column(table, "answer_tokens", pa.int64()), column(table, "row", pa.int64())
        adjusted = np.full(len(value), np.nan)
        adjusted[chosen_from] = rank_among_neighbours(value[chosen_from], tokens[chosen_from], rows[chosen_from])
        value = adjusted
    return value, reasons


def rank_among_neighbours(
    values: _Floats, lengths: NDArray[np.int64], rows: NDArray[np.int64], neighbours: int = NEIGHBOURS
) -> _Floats:
    """The share of the other rows next in length that a value is above, 0 to 1; all arrays (n,).

    In order of length, ties by row, a row's neighbours are the ``neighbours`` around it, itself the middle one; at both
    ends the first and the last so many. Of equal values the one of the smaller row counts as the higher.
    """
    count = len(values)
    window = min(neighbours, count)
    if window < 2:
        return np.ones(count)
    by_length = np.lexsort((rows, lengths))
    place = np.empty(count, np.int64)
    place[np.lexsort((-rows, values))] = np.arange(count)  # where it stands among all values, without ties
    places = place[by_length]
    windows = np.lib.stride_tricks.sliding_window_view(places, window)
    first = np.clip(np.arange(count) - window // 2, 0, count - window)
    shares = np.empty(count)
    for start in range(0, count, 65_536):  # 65,536 windows of 41 places are 21 MB
        part = slice(start, start + 65_536)
        shares[by_length[part]] = (windows[first[part]] < places[part, None]).sum(axis=1) / (window - 1)
    return shares


def check_columns(table: pa.Table, names: Sequence[str]) -> None:
    """Refuse a table that is no score table.

    Raises:
        InputError: it names the columns that are missing.
    """
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise InputError(
            f"the score table has no column {', '.join(missing)}; pass the folder that codeact score wrote"
        )


def column(table: pa.Table, name: str, kind: pa.DataType) -> NDArray[Any]:
    """A column as numpy; null becomes NaN, or 0 in a column of integers."""
    fill = float("nan") if pa.types.is_floating(kind) else 0
    values: NDArray[Any] = pc.fill_null(table.column(name).cast(kind), fill).to_numpy()
    return values


def ok_rows(table: pa.Table) -> NDArray[np.bool_]:
    """Which rows were scored, (rows,)."""
    status = table.column("status")
    ok: NDArray[np.bool_] = pc.fill_null(pc.equal(status, pa.scalar("ok", status.type)), False).to_numpy()
    return ok
