"""A job's shards are shared out among as many workers as are asked for, by the engine that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from codeact.workers.choice import Engine, launched_rank
from codeact.workers.engines import Begin, LocalPool, Place, Pool, supervise, work_alone
from codeact.workers.shards import ShardFolder


def share_out(
    begin: Begin,
    open_folder: Callable[[], ShardFolder],
    *,
    workers: int | None = None,
    engine: Engine = "local",
    address: str | None = None,
) -> dict[str, Any] | None:
    """Do all shards, by as many workers as are asked for.

    Args:
        begin: what a worker has to know.
        open_folder: opens the folder, once the first worker has claimed it.
        workers, engine, address: see ``codeact.scoring.stage.score_data``; ``check_engine`` has accepted them.

    Returns:
        The totals of the merge; None where another worker does that.

    Raises:
        InputError: of ``prepare``; or shards cannot be done, all others being done: the first are named, with why.
    """
    if engine != "ray" and workers in (None, 1):
        launched = launched_rank()
        place = None if launched is None else Place(launched)
        return work_alone(begin.prepare(place, True), show=not launched)
    pool: Pool
    if engine == "ray":
        from codeact.workers.ray_pool import RayPool  # and Ray, which is an extra

        pool = RayPool(address, workers, begin.folder)
        count, what = pool.workers, "workers on Ray"  # which gives each its cores
    else:
        assert workers is not None
        pool, count, what = LocalPool(), workers, "processes"
        begin = replace(begin, share=workers)
    return supervise(pool, begin, count, open_folder, what)
