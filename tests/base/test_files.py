"""A file appears whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from codeact.base.errors import InputError
from codeact.base.files import TEMPORARY_PREFIX, atomic_path, locked_folder, remove_leftovers


def test_appears_at_the_end_and_makes_its_folder(tmp_path):
    target = tmp_path / "new" / "file"
    with atomic_path(target) as temporary:
        temporary.write_text("content")
        assert not target.exists()
    assert target.read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text(str(1 / 0))
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_at_any_step_is_one_clear_line(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with (
        pytest.raises(InputError, match=r"cannot write .*file: No space left on device"),
        atomic_path(tmp_path / "file") as temporary,
    ):
        temporary.write_text("content")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    code = (
        "import os, signal, sys; from codeact.base.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t: t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "dead")], check=False)
    assert [path.name.startswith(TEMPORARY_PREFIX) for path in tmp_path.iterdir()] == [True]
    with atomic_path(tmp_path / "living") as temporary:
        temporary.write_text("whole")
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == [temporary]
    assert (tmp_path / "living").read_text() == "whole"


def test_one_process_at_a_time_writes_to_a_folder(tmp_path):
    code = (
        "import sys, pathlib\nfrom codeact.base.files import locked_folder\n"
        "with locked_folder(pathlib.Path(sys.argv[1]), wait=True):\n print('held', flush=True)\n sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with (
        pytest.raises(InputError, match=r"another process writes to .*; wait for it"),
        locked_folder(tmp_path / "a", wait=False),
    ):
        pass
    with locked_folder(tmp_path / "b", wait=False):
        pass
    other.kill()  # a lock goes with its process
    other.wait()
    with locked_folder(tmp_path / "a", wait=False):
        assert not [*(tmp_path / "a").iterdir()]


@pytest.mark.parametrize(
    "command",
    [
        ("clean", "none.jsonl", "--embeddings", "a/../rows.npy"),
        ("select", "--scores", "none", "--embeddings", "rows.npy"),
        ("select", "--scores", "none", "--strategy", "random", "--marks", "rows.rows.parquet"),
    ],
)
def test_what_is_read_is_not_overwritten(command, codeact, tmp_path, monkeypatch):
    """``rows.jsonl`` and ``rows.npy`` would both have rows.rows.parquet beside them."""
    monkeypatch.chdir(tmp_path)
    code, _, err = codeact(*command, "--output", "rows.jsonl")
    assert code == 2
    assert "rows.rows.parquet belongs to " in err
    assert "choose another --output" in err
