"""Numbers with their units, and texts of strangers made visible, for the pages that people read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

NONE = "\N{EN DASH}"
"""What a cell shows where there is no number."""

_SPACE = "\N{NO-BREAK SPACE}"

# What a browser would show as nothing, or let change the order of what stands around it: control characters, those
# that turn the direction of writing, and halves of surrogate pairs, which no UTF-8 file may hold.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def count(value: float | None) -> str:
    """A whole number with thousands separators."""
    return NONE if value is None else f"{value:,.0f}"


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: 1 row, 2 rows."""
    return f"{number:,}{_SPACE}{one if number == 1 else many or one + 's'}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 0.25 as 25.0 %."""
    return NONE if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}{_SPACE}%"


def moved(before: float, after: float, show: Callable[[float], str]) -> str:
    """How a value went: rose from 1 to 2, fell from 2 to 1, stayed at 1. ``show`` writes it."""
    if show(before) == show(after):
        return f"stayed at {show(after)}"
    return f"{'rose' if after > before else 'fell'} from {show(before)} to {show(after)}"


def title(dataset: str) -> str:
    """The name that a data set of problems is known by."""
    return {"humaneval": "HumanEval", "mbpp": "MBPP"}.get(dataset, dataset)


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def size(number: float | None) -> str:
    """Bytes in MiB or GiB."""
    if number is None:
        return NONE
    return f"{number / 2**30:,.2f}{_SPACE}GiB" if number >= 2**30 else f"{number / 2**20:,.0f}{_SPACE}MiB"


def duration(seconds: float | None) -> str:
    """Seconds as 1.2 s, 3 min 20 s or 2 h 5 min."""
    if seconds is None:
        return NONE
    if seconds < 99.95:
        return f"{seconds:.1f}{_SPACE}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{_SPACE}min {whole % 60}{_SPACE}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,}{_SPACE}h {minutes % 60}{_SPACE}min"


def short(value: float) -> str:
    """A number for the tick of an axis: 950, 2k, 1.5M."""
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale * (10 if unit == "k" else 1):
            return f"{value / scale:.4g}{unit}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def visible(text: str) -> str:
    """Show what is invisible as its number, such as ⟨U+202E⟩; tabs and ends of lines stay."""
    return _INVISIBLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text.replace("\r\n", "\n"))
