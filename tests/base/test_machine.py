"""Memory and CPUs as a container or a scheduler gives them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codeact.base import machine

GIB = 1 << 30
MEMINFO = "MemTotal:       33554432 kB\nMemFree:         1000000 kB\nMemAvailable:   20971520 kB\n"  # 32 GiB, 20 free


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Returns a function that sets this process's control groups: the kernel's list, and files under the mount."""
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "mounted")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)

    def write(listed: str, **files: object) -> None:
        (tmp_path / "proc" / "self" / "cgroup").write_text(listed)
        for name, text in files.items():
            path = tmp_path / "mounted" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return write


@pytest.mark.parametrize(
    ("listed", "files", "limit", "free"),
    [
        ("0::/\n", {"memory.max": 4 * GIB, "memory.current": GIB}, 4, 3),
        # What it read of files counts as used, and is given back for the asking.
        (
            "0::/\n",
            {"memory.max": 4 * GIB, "memory.current": 3 * GIB, "memory.stat": f"anon 5\ninactive_file {GIB}\n"},
            4,
            2,
        ),
        # The group outside is the tighter one; the one inside says nothing.
        (
            "0::/job/step\n",
            {"job/memory.max": GIB, "job/memory.current": GIB // 2, "job/step/memory.max": "max"},
            1,
            0.5,
        ),
        # A parent with a higher limit has less left.
        (
            "0::/a/b\n",
            {
                "a/memory.max": 8 * GIB,
                "a/memory.current": 7 * GIB,
                "a/b/memory.max": 4 * GIB,
                "a/b/memory.current": GIB,
            },
            4,
            1,
        ),
        ("0::/a\n", {"a/memory.max": "max", "a/memory.high": 2 * GIB, "a/memory.current": 0}, 2, 2),
        # Inside a container the list has the host's path, the mount only the container's end of it.
        ("0::/docker/1234\n", {"memory.max": 4 * GIB, "memory.current": 0}, 4, 4),
        ("5:cpu:/a\n4:memory:/a\n", {"memory/a/memory.limit_in_bytes": 2 * GIB}, 2, 2),
        (
            "4:memory:/docker/1234\n",
            {
                "memory/memory.limit_in_bytes": 4 * GIB,
                "memory/memory.usage_in_bytes": 3 * GIB,
                "memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {2 * GIB}\n",
            },
            4,
            3,
        ),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": 9223372036854771712}, None, 20),
        ("0::/\n", {"memory.max": "max"}, None, 20),
        ("0::/\n", {"memory.max": 24 * GIB, "memory.current": 0}, 24, 20),
        ("0::/\n", {"memory.max": 4 * GIB, "memory.current": 5 * GIB}, 4, 0),
        ("", {}, None, 20),
    ],
)
def test_memory_is_what_the_machine_has_and_the_control_groups_leave(groups, listed, files, limit, free):
    groups(listed, **files)
    assert machine.memory_limit() == (None if limit is None else limit * GIB)
    assert machine.total_memory() == (limit or 32) * GIB
    assert machine.free_memory() == free * GIB


def test_a_device_has_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 8))
    assert machine.free_memory(torch.device("cuda:0")) == 5
    assert machine.total_memory(torch.device("cuda:0")) == 8
    assert machine.free_memory(torch.device("cpu")) > 8


def test_every_plan_sees_four_gibibytes(groups):
    """A container of 4 GiB on a machine of 32."""
    from codeact.doctor.probes import memory
    from codeact.evaluation import generate

    groups("0::/\n", **{"memory.max": 4 * GIB, "memory.current": 0})
    assert "4.00 GiB of 4.00 GiB free; a control group limits it to 4.00 GiB" in memory()
    assert generate.free_memory() == 4 * GIB
    assert machine.machine_facts()["memory"] == 4 * GIB


@pytest.mark.parametrize(
    ("listed", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "400000 100000"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000"}, 1),
        ("0::/\n", {"cpu.max": "6400000 100000"}, 8),
        (
            "3:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": 300000, "cpu,cpuacct/x/cpu.cfs_period_us": 100000},
            3,
        ),
        ("3:cpu:/x\n", {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, 8),
    ],
)
def test_cpus_are_those_allowed_and_paid_for(groups, monkeypatch, listed, files, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    groups(listed, **files)
    assert machine.usable_cpus() == cpus


def test_threads_follow_the_usable_cpus(groups, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    told = []
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    groups("0::/\n", **{"cpu.max": "300000 100000"})
    assert machine.limit_threads() == 3
    assert (os.environ["OMP_NUM_THREADS"], told) == ("5", []), "what the user says stands"
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.limit_threads()
    assert (os.environ.pop("OMP_NUM_THREADS"), told) == ("3", [3])
    assert os.environ.pop("GOMP_SPINCOUNT") == "1000"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    machine.limit_threads()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_the_command_line_limits_threads_before_numpy_and_torch_load():
    code = """if True:
        import os, sys
        from codeact.base import machine
        machine.usable_cpus, os.cpu_count = (lambda: 3), (lambda: 64)
        class Watch:
            def find_spec(self, name, *_):
                if name in ("numpy", "torch"):
                    print(name, os.environ.get("OMP_NUM_THREADS"), os.environ.get("GOMP_SPINCOUNT"))
        sys.meta_path.insert(0, Watch())
        import codeact.__main__
        sys.argv = ["codeact", "select", "--help"]
        try:
            codeact.__main__.main()
        except SystemExit:
            import numpy
    """
    environment = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    loads = [line for line in result.stdout.splitlines() if line.startswith(("numpy ", "torch "))]
    assert loads
    assert {tuple(line.split()[1:]) for line in loads} == {("3", "1000")}


@pytest.mark.parametrize(("load", "cores", "told"), [(3.0, 2, True), (2.0, 2, False), (1.5, 1, True), (0.0, 1, False)])
def test_the_doctor_tells_of_a_load_above_the_cpus(monkeypatch, load, cores, told):
    from codeact.doctor.probes import memory

    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(machine, "usable_cpus", lambda: cores)
    assert (f"the load {load:.1f} is above them" in memory()) == told


def test_where_the_system_tells_no_load_there_is_none(monkeypatch):
    monkeypatch.delattr(os, "getloadavg")
    assert machine.load() == 0


def test_peak_memory_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 8)
    assert machine.peak_memory(torch.device("cuda"))[1:] == [5, 8]
    assert machine.peak_memory(torch.device("cpu"))[1:] == [0, 0]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_the_resident_peak_is_of_the_time_since_the_reset():
    big = bytearray(b"1") * 2**28
    before = machine.peak_memory()[0]
    assert before > 2**28
    del big
    since = machine.reset_peaks(torch.device("cpu"))
    after = machine.peak_memory()[0]
    if since == "start of training":
        assert after < before - 2**27
    else:
        assert after >= before


def test_versions_name_what_is_installed():
    found = machine.versions()
    assert found["python"] == sys.version.split()[0]
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert machine.cpu_name()


@pytest.mark.parametrize("error", [KeyError("uid not found"), OSError("no username")])  # Python to 3.12, and since
def test_a_user_whom_the_system_does_not_know_gets_a_name(monkeypatch, error):
    def unknown():
        raise error

    monkeypatch.setattr(machine.getpass, "getuser", unknown)
    monkeypatch.delenv("LOGNAME", raising=False)
    machine.name_user()
    assert os.environ["LOGNAME"] == str(os.getuid())
    monkeypatch.setenv("LOGNAME", "ada")
    machine.name_user()
    assert os.environ["LOGNAME"] == "ada"
