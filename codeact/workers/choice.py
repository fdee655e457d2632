"""Which engine does the shards of a job, and what started this process."""

from __future__ import annotations

import os
from typing import Literal, get_args

from codeact.base.errors import InputError, one_of
from codeact.base.settings import Settings, setting

Engine = Literal["local", "ray", "torchrun"]


class WorkerSettings(Settings):
    """Who does the work; see ``codeact.scoring.stage.score_data``."""

    workers: int | None = setting(
        None, "Processes that compute, one a GPU or a share of the CPUs each; default: 1, on Ray all.", ge=1
    )
    engine: Engine = setting("local", "Who runs them.")
    address: str | None = setting(None, "HOST:PORT of a Ray cluster; default: one of this machine's own, for the run.")


def check_engine(engine: str, workers: int | None, address: str | None) -> None:
    """Refuse what does not go together.

    Raises:
        InputError: it does not.
    """
    launched = launched_rank()
    one_of("--engine", engine, get_args(Engine))
    if launched is not None and (engine == "ray" or (workers or 1) > 1):
        asked = "--engine ray" if engine == "ray" else "--workers"
        raise InputError(f"a launcher started several processes, and each is a worker; leave out {asked}")
    if launched is None and engine == "torchrun":
        raise InputError("no launcher started this: say torchrun --nproc-per-node N -m codeact ...; or --workers N")
    if address is not None and engine != "ray":
        raise InputError("--address is of a Ray cluster; say --engine ray")


def launched_rank() -> int | None:
    """Which process this is under torchrun, accelerate or srun, if they started several with the same command."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if int(os.environ.get(size, "1")) > 1 and rank in os.environ:
            return int(os.environ[rank])
    return None


def local_rank(rank: int) -> int:
    """Which of the processes that a launcher started on this machine this is."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", rank)))
