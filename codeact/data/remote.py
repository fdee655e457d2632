"""Data on object stores and servers: fetched once to this machine, then read as the files of a folder are.

    s3://BUCKET/rows.jsonl  gs://BUCKET/FOLDER  hf://datasets/OWNER/NAME/FILE  https://HOST/FILE  and what fsspec knows

    CACHE/remote/<address>/<state>/rows.jsonl

The state is what the store says of the files (size, ETag, times): one that has changed is fetched again, and whoever
comes meanwhile waits. The data is known by its content, so that here and there it has the same fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from codeact.base.console import say, size
from codeact.base.errors import InputError
from codeact.base.files import atomic_path, cache_path, locked_folder
from codeact.data.sources import one_line, refusal

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://[^/]")
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
    try:
        store, root = _store(address)
        there = _listing(store, root)
        digest = hashlib.sha256(json.dumps(there, sort_keys=True, default=str).encode()).hexdigest()
        home = cache_path("remote", grows=True) / hashlib.sha256(address.encode()).hexdigest()[:32]
        target = home / digest[:32]
        name = PurePosixPath(root.rstrip("/")).name or "data"
        with locked_folder(home, wait=True):
            missing = {path: target / name / path for path in there if not (target / name / path).exists()}
            if missing:
                _refuse_without_room(address, sum(there[path].get("size") or 0 for path in missing), home)
            for path, place in missing.items():
                with atomic_path(place) as temporary:
                    store.get_file(f"{root}/{path}" if path else root, str(temporary))
            for old in home.iterdir():
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
        return target / name
    except InputError:
        raise
    except Exception as error:  # every store has errors of its own
        told = (str(error) or type(error).__name__)[:300]
        raise refusal(f"{address} cannot be read: {told}; check the address, network and credentials") from None


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
    say(f"fetching {address}, {size(needed)}")
