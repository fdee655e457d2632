"""What codeact status says, from the files that workers leave."""

from __future__ import annotations

import os

import pytest

from codeact.base.errors import InputError
from codeact.run.status import status_text
from codeact.workers.claims import LEASE, Worker
from codeact.workers.engines import work_alone
from tests.helpers import made_up_scores


def test_progress_speed_workers_and_what_is_dead(tmp_path, codeact):
    folder = tmp_path / "run" / "scores"
    job = made_up_scores.prepare(folder, 12, 0.0)
    assert "no worker lives; the same codeact score command goes on where it was" in status_text(folder)
    with Worker(folder) as one, Worker(folder) as other:
        for shard in range(3):
            job.do(shard, lambda rows, tokens: None)
        one.parts, one.rows, one.tokens = 3, 9.0, 9000
        for worker, shard in ((one, 3), (other, 4)):
            assert worker.take(job.folder.part(shard))
            worker.count(1.5, 100)
        other.fail("RuntimeError: no\nTraceback")
        assert other.take(job.folder.part(5))
        for worker in (one, other):
            worker.renew()
        now = (folder / "workers" / f"{one.name}.json").stat().st_mtime
        first, speed, head, *table, failed = status_text(tmp_path / "run", now + 2).splitlines()
        assert first == f"{folder}: 3 of 12 shards, 9 of 35 rows, 25.7 %"
        assert speed.startswith("2 of 2 workers live: ")
        assert speed.endswith(" left")
        assert head.split() == ["worker", "state", "shard", "shards", "rows", "tokens/s", "last", "sign"]
        cells = {line.split()[0]: line.split()[1:] for line in table}
        assert cells[one.name][:5] == ["at", "work", "00003-of-00012", "3", "10.5"]
        assert failed == "shard 00004-of-00012 failed: RuntimeError: no"
        os.utime(folder / "workers" / f"{other.name}.json", (now - 2 * LEASE, now - 2 * LEASE))
        said = status_text(folder, now)
        assert "1 of 2 workers live" in said
        assert f"{other.name}  dead" in said
        assert "2 min 0 s ago" in said
        assert "nobody who lives does shard 00005-of-00012: it is taken over when" in said
    assert work_alone(job, show=False) is not None
    code, out, _ = codeact("status", folder)
    assert code == 0
    assert out.splitlines()[0] == f"{folder}: 12 of 12 shards, 35 of 35 rows, 100.0 %; merged"
    assert "live" not in out


def test_a_folder_without_scores(tmp_path):
    with pytest.raises(InputError, match="holds no scores"):
        status_text(tmp_path)
