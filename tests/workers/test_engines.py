"""Workers that share a folder of scores: every shard once, the same table whoever dies, and an end in any case."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from codeact.base.errors import InputError
from codeact.scoring.folder import ScoreFolder
from codeact.workers import engines
from codeact.workers.claims import Worker, read_claims
from codeact.workers.engines import Begin, Job, LocalPool, supervise, work, work_alone
from tests.helpers import made_up_scores

SHARDS = 12


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "faults").mkdir()
    return tmp_path / "scores"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "scores"
    assert work_alone(made_up_scores.prepare(folder, SHARDS, 0.0), show=False)["rows"] == 3 * SHARDS - 1
    return pq.read_table(folder / "scores.parquet")


def start(folder: Path, workers: int = 2, seconds: float = 0.0) -> None:
    begin = Begin(folder=folder, prepare=partial(made_up_scores.prepare, folder, SHARDS, seconds))
    supervise(LocalPool(), begin, workers, lambda: ScoreFolder.open(folder), "processes")


def fault(folder: Path, name: str) -> None:
    (folder.parent / "faults" / name).touch()


def merged(folder: Path):
    return pq.read_table(folder / "scores.parquet")


@pytest.mark.parametrize("misses", [1, 16])  # with 1 they often look anew for free shards
def test_equal_workers_do_no_shard_twice(folder, table, monkeypatch, misses):
    monkeypatch.setattr(engines, "_MISSES", misses)
    monkeypatch.setattr(engines, "BEAT", 0.1)
    done: list[int] = []
    merges: list[object] = []

    def run() -> None:
        job = made_up_scores.prepare(folder, SHARDS, 0.01)
        do = job.do
        job = Job(job.folder, lambda shard, step: (done.append(shard), do(shard, step)))
        barrier.wait()
        merges.append(work_alone(job, show=False))

    barrier = threading.Barrier(5)
    with ThreadPoolExecutor(5) as pool:
        for ended in [pool.submit(run) for _ in range(5)]:
            ended.result()
    assert sorted(done) == list(range(SHARDS))
    assert len([totals for totals in merges if totals is not None]) == 1
    assert merged(folder).equals(table)
    assert read_claims(folder) == []


def test_one_that_dies_is_replaced_and_the_table_is_the_same(folder, table, capfd):
    fault(folder, "4.once")
    start(folder)
    assert merged(folder).equals(table)
    assert capfd.readouterr().err.count("died (SIGKILL); another takes its place") == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("4.kill", r"worker \S+ ended in it; worker \S+ ended in it"),
        ("4.raise", "RuntimeError: row 4 is poison"),
    ],
)
def test_a_shard_that_cannot_be_done_is_named_all_others_are_and_a_rerun_completes(folder, table, name, reason):
    fault(folder, name)
    message = rf"1 of 12 shards cannot be scored, all others are \(shard 1 \(rows 3 to 5\): {reason}\); the same"
    with pytest.raises(InputError, match=message):
        start(folder)
    assert ScoreFolder.open(folder).missing() == [1]
    with pytest.raises(InputError, match="1 of 12 shards are missing"):
        ScoreFolder.open(folder).merge()
    (folder.parent / "faults" / name).unlink()
    assert work_alone(made_up_scores.prepare(folder, SHARDS, 0.0), show=False) is not None
    assert merged(folder).equals(table)
    assert read_claims(folder) == []


def test_what_a_user_can_mend_ends_all(folder):
    fault(folder, "4.refuse")
    with pytest.raises(InputError, match=r"^row 4 is refused$"):
        start(folder)


def test_workers_that_all_die_end_the_run(folder, monkeypatch):
    monkeypatch.setattr(engines, "TRIES", 0)
    for row in range(0, 3 * SHARDS, 3):
        fault(folder, f"{row}.kill")
    with pytest.raises(InputError, match=r"1 processes died in a row \(SIGKILL\), perhaps for want of memory; lower "):
        start(folder, workers=1)


def test_failures_in_a_row_are_not_the_shards(folder):
    for row in range(0, 3 * SHARDS, 3):
        fault(folder, f"{row}.raise")
    job = made_up_scores.prepare(folder, SHARDS, 0.0)
    with pytest.raises(InputError, match=r"3 shards in a row failed, .*shard 2 .*see .*claims"), Worker(folder) as one:
        work(job, one, lambda rows, tokens: None)
    assert "Traceback" in next((folder / "claims").iterdir()).read_text()


def note_environment(folder: Path, place, first) -> Job:
    (folder / "seen").write_text(os.environ.get("CODEACT_TEST_SAYS", ""))
    raise InputError("noted")


def test_a_worker_has_the_environment_of_its_start(tmp_path, monkeypatch):
    """Also one that is forked from a process which was started earlier."""
    pool = LocalPool()
    for said in ("one", "two"):
        monkeypatch.setenv("CODEACT_TEST_SAYS", said)
        pool.start(0, Begin(folder=tmp_path, prepare=partial(note_environment, tmp_path)))
        ended = []
        while not ended:
            ended = pool.ended(0.1)
        ((_, error),) = ended
        assert str(error) == "noted"
        assert (tmp_path / "seen").read_text() == said
