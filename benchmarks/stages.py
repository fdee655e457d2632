"""How the stages of the data flow grow with the rows: time and memory at 10^2 to 10^4 rows.

    python -m benchmarks.stages [--quick] [--json FILE]

Rows: functions of this Python's standard library, as `codeact harvest` finds them, as often as needed, each copy with
an id of its own. All stages run on the same file; they are timed in turns, in random order. Scoring 10^4 rows with a
real model would take an hour on two cores, so here it is a model with random weights (2 layers of 64, 4,096 words,
sequences cut at 256 tokens): what is seen is the growth, and the cost of everything round the model. benchmarks.scoring
has the real one. Embedding runs on all-MiniLM-L6-v2, to 300 rows.

Peers and floors are one here: what any program must do for the stage with the libraries that it stands on.
- read: ``json.loads`` of every line.
- tokenize: the tokenizer itself (Rust) on all questions and answers at once.
- embed: ``SentenceTransformer.encode`` of all questions.
- merge: reading ten Parquet shards and writing one file of them with pyarrow.
- score and cluster have theirs in benchmarks.scoring and benchmarks.clustering, select in benchmarks.primitives.
Before the clock starts, records, tokens, vectors and tables are compared with what the peer gives.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import codeact
from benchmarks.measure import (
    Line,
    Report,
    Timing,
    added_memory,
    digits,
    growth_exponent,
    interleave,
    main,
    mebibytes,
    table,
)
from codeact.data.records import Record
from codeact.run import demo_models

SIZES = (100, 300, 1_000, 10_000)
QUICK_SIZES = (50, 100)
# Stages whose time a row makes 10^4 of them too long.
MOST = {"embed": 300}
# Rows at which memory is measured, in a process each; benchmarks.clustering has that of clustering.
MEMORY_ROWS = {"read": 10_000, "tokenize": 10_000, "score": 1_000, "embed": 300}


def write_rows(folder: Path, count: int) -> Path:
    """A JSONL file of so many rows."""
    from codeact.data.harvest import write_harvest

    source = folder / "stdlib.jsonl"
    if not source.exists():
        write_harvest("stdlib", source)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    output = folder / f"rows-{count}.jsonl"
    with output.open("w") as file:
        for number in range(count):
            file.write(json.dumps({**rows[number * 7 % len(rows)], "id": f"row-{number}"}) + "\n")
    return output


class Stages:
    """Every stage on the rows of one file, with what it needs made before."""

    def __init__(self, folder: Path, count: int) -> None:
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        from codeact.scoring.folder import ScoreFolder
        from codeact.scoring.ifd import IfdScorer
        from codeact.text.templates import PromptBuilder

        self.count = count
        self.file = write_rows(folder, count)
        self.records = codeact.open_records(self.file, codeact.Columns(id="id"))
        self.rows = [row for row in self.records if isinstance(row, Record)]
        self.tokenizer = AutoTokenizer.from_pretrained(demo_models.causal_lm())
        self.prompts = PromptBuilder(self.tokenizer, "qa")
        few = self.tokenizer.train_new_from_iterator([row.answer for row in self.rows[:500]], 4096)
        torch.manual_seed(0)
        small = LlamaConfig(
            vocab_size=len(few),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
        )
        self.scorer = IfdScorer(LlamaForCausalLM(small).eval(), few, max_length=256)
        self.folder = ScoreFolder(folder / f"scores-{count}", {"data": {"rows": count}, "shard_size": -(-count // 10)})
        self.folder.claim()
        for shard in self.folder.missing():
            self.folder.score(self.records, self.scorer, shard)
        self.folder.merge()
        self.scores = self.folder.read()
        generator = np.random.default_rng(0)
        vectors = generator.normal(size=(count, 384))
        self.vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        self.labels = generator.integers(0, 10, count).astype(np.int32)

    @functools.cached_property
    def embedder(self) -> Any:
        from codeact.embedding.vectors import load_embedder

        return load_embedder(str(demo_models.sentence_embedder()), device="cpu")

    def read(self) -> list[Any]:
        return list(codeact.open_records(self.file, codeact.Columns(id="id")))

    def read_floor(self) -> list[Any]:
        with self.file.open("rb") as file:
            return [json.loads(line) for line in file]

    def tokenize(self) -> list[Any]:
        from codeact.scoring.tokens import tokenize

        return tokenize(self.rows, self.tokenizer, self.prompts, 2048)

    def tokenize_floor(self) -> Any:
        texts = [row.question for row in self.rows] + [row.answer for row in self.rows]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def score(self) -> Any:
        return self.scorer.score(self.rows)[0]

    def embed(self) -> Any:
        return codeact.embed([row.question for row in self.rows], model=self.embedder, batch_size=64)

    def embed_floor(self) -> Any:
        return self.embedder.encode([row.question for row in self.rows], batch_size=64, show_progress_bar=False)

    def cluster(self) -> Any:
        return codeact.cluster(self.vectors, k=10)

    def select(self) -> Any:
        return codeact.select(self.scores, self.labels, ratio=0.4)

    def merge(self) -> Any:
        return self.folder.merge()

    def merge_floor(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        shards = pa.concat_tables([pq.read_table(self.folder.path(shard)) for shard in range(self.folder.shards)])
        pq.write_table(shards, self.folder.folder / "plain.parquet")
        return shards

    def calls(self) -> dict[str, Callable[[], Any]]:
        """By name; "... floor" is the peer of the stage before it."""
        names = (
            "read, read floor, tokenize, tokenize floor, score, merge, merge floor, embed, embed floor, cluster, select"
        )
        return {
            name: getattr(self, name.replace(" ", "_"))
            for name in names.split(", ")
            if self.count <= MOST.get(name.split()[0], self.count)
        }

    def check(self) -> None:
        """Nothing is timed that gives something else than its peer."""
        plain = self.read_floor()
        assert [row.id for row in self.rows] == [row["id"] for row in plain]
        ids = self.tokenize_floor()
        for item, answer in zip(self.tokenize(), ids[self.count :], strict=True):
            assert item.status != "ok" or item.answer_tokens == len(answer)
        assert self.merge_floor().replace_schema_metadata(None).equals(self.scores)
        if self.count <= MOST["embed"]:
            ours, theirs = self.embed(), self.embed_floor()
            # In batches of their own order; bfloat16 where the CPU has it.
            assert float((ours * theirs / np.linalg.norm(theirs, axis=1, keepdims=True)).sum(1).min()) > 0.99


def prepare(stage: str, folder: str, count: int) -> Callable[[], Any]:
    """For ``added_memory``."""
    Stages(Path(folder), 50).calls()[stage]()
    return Stages(Path(folder), count).calls()[stage]


def run(options: argparse.Namespace) -> Report:
    sizes = QUICK_SIZES if options.quick else SIZES
    times: dict[tuple[str, int], Timing] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in sizes:
            stages = Stages(Path(folder), count)
            stages.check()
            slow = (
                {"score": 1, "tokenize": 2, "tokenize floor": 2} if count == 10_000 else {"embed": 2, "embed floor": 2}
            )
            found = interleave(stages.calls(), 3, slow, warm=count == sizes[0])
            times |= {(name, count): timing for name, timing in found.items()}
        names = [name for name in dict.fromkeys(name for name, _ in times) if not name.endswith("floor")]
        peaks: dict[tuple[str, int], int | None] = {}
        if not options.quick:
            peaks = {(name, count): added_memory(prepare, name, folder, count) for name, count in MEMORY_ROWS.items()}
    rows = []
    lines = []
    exponents = {}
    for name in names:
        known = [count for count in sizes if (name, count) in times]
        exponents[name] = growth_exponent(known, [times[name, count].median for count in known])
        for count in known:
            timing, floor = times[name, count], times.get((f"{name} floor", count))
            rows.append(
                (
                    name,
                    f"{count:,}",
                    timing,
                    digits(count / timing.median),
                    "" if floor is None else f"{floor.median / timing.median:.0%}",
                    mebibytes(peaks.get((name, count))),
                    f"{exponents[name]:.2f}" if count == known[-1] else "",
                )
            )
        last = known[-1]
        if (floor := times.get((f"{name} floor", last))) is not None:
            peer = {
                "read": "json.loads",
                "tokenize": "the bare tokenizer",
                "embed": "sentence-transformers",
                "merge": "pyarrow",
            }[name]
            lines.append(
                Line(
                    what=f"{name} {last:,} rows",
                    ours=times[name, last],
                    peer=f"{peer}, the floor",
                    theirs=floor,
                    floor=floor.median,
                    memory=peaks.get((name, last)),
                )
            )
    found_table = table(
        "stage |> rows |> median (least to most) |> rows/s |> share of the floor |> added memory |> "
        "time grows as rows to the power of",
        rows,
    )
    records = [{"stage": name, "rows": count, "seconds": t.seconds} for (name, count), t in times.items()]
    peak_records = [{"stage": name, "rows": count, "bytes": peak} for (name, count), peak in peaks.items()]
    return Report(
        sections=["## How the data stages grow", found_table],
        lines=lines,
        figures={"records": records, "added_bytes": peak_records, "growth_exponents": exponents},
    )


if __name__ == "__main__":
    main(run, __doc__)
