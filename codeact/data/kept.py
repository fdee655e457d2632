"""What a pass over a large file told, for whoever opens it next: where its rows begin, its digest, which ids are twice.

Without it every command, every worker and every rerun reads 100 GB before it begins. It lies in the cache folder and is
known by the file's place, size and times, as git knows what has changed; the time of change is among them, which nobody
sets back. The first who wants it makes it, whoever comes meanwhile waits for that, and all map it: one copy a machine.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from codeact.base.errors import InputError
from codeact.base.files import TEMPORARY_PREFIX, cache_path, locked_folder

Arrays = Mapping[str, npt.NDArray[Any]]

_LEAST = 64 << 20  # bytes: smaller files are read in a moment
_MAPPED = 8 << 20  # bytes: smaller arrays are read, as a map holds a descriptor and there may be thousands of files
_SETTLED = 2.0  # seconds: what was written just now may be written again within one tick of its clock
_FORMAT = 1


def kept_of_file(file: Path, what: str, make: Callable[[], Arrays]) -> Arrays:
    """Return what ``make`` told of a file once, or make it now.

    Args:
        file: that is read.
        what: is told of it, a word.
        make: reads it and returns named arrays; its errors are raised.

    Raises:
        OSError: there is no such file.
    """
    before = _stamp(file)
    if before[0] < _LEAST:
        return make()
    place = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32]
    settled = time.time() - before[2] / 1e9 > _SETTLED  # whatever changes it from now on gives it another time
    return _kept(place, what, "-".join(map(str, before)), make, settled=settled)


def kept_of_rows(fingerprint: str, what: str, make: Callable[[], Arrays]) -> Arrays:
    """The same of rows that are known by their fingerprint."""
    return _kept(fingerprint[:32], what, "rows", make, settled=True)


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _kept(place: str, what: str, state: str, make: Callable[[], Arrays], *, settled: bool) -> Arrays:
    folder = cache_path("data", grows=True) / place
    ours = folder / f"{what}-{_FORMAT}-{state}"
    if (found := _read(ours)) is not None:
        return found
    with ExitStack() as stack:
        with suppress(InputError):  # a cache that cannot be written to
            stack.enter_context(locked_folder(folder, wait=True))
        if (found := _read(ours)) is not None:  # made while we waited
            return found
        made = make()
        if settled:
            with suppress(OSError):  # a disk that is full: it is the next one's loss
                _write(ours, made)
                for old in folder.glob(f"{what}-*"):
                    if old != ours:
                        shutil.rmtree(old, ignore_errors=True)
        return made


def _read(folder: Path) -> Arrays | None:
    """The arrays in a folder; None where there is none or one is damaged."""
    try:
        files = sorted(folder.glob("*.npy"))
        return {
            file.stem: np.load(file, mmap_mode="r" if file.stat().st_size > _MAPPED else None, allow_pickle=False)
            for file in files
        } or None
    except (OSError, ValueError, EOFError):
        return None


def _write(folder: Path, arrays: Arrays) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        shutil.rmtree(folder, ignore_errors=True)  # one that is damaged
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
