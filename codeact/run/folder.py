"""The folder of a run: what each step made, under which settings, and the results of other settings kept aside.

    DIR/run.json            settings, versions, and of every step: key, time, memory, what it said, what it made
    DIR/.cache/STEP-KEY/    results of settings that were tried before; they come back when the settings do

A step's key is a hash of everything that decides its result. What lies in the folder always belongs to the key that
run.json names for it: it is put aside before another key is written there, so a kill at any moment loses nothing and
mixes nothing.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from codeact.base.errors import InputError
from codeact.base.files import atomic_path, remove_leftovers
from codeact.base.machine import machine_facts, peak_memory, reset_peaks, versions
from codeact.base.parsing import read_json
from codeact.base.stage import Lines, Run, Stage

FORMAT = 1


class RunFolder:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        """Read what is there.

        Raises:
            InputError: run.json is damaged or of a newer codeact.
        """
        self.folder = folder
        self._path = folder / "run.json"
        self._content: dict[str, Any] = {"format": FORMAT, "stages": {}}
        try:
            content = read_json(self._path)
            content["stages"].items()
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"cannot use {self._path}: {error}; remove it, and all steps are done again") from None
        if content["format"] != FORMAT:
            raise InputError(f"{self._path} is of another codeact (format {content['format']}, here {FORMAT})")
        self._content = content

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of this machine out.

        Raises:
            InputError: one is at work there, or the folder cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / ".lock").open("w")
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error.strerror}; choose another output") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"another codeact run is at work in {self.folder}; wait for it") from None
            yield

    def describe(self, settings: dict[str, Any]) -> None:
        """Record what is run, by what and where."""
        self._content |= {
            "codeact": importlib.metadata.version("codeact"),
            "commit": _commit(),
            "settings": settings,
            "versions": versions(),
            "machine": machine_facts(),
        }
        self._write()

    def lines(self, name: str) -> Lines:
        """What a finished step said."""
        return [(label, text) for label, text in self._content["stages"][name]["lines"]]

    def finished(self, stage: Stage) -> bool:
        """Whether the step's result is there, whatever its settings.

        Raises:
            InputError: a file of it was changed since.
        """
        record = self._record(stage.name)
        if record is None or "seconds" not in record:
            return False
        if not all((self.folder / name).exists() for name in (*stage.outputs, *record["products"])):
            return False
        for name, known in record["products"].items():
            if self._stamp(name, known)["sha256"] != known["sha256"]:
                raise InputError(
                    f"{self.folder / name} was changed after step {stage.name} made it; move it away to have it made "
                    "again, or go on by hand with the stage's own command"
                )
        return True

    def reusable(self, stage: Stage, key: str) -> bool:
        """Whether the step was finished with ``key``; its result is brought back if it was put aside."""
        self._switch(stage, key)
        return self.finished(stage)

    def known(self, stage: Stage, key: str) -> bool:
        """Whether the step was finished with ``key``, here or aside; changes nothing."""
        record = self._record(stage.name)
        if record is not None and record["key"] == key:
            return self.finished(stage)
        return (self._aside(stage.name, key) / "record.json").exists()

    def current(self, stage: Stage, key: str) -> bool:
        """Whether what lies in the folder of this step, finished or not, is of ``key``."""
        record = self._record(stage.name)
        return record is not None and record["key"] == key

    def settings(self) -> dict[str, Any]:
        """Those of the last run here."""
        return dict(self._content.get("settings", {}))

    def started(self) -> set[str]:
        """Names of the steps that were ever begun."""
        return set(self._content["stages"])

    def stale(self, stage: Stage) -> bool:
        """Whether the step's result was made from other results than those that lie here now."""
        record = self._record(stage.name) or {}
        return any(self._stamps(need) != stamps for need, stamps in record.get("took", {}).items())

    def do(self, stage: Stage, key: str, run: Run) -> Lines:
        """Do the step; what a killed run did for the same key is gone on from."""
        self._switch(stage, key)
        for place in (self.folder / name for name in stage.outputs):  # half a file of a killed run is nobody's result
            for folder in (place.parent, place, *place.rglob("*")):
                if folder.is_dir():
                    remove_leftovers(folder)
        begin = time.perf_counter()
        took = {need: self._stamps(need) for need in (*stage.needs, *stage.takes)}
        record: dict[str, Any] = {"stage": stage.section, "key": key, "started": _now(), "took": took}
        self._content["stages"][stage.name] = record
        self._write()
        since = reset_peaks()
        lines = stage.work(run)
        record |= {
            "seconds": round(time.perf_counter() - begin, 3),
            "peak_memory": peak_memory()[0] if since != "start of the process" else None,
            "lines": lines,
            "products": self._digest(stage.products),
        }
        self._write()
        return lines

    def keys(self) -> dict[str, str]:
        """The key of every finished step but the report."""
        records = self._content["stages"].items()
        return {name: record["key"] for name, record in records if "seconds" in record and name != "report"}

    def digest(self, *names: str) -> dict[str, str]:
        """The sha256 of every product of these finished steps."""
        return {path: digest for name in names for path, digest in self._stamps(name).items()}

    def _stamps(self, name: str) -> dict[str, str]:
        products = (self._record(name) or {}).get("products", {})
        return {path: stamp["sha256"] for path, stamp in products.items()}

    def _switch(self, stage: Stage, key: str) -> None:
        """Put what belongs to another key aside, and bring back what belongs to this one."""
        record = self._record(stage.name)
        if record is not None and record["key"] != key:
            aside = self._aside(stage.name, record["key"])
            self._move(stage.outputs, self.folder, aside)
            if "seconds" in record:
                with atomic_path(aside / "record.json") as temporary:
                    temporary.write_text(json.dumps(record), encoding="utf-8")
            record = None
        aside = self._aside(stage.name, key)
        if record is None:
            # From here on what lies in the folder is of the new key, also if only a part of it is back.
            self._content["stages"][stage.name] = {"stage": stage.section, "key": key}
            self._write()
        if aside.exists():
            self._move(stage.outputs, aside, self.folder)
            with suppress(OSError, ValueError):
                self._content["stages"][stage.name] = read_json(aside / "record.json")
                self._write()
            shutil.rmtree(aside)

    def _move(self, names: Sequence[str], source: Path, target: Path) -> None:
        for name in names:
            if (source / name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(source / name, target / name)

    def _aside(self, name: str, key: str) -> Path:
        return self.folder / ".cache" / f"{name}-{key[:16]}"

    def _record(self, name: str) -> dict[str, Any] | None:
        record: dict[str, Any] | None = self._content["stages"].get(name)
        return record

    def _digest(self, patterns: Sequence[str]) -> dict[str, dict[str, Any]]:
        names = {str(path.relative_to(self.folder)) for pattern in patterns for path in self.folder.glob(pattern)}
        return {name: self._stamp(name, {}) for name in sorted(names)}

    def _stamp(self, name: str, known: dict[str, Any]) -> dict[str, Any]:
        """Size, time and sha256 of a file; the sha256 is taken as known where size and time are."""
        status = (self.folder / name).stat()
        stamp = {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        if all(known.get(part) == value for part, value in stamp.items()):
            return known
        with (self.folder / name).open("rb") as file:
            return {**stamp, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    def _write(self) -> None:
        with atomic_path(self._path) as temporary:
            temporary.write_text(json.dumps(self._content, indent=1, default=str) + "\n", encoding="utf-8")


def key_of(inputs: dict[str, Any]) -> str:
    """The sha256 of everything that decides a step's result."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """Of the checkout that codeact runs from, if it is one."""
    command = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        if result.returncode == 0 and (Path(__file__).parents[2] / ".git").exists():
            return result.stdout.strip() or None
    return None
