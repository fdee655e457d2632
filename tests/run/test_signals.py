"""What is left of a command that is stopped: one line, an exit code, no process, and a folder to go on in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from codeact.data.records import write_jsonl
from tests.conftest import make_records
from tests.helpers import forked

ROWS = 300  # in shards of 5: a rerun takes seconds, and a signal at the first shard still leaves nearly all to do
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@pytest.fixture
def command(tmp_path, tiny_model_path) -> list[str]:
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": r.question, "output": r.answer} for r in make_records(ROWS)])
    options = [
        "--model",
        str(tiny_model_path),
        "--output",
        str(tmp_path / "scores"),
        "--shard-size",
        "5",
        "--max-length",
        "256",
    ]
    return [sys.executable, "-m", "codeact", "score", str(tmp_path / "rows.jsonl"), *options]


def begun(command: list[str], folder: Path) -> forked.Popen:
    """The command, once it has written some of its shards and has many more to do."""
    process = forked.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(folder.glob("scores/shards/0*.parquet")):
        time.sleep(0.05)
    return process


def offspring(process: int) -> list[int]:
    """Processes that it started, and theirs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended just now
        if parent == process:
            found += [number, *offspring(number)]
    return found


def all_end(processes: list[int]) -> bool:
    """Whether they all end, however long a busy machine takes for it (pytest's caller has the last word)."""
    for _ in range(2400):
        if not any(Path(f"/proc/{number}").exists() and not zombie(number) for number in processes):
            return True
        time.sleep(0.05)
    return False


def zombie(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("workers", "number", "code"),
    [(1, signal.SIGINT, 130), (2, signal.SIGTERM, 143), (2, signal.SIGINT, 130)],
)
def test_a_signal_ends_all_with_one_line(command, tmp_path, workers, number, code):
    process = begun([*command, "--workers", str(workers)], tmp_path)
    started = offspring(process.pid)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code, err
    assert err.rstrip().splitlines()[-1] == "codeact: stopped; the same command goes on where it was"
    assert "Traceback" not in err
    assert len(started) >= (workers if workers > 1 else 0)
    assert all_end(started)
    assert len(list(tmp_path.glob("scores/shards/0*.parquet"))) < ROWS / 5


def test_workers_of_a_killed_command_end_and_the_rerun_completes(command, tmp_path):
    command += ["--workers", "2"]
    process = begun(command, tmp_path)
    workers = offspring(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(workers) >= 2
    assert all_end(workers)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("scores/shards/0*.parquet")}
    assert 0 < len(kept) < ROWS / 5
    forked.run(command, check=True, capture_output=True)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert pq.read_table(tmp_path / "scores" / "scores.parquet")["row"].to_pylist() == list(range(ROWS))


def test_the_first_error_ends_all(command, tmp_path):
    """A share that fails is told at once, not when the others have ended."""
    process = begun([*command, "--workers", "2"], tmp_path)
    shards = tmp_path / "scores" / "shards"
    shards.rename(tmp_path / "scores" / "away")
    shards.write_text("no folder any more")
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.count("codeact: error: ") == 1
    assert "shards" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("module", ["pydantic", "typer", "yaml", "numpy"])
def test_a_signal_while_libraries_load(tmp_path, module, number, code):
    """The very moment is chosen by a library that sends the signal as it is imported."""
    (tmp_path / f"{module}.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "codeact", "score", "x.jsonl", "--model", "m", "--output", "o"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr == "\ncodeact: stopped; the same command goes on where it was\n"


def test_what_a_worker_refuses_is_told_as_one_process_tells_it(command):
    said = []
    for workers in ("1", "2"):
        more = ["--max-length", "513", "--workers", workers]
        result = forked.run([*command, *more], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr.count("Traceback")) == (2, 0), result.stderr
        said.append(result.stderr.splitlines()[-1])
    assert said[0] == said[1]
    assert "--max-length" in said[0]
