"""A control group for a program: what the kernel holds on its behalf then counts too, and has a limit.

Where this process may make none (most users), there are still the limits of the process and the filter of system calls.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
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
        self._free: deque[Path] = deque()
        self._parent: Path | None = None
        for parent in group_folders("memory"):
            if (group := self._make(parent)) is not None:
                self._free.append(group)
                self._parent = parent
                _remove_leftovers(parent)
                break

    def _make(self, parent: Path) -> Path | None:
        """A new group with its limit; None where that cannot be."""
        group = parent / f"{_PREFIX}{os.getpid()}-{id(self):x}-{next(self._numbers)}"
        with suppress(OSError):
            group.mkdir()
        for limit, swap in _LIMITS:
            with suppress(OSError):
                if not (group / limit).exists():  # on a file system that is none of control groups it could be written
                    continue
                (group / limit).write_text(str(self._most))
                with suppress(OSError):  # a kernel that does not count swap
                    (group / swap).write_text("0" if limit == "memory.max" else str(self._most))
                return group
        with suppress(OSError):
            group.rmdir()
        return None

    def _take(self) -> Path | None:
        for _ in range(len(self._free)):
            with suppress(IndexError, OSError):  # another thread has it; somebody removed it
                group = self._free.popleft()
                if not (group / "cgroup.procs").read_text():
                    return group
                self._free.append(group)  # its last process is still dying
        return self._make(self._parent) if self._parent is not None else None

    @contextmanager
    def group(self) -> Iterator[Path | None]:
        """Lend an empty group: a process joins when its id is written into ``cgroup.procs``. None: there is none."""
        lent = self._take()
        try:
            yield lent
        finally:
            if lent is not None:
                self._free.append(lent)

    def close(self) -> None:
        """Remove them; one whose last process is still dying is removed by the next run."""
        self._parent = None
        while self._free:
            with suppress(OSError):
                self._free.popleft().rmdir()


def _remove_leftovers(parent: Path) -> None:
    """Remove the groups of processes that were killed before they could."""
    for group in parent.glob(f"{_PREFIX}*"):
        if not Path("/proc", group.name.removeprefix(_PREFIX).split("-")[0]).exists():
            with suppress(OSError):
                group.rmdir()
