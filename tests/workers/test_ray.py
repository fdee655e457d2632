"""The Ray engine: a cluster of two nodes, faults of workers, nodes and drivers; nothing is lost, nothing doubled."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from codeact.base.errors import InputError
from codeact.scoring.folder import ScoreFolder
from codeact.workers.claims import read_workers
from codeact.workers.engines import Begin, supervise, work_alone
from codeact.workers.ray_pool import RayPool
from tests.helpers import made_up_scores

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Ray has several nodes on one machine on Linux only"),
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed"),
]

SHARDS = 12
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of 2 cores, which ask for a token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "f" * 64)
        from ray._raylet import Config
        from ray.cluster_utils import Cluster

        Config.initialize("")  # where another test has imported Ray before
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        nodes.add_node(num_cpus=2)
        yield nodes
        nodes.shutdown()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "faults").mkdir()
    return tmp_path / "scores"


def start(address: str, folder: Path, workers: int = 2) -> None:
    begin = Begin(folder=folder, prepare=partial(made_up_scores.prepare, folder, SHARDS, 0.0))
    pool = RayPool(address, workers, folder)
    supervise(pool, begin, workers, lambda: ScoreFolder.open(folder), "workers on Ray")


def is_whole(folder: Path) -> None:
    assert pq.read_table(folder / "scores.parquet")["row"].to_pylist() == list(range(3 * SHARDS - 1))
    assert len(list((folder / "shards").iterdir())) == SHARDS
    assert not list((folder / "claims").iterdir())
    assert not list(folder.glob(".codeact-seen-*"))


def test_a_worker_that_is_killed_is_replaced(cluster, folder, capfd):
    (folder.parent / "faults" / "4.once").touch()
    start(cluster.address, folder)
    is_whole(folder)
    assert capfd.readouterr().err.count("another takes its place") == 1
    alone = folder.parent / "alone"
    work_alone(made_up_scores.prepare(alone, SHARDS, 0.0), show=False)
    assert pq.read_table(alone / "scores.parquet").equals(pq.read_table(folder / "scores.parquet"))


def test_a_shard_that_kills_or_fails_is_named_and_a_rerun_on_another_engine_completes(cluster, folder):
    (folder.parent / "faults" / "4.kill").touch()
    (folder.parent / "faults" / "9.raise").touch()
    with pytest.raises(
        InputError, match=r"2 of 12 shards cannot be .*rows 3 to 5.*rows 9 to 11\): RuntimeError: row 9"
    ):
        start(cluster.address, folder)
    assert ScoreFolder.open(folder).missing() == [1, 3]
    for fault in (folder.parent / "faults").iterdir():
        fault.unlink()
    work_alone(made_up_scores.prepare(folder, SHARDS, 0.0), show=False)
    is_whole(folder)


def test_a_node_that_is_killed(cluster, folder):
    node = cluster.add_node(num_cpus=2)
    waits = [folder.parent / "faults" / f"{3 * shard}.wait" for shard in range(SHARDS)]
    for wait in waits:
        wait.touch()

    def kill() -> None:
        while sum(record.part is not None for record in read_workers(folder)) < 3:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
        for wait in waits:
            wait.unlink()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    start(cluster.address, folder, workers=3)
    killer.join()
    is_whole(folder)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("address", "no Ray cluster answers at 127.0.0.1:1 "),
        ("workers", r"the Ray cluster has \d cores on \d nodes, at least one a worker; lower workers"),
        ("folder", "does not see .*give an output that lies on a file system of all nodes"),
        ("version", r"has codeact \S+, and 9.9.9 was started; install one on all nodes"),
        ("refused", r"row 4 is refused \(on "),
    ],
)
def test_what_cannot_be_is_one_clear_line(cluster, folder, monkeypatch, what, message):
    if what == "version":
        monkeypatch.setattr("codeact.workers.ray_pool.__version__", "9.9.9")
    if what == "refused":
        (folder.parent / "faults" / "4.refuse").touch()
    if what == "folder":  # as if the driver's folder lay on its own disk
        monkeypatch.setattr(Path, "touch", lambda path: None)
    address, workers = ("127.0.0.1:1" if what == "address" else cluster.address), (9 if what == "workers" else 1)
    with pytest.raises(InputError, match=message):
        start(address, folder, workers)
    assert what == "refused" or not folder.exists()


DRIVER = """if True:
    import os, sys
    from functools import partial
    from pathlib import Path
    from codeact.workers.engines import Begin, supervise
    from codeact.scoring.folder import ScoreFolder
    from codeact.workers.ray_pool import RayPool
    from tests.helpers import made_up_scores
    folder = Path(sys.argv[1])
    pool = RayPool(None, 1, folder)
    begin = Begin(folder=folder, prepare=partial(made_up_scores.prepare, folder, 1000, 0.2))
    supervise(pool, begin, 1, lambda: ScoreFolder.open(folder), "workers on Ray")
"""


def listening(pids: set[int]) -> list[str]:
    """Addresses, as the kernel writes them, at which these processes listen for others."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(link))
            except OSError:
                continue
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


def test_a_cluster_of_ones_own_is_shut_in_and_ends_with_a_killed_driver(folder):
    from tests.run.test_signals import all_end, offspring

    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**{k: v for k, v in os.environ.items() if k not in names}, "PYTHONPATH": path}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)], cwd=folder.parent, env=environment)
    while not list(folder.glob("shards/0*")):
        assert driver.poll() is None
        time.sleep(0.1)
    started = offspring(driver.pid)
    raylet = next(pid for pid in started if b"raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_bytes())
    told = Path(f"/proc/{raylet}/environ").read_bytes()
    assert b"RAY_AUTH_MODE=token" in told
    assert b"RAY_USAGE_STATS_ENABLED=0" in told
    loopback = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}
    found = listening({driver.pid, *started})
    assert found
    assert {*found} <= loopback
    agents = {pid for pid in started if b"Agent" in Path(f"/proc/{pid}/cmdline").read_bytes()}  # look once a minute
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert all_end([pid for pid in started if pid not in agents])
    assert 0 < len(list(folder.glob("shards/0*"))) < 1000
