"""What all benchmarks share; that they run is `python -m benchmarks --quick`."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import device, measure
from benchmarks.__main__ import BUDGET
from benchmarks.measure import Line, Report, Timing

LINE = Line(
    what="add", ours=Timing((0.002, 0.001, 0.003)), peer="other", theirs=Timing((0.001,)), floor=0.001, memory=2**20
)


def calls_of(**settings) -> tuple[list[str], dict[str, Timing]]:
    calls: list[str] = []
    times = measure.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, 6, **settings)
    return calls, times


def test_the_roofline_of_scoring_adds_up():
    """80,000 rows of 200 + 400 tokens by a 7B model: 80 million tokens, 1.06e18 operations; half an hour on an H100."""
    roofline = pytest.importorskip("benchmarks.roofline", reason="Triton is not installed")
    scored = {
        (s.model, s.chip): s for s in (roofline.scoring(m, c) for m in roofline.SCORED for c in roofline.SCORED_ON)
    }
    one = scored["CodeLlama-7B", "H100"]
    assert 80_000 * one.tokens == 80e6
    assert 80_000 * one.floor_seconds * 989e12 == pytest.approx(1.06e18, rel=0.01)
    assert 25 < 80_000 * one.code_seconds / 60 < 36
    assert all(s.floor_seconds < s.code_seconds for s in scored.values())
    assert len(roofline.scoring_table(scored.values()).splitlines()) == 2 + 4 * 4


def test_every_arm_runs_equally_often_and_not_always_in_the_same_order():
    calls, times = calls_of()
    assert {len(timing.seconds) for timing in times.values()} == {6}
    rounds = [tuple(calls[first : first + 3]) for first in range(0, len(calls), 3)]
    assert len(rounds) == 7  # the first does not count
    assert {frozenset(one) for one in rounds} == {frozenset("abc")}
    assert len(set(rounds)) > 2
    assert calls_of()[0] == calls


def test_a_slow_arm_runs_less_often():
    calls, times = calls_of(fewer={"c": 2}, warm=False)
    assert {name: len(timing.seconds) for name, timing in times.items()} == {"a": 6, "b": 6, "c": 2}
    assert Counter(calls) == {"a": 6, "b": 6, "c": 2}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ((0.002, 0.001, 0.003), "2 (1 to 3) ms"),
        ((12345.6,), "12,346 s"),
        ((4.2e-6, 1.5e-3, 3.1e-6), "4.2 (3.1 to 1,500) us"),
    ],
)
def test_a_timing_reads_as_median_and_spread(seconds, text):
    assert str(Timing(seconds)) == text


def test_the_summary_says_where_a_peer_wins():
    faster = Line(what="add", ours=LINE.theirs, peer="other", theirs=LINE.ours)
    lost, won = measure.summary([LINE, faster]).splitlines()[2:]
    assert "0.50, **the peer wins**" in lost
    assert "| 50% | 1.0 MiB |" in lost
    assert "wins" not in won
    assert "| **2** |" in won


def test_figures_come_back_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    output = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["x", "--json", str(output), "--quick"])
    measure.main(lambda options: Report(sections=["## X"], lines=[LINE], figures={"quick": options.quick}), "X")
    figures = json.loads(output.read_text())
    assert figures["quick"] is True
    assert measure.read_lines(figures) == [LINE]
    assert capsys.readouterr().out.startswith("## X\n\n| what |")


def _allocate(megabytes: int):
    return lambda: bytearray(megabytes << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_added_memory_is_that_of_the_call():
    assert 63 << 20 < measure.added_memory(_allocate, 64) < 80 << 20


def test_growth():
    assert measure.growth_exponent([1, 10, 100], [5, 1, 100]) == pytest.approx(2)


def test_the_parts_exist_and_fit_into_twenty_minutes():
    assert all(importlib.util.find_spec(f"benchmarks.{part}") for part in BUDGET)
    assert sum(BUDGET.values()) < 20 * 60


# ------------------------------------------------------------------------------------------------ benchmarks.device


def device_report(monkeypatch, folder: Path, *arguments: str) -> tuple[int, dict]:
    """The exit code of ``python -m benchmarks.device`` and what it wrote; in this process, as its stages are forked."""
    monkeypatch.setenv("OUT", str(folder))
    monkeypatch.setattr(sys, "argv", ["device", "--device", "cpu", "--small", *arguments])
    for name in ("HF_HUB_OFFLINE", "TRITON_INTERPRET", "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that they are put back
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stop:
        device.main()
    return int(stop.value.code or 0), json.loads((folder / "device.json").read_text())


def test_everything_for_a_device_runs_in_small_on_the_cpu(tmp_path):
    """All but the doctor, who has tests of his own and takes as long as all the others.

    In a process of its own: its stages are forked, and a fork of one in which PyTorch has computed may crash.
    """
    names = [name for name in device.STAGES if name != "doctor"]
    command = [sys.executable, "-m", "benchmarks.device", "--device", "cpu", "--small", "--only", ",".join(names)]
    environment = {**os.environ, "OUT": str(tmp_path), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=device.ROOT, env=environment, capture_output=True, text=True, check=False)
    report = json.loads((tmp_path / "device.json").read_text())
    assert done.returncode == 0, (report, done.stderr)
    assert {name for name, stage in report["stages"].items() if stage["status"] == "ok"} == {*names} - {
        "gpu_tests",
        "loss_speed",
    }
    assert report["said"].startswith("not run on a device")
    assert report["stages"]["training"]["figures"]["resumed"]["same_bits"]


def _crash(device: str, small: bool) -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def _hang(device: str, small: bool) -> dict:
    subprocess.run(["sleep", "1000"], check=False)
    return {}


def _wrong(device: str, small: bool) -> dict:
    print("what the stage said")
    raise AssertionError("off by 7")


def test_a_stage_that_fails_crashes_or_hangs_does_not_end_the_others(monkeypatch, tmp_path):
    stages = {"fine": (lambda *_: {"x": 1}, 60), "wrong": (_wrong, 60), "hang": (_hang, 1.5), "crash": (_crash, 60)}
    monkeypatch.setattr(device, "STAGES", stages)
    monkeypatch.setattr(device, "preload", lambda: None)
    code, report = device_report(monkeypatch, tmp_path)
    assert code == 1
    assert list(report["stages"]) == ["wrong", "crash", "hang", "fine"], "the worst first"
    assert report["stages"]["fine"]["figures"] == {"x": 1}
    assert report["stages"]["wrong"]["why"] == "AssertionError: off by 7"
    assert "what the stage said" in report["stages"]["wrong"]["log"]
    assert report["stages"]["crash"]["why"] == "the process ended with exit code -9"
    assert report["stages"]["hang"]["status"] == "too slow"
    code, report = device_report(monkeypatch, tmp_path, "--budget", "0", "--only", "fine,wrong")
    assert code == 1
    assert {stage["status"] for stage in report["stages"].values()} == {"no time left"}


def test_on_a_gpu_a_stage_is_a_fresh_process(monkeypatch, tmp_path):
    """There a fork is forbidden; here the same process does what the CPU can do."""
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(device.multiprocessing, "get_context", {"spawn": spawn}.__getitem__)
    log = tmp_path / "log"
    log.touch()
    assert device.run_stage("build", "cuda", True, 60, log)["status"] == "ok"
    why = device.run_stage("facts", "cuda", True, 60, log)["why"]
    assert "CUDA" in why or "NVIDIA driver" in why, "no device, and it says so, as a CPU or a CUDA build does"


@pytest.mark.parametrize("lacks", ["", "pip"])
def test_wheels_are_installed_beside_the_machines_packages_and_counted(monkeypatch, tmp_path, lacks):
    real = importlib.util.find_spec
    if lacks:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    wheel = tmp_path / "wheels" / "carried_thing-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carried_thing.py", "VALUE = 7\n")
        archive.writestr(
            "carried_thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.0\n"
        )
        archive.writestr(
            "carried_thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("carried_thing-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    device.install_wheels(wheel.parent, tmp_path / "site")
    assert device.run("-c", "import carried_thing; print(carried_thing.VALUE)") == "7\n"
    wheels, tree = device.carried_bytes(wheel.parent)
    assert wheels == wheel.stat().st_size
    assert 1 << 20 < tree < device.CARRIED - (16 << 20), "a tree that leaves room for the wheels"
