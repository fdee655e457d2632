"""What a person sees: lines, tables, a progress bar, numbers with units, and strangers' texts made harmless.

Loads nothing heavy, and tqdm only for a bar on a terminal.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Never

    from tqdm import tqdm

# What a terminal would obey, or show as nothing, or let change the order of what stands around it: control characters,
# those that turn the direction of writing, and halves of surrogate pairs, which no UTF-8 file may hold.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_SECONDS_BETWEEN_LINES = 60.0


def visible(text: str) -> str:
    """Show what is invisible as its number, such as ⟨U+001B⟩; tabs and ends of lines stay.

    What comes back can be written as UTF-8, and neither a terminal nor a browser obeys anything in it.
    """
    return _INVISIBLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text.replace("\r\n", "\n"))


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: no half of a surrogate pair, as which Python hands on bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def say(text: str) -> None:
    """Tell the person who waits: a line on the standard error, above a bar if there is one, made ``visible``."""
    with ExitStack() as stack:
        if "tqdm" in sys.modules:  # so a bar may be open, and the line would break into it
            from tqdm import tqdm

            stack.enter_context(tqdm.external_write_mode(sys.stderr))
        # In one piece: print writes the end of a line by itself, and other processes write here too.
        print(f"{visible(text)}\n", end="", file=sys.stderr, flush=True)


def aligned(rows: Sequence[Sequence[str | None]], left: int = 2, *, markdown: bool = False) -> str:
    """Return a table as text, in columns as wide as their widest cell.

    Args:
        rows: cells of every line, the same number in each; a pair of a name and a text is a table too. A cell is made
            one ``visible`` line; of None it is empty.
        left: so many columns are aligned on the left, the others (numbers) on the right.
        markdown: with a rule under the first row, so that it is a table for Markdown as well.
    """
    cells = [[re.sub(r"[\t\n]", " ", visible(cell or "")) for cell in row] for row in rows]
    if not cells:
        return ""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.ljust if place < left else str.rjust for place in range(len(widths))]
    lines = [[side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)] for row in cells]
    if not markdown:
        return "\n".join("  " + "  ".join(line).rstrip() for line in lines)
    rule = ["-" * width if place < left else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


class Progress:
    """How far a stage is: a bar on a terminal; elsewhere (a log, a file) a line at the start and one a minute.

    ``with Progress(2017, "rows", "scoring") as step:`` and ``step(rows, tokens)`` after every part, which may be a
    fraction of a row; with tokens, it shows how many a second.

    Args:
        total: how many there are to do; of 0 nothing is shown.
        unit: what they are, in the plural.
        what: what is done with them.
        show: False: nothing is shown.
    """

    def __init__(self, total: int, unit: str, what: str, *, show: bool = True) -> None:
        self._total, self._unit, self._what = total, unit, what
        self._show = show and total > 0
        self._done, self._tokens = 0.0, 0
        self._stack = ExitStack()
        self._bar: tqdm[Never] | None = None
        self._begin = self._told = time.monotonic()

    def __enter__(self) -> Progress:
        if self._show and sys.stderr.isatty():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            form = f"{{desc}}: {{percentage:3.0f}}% |{{bar:30}}| {{n:,.0f}} of {{total:,}} {self._unit} "
            form += "[{elapsed}<{remaining}{postfix}]"
            self._bar = self._stack.enter_context(tqdm(total=self._total, desc=self._what, bar_format=form))
            self._stack.enter_context(logging_redirect_tqdm())  # else a line that is logged would break into the bar
        elif self._show:
            say(f"{self._what}: {self._total:,} {self._unit} to do")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, count: float, tokens: int = 0) -> None:
        """Count what was done since the last call: ``count`` of the unit, with so many tokens."""
        count = min(count, self._total - self._done)  # shares may add up to a hair more than all
        self._done += count
        self._tokens += tokens
        now = time.monotonic()
        seconds = max(now - self._begin, 1e-9)
        rate = f"{self._tokens / seconds:,.0f} tokens/s" if self._tokens else ""
        if self._bar is not None:
            self._bar.set_postfix_str(rate, refresh=False)
            self._bar.update(count)
        elif self._show and now - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = now
            left = f"about {duration(seconds * (self._total / self._done - 1))} left" if self._done else ""
            parts = [f"{self._done:,.0f} of {self._total:,} {self._unit}", rate, left]
            say(f"{self._what}: {', '.join(filter(None, parts))}")


# -------------------------------------------------------------------------------------------- numbers with their units


def if_known(show: Callable[[Any], str], value: Any) -> str | None:
    """A value as ``show`` writes it; None where it is None, which tables leave empty."""
    return None if value is None else show(value)


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: 1 row, 2 rows."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 0.25 as 25.0 %; a dash where there is none."""
    return f"{100 * share:.{digits}f} %" if share is not None and math.isfinite(share) else "\N{EN DASH}"


def size(number: float) -> str:
    """Bytes in KiB, MiB or GiB: 12 KiB, 1.50 GiB."""
    if number >= 2**30:
        return f"{number / 2**30:,.2f} GiB"
    return f"{number / 2**20:,.0f} MiB" if number >= 2**20 or not number else f"{number / 2**10:,.0f} KiB"


def duration(seconds: float) -> str:
    """Seconds as 1.2 s, 3 min 20 s or 2 h 5 min."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def short(value: float) -> str:
    """A number in little room: 950, 20k, 1.5M."""
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale * (10 if unit == "k" else 1):
            return f"{value / scale:.4g}{unit}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
