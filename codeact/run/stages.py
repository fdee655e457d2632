"""The stages up to the chosen rows, as the command line and a run use them: score, embed, select."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from codeact.base.errors import InputError
from codeact.base.files import remove_leftovers
from codeact.data.records import BadRow, RecordSet
from codeact.data.sources import absolute_name
from codeact.run.settings import DataSettings, EmbedSettings, ScoreSettings, SelectSettings

if TYPE_CHECKING:
    from codeact.embedding.vectors import EmbeddingMetadata

_NAMED_REFUSALS = 5


def score(
    data: DataSettings,
    settings: ScoreSettings,
    output: str | Path,
    *,
    shard: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    strict: bool = False,
) -> dict[str, Any] | None:
    """Score a data set into the folder ``output``, doing only the shards that are missing.

    Args:
        data: the data set.
        settings: how.
        output: the folder; see ``codeact.scoring.folder``.
        shard: ``(i, n)``: do shards i, i + n, i + 2 n ... only, and leave the merge to ``codeact merge``.
        overwrite: discard scores made with other settings.
        strict: stop at the first bad row instead of counting it.

    Returns:
        The totals of the merged table, or None where another process has shards to do.

    Raises:
        InputError: see the stages.
    """
    from codeact.base.devices import resolve_device, resolve_dtype
    from codeact.models.loading import load_causal_lm, model_fingerprint, quiet_transformers
    from codeact.scoring.folder import ScoreFolder
    from codeact.scoring.ifd import IfdScorer

    records = data.open()
    if strict:
        for row in records:
            if isinstance(row, BadRow):
                raise InputError(f"{row.message} ({row.reason}); mend it, or leave out --strict to go on without it")
    quiet_transformers()
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    model, tokenizer = load_causal_lm(settings.model, device, dtype)
    scorer = IfdScorer(
        model, tokenizer, settings.template, settings.max_length, settings.tokens_per_pack, settings.protocol
    )
    folder = ScoreFolder(
        output,
        {
            "data": {
                **data.model_dump(),
                "source": absolute_name(data.source),
                "rows": len(records),
                "fingerprint": records.fingerprint,
            },
            "model": {"name": absolute_name(settings.model), "fingerprint": model_fingerprint(settings.model, model)},
            "template": scorer.prompts.text,
            "max_length": settings.max_length,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens_per_pack": scorer.tokens_per_pack,
            "protocol": settings.protocol,
            "shard_size": settings.shard_size,
        },
    )
    folder.claim(overwrite)
    index, count = shard
    missing = [number for number in folder.missing() if number % count == index]
    say(f"scoring {records.source}: {len(missing)} of {folder.shards} shards to do, {dtype} on {device}")
    with _RowBar(sum(folder.shard_rows(number) for number in missing)) as bar:
        folder.score(records, scorer, missing, bar)
    return folder.merge() if count == 1 else None


def score_in_processes(data: DataSettings, settings: ScoreSettings, output: Path, processes: int) -> dict[str, Any]:
    """Score with a process a GPU (or an equal share of the CPUs), then merge. Arguments and errors as in ``score``."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    from codeact.scoring.folder import ScoreFolder

    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        shares = [pool.submit(_score_share, data, settings, output, index, processes) for index in range(processes)]
        try:
            for share in as_completed(shares):
                share.result()
        except BrokenProcessPool:
            pool.shutdown(cancel_futures=True)
            raise InputError(
                f"one of {processes} scoring processes was killed, perhaps for want of memory; lower tokens_per_pack "
                "or processes and run again: finished shards are kept"
            ) from None
    return ScoreFolder.open(output).merge()


def _score_share(data: DataSettings, settings: ScoreSettings, output: Path, index: int, count: int) -> None:
    import torch

    if torch.cuda.is_available() and settings.device == "auto":
        settings = settings.model_copy(update={"device": f"cuda:{index % torch.cuda.device_count()}"})
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    score(data, settings, output, shard=(index, count))


def embed(data: DataSettings, settings: EmbedSettings, output: str | Path) -> EmbeddingMetadata:
    """Embed the questions of a data set into ``output`` (.npy); done already for this data and model: nothing to do.

    Returns:
        What the file holds.
    """
    from codeact.base.devices import resolve_device, resolve_dtype
    from codeact.embedding.vectors import embed_records, embedder_fingerprint, read_embeddings
    from codeact.models.loading import quiet_transformers

    records = data.open()
    dtype = str(resolve_dtype(settings.dtype, resolve_device(settings.device))).removeprefix("torch.")
    wanted = (records.fingerprint, settings.model, embedder_fingerprint(settings.model), dtype)
    if Path(output).exists():
        try:
            known = read_embeddings(output).metadata
        except InputError:
            known = None  # of a killed or another run: made anew
        if known and (known.data_fingerprint, known.model, known.model_fingerprint, known.dtype) == wanted:
            say(f"{output} is up to date: {known.rows:,} embeddings")
            return known
    quiet_transformers()
    remove_leftovers(Path(output).parent)
    done = embed_records(
        records,
        output,
        settings.model,
        batch_size=settings.batch_size,
        device=settings.device,
        dtype=settings.dtype,
        progress=True,
    )
    say(
        f"embedded {done.rows:,} questions ({done.tokens:,} tokens; {done.truncated:,} cut to the model's length; "
        f"{done.skipped:,} rows without a question skipped)"
    )
    return done


def select(
    scores: str | Path,
    embeddings: str | Path | None,
    output: str | Path,
    settings: SelectSettings,
    source: str | None = None,
) -> dict[str, Any]:
    """Choose rows and write them as conversations to ``output``.

    Args:
        scores: a merged score folder.
        embeddings: the embeddings of the same data; cdas needs them, the other strategies take none.
        output: JSON lines.
        settings: what to choose.
        source: where the data lies now, if not where it was scored.

    Returns:
        The fields of ``codeact.selection.choose.Selection``, and ``clustered``: whether there were embeddings.
    """
    from codeact.embedding.vectors import read_embeddings
    from codeact.scoring.folder import ScoreFolder
    from codeact.selection.audit import write_audit
    from codeact.selection.choose import join_labels, plan_selection, write_selection
    from codeact.selection.clustering import cluster

    folder = ScoreFolder.open(scores)
    table = folder.read()
    records = open_scored_data(folder, source)
    labels = None
    if embeddings is not None:
        vectors = read_embeddings(embeddings)
        found = cluster(vectors.vectors, settings.clusters, settings.seed, settings.backend)
        labels = join_labels(
            table,
            vectors.rows,
            vectors.ids,
            found,
            table_fingerprint=folder.settings["data"]["fingerprint"],
            embeddings_fingerprint=vectors.metadata.data_fingerprint,
        )
    elif settings.strategy == "cdas":
        raise InputError(
            "strategy cdas chooses by cluster and needs --embeddings FILE.npy; make it with: codeact embed"
        )
    selection = plan_selection(
        table, labels, settings.ratio, settings.strategy, protocol=settings.protocol, seed=settings.seed
    )
    write_selection(output, records, table, selection, labels)
    write_audit(output, table, selection, labels)
    return {**dataclasses.asdict(selection), "clustered": labels is not None}


def open_scored_data(folder: Any, source: str | None = None) -> RecordSet:
    """Open the data that a score folder was made from, and check that it is still the same.

    Raises:
        InputError: it is gone (say where it lies with ``--data``) or has changed.
    """
    kept = {key: value for key, value in folder.settings["data"].items() if key in DataSettings.model_fields}
    data = DataSettings(**{**kept, **({"source": source} if source else {})})
    try:
        records = data.open()
    except InputError as error:
        raise InputError(f"{error}; if the data has moved, say where with --data") from None
    if records.fingerprint != folder.settings["data"]["fingerprint"]:
        raise InputError(
            f"{data.source} is not the data that was scored: fingerprint {records.fingerprint[:16]}, scored "
            f"{folder.settings['data']['fingerprint'][:16]}; say where that lies with --data, or score again"
        )
    return records


def score_lines(totals: dict[str, Any], folder: str | Path) -> list[tuple[str, str]]:
    """Lines of the summary table about the scores."""
    from codeact.scoring.folder import ScoreFolder

    table = ScoreFolder.open(folder).read()
    ok = totals["status"].get("ok", 0)
    refused = totals["rows"] - ok
    reasons = ", ".join(f"{count:,} {name}" for name, count in sorted(totals["refused"].items())) or "none"
    padding = _batch_padding(table, 16)
    lines = [
        ("rows in", f"{totals['rows']:,}"),
        ("tokens in", f"{totals['prompt_tokens']:,} question + {totals['answer_tokens']:,} answer"),
        ("rows scored", f"{ok:,} ({totals['truncated']:,} with a truncated answer)"),
        ("rows refused", f"{refused:,} ({reasons})"),
    ]
    if totals["seconds"] and totals["tokens"]:
        rate = totals["tokens"] / totals["seconds"]
        lines += [
            ("scoring", f"{totals['seconds']:.1f} s, {rate:,.0f} tokens/s, {ok / totals['seconds']:.2f} rows/s"),
            ("packs", f"{totals['packs']:,}, {totals['tokens'] / totals['capacity_tokens']:.1%} full on average"),
            ("padding", f"0 tokens (batches of 16 in input order would be {padding:.1%} padding)"),
        ]
    named = table.filter(pc.is_valid(table["reason"]))["reason"]
    lines += [("refused", reason.as_py()) for reason in named[:_NAMED_REFUSALS]]
    if len(named) > _NAMED_REFUSALS:
        more = f"and {len(named) - _NAMED_REFUSALS:,} more, each with its reason in {Path(folder) / 'scores.parquet'}"
        lines.append(("", more))
    return lines


def selection_lines(selection: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the summary table about the selection."""
    chosen = len(selection["positions"])
    lines = [
        (
            "budget",
            f"{selection['budget']:,} rows ({selection['strategy']}, ratio {selection['ratio']}, "
            f"protocol {selection['protocol']})",
        ),
        (
            "rows chosen",
            f"{chosen:,}"
            + (f" ({selection['shortfall']:,} short: no eligible row is left)" if selection["shortfall"] else ""),
        ),
        ("tokens chosen", f"{selection['tokens_chosen']:,} of {selection['tokens_in']:,}"),
    ]
    for item in selection["clusters"] if selection["clustered"] else ():
        text = f"{item['chosen']:,} chosen of {item['size']:,} ({item['eligible']:,} eligible)"
        lines.append((f"cluster {item['label']}", text))
    return lines


def print_table(lines: list[tuple[str, str]]) -> None:
    """Print the summary."""
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"  {name:<{width}}  {text}")


def _batch_padding(table: pa.Table, batch: int) -> float:
    """Share of padding tokens, were the scored rows padded in batches in input order."""
    ok = np.asarray(table["status"]) == "ok"
    lengths = (np.asarray(table["prompt_tokens"], dtype=np.int64) + np.asarray(table["answer_tokens"]))[ok]
    if not len(lengths):
        return 0.0
    firsts = np.arange(0, len(lengths), batch)
    sizes = np.diff(firsts, append=len(lengths))
    padded = int((np.maximum.reduceat(lengths, firsts) * sizes).sum())
    return 1 - int(lengths.sum()) / padded


def say(text: str) -> None:
    """Tell the person who waits; what a program reads goes to the standard output."""
    print(text, file=sys.stderr, flush=True)


class _RowBar:
    """A bar that counts rows and shows tokens per second."""

    def __init__(self, rows: int) -> None:
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._log_above = logging_redirect_tqdm()  # else a line that is logged would break into the bar
        form = "{percentage:3.0f}% |{bar:30}| {n:.0f}/{total} rows [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(total=rows, bar_format=form, disable=rows == 0)
        self._begin = time.perf_counter()
        self._rows, self._tokens = rows, 0

    def __enter__(self) -> Callable[[float, int], None]:
        self._log_above.__enter__()
        return self._step

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._log_above.__exit__(None, None, None)

    def _step(self, rows: float, tokens: int) -> None:
        self._tokens += tokens
        rate = self._tokens / (time.perf_counter() - self._begin)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(min(rows, self._rows - self._bar.n))  # shares add up to a hair more than all


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``I/N``, I from 0 to N - 1.

    Raises:
        InputError: it is something else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise InputError(f"--shard {text!r} must be I/N with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])
