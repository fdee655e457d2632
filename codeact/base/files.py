"""Files that appear whole or not at all, also under ``kill -9`` and power loss."""

from __future__ import annotations

import atexit
import functools
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from codeact.base.console import say
from codeact.base.errors import InputError

TEMPORARY_PREFIX = ".codeact-tmp-"


def cache_path(name: str, *, grows: bool = False) -> Path:
    """Where something is kept that is costly to have again: in the folder CODEACT_CACHE, else in ``~/.cache/codeact``.

    Where there is no home, or it cannot be written to and does not hold it, in a folder for this process alone. That
    one has no name that somebody else on the machine could have taken before.

    Args:
        name: of the file or folder, relative.
        grows: it is a folder that is written to though it is there already.
    """
    if named := os.environ.get("CODEACT_CACHE"):
        return Path(named).expanduser() / name
    home = Path(os.path.expanduser("~"), ".cache", "codeact")
    if home.is_absolute():  # else there is no home
        if (home / name).exists() and (not grows or os.access(home / name, os.W_OK)):
            return home / name
        with suppress(OSError):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            if os.access((home / name).parent, os.W_OK) and not (home / name).exists():
                return home / name
    return _process_cache() / name


@functools.cache
def _process_cache() -> Path:
    folder = tempfile.mkdtemp(prefix="codeact-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    say(f"no home to write to: the cache is {folder} and goes with this process; CODEACT_CACHE names one that stays")
    return Path(folder)


def download(url: str, *, most: int, seconds: float) -> bytes:
    """What is at an address: ``most`` bytes in ``seconds`` at most.

    Raises:
        OSError: it cannot be had, or is longer, or takes longer.
    """
    import http.client
    import urllib.request

    content, until = bytearray(), time.monotonic() + seconds
    try:
        with urllib.request.urlopen(url, timeout=min(20.0, seconds)) as answer:
            while part := answer.read1(1 << 16):
                content += part
                if time.monotonic() > until or len(content) > most:
                    raise TimeoutError(f"{len(content):,} bytes in {seconds:.0f} s, and no end")
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from None
    return bytes(content)


def keep_apart(written: Path, *read: str | Path | None) -> None:
    """Refuse to write a file that is read as well: one of ``read``, or the NAME.rows.parquet beside a NAME.npy of them.

    Raises:
        InputError: it is one of them.
    """
    for path in read:
        if path is None:
            continue
        read_here = Path(path).resolve()
        if written.resolve() in (read_here, read_here.with_suffix(".rows.parquet")):
            raise InputError(f"{written} belongs to {path} and would be overwritten; choose another --output")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, sync it to disk and rename it to ``path``.

    The temporary name holds host, process and target, so that two writers of one file never share it and the last
    rename wins whole. When the block raises, the temporary file is removed and ``path`` is left as it was.

    Raises:
        InputError: the folder cannot be written to, or the disk is full; the message names the file.
    """
    path = Path(path)
    refuse_address(path)
    temporary = path.with_name(
        f"{TEMPORARY_PREFIX}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        descriptor = os.open(temporary, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another --output"
        ) from None
    finally:
        with suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path, *, wait: bool) -> Iterator[None]:
    """Keep other processes of this machine from writing to a folder; where a system has no such locks, do nothing.

    Args:
        folder: is made if it is not there.
        wait: for another process that writes there; else that is an error.

    Raises:
        InputError: another process writes there, or the folder cannot be made.
    """
    refuse_address(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; choose another output") from None
    with ExitStack() as stack:
        with suppress(ImportError, OSError):  # Windows, and file systems without locks
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise InputError(f"another process writes to {folder}; wait for it, or choose another output") from None
        yield


def refuse_address(path: Path) -> None:
    """Refuse an address where a path of this machine is wanted: it would be made as a folder.

    Raises:
        InputError: it is one.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/[^/]", str(path)) and not path.exists():
        address = str(path).replace(":/", "://", 1)
        raise InputError(f"{address} is no path of this machine; only data may lie there: give a path, and copy it")


def check_kind(path: str | Path, *, folder: bool) -> None:
    """Refuse to write a folder where a file is, or a file where a folder is; to be asked before a model is loaded.

    Raises:
        InputError: that is so.
    """
    if Path(path).exists() and Path(path).is_dir() != folder:
        there, wanted = ("file", "folder") if folder else ("folder", "file")
        raise InputError(f"{path} is a {there}, and what is written is a {wanted}; choose another --output")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in ``folder`` of processes of this machine that were killed while they wrote."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}{socket.gethostname()}-*"):
        process = path.name.removeprefix(f"{TEMPORARY_PREFIX}{socket.gethostname()}-").split("-", 1)[0]
        if process.isdigit() and not runs(int(process)):
            path.unlink(missing_ok=True)


def runs(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; a folder that cannot be opened (some network mounts) has no such call."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
