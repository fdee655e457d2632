"""Data on object stores and servers: fetched once to this machine, then read as the files of a folder are.

    s3://BUCKET/rows.jsonl  gs://BUCKET/FOLDER  hf://datasets/OWNER/NAME/FILE  https://HOST/FILE  and what fsspec knows

    CACHE/remote/<address>/<state>/rows.jsonl

The state is what the store says of the files (size, ETag, times): one that has changed is fetched again, and whoever
comes meanwhile waits. The data is known by its content, so that here and there it has the same fingerprint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from codeact.base.console import say, size
from codeact.base.errors import InputError
from codeact.base.files import atomic_path, cache_path, locked_folder
from codeact.data.sources import one_line, refusal

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://[^/]")
# By what a store says that a file has changed; other facts, such as a signed address, change by themselves.
_STATE = ("size", "ETag", "etag", "LastModified", "Last-Modified", "last_modified", "mtime", "updated", "created",
          "generation", "md5Hash", "Content-MD5", "Digest", "VersionId", "version_id", "blob_id", "lfs")  # fmt: skip
_UNUSED = 7 * 86_400.0  # seconds after which an old state is removed
_LIBRARIES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def is_address(name: str) -> bool:
    """Whether this is no path and no name on the hub, but where something lies on a store or a server."""
    return bool(_ADDRESS.match(name)) and "::" not in name  # of the latter fsspec would make chains


def fetched(address: str) -> Path:
    """Return the file or folder of this machine that holds what lies at an address, fetching what is not here yet.

    Files are fetched one by one, each whole or not at all, so that what was fetched survives a kill.

    Raises:
        InputError: its library is not installed, nothing is there or may be read, or the disk is too small.
    """
    home = cache_path("remote", grows=True) / hashlib.sha256(address.encode()).hexdigest()[:32]
    try:
        store, root = _store(address)
        with locked_folder(home, wait=True):  # before the look: what is fetched is what was seen
            there = _listing(store, root)
            state = json.dumps(
                [[path, {k: facts[k] for k in _STATE if k in facts}] for path, facts in sorted(there.items())],
                default=str,
            )
            target = home / hashlib.sha256(state.encode()).hexdigest()[:32]
            kept = target / (_name(address) or "data")
            missing = {path: kept / path for path in there if not (kept / path).exists()}
            if missing:
                needed = sum(there[path].get("size") or 0 for path in missing)
                _refuse_without_room(address, needed, home)
                say(f"fetching {address}, {size(needed)}")
            for path, place in missing.items():
                with atomic_path(place) as temporary:
                    _get(store, f"{root}/{path}" if path else root, temporary)
            os.utime(target)
            for old in home.iterdir():  # others may be read by somebody
                if old != target and time.time() - old.stat().st_mtime > _UNUSED:
                    shutil.rmtree(old, ignore_errors=True)
        return kept
    except InputError:
        raise
    except Exception as error:  # every store has errors of its own
        told = (str(error) or type(error).__name__)[:300]
        raise refusal(f"{address} cannot be read: {told}; check the address, network and credentials") from None


class _UnreadError(Exception):
    """What a store said, which is no error of this machine's disk."""


def _get(store: Any, path: str, place: Path) -> None:
    try:
        store.get_file(path, str(place))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        raise _UnreadError(str(error) or type(error).__name__) from None


def _name(address: str) -> str:
    """Of the file or folder; of a page of a server without what is asked of it."""
    scheme, _, place = address.partition("://")
    place = urlsplit(address).path if scheme in ("http", "https") else place
    return PurePosixPath(place.rstrip("/")).name


def _store(address: str) -> tuple[Any, str]:
    import fsspec

    scheme = address.partition("://")[0]
    try:
        store, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        library = _LIBRARIES.get(scheme)
        remedy = f"pip install {library}" if library else one_line(str(error))
        raise InputError(f"{address}: what reads {scheme}:// is not installed: {remedy}") from None
    except ValueError as error:  # no such scheme
        raise refusal(f"{address} cannot be read: {error}; give a path, s3://, gs://, hf:// or https://") from None
    return store, root


def _listing(store: Any, root: str) -> dict[str, Mapping[str, Any]]:
    """What the store says of every file, by its path below ``root``; the path of a file alone is empty."""
    store.invalidate_cache()
    facts = store.info(root)
    if facts["type"] != "directory":
        return {"": facts}
    found = store.find(root, detail=True)
    prefix = f"{root.rstrip('/')}/"
    files = {path.removeprefix(prefix): facts for path, facts in found.items() if not path.endswith("/")}
    if not files:
        raise FileNotFoundError("there is nothing")
    if outside := [path for path in files if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts]:
        raise ValueError(f"{outside[0]!r} is a name that leads elsewhere")
    return files


def _refuse_without_room(address: str, needed: int, home: Path) -> None:
    free = shutil.disk_usage(home).free
    if needed > free:
        raise InputError(
            f"{address} holds {size(needed)}, and {size(free)} are left for {home}; CODEACT_CACHE names a larger disk"
        )
