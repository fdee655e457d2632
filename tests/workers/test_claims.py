"""Who does which part of a job: one at a time, whoever dies, and whatever lies in the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from codeact.base.errors import InputError
from codeact.workers import claims
from codeact.workers.claims import LEASE, TRIES, Tally, Worker, read_claims, read_workers


@pytest.fixture
def worker(tmp_path):
    with Worker(tmp_path) as worker:
        yield worker


def of_another(folder: Path, name: str, *, silent: float = 0.0, **more: object) -> None:
    """The record of a worker elsewhere, which has said nothing for so many seconds."""
    known = {"host": "far", "pid": 1, "place": "far", "began": 1.0, "ended": False, "part": None}
    content = {**known, "parts": 0, "rows": 0, "tokens": 0, "seconds": 1, **more}
    path = folder / "workers" / f"{name}.json"
    path.write_text(json.dumps(content))
    now = path.stat().st_mtime
    os.utime(path, (now - silent, now - silent))


def claim(folder: Path, part: str, worker: str, attempt: int = 0) -> None:
    (folder / "claims" / f"{part}.{attempt}").write_text(worker)


def test_one_worker_has_a_part(worker, tmp_path):
    with Worker(tmp_path) as other:
        assert worker.take("a")
        assert not other.take("a")
        assert other.claimed() == {"a"}
        worker.finish()
        assert other.claimed() == set()
        assert other.take("a")  # which is why a part is looked at again once it is claimed
    assert worker.claimed() == set()  # who ends lets go
    assert [(record.parts, record.ended) for record in read_workers(tmp_path) if record.name == other.name] == [
        (0, True)
    ]


def test_many_at_once_take_every_part_once(tmp_path):
    taken: list[str] = []

    def run() -> None:
        with Worker(tmp_path) as worker:
            for part in range(30):
                if worker.take(f"{part}"):
                    taken.append(f"{part}")

            barrier.wait()

    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        for ended in [pool.submit(run) for _ in range(8)]:
            ended.result()
    assert sorted(taken, key=int) == [f"{part}" for part in range(30)]


@pytest.mark.parametrize("silent", [0.0, LEASE / 2, 2 * LEASE])
def test_a_lease_that_ran_out_is_taken_over(worker, tmp_path, silent):
    of_another(tmp_path, "other", silent=silent)
    claim(tmp_path, "a", "other")
    assert worker.take("a") == (silent > LEASE)
    if silent > LEASE:
        assert {c.worker for c in read_claims(tmp_path)} == {"other", worker.name}
        worker.finish()
        assert read_claims(tmp_path) == []


def test_a_process_of_this_machine_that_is_gone_is_dead_at_once(worker, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    of_another(tmp_path, "other", place=claims.place(), pid=process.pid)
    process.wait()
    claim(tmp_path, "a", "other")
    assert worker.take("a")


@pytest.mark.parametrize("state", ["ended", "removed", "unnamed"])
def test_who_is_no_more_holds_nothing(worker, tmp_path, state):
    if state == "ended":
        of_another(tmp_path, "other", ended=True)
    claim(tmp_path, "a", "" if state == "unnamed" else "other")
    if state == "unnamed":  # it is being made, or its maker died over it
        assert not worker.take("a")
        path = tmp_path / "claims" / "a.0"
        os.utime(path, (1, 1))
    assert worker.take("a")


def test_a_part_over_which_workers_die_is_given_up_and_tried_anew_by_a_rerun(worker, tmp_path):
    for attempt in range(TRIES):
        claim(tmp_path, "a", f"gone-{attempt}", attempt)
    assert not worker.take("a")
    assert worker.given_up == {"a": "worker gone-0 ended in it; worker gone-1 ended in it"}
    assert worker.take("b")
    worker.fail("RuntimeError: no\nTraceback ...")
    assert worker.take("b")  # once more, as it may have been the device
    worker.fail("RuntimeError: no\nTraceback ...")
    assert not worker.take("b")
    assert worker.given_up["b"] == "RuntimeError: no"
    worker.__exit__()
    with Worker(tmp_path) as later:  # nobody lives who was there
        for number in range(TRIES):
            os.utime(tmp_path / "claims" / f"a.{number}", (later.began - 1, later.began - 1))
        assert later.take("a")
        later.finish()
    with Worker(tmp_path) as witness:
        for attempt in range(TRIES):
            claim(tmp_path, "c", f"gone-{attempt}", attempt)
        with Worker(tmp_path) as late:
            assert not late.take("c")
        assert not witness.take("c")


def test_records_stay_while_somebody_lives(tmp_path):
    names = []
    with Worker(tmp_path) as first:
        with Worker(tmp_path) as second:
            names += [first.name, second.name]
        with Worker(tmp_path) as third:
            assert {record.name for record in read_workers(tmp_path)} == {*names, third.name}
    with Worker(tmp_path) as later:
        assert [record.name for record in read_workers(tmp_path)] == [later.name]


def test_who_comes_back_after_a_takeover_does_no_harm(tmp_path):
    with Worker(tmp_path) as slow, Worker(tmp_path) as fast:
        assert slow.take("a")
        os.utime(tmp_path / "workers" / f"{slow.name}.json", (1, 1))
        assert fast.take("a")
        slow.finish()
        assert fast.claimed() == {"a"}
        fast.finish()
        assert fast.claimed() == set()


def test_what_is_no_record_is_passed_over(worker, tmp_path):
    for name, content in {"a": "", "b": "[1]", "c": '{"host": 1}', "d": "[" * 10_000}.items():
        (tmp_path / "workers" / f"{name}.json").write_text(content)
    (tmp_path / "claims" / "x.0").write_bytes(b"\xff\x1b[2J\nwhy \x1b[2J\n")
    assert [record.name for record in read_workers(tmp_path)] == [worker.name]
    assert "\x1b" not in read_claims(tmp_path)[0].reason
    assert worker.take("x")


def test_what_others_did_is_told_once(worker, tmp_path):
    of_another(tmp_path, "old", rows=5, tokens=50)
    tally = Tally(tmp_path, without=worker.name)
    of_another(tmp_path, "old", rows=7.5, tokens=70)
    of_another(tmp_path, "new", rows=1, tokens=10)
    worker.take("a")
    worker.count(3, 30)
    worker.renew()
    assert tally.more() == (3.5, 30)
    assert tally.more() == (0, 0)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "workers").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*choose another output"), Worker(tmp_path):
        pass
