"""A control group for a program: what the kernel holds on its behalf then counts too, and has a limit.

Where this process may make none (most users), there are still the limits of the process and the filter of system calls.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from codeact.base.machine import group_folders

_PREFIX = "codeact-"
_SPARE_BYTES = 64 << 20  # for the interpreter's pages of files and what the kernel needs for a decent program
_LIMITS = (("memory.max", "memory.swap.max"), ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"))
"""Of version 2 and of version 1: the file of the limit, that of swap."""


class MemoryGroups:
    """Control groups of ``most_bytes`` each, reused from program to program.

    ``most_bytes``: memory of the processes and of their files in memory.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes + _SPARE_BYTES
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._free: list[Path] = []
        self._parent = next((place for place in group_folders("memory") if self._try(place)), None)

    def _try(self, parent: Path) -> bool:
        group = self._make(parent)
        if group is not None:
            _remove_leftovers(parent)
            self._free.append(group)
        return group is not None

    def _make(self, parent: Path) -> Path | None:
        """A new group with its limit; None where that cannot be."""
        group = parent / f"{_PREFIX}{os.getpid()}-{id(self):x}-{next(self._numbers)}"
        with suppress(OSError):
            group.mkdir()
            for limit, swap in _LIMITS:
                if (group / limit).exists():
                    (group / limit).write_text(str(self._most))
                    with suppress(OSError):  # a kernel that does not count swap
                        (group / swap).write_text("0" if limit == "memory.max" else str(self._most))
                    return group
        with suppress(OSError):
            group.rmdir()
        return None

    @contextmanager
    def group(self) -> Iterator[Path | None]:
        """Lend an empty group: a process joins when its id is written into ``cgroup.procs``. None: there is none."""
        with self._lock:
            lent = next((group for group in self._free if _empty(group)), None)
            if lent is not None:
                self._free.remove(lent)
        if lent is None and self._parent is not None:
            lent = self._make(self._parent)
        try:
            yield lent
        finally:
            if lent is not None:
                with self._lock:
                    self._free.append(lent)

    def close(self) -> None:
        """Remove them; one whose last process is still dying is removed by the next run."""
        with self._lock:
            for group in self._free:
                with suppress(OSError):
                    group.rmdir()
            self._free, self._parent = [], None


def _empty(group: Path) -> bool:
    try:
        return not (group / "cgroup.procs").read_text()
    except OSError:
        return False


def _remove_leftovers(parent: Path) -> None:
    """Remove the groups of processes that were killed before they could."""
    for group in parent.glob(f"{_PREFIX}*"):
        process = group.name.removeprefix(_PREFIX).split("-")[0]
        if not Path("/proc", process).exists():
            with suppress(OSError):
                group.rmdir()
