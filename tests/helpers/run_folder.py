"""A run folder made without a model, in milliseconds: random scores, and rows that want to be more than text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from codeact.data.settings import DataSettings
from codeact.embedding.files import EmbeddingMetadata, write_embeddings
from codeact.padding.stats import PackReport, pack_stats
from codeact.scoring.table import SCHEMA

HOSTILE = (
    "<script>document.title = 'owned'; throw new Error('script ran')</script>",
    "</style></pre></code></details></main><img src=x onerror=alert(1)><iframe src=//example.com></iframe>",
    '"><svg onload=\'alert(1)\'><a href="javascript:alert(1)">x</a>&lt;b&gt; &amp; {{ 7 * 7 }} {% raw %} ${1}',
    "\n\nstarts with empty lines\x00\x07\x1b[31m and controls\x9b, half a pair \ud83d, then 👩‍👩‍👧‍👦 🇪🇺 é",
    "مرحبا بالعالم שלום \u202e txt.exe \u2066 \u200f right to left",
    "x" * 12_000,
    "very long\n" * 3_000,
    "",
    "]]><!-- --> <?php ?> <![CDATA[",
)
"""What no page may take for anything but text."""
TOPICS = ("Parse a date.", "Sort a list.", "Open a socket.")


def make_run(folder: Path, rows: int = 60, clusters: int = 5, seed: int = 0) -> Path:
    """Write a whole run, and its data beside it; hostile texts are among the chosen rows shown, and all the others."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    refused = np.arange(rows) % 17 == 16
    uncond = rng.gamma(9, 0.25, rows)
    cond = uncond + np.log(rng.beta(4, 2, rows) * 1.25)
    ifd = np.where(refused, np.nan, np.exp(cond - uncond))
    prompt = rng.integers(5, 60, rows).astype(np.int32)
    answer = np.where(refused, 0, rng.lognormal(4.6, 0.8, rows).astype(np.int32) + 2).astype(np.int32)
    write_scores(folder / "scores" / "scores.parquet", refused, ifd, cond, uncond, prompt, answer)
    _write_data(folder, refused)
    cluster = np.where(refused, -1, rng.integers(0, clusters, rows)).astype(np.int32)
    vectors = rng.normal(size=(clusters, 16))[cluster] + 0.4 * rng.normal(size=(rows, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    kept = np.flatnonzero(~refused)
    metadata = EmbeddingMetadata(model="m", data_fingerprint="f", rows=len(kept), skipped=0, truncated=0, tokens=0)
    write_embeddings(folder / "embeddings.npy", vectors[kept], [str(i) for i in kept], kept, metadata)
    eligible = np.flatnonzero(~refused & (ifd < 1))
    chosen = np.zeros(rows, np.bool_)
    chosen[eligible[np.argsort(-ifd[eligible])[: rows * 2 // 5]]] = True
    reasons = np.where(refused, "empty_answer", np.where(ifd >= 1, "ifd_at_least_1", "below_budget"))
    write_selected(folder, chosen, cluster, reasons)
    _write_conversations(folder / "selected.jsonl", chosen, ifd, cluster)
    tokens = (prompt + answer)[chosen].astype(np.int64).clip(max=1024)
    _write_packs(folder, tokens)
    _write_training(folder / "model", tokens)
    for when, solved in (("before", 3), ("after", 5)):
        _write_evaluation(folder / "evaluation" / when, solved)
    _write_records(folder, refused, chosen, prompt + answer)
    return folder


def write_scores(path: Path, refused: Any, ifd: Any, cond: Any, uncond: Any, prompt: Any, answer: Any) -> None:
    """The score table of these columns, all (rows,); ids are row numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = len(ifd)
    columns = {
        "id": pa.array(np.arange(rows)).cast(pa.string()),
        "row": np.arange(rows),
        "status": pa.DictionaryArray.from_arrays(refused.astype(np.int32), ["ok", "empty_answer"]).cast(pa.string()),
        "reason": pa.nulls(rows, pa.string()),
        "truncated": np.zeros(rows, np.bool_),
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "scored_tokens": answer,
        "uncond_scored_tokens": answer,
        "cond_nll_sum": pa.array(cond * answer, mask=refused),
        "uncond_nll_sum": pa.array(uncond * answer, mask=refused),
        "ifd": pa.array(ifd, mask=refused),
    }
    pq.write_table(pa.table(columns, schema=SCHEMA), path)


def write_selected(folder: Path, chosen: Any, cluster: Any, reasons: Any) -> None:
    """``selected.rows.parquet`` of these columns, all (rows,)."""
    rows = len(chosen)
    columns = {
        "row": np.arange(rows),
        "id": pa.array(np.arange(rows)).cast(pa.string()),
        "cluster": pa.array(cluster, mask=cluster < 0),
        "chosen": chosen,
        "reason": pa.array(reasons, mask=chosen),
    }
    pq.write_table(pa.table(columns), folder / "selected.rows.parquet")


def write_json(path: Path, content: Any) -> None:
    """Write JSON; lone surrogates as their escapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _write_data(folder: Path, refused: Any) -> None:
    data = folder.with_name(f"{folder.name}-rows.jsonl")
    with data.open("w") as file:
        for row, empty in enumerate(refused.tolist()):
            question = f"{TOPICS[row % len(TOPICS)]} {HOSTILE[row % len(HOSTILE)] or 'nothing'}"
            answer = "" if empty else f"{HOSTILE[(row + 1) % len(HOSTILE)]} of row {row}"
            line = json.dumps({"question": question, "answer": answer})
            file.write(line.replace("\\ud83d,", ",") + "\n")  # no row with half a pair is ever scored
    settings = DataSettings(source=str(data.resolve()))
    known = {**settings.model_dump(), "rows": len(refused), "fingerprint": settings.open().fingerprint}
    manifest = {"hash": "h", "settings": {"data": known, "shard_size": 10_000}}
    write_json(folder / "scores" / "manifest.json", manifest)


def _write_conversations(path: Path, chosen: Any, ifd: Any, cluster: Any) -> None:
    rows = np.flatnonzero(chosen)
    order = rows[np.argsort(ifd[rows])]
    shown = [*order[-3:], *order[:3]]  # what the report shows
    texts = {int(row): HOSTILE[2 * at % len(HOSTILE)] for at, row in enumerate(shown)}
    answers = {int(row): HOSTILE[(2 * at + 1) % len(HOSTILE)] for at, row in enumerate(shown)}
    with path.open("w") as file:
        for row in rows.tolist():
            turns = [("user", texts.get(row, "Write f.")), ("assistant", answers.get(row, "def f():\n    return 1"))]
            line = {
                "id": f"<b>{row}</b>",
                "messages": [{"role": role, "content": content} for role, content in turns],
                "ifd": float(ifd[row]),
                "cluster": int(cluster[row]),
                "extra": {},
            }
            file.write(json.dumps(line) + "\n")


def _write_packs(folder: Path, tokens: Any) -> None:
    strategies = pack_stats(tokens, tokens // 2, 1024, batch_size=16)
    report = PackReport(
        data="d", tokenizer="t", model_type="chat", capacity=1024, batch_size=16, seed=42, rows=len(tokens),
        truncated=0, refused={}, shape=None, lengths=tokens, strategies=strategies,
    )  # fmt: skip
    report.write_json(folder / "pack_stats.json")
    np.save(folder / "pack_lengths.npy", tokens)


def _write_training(folder: Path, tokens: Any) -> None:
    losses = [{"step": step, "loss": 2 - step / 20, "learning_rate": 1e-4} for step in range(1, 11)]
    held_out = [{"step": 0, "eval_loss": 1.9}, {"step": 10, "eval_loss": 1.5}, {"step": 5, "loss": float("nan")}]
    settings = {"pad_mode": "dynamic_pack", "pack_scope": "epoch"}
    write_json(
        folder / "training.json", {"settings": settings, "held_out": 6, "result": {}, "log": [*losses, *held_out]}
    )
    cost = {
        "tokens": int(tokens.sum()), "padding": 0, "supervised": int(tokens.sum()) // 2, "samples": len(tokens),
        "devices": 1, "seconds": 12.5, "peak_resident_bytes": 3 * 2**30, "peak_cuda_allocated_bytes": None,
        "model_utilisation": 0.21,
    }  # fmt: skip
    write_json(folder / "cost.json", cost)


def _write_evaluation(folder: Path, solved: int) -> None:
    verdicts = ["pass"] * solved + ["wrong", "exception", "time"] * 3
    verdicts = verdicts[:8]
    outcomes = {kind: verdicts.count(kind) for kind in set(verdicts)}
    share = {"pass@1": solved / 8}
    content = {
        "dataset": "humaneval",
        "isolated": True,
        "tasks": 8,
        "pass_at": {"base": share, "plus": share},
        "outcomes": dict(sorted(outcomes.items())),
        "samples": {
            f"HumanEval/{n}": [
                {"base": v, "plus": v, "message": f"<b>{v}", "input": f"f({n})", "solution": f"# {v}\n{HOSTILE[n]}"}
            ]
            for n, v in enumerate(verdicts)
        },
    }
    write_json(folder / "humaneval-sanitized_eval.json", content)


def _write_records(folder: Path, refused: Any, chosen: Any, tokens: Any) -> None:
    def stage(name: str, follows: str | None, before: Any, after: Any, reason: str) -> dict[str, Any]:
        lost = before & ~after
        flows = [{"reason": reason, "rows": int(lost.sum()), "tokens": int(tokens[lost].sum())}]
        return {
            "stage": name, "what": "rows", "after": follows, "rows_in": int(before.sum()),
            "tokens_in": int(tokens[before].sum()),
            "rows_out": int(after.sum()), "tokens_out": int(tokens[after].sum()), "lost": flows, "added": [],
        }  # fmt: skip

    everything = np.ones(len(chosen), np.bool_)
    stages = [
        stage("score", None, everything, ~refused, "empty_answer"),
        stage("select", "score", ~refused, chosen, "below_budget"),
    ]
    write_json(folder / "ledger.json", {"stages": stages})
    record = {"started": "2026-01-02T03:04:05+00:00", "seconds": 3723.4, "peak_memory": 2**31, "lines": [["a", "<i>b"]]}
    content = {
        "format": 1, "codeact": "0.1.0", "commit": None, "settings": {"data": {"source": "<img src=x>", "split": None}},
        "versions": {"python": "3.11"}, "machine": {"cpu": "A & B", "memory": 2**34, "gpus": []},
        "stages": {name: {"key": "k", **record} for name in ("score", "embed", "select", "train", "report")},
    }  # fmt: skip
    write_json(folder / "run.json", content)
