"""Job files: what a shell and a YAML reader make of them is the command that was given."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

AWKWARD = ["score", "my rows's.jsonl", "--model", '$HOME; "m" #', "--output", "/shared/scores: a"]


def stub(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def test_slurm_starts_every_worker_with_the_command(codeact, tmp_path):
    code, out, err = codeact("launch", "slurm", "--workers", 3, "--gpus", 0, "--cpus", 2, "--", *AWKWARD)
    assert code == 0, err
    assert "#SBATCH --ntasks=3" in out
    assert "gpus-per-task" not in out
    stub(tmp_path / "bin", "srun", 'while [[ $1 == --* ]]; do shift; done; printf "%s\\n" "$@"')
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.defpath}", "SLURM_CPUS_PER_TASK": "2"}
    done = subprocess.run(["bash"], input=out, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["codeact", *AWKWARD]


def test_kubernetes_reads_the_command(codeact):
    code, out, err = codeact("launch", "k8s", "--workers", 3, "--hours", 2, "--image", "a: b", "--", *AWKWARD)
    assert code == 0, err
    spec = yaml.safe_load(out)["spec"]
    assert (spec["parallelism"], spec["activeDeadlineSeconds"]) == (3, 7200)
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == ["codeact", *AWKWARD]
    assert container["image"] == "a: b"
    assert container["resources"] == {"limits": {"cpu": "8", "nvidia.com/gpu": "1"}}


def test_ray_submits_a_driver(codeact, tmp_path, monkeypatch):
    bash = shutil.which("bash")
    for name, script in (("bash", f'exec {bash} "$@"'), ("ray", f'printf "%s\\n" "$@" > {tmp_path}/said')):
        stub(tmp_path / "bin", name, script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    code, _, err = codeact("launch", "ray", "--workers", 3, "--submit", "--", *AWKWARD)
    assert code == 0, err
    said = (tmp_path / "said").read_text().splitlines()
    assert said[:2] == ["job", "submit"]
    assert said[said.index("--") + 1 :] == [
        "codeact",
        *AWKWARD,
        "--engine",
        "ray",
        "--address",
        "auto",
        "--workers",
        "3",
    ]
    monkeypatch.setenv("PATH", "")
    code, _, err = codeact("launch", "slurm", "--submit", "--", *AWKWARD)
    assert (code, "sbatch is not here; leave out --submit" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slrm", "--", *AWKWARD], "system 'slrm' is unknown; choose one of: slurm"),
        (["slurm", "--", "train"], "only score and embed share their work among workers"),
        (["slurm", "--", *AWKWARD, "--workers=2"], "leave --workers out of the command"),
        (["slurm", "--workers", "0", "--", *AWKWARD], "--workers 0"),
    ],
)
def test_what_cannot_be(codeact, words, message):
    code, _, err = codeact("launch", *words)
    assert (code, message in err) == (2, True), err
