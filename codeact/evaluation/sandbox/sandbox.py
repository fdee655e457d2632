"""Run untrusted programs, each alone in a sandbox of bubblewrap.

A program gets: its own user, process, network, IPC and host-name namespaces; a read-only file system with the
interpreter, the system's libraries and NumPy, and nothing of the user's; an empty environment; a private /tmp in
memory; limits of CPU time, memory, file size, open files and threads; a filter of system calls. It hands results back
through one pipe, of which so many bytes are read and no more. Killing bwrap kills everything inside.
"""

from __future__ import annotations

import fcntl
import importlib.util
import itertools
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeact.base.errors import InputError
from codeact.evaluation.sandbox.seccomp import seccomp_filter

RUNNER = Path(__file__).with_name("runner.py")
_GRACE_SECONDS = 1.0
_PIPE_BYTES = 1 << 20
_LONGEST_LINE = 1 << 25  # twice what the runner writes before it turns to digests
_ENVIRONMENT = {
    "HOME": "/tmp",
    "PATH": "/nowhere",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of a set does not differ from run to run
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_PACKAGES = ("numpy", "numpy.libs")
_users = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use. A test may take ``max(min_seconds, factor * seconds of the reference)``.

    ``load_seconds``: until the program is defined. All tests together may take ``max(total_seconds, factor * seconds of
    the reference)``. Memory is that of the process; its files in /tmp may take ``disk_mb`` more.
    """

    min_seconds: float = 1.0
    factor: float = 4.0
    load_seconds: float = 10.0
    total_seconds: float = 60.0
    memory_mb: int = 4096
    disk_mb: int = 64
    threads: int = 32
    open_files: int = 64

    def resources(self, total: float) -> dict[str, int]:
        """The limits that the kernel keeps, by their names in ``resource``."""
        return {
            "RLIMIT_CPU": int(self.load_seconds + total) + 2,
            "RLIMIT_AS": self.memory_mb << 20,
            "RLIMIT_FSIZE": self.disk_mb << 20,
            "RLIMIT_NPROC": self.threads,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a run ended: "exit" by itself (``status``: its exit code, 128 + signal), "time", "flood" (it wrote too much),
    "stopped" (the reader had enough)."""

    how: str
    status: int = 0


class Sandbox:
    """Runs requests of `codeact.evaluation.sandbox.runner`. ``why_not`` says why nothing isolates; None where it does.

    Args:
        limits: what a program may use.
        unsafe: run without isolation where there is none: with the limits, an empty environment and a temporary folder,
            and nothing else between the program and the user's files.

    Raises:
        InputError: bubblewrap is absent or cannot isolate here, and ``unsafe`` is off.
    """

    def __init__(self, limits: Limits, *, unsafe: bool = False) -> None:
        self.limits = limits
        self.isolated = False
        self._command: list[str] = []
        self._filter = seccomp_filter(platform.machine())
        self._change_user = False
        self.why_not = self._find_isolation()
        self.isolated = self.why_not is None
        if not self.isolated and not unsafe:
            raise InputError(
                f"refusing to run generated programs without isolation: {self.why_not}; install bubblewrap "
                "(Debian, Ubuntu: apt-get install bubblewrap) where namespaces are allowed, or, on a machine that you "
                "can lose, say --unsafe-no-sandbox"
            )

    def _find_isolation(self) -> str | None:
        """Find a way that works, by trying it; returns why there is none."""
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            return "bubblewrap (bwrap) is not installed"
        if self._filter is None:
            return f"there is no filter of system calls for {platform.machine()}"
        # Root needs no user namespace to isolate, and can give every program a user of its own, which its limits and
        # files are then bound to; where root is confined itself (a container), a user namespace may still be allowed.
        ways = [True, False] if os.geteuid() == 0 else [False]
        reason = ""
        for change_user in ways:
            self._change_user = change_user
            self._command = _bwrap_command(bwrap, self.limits, change_user)
            self.isolated = True
            if self._works():
                return None
            self.isolated = False
            reason = f"bubblewrap cannot isolate here ({self._complaint()})"
        return reason

    def _works(self) -> bool:
        lines: list[bytes] = []

        def keep(line: bytes) -> bool:
            lines.append(line)
            return True

        program = {"program": "def f():\n return 1", "entry_point": "f", "inputs": [[]], "seconds": [30.0]}
        self.run({**program, "form": "", "timed": False}, 30.0, 30.0, keep)
        return lines[:1] == [b'{"value":1}']

    def _complaint(self) -> str:
        """What bwrap says itself about why it does not work."""
        command = [*self._command, "true"]
        index = command.index("--seccomp")
        del command[index : index + 2]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env={})
        return (result.stderr.strip().splitlines() or ["no reason given"])[0]

    def run(
        self,
        request: Mapping[str, Any],
        silence: float,
        total: float,
        consume: Callable[[bytes], bool],
        most_bytes: int = 1 << 20,
    ) -> Ended:
        """Run one program.

        Args:
            request: what ``codeact.evaluation.sandbox.runner`` reads: program, entry_point, inputs (wire form), seconds
                (one an input), form, timed; or program, entry_point, check.
            silence: seconds without a result after which it is killed.
            total: seconds after which it is killed, results or not; ``load_seconds`` come on top.
            consume: called with every line of results, which are not trusted; False ends the run.
            most_bytes: more than so many bytes of results end the run.
        """
        with tempfile.TemporaryDirectory(prefix="codeact-") as folder:
            return self._run(request, silence, total, consume, most_bytes, folder)

    def _run(
        self,
        request: Mapping[str, Any],
        silence: float,
        total: float,
        consume: Callable[[bytes], bool],
        most_bytes: int,
        folder: str,
    ) -> Ended:
        request = {
            "load_seconds": self.limits.load_seconds,
            **request,
            "limits": self.limits.resources(total),
            "user": next_user() if self.isolated and self._change_user else None,
            "path": ["/packages"] if self.isolated else sorted({str(place.parent) for place in _package_folders()}),
        }
        if not self.isolated:
            del request["limits"]["RLIMIT_NPROC"]  # it would count everything that the user runs
        reading, writing = os.pipe()
        with suppress(OSError):
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # results can be long; fewer turns
        open_here = [writing]
        try:
            standard_input = _memory_file(json.dumps(request).encode())
            open_here.append(standard_input)
            passed = [writing]
            command = self._command
            if self.isolated:
                passed.append(_memory_file(self._filter or b""))
                open_here.append(passed[-1])
                command = [argument.format(seccomp=passed[-1]) for argument in command]
            interpreter = [os.path.realpath(sys.executable), "-I", "-S", "-B"]
            runner = "/runner.py" if self.isolated else str(RUNNER)
            process = subprocess.Popen(
                [*command, *interpreter, runner, str(writing)],
                stdin=standard_input,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=passed,
                env=_ENVIRONMENT,
                cwd=folder,
                start_new_session=True,
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            for descriptor in open_here:
                os.close(descriptor)
        how = ""
        try:
            how = self._read(reading, silence, total, consume, most_bytes)
        finally:
            os.close(reading)
            status = _end(process, patient=how == "exit")
        return Ended(how=how, status=status if how == "exit" else 0)

    def _read(self, pipe: int, silence: float, total: float, consume: Callable[[bytes], bool], most_bytes: int) -> str:
        """Read rows until the pipe closes or something is enough."""
        now = time.monotonic()
        latest = now + self.limits.load_seconds + total + 2 * _GRACE_SECONDS
        deadline = min(latest, now + self.limits.load_seconds + silence + _GRACE_SECONDS)
        lines = _Lines()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                return "time"
            data = os.read(pipe, _PIPE_BYTES)
            if not data:
                return "exit"
            complete = lines.add(data)
            if lines.total > most_bytes or lines.begun > _LONGEST_LINE:
                return "flood"
            for line in complete:
                if not consume(line):
                    return "stopped"
            if complete:
                deadline = min(latest, time.monotonic() + silence + _GRACE_SECONDS)


class _Lines:
    """Cuts what a pipe gives into lines, in time linear in its length whatever it is."""

    def __init__(self) -> None:
        self.total = self.begun = 0
        self._begun: list[bytes] = []

    def add(self, data: bytes) -> list[bytes]:
        """Return the lines that ``data`` completes."""
        self.total += len(data)
        first, *others = data.split(b"\n")
        self._begun.append(first)
        self.begun += len(first)
        if not others:
            return []
        complete = [b"".join(self._begun), *others[:-1]]
        self._begun = [others[-1]]
        self.begun = len(others[-1])
        return complete


def _end(process: subprocess.Popen[bytes], patient: bool) -> int:
    """Kill all of a program (one that closed its pipe gets a moment to exit by itself); returns its exit code."""
    if patient:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE_SECONDS / 2)
    # In the sandbox the death of bwrap is that of everything inside; without one this reaches the process group.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    return 128 - status if status < 0 else status


def _memory_file(content: bytes) -> int:
    descriptor = os.memfd_create("codeact")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def next_user() -> int:
    """A user id that nothing else has: the kernel counts processes by user."""
    return 0x7000_0000 + (os.getpid() % 0x8000) * 0x1000 + next(_users) % 0x1000


def _bwrap_command(bwrap: str, limits: Limits, change_user: bool) -> list[str]:
    """The command line up to the program's; ``{seccomp}`` stands for a file descriptor."""
    command = [bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv"]
    if change_user:
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    binds = {place: place for place in (*_LIBRARIES, os.path.realpath(sys.base_prefix)) if os.path.exists(place)}
    binds |= {str(place): f"/packages/{place.name}" for place in _package_folders()}
    # Made by bwrap itself, the folders above a bind are for root's eyes only.
    parents = {str(parent) for target in binds.values() for parent in Path(target).parents} - {"/"}
    for parent in sorted(parents):
        command += ["--dir", parent]
    for place, target in binds.items():
        if os.path.islink(place) and place in _LIBRARIES:
            command += ["--symlink", os.readlink(place), target]
        else:
            command += ["--ro-bind", place, target]
    for device in ("null", "zero", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    command += ["--ro-bind", str(RUNNER), "/runner.py"]
    command += ["--perms", "1777", "--size", str(limits.disk_mb << 20), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    for name, value in _ENVIRONMENT.items():
        command += ["--setenv", name, value]
    return [*command, "--remount-ro", "/", "--seccomp", "{seccomp}", "--"]


def _package_folders() -> Sequence[Path]:
    """Folders of the packages that a program may import besides the standard library."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or not spec.submodule_search_locations:
        return []
    site = Path(next(iter(spec.submodule_search_locations))).parent
    return [site / name for name in _PACKAGES if (site / name).is_dir()]
