"""Workers as actors of Ray: an actor a GPU, or a share of the cores of the nodes."""

from __future__ import annotations

import functools
import os
import secrets
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from codeact import __version__
from codeact.base.errors import InputError, import_extra
from codeact.workers.engines import Begin, WorkerDied

_OWN_CLUSTER = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as there: its node is 127.0.0.1, and its servers listen to nobody else
}
_ANSWER_SECONDS = 5.0


class RayPool:
    """Actors on a cluster that is there, or on one of this machine's own that lives as long as the pool.

    Args:
        address: of a cluster: ``HOST:PORT``, ``ray://HOST:PORT``, or ``auto``: the one that this machine is a node of.
            None: one is started, which listens on the loopback interface only, asks for a token and reports nothing.
        workers: how many; None: as many as there are GPUs, or nodes where there is none.
        folder: of the shards; every node has to see it.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: no cluster answers, or it has not as many GPUs or cores.
    """

    def __init__(self, address: str | None, workers: int | None, folder: Path) -> None:
        self._environment: dict[str, str | None] = {}
        own = _OWN_CLUSTER if address is None else {"RAY_USAGE_STATS_ENABLED": "0"}
        for name, value in own.items():
            self._set(name, value)
        if address is None and not os.environ.get("RAY_AUTH_TOKEN"):
            self._set("RAY_AUTH_TOKEN", _token())  # where there is one, Ray's own clusters ask for it
        self._ray = import_extra("ray", "ray", "--engine ray")
        self._running: dict[Any, tuple[int, Any, Any]] = {}
        self._connect(address)
        self._seen = folder / f".codeact-seen-{secrets.token_hex(8)}"
        self._made = not folder.exists()
        try:
            self._options = self._share(workers)
            self._actor = self._ray.remote(max_restarts=0, max_task_retries=0)(_actor_class())
            folder.mkdir(parents=True, exist_ok=True)
            self._seen.touch()
        except OSError as error:
            self.stop()
            raise InputError(f"cannot write {folder}: {error.strerror or error}; choose another --output") from None
        except BaseException:
            self.stop()
            raise

    def _set(self, name: str, value: str) -> None:
        self._environment.setdefault(name, os.environ.get(name))
        os.environ[name] = value

    def _connect(self, address: str | None) -> None:
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if port.isdigit():
            try:  # Ray itself asks for minutes
                socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
            except OSError as error:
                raise InputError(
                    f"no Ray cluster answers at {address} ({error.strerror or error}); ask it by ray status, or leave "
                    "out --address for one of this machine's own"
                ) from None
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM)
        try:
            # Without an address Ray would join any cluster of this machine.
            more = {"address": "local", "include_dashboard": False} if address is None else {"address": address}
            self._ray.init(logging_level="ERROR", log_to_driver=False, **more)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            told = str(error).strip().splitlines() or [type(error).__name__]
            where = f"at {address}" if address else "on this machine"
            raise InputError(f"no Ray cluster {where} can be used: {told[0]}") from None
        finally:
            if main:  # Ray puts its own there
                signal.signal(signal.SIGTERM, before)

    def _share(self, workers: int | None) -> dict[str, Any]:
        """What an actor asks for."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
        self.workers = workers or gpus or max(1, len(cores))
        if gpus:
            if self.workers > gpus:
                raise InputError(f"the Ray cluster has {gpus} GPUs, one a worker; lower --workers")
            return {"num_gpus": 1, "num_cpus": 0}
        each = -(-self.workers // max(1, len(cores)))  # of a node, spread evenly
        if not cores or each > min(cores):
            raise InputError(
                f"the Ray cluster has {sum(cores)} cores on {len(cores)} nodes, at least one a worker; lower --workers"
            )
        return {"num_cpus": min(cores) // each, "scheduling_strategy": "SPREAD"}

    def start(self, index: int, begin: Begin) -> None:
        """Start an actor."""
        actor = self._actor.options(**self._options).remote()
        refused = actor.refuse.remote(str(self._seen), __version__)
        self._running[actor.run.remote(refused, index, begin)] = index, actor, refused

    def ended(self, seconds: float) -> list[tuple[int, Exception | None]]:
        """Those that ended, with what they said."""
        done, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=seconds)
        found: list[tuple[int, Exception | None]] = []
        for reference in done:
            index, actor, refused = self._running.pop(reference)
            error: Exception | None = None
            try:
                # What is sent to another codeact may not even be read there, so that is looked at first.
                if said := self._ray.get(refused) or self._ray.get(reference):
                    error = InputError(said)
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.OutOfMemoryError) as death:
                error = WorkerDied(_first_line(death))
            except self._ray.exceptions.RayError as failure:
                error = InputError(f"a worker on Ray failed: {_last_line(failure)}")
            self._ray.kill(actor)
            found.append((index, error))
        return found

    def stop(self) -> None:
        """End the actors, leave the cluster, and stop it if it is ours."""
        for _, actor, _ in self._running.values():
            with suppress(Exception):
                self._ray.kill(actor)
        self._ray.shutdown()
        with suppress(OSError):
            self._seen.unlink(missing_ok=True)
            if self._made:
                self._seen.parent.rmdir()  # if nothing came of it
        for name, value in self._environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@functools.cache
def _token() -> str:
    """One for all clusters of this process: Ray reads it once."""
    return secrets.token_hex(32)


def _actor_class() -> type:
    """Made in a function, so that Ray sends the class itself: what it runs on may be no or another codeact."""

    class ShardWorker:
        """One worker; what it refuses is returned as text."""

        def refuse(self, seen: str, version: str) -> str | None:
            host = socket.gethostname()
            try:
                import codeact
            except ImportError:
                return f"{host} has no codeact; install {version} on all nodes"
            if codeact.__version__ != version:
                return f"{host} has codeact {codeact.__version__}, and {version} was started; install one on all nodes"
            if not os.path.exists(seen):
                folder = os.path.dirname(seen)
                return f"{host} does not see {folder}: give an --output that lies on a file system of all nodes"
            return None

        def run(self, refused: str | None, index: int, begin: Begin) -> str | None:
            from codeact.base.errors import InputError
            from codeact.workers.engines import run_worker

            if refused:
                return refused
            try:
                run_worker(begin, index)
            except InputError as error:
                return f"{error.args[0]} (on {socket.gethostname()})"
            return None

    return ShardWorker


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _last_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__
