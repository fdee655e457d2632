"""What all benchmarks share; that they run is `python -m benchmarks --quick`."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import measure
from benchmarks.__main__ import BUDGET
from benchmarks.measure import Line, Report, Timing

LINE = Line(
    what="add", ours=Timing((0.002, 0.001, 0.003)), peer="other", theirs=Timing((0.001,)), floor=0.001, memory=2**20
)


def calls_of(**settings) -> tuple[list[str], dict[str, Timing]]:
    calls: list[str] = []
    times = measure.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, 6, **settings)
    return calls, times


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
