"""The job file by which a cluster starts the workers of ``codeact score`` or ``embed``: Slurm, Ray, Kubernetes."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from typing import Literal, get_args

from codeact.base.errors import InputError, one_of
from codeact.base.settings import Settings, setting

System = Literal["slurm", "ray", "k8s"]
_SUBMIT = {"slurm": ("sbatch",), "ray": ("bash",), "k8s": ("kubectl", "create", "-f", "-")}


class LaunchSettings(Settings):
    """What the job asks the cluster for."""

    workers: int = setting(8, "Workers, each with a GPU of its own.", ge=1)
    gpus: int = setting(1, "GPUs of a worker: 1, or 0 to compute on CPUs.", ge=0, le=1)
    cpus: int = setting(8, "Cores of a worker.", ge=1)
    hours: int = setting(24, "After which Slurm or Kubernetes ends the job; the same command goes on.", ge=1)
    image: str = setting("codeact", "Container image, for k8s.")
    claim: str = setting("shared", "Persistent volume claim with data, model and output, for k8s.")
    mount: str = setting("/shared", "Where a container sees that volume, for k8s.")
    dashboard: str = setting("http://127.0.0.1:8265", "Of the Ray cluster, where jobs are submitted, for ray.")


def job_file(system: str, command: Sequence[str], settings: LaunchSettings) -> str:
    """The text of the job.

    Args:
        system: ``slurm``, a script for sbatch; ``ray``, a script that submits; ``k8s``, a Job for kubectl.
        command: ``["score" or "embed", "rows.jsonl", ...]``, as behind ``codeact``.
        settings: what it asks for.

    Raises:
        InputError: the system is unknown, or the command is neither, or says itself how many workers there are.
    """
    one_of("system", system, get_args(System))
    if not command or command[0] not in ("score", "embed"):
        raise InputError(
            "only score and embed share their work among workers: codeact launch slurm -- score DATA --model M ..."
        )
    for name in ("--workers", "--processes", "--engine", "--address"):
        if any(word == name or word.startswith(f"{name}=") for word in command):
            raise InputError(f"leave {name} out of the command that is launched; the job says it")
    return {"slurm": _slurm, "ray": _ray, "k8s": _kubernetes}[system](["codeact", *command], settings)


def submit(system: str, text: str) -> None:
    """Hand the job to the cluster.

    Raises:
        InputError: the program that does so is not here, or refuses it.
    """
    program = _SUBMIT[system]
    if shutil.which(program[0]) is None or (system == "ray" and shutil.which("ray") is None):
        name = "ray" if system == "ray" else program[0]
        raise InputError(f"{name} is not here; leave out --submit, and submit the file where it is")
    code = subprocess.run(program, input=text, text=True, check=False).returncode
    if code:
        raise InputError(f"{program[0]} ended with exit code {code}; see above")


def _slurm(command: list[str], settings: LaunchSettings) -> str:
    gpus = [f"#SBATCH --gpus-per-task={settings.gpus}"] * (settings.gpus > 0)
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=codeact",
        f"#SBATCH --ntasks={settings.workers}",
        *gpus,
        f"#SBATCH --cpus-per-task={settings.cpus}",
        f"#SBATCH --time={settings.hours}:00:00",
        "#SBATCH --no-kill --requeue",
        "# A task that is lost is no loss: the others take over its shard.",
        "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
        f"srun --cpus-per-task=$SLURM_CPUS_PER_TASK --kill-on-bad-exit=0 {shlex.join(command)}",
    ]
    return "\n".join(lines) + "\n"


def _ray(command: list[str], settings: LaunchSettings) -> str:
    driver = [*command, "--engine", "ray", "--address", "auto", "--workers", str(settings.workers)]
    return (
        "#!/bin/bash\n"
        "# The driver runs on the head node; where the cluster asks for a token, RAY_AUTH_TOKEN holds it.\n"
        f"ray job submit --no-wait --address {shlex.quote(settings.dashboard)} -- {shlex.join(driver)}\n"
    )


def _kubernetes(command: list[str], settings: LaunchSettings) -> str:
    limits = {"cpu": str(settings.cpus), **({"nvidia.com/gpu": str(settings.gpus)} if settings.gpus else {})}
    return f"""apiVersion: batch/v1
kind: Job
metadata: {{generateName: codeact-}}
spec:
  parallelism: {settings.workers}  # no completions: a pod that ends well says that all shards are done
  backoffLimit: {4 * settings.workers}  # a pod that is lost is no loss: the others take over its shard
  activeDeadlineSeconds: {settings.hours * 3600}
  template:
    spec:
      restartPolicy: Never
      containers:
        - name: worker
          image: {json.dumps(settings.image)}
          command: {json.dumps(command)}
          resources: {{limits: {json.dumps(limits)}}}
          volumeMounts: [{{name: shared, mountPath: {json.dumps(settings.mount)}}}]
      volumes: [{{name: shared, persistentVolumeClaim: {{claimName: {json.dumps(settings.claim)}}}}}]
"""
