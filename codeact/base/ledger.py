"""What went into every stage of a run and what came out, in rows and tokens, with a reason for every loss.

The numbers of a stage come from different places: what it took in from what the stage before left on disk, what it
gave out from its own files, and the losses from its own account of them. So the ledger only balances if nothing was
dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from codeact.base.console import aligned, if_known
from codeact.base.errors import InputError
from codeact.base.files import atomic_path
from codeact.base.parsing import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Rows and tokens that a stage lost or added, and why. ``tokens`` is None where they are not counted."""

    reason: str
    rows: int
    tokens: int | None = None


def changes(counts: Mapping[str, tuple[int, int | None]]) -> tuple[Change, ...]:
    """Changes from ``reason -> (rows, tokens)``, without those of nothing."""
    return tuple(
        Change(reason=reason, rows=rows, tokens=tokens) for reason, (rows, tokens) in counts.items() if rows or tokens
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One stage. ``after`` names the stage whose rows these are; None where a chain of them begins."""

    stage: str
    what: str
    after: str | None
    rows_in: int
    rows_out: int
    tokens_in: int | None = None
    tokens_out: int | None = None
    lost: tuple[Change, ...] = ()
    added: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The stages of a run in order; ``stale`` names those left out, since what they took in is gone."""

    entries: tuple[Entry, ...]
    stale: tuple[str, ...] = ()

    def complaints(self) -> list[str]:
        """Where it does not balance: one sentence each; empty if it does."""
        found = []
        known = {entry.stage: entry for entry in self.entries}
        for entry in self.entries:
            for unit in ("rows", "tokens"):
                taken, given = getattr(entry, f"{unit}_in"), getattr(entry, f"{unit}_out")
                before = known.get(entry.after or "")
                handed = getattr(before, f"{unit}_out") if before else None
                if taken is not None and handed is not None and taken != handed:
                    found.append(f"{entry.stage} takes in {taken:,} {unit}, {entry.after} gave out {handed:,}")
                if taken is None or given is None:
                    continue
                lost, added = (_total(changes, unit) for changes in (entry.lost, entry.added))
                if taken + added != given + lost:
                    found.append(
                        f"{entry.stage}: {taken:,} {unit} in + {added:,} added is not {given:,} out + {lost:,} lost"
                    )
        return found

    def table(self) -> str:
        """Aligned plain text: a line a stage, and a line a reason under it."""
        head = ("stage", "", "rows in", "rows out", "tokens in", "tokens out")
        cells: list[Sequence[str | None]] = [head]
        for entry in self.entries:
            numbers = (entry.rows_in, entry.rows_out, entry.tokens_in, entry.tokens_out)
            cells.append((entry.stage, entry.what, *(if_known("{:,}".format, number) for number in numbers)))
            for sign, listed in (("-", entry.lost), ("+", entry.added)):
                for change in listed:
                    rows = f"{sign}{change.rows:,}" if change.rows else ""
                    tokens = f"{sign}{change.tokens:,}" if change.tokens else ""
                    cells.append(("", f"{sign} {change.reason}", "", rows, "", tokens))
        text = aligned(cells)
        if self.stale:
            text += f"\n\n  stale, made from other results, and not counted: {', '.join(self.stale)}"
        return text

    def write(self, path: Path) -> None:
        """Write it as JSON; the file appears whole or not at all."""
        content = {"stages": [asdict(entry) for entry in self.entries], "stale": self.stale}
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Read what ``write`` wrote.

        Raises:
            InputError: it is not there, or is something else.
        """
        try:
            content = read_json(path)
            entries = tuple(_entry(stage) for stage in content["stages"])
            return cls(entries=entries, stale=tuple(content.get("stale", ())))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"cannot use {path}: {error}; make it again with: codeact run") from None


def _entry(stage: dict) -> Entry:  # type: ignore[type-arg]
    changes = {name: tuple(Change(**change) for change in stage[name]) for name in ("lost", "added")}
    return Entry(**{**stage, **changes})


def _total(changes: Iterable[Change], unit: str) -> int:
    return sum(getattr(change, unit) or 0 for change in changes)
