"""The ledger of a run's folder, counted anew from the files that the stages left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codeact.base.errors import InputError
from codeact.base.ledger import Change, Entry, Ledger
from codeact.scoring.folder import ScoreFolder
from codeact.selection.audit import audit_path


def ledger_of(folder: Path) -> Ledger:
    """Count what every stage took in, lost and gave out; stages that are not done are left out."""
    return Ledger(entries=tuple(_entries(folder)))


def _entries(folder: Path) -> Iterator[Entry]:
    if not (folder / "scores" / "scores.parquet").exists():
        return
    scores = ScoreFolder.open(folder / "scores")
    table = scores.read()
    yield from _score(scores.rows, table)
    if (folder / "embeddings.npy").exists():
        yield _embed(folder / "embeddings.npy", table)
    if (folder / "selected.jsonl").exists():
        yield _select(folder / "selected.jsonl", table)
    if (folder / "model" / "training.json").exists():
        yield from _train(folder, table)
    for part in ("before", "after"):
        yield from _programs(folder, part)


def _score(rows: int, table: pa.Table) -> Iterator[Entry]:
    """Rows of the data set -> records -> scored ones. Tokens are question + answer, by the model's tokenizer."""
    record, scored, tokens = _records(table), _scored(table), _tokens(table)
    yield Entry(
        stage="read",
        what="rows",
        after=None,
        rows_in=rows,
        rows_out=int(record.sum()),
        lost=_refused(table, ~record, None),
    )
    yield Entry(
        stage="score",
        what="rows",
        after="read",
        rows_in=int(record.sum()),
        rows_out=int(scored.sum()),
        tokens_in=int(tokens.sum()),
        tokens_out=int(tokens[scored].sum()),
        lost=_refused(table, record & (np.asarray(table["status"]) != "ok"), tokens),
    )


def _embed(path: Path, table: pa.Table) -> Entry:
    from codeact.embedding.vectors import read_embeddings

    return Entry(
        stage="embed",
        what="questions",
        after="read",
        rows_in=int(_records(table).sum()),
        rows_out=len(read_embeddings(path).vectors),
    )


def _select(selected: Path, table: pa.Table) -> Entry:
    """Scored rows -> chosen ones: the losses by the audit, what is left by the file of chosen rows itself."""
    tokens, scored = _tokens(table), _scored(table)
    reasons = pq.read_table(audit_path(selected), columns=["reason"])["reason"]
    lost = {}
    for reason in sorted(set(pc.unique(reasons).to_pylist()) - {None}):
        rows = np.asarray(pc.fill_null(pc.equal(reasons, reason), False)) & scored
        if rows.any():
            lost[reason] = (int(rows.sum()), int(tokens[rows].sum()))
    ids, lines = _ids(selected)
    chosen = np.asarray(pc.is_in(table["id"].cast(pa.large_string()), value_set=ids))
    return Entry(
        stage="select",
        what="rows",
        after="score",
        rows_in=int(scored.sum()),
        rows_out=lines,
        tokens_in=int(tokens[scored].sum()),
        tokens_out=int(tokens[chosen].sum()),
        lost=_changes(lost),
    )


def _train(folder: Path, table: pa.Table) -> Iterator[Entry]:
    """Chosen rows -> samples. Writing them in the model's format adds tokens; what is cut or held out is lost."""
    known = json.loads((folder / "model" / "training.json").read_text(encoding="utf-8"))
    counts = known["conversations"]
    ids, _ = _ids(folder / "selected.jsonl")
    before = int(_tokens(table)[np.asarray(pc.is_in(table["id"].cast(pa.large_string()), value_set=ids))].sum())
    formatted = counts["tokens"] + counts["cut_tokens"] - before
    lost: dict[str, tuple[int, int | None]] = {
        reason: (rows, None) for reason, rows in sorted(counts["refused"].items())
    }
    if not known["held_out_of_others"]:
        lost["held out to measure the loss"] = (known["held_out"], known["held_out_tokens"])
    lost[f"cut from {counts['truncated']:,} samples to fit"] = (0, counts["cut_tokens"])
    if formatted < 0:
        lost["the chat's format"] = (0, -formatted)
    yield Entry(
        stage="train",
        what="samples",
        after="select",
        rows_in=counts["rows"],
        rows_out=known["trained_on"],
        tokens_in=before,
        tokens_out=known["trained_on_tokens"],
        lost=_changes(lost),
        added=_changes({"the chat's format": (0, formatted)}) if formatted > 0 else (),
    )


def _programs(folder: Path, part: str) -> Iterator[Entry]:
    """Tasks -> programs -> programs that pass."""
    for samples in sorted((folder / "programs" / part).glob("*.jsonl")):
        settings = json.loads(samples.with_name(f"{samples.name}.settings.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        tasks = len({row["task_id"] for row in rows})
        yield Entry(
            stage=f"generate.{part}",
            what="programs",
            after=None,
            rows_in=tasks * settings["samples"],
            rows_out=len(rows),
        )
        path = folder / "evaluation" / part / f"{samples.stem}-sanitized_eval.json"
        if not path.exists():
            continue
        judged = json.loads(path.read_text(encoding="utf-8"))["samples"].values()
        outcomes = Counter(item["plus"] or item["base"] for verdicts in judged for item in verdicts)
        lost: dict[str, tuple[int, int | None]] = {
            name: (count, None) for name, count in sorted(outcomes.items()) if name != "pass"
        }
        yield Entry(
            stage=f"evaluate.{part}",
            what="programs",
            after=f"generate.{part}",
            rows_in=sum(len(verdicts) for verdicts in judged),
            rows_out=outcomes["pass"],
            lost=_changes(lost),
        )


def _changes(found: dict[str, Any]) -> tuple[Change, ...]:
    return tuple(
        Change(reason=name, rows=rows, tokens=tokens) for name, (rows, tokens) in found.items() if rows or tokens
    )


def _tokens(table: pa.Table) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(table["prompt_tokens"], np.int64) + np.asarray(table["answer_tokens"], np.int64)


def _scored(table: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.asarray(pc.is_valid(table["ifd"]))


def _records(table: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows held a record: of the others reading made no tokens, and a template refuses records."""
    refused = pc.fill_null(pc.starts_with(table["reason"], "template_refused"), False)
    return np.asarray((_tokens(table) > 0) | np.asarray(refused))


def _refused(table: pa.Table, rows: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any] | None) -> tuple[Change, ...]:
    """The losses among ``rows``, by the code that a reason begins with."""
    codes = pc.list_element(pc.split_pattern(table["reason"].filter(pa.array(rows)), ":", max_splits=1), 0)
    lost: dict[str, tuple[int, int | None]] = {}
    for code in sorted(pc.unique(codes).to_pylist()):
        these = np.asarray(pc.equal(codes, code))
        lost[code] = (int(these.sum()), None if tokens is None else int(tokens[rows][these].sum()))
    return _changes(lost)


def _ids(selected: Path) -> tuple[pa.Array, int]:
    """The ids in a file of chosen rows, and its lines."""
    ids = []
    with selected.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                ids.append(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{selected}, line {number}: no chosen row ({error}); select again") from None
    return pa.array(ids, pa.large_string()), len(ids)
