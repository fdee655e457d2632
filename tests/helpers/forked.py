"""Commands in processes that have loaded the libraries already: in the place of ``subprocess.run`` and ``Popen``.

Nearly all that a command of a test takes is the import of PyTorch and Transformers, five seconds of CPU each time. Here
one process of each worker of the suite loads them once and forks at every start; what is forked is a process of its own
with its own arguments, environment, folder and output, that can be killed, and ends as an interpreter does. A test that
looks at imports, or sets what is read by them, wants a new interpreter: ``subprocess``.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from subprocess import PIPE, CalledProcessError, CompletedProcess, TimeoutExpired
from typing import NoReturn

LOADED = (
    "codeact.cli",
    "codeact.scoring.stage",
    "codeact.embedding.stage",
    "codeact.selection.stage",
    "codeact.training.stage",
    "codeact.training.trainer",
    "codeact.evaluation.stage",
    "codeact.run.flow",
    "codeact.models.loading",
    "datasets",
    "peft",
    "transformers.trainer",
)
WAIT = 0.005  # seconds between two looks at whether a process has ended


class Popen:
    """What ``subprocess.Popen`` does for ``[sys.executable, "-m" or "-c", ...]``; outputs are in files until read."""

    def __init__(self, command, *, stdout=None, stderr=None, text=False, env=None, cwd=None):
        python, kind, *_ = self.args = list(map(str, command))
        assert python == sys.executable
        assert kind in ("-m", "-c"), f"a new interpreter is wanted: {command}"
        self.text, self.returncode = text, None
        self._folder = Path(tempfile.mkdtemp(dir=_home().name))
        streams = {"stdout": stdout, "stderr": stderr}
        self._piped = [name for name, where in streams.items() if where == PIPE]
        asked = {
            "command": self.args[1:],
            "environment": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
            "folder": str(self._folder),
            "streams": {name: str(self._folder / name) if where == PIPE else where for name, where in streams.items()},
        }
        server = _server()
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())

    def poll(self) -> int | None:
        if self.returncode is None:
            with suppress(FileNotFoundError):
                self.returncode = int((self._folder / "ended").read_text())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise TimeoutExpired(self.args, timeout)
            time.sleep(WAIT)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None):
        self.wait(timeout)
        said = {name: (self._folder / name).read_bytes() for name in self._piped}
        read = {name: text.decode() if self.text else text for name, text in said.items()}
        return read.get("stdout"), read.get("stderr")


def run(command, *, check, capture_output=False, text=False, env=None, cwd=None, timeout=None) -> CompletedProcess:
    """As ``subprocess.run``."""
    where = PIPE if capture_output else None
    process = Popen(command, stdout=where, stderr=where, text=text, env=env, cwd=cwd)
    out, err = process.communicate(timeout)
    if check and process.returncode:
        raise CalledProcessError(process.returncode, command, out, err)
    return CompletedProcess(command, process.returncode, out, err)


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    """Of what the processes say, for as long as this one lives."""
    return tempfile.TemporaryDirectory(prefix="forked-")


@cache
def _server() -> subprocess.Popen[str]:
    """The process that forks, which ends with its standard input."""
    code = "from tests.helpers.forked import served; served()"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True, cwd=root, env=environment, bufsize=1
    )


def served() -> None:
    """Fork for every line of standard input, tell its process, and say in a file how each ended."""
    import importlib
    import select

    for name in LOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for what is forked
    running: dict[int, Path] = {}
    with os.fdopen(0, "rb", buffering=0, closefd=False) as asked:
        while True:
            if select.select([asked], [], [], WAIT)[0]:
                line = asked.readline()
                if not line:
                    return
                request = json.loads(line)
                number = os.fork()
                if not number:
                    _ended(request)
                running[number] = Path(request["folder"])
                print(number, flush=True)
            for number in list(running):
                ended, status = os.waitpid(number, os.WNOHANG)
                if ended:
                    folder = running.pop(number)
                    (folder / "ending").write_text(str(os.waitstatus_to_exitcode(status)))
                    (folder / "ending").rename(folder / "ended")


def _ended(request: dict) -> NoReturn:
    """End as an interpreter does, but for what libraries that this command never used say of their leaks."""
    code = 0
    try:
        _work(request)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _work(request: dict) -> None:
    """What a new interpreter does with these arguments."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    kept = os.dup(2)
    for number, where in enumerate(request["streams"].values(), 1):
        if where is None:
            os.dup2(kept, number)
        else:
            place = os.devnull if where == subprocess.DEVNULL else where
            os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.close(kept)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    kind, what, *arguments = request["command"]
    sys.path[0] = request["cwd"] if kind == "-m" else ""
    if kind == "-m":
        sys.argv = [what, *arguments]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *arguments]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def ranks(*arguments: object, module: str = "", code: str = "", env=None, cwd=None) -> CompletedProcess:
    """Two processes with what ``torchrun --nproc-per-node 2`` tells them; the outputs of both, one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, *(("-m", module) if module else ("-c", code)), *arguments]
    environments = [{**(env or os.environ), **told, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    both = [Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=one, cwd=cwd) for one in environments]
    while any(process.poll() is None for process in both):
        if any(process.poll() for process in both):  # the other one would wait for it
            for process in both:
                process.send_signal(signal.SIGTERM)
        time.sleep(WAIT)
    out, err = ("".join(texts) for texts in zip(*(process.communicate() for process in both), strict=True))
    code = next((process.returncode for process in both if process.returncode), 0)
    return CompletedProcess(command, code, out, err)
