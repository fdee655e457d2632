"""How far the workers of ``codeact score`` and ``embed`` are, from the files of their folder alone."""

from __future__ import annotations

import time
from pathlib import Path

from codeact.base.console import aligned, counted, duration, percent, short
from codeact.base.errors import InputError
from codeact.embedding.folder import EmbeddingFolder
from codeact.embedding.stage import EMBEDDINGS_FILE
from codeact.scoring.folder import ScoreFolder
from codeact.scoring.stage import SCORES_FOLDER
from codeact.workers.claims import WorkerRecord, read_claims, read_workers
from codeact.workers.shards import ShardFolder


def status_text(path: str | Path, now: float | None = None) -> str:
    """Progress, speed, the workers, and what is dead or failed, as lines.

    Args:
        path: a folder of scores, FILE.npy of embeddings that are being made, or a run's folder that has either.
        now: seconds since 1970, by the clock of the folder's file system; default: by this machine's.

    Raises:
        InputError: it holds neither, or no more.
    """
    folder = _open(Path(path))
    now = time.time() if now is None else now
    missing = folder.missing()
    left = sum(len(folder.span(shard)) for shard in missing)
    done = folder.rows - left
    merged = not missing and folder.is_merged
    lines = [
        f"{folder.folder}: {folder.shards - len(missing):,} of {counted(folder.shards, 'shard')}, "
        f"{done:,} of {counted(folder.rows, 'row')}, {percent(done / folder.rows)}{'; merged' if merged else ''}"
    ]
    workers = read_workers(folder.folder)
    alive = {worker.name: worker for worker in workers if worker.lives(now)}
    if alive:
        tokens, rows = _speed(list(alive.values()))
        time_left = f", about {duration(left / rows)} left" if rows and missing else ""
        lines.append(
            f"{len(alive)} of {counted(len(workers), 'worker lives', 'workers live')}: {tokens:,.0f} tokens/s, "
            f"{rows:,.1f} rows/s{time_left}"
        )
    elif missing:
        lines.append(f"no worker lives; the same {folder.COMMAND} command goes on where it was")
    if workers:
        head = ("worker", "state", "shard", "shards", "rows", "tokens/s", "last sign")
        lines.append(aligned([head, *(_cells(worker, worker.name in alive, now) for worker in workers)], left=3))
    for claim in read_claims(folder.folder):
        if claim.reason:
            lines.append(f"shard {claim.part} failed: {claim.reason}")
        elif claim.worker not in alive:
            lines.append(
                f"nobody who lives does shard {claim.part}: it is taken over when no shard is left that nobody began"
            )
    return "\n".join(lines)


def _open(path: Path) -> ShardFolder:
    """What is being made there; in a run embeddings are made after scores, and have no such folder once they are."""
    if path.suffix == ".npy":
        shards = EmbeddingFolder.beside(path)
        if path.exists() and not shards.exists():
            raise InputError(f"{path} is made, and nobody is at work on it")
        return EmbeddingFolder.open(shards)
    shards = EmbeddingFolder.beside(path / EMBEDDINGS_FILE)
    if shards.exists():
        return EmbeddingFolder.open(shards)
    return ScoreFolder.open(path / SCORES_FOLDER if (path / SCORES_FOLDER).exists() else path)


def _speed(workers: list[WorkerRecord]) -> tuple[float, float]:
    """Tokens and rows a second of all."""
    seconds = [max(worker.seconds, 1e-9) for worker in workers]
    return (
        sum(worker.tokens / time for worker, time in zip(workers, seconds, strict=True)),
        sum(worker.rows / time for worker, time in zip(workers, seconds, strict=True)),
    )


def _cells(worker: WorkerRecord, lives: bool, now: float) -> tuple[str, ...]:
    state = "ended" if worker.ended else "dead" if not lives else "at work" if worker.part else "waits"
    sign = f"{duration(max(0.0, now - worker.renewed))} ago"
    speed = f"{_speed([worker])[0]:,.0f}"
    return worker.name, state, worker.part or "", f"{worker.parts:,}", short(worker.rows), speed, sign
