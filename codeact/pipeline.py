"""The stages as they run from the command line or from one YAML file: records -> scores, embeddings -> selection."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from codeact.atomic import atomic_path, remove_leftovers
from codeact.errors import InputError
from codeact.records import BadRow, Columns, RecordSet, open_records

_NAMED_REFUSALS = 5


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(_Settings):
    """Which data, and which columns of it."""

    source: str
    question: str = "instruction"
    answer: str = "output"
    input: str | None = None
    conversation: str | None = None
    id: str | None = None
    split: str = "train"
    config_name: str | None = None

    def open(self) -> RecordSet:
        """Open the data set.

        Raises:
            InputError: it cannot be read, or lacks a column.
        """
        columns = Columns(**self.model_dump(include={field.name for field in dataclasses.fields(Columns)}))
        return open_records(self.source, columns, split=self.split, config_name=self.config_name)


class ScoreSettings(_Settings):
    """How rows are scored; see ``codeact.ifd.IfdScorer``."""

    model: str
    template: str = "qa"
    max_length: int = Field(default=2048, ge=2)
    dtype: str = "auto"
    device: str = "auto"
    tokens_per_pack: int | None = Field(default=None, ge=1)
    shard_size: int = Field(default=10_000, ge=1)
    protocol: Literal["exact", "seed"] = "exact"


class EmbedSettings(_Settings):
    """How questions are embedded; see ``codeact.embedding.embed``."""

    model: str = "sentence-transformers/all-mpnet-base-v2"
    batch_size: int = Field(default=64, ge=1)
    dtype: str = "auto"
    device: str = "auto"


class SelectSettings(_Settings):
    """What is chosen; see ``codeact.selection.plan_selection``."""

    ratio: float = Field(default=0.4, gt=0, le=1)
    clusters: int = Field(default=10, ge=1)
    strategy: Literal["cdas", "top_ifd", "random"] = "cdas"
    protocol: Literal["exact", "seed"] = "exact"
    seed: int = Field(default=42, ge=0)
    backend: Literal["auto", "sklearn", "cuml"] = "auto"


class RunSettings(_Settings):
    """One run: its data, its stages and the folder it writes to."""

    output: Path
    data: DataSettings
    score: ScoreSettings
    embed: EmbedSettings = EmbedSettings()
    select: SelectSettings = SelectSettings()
    train: dict[str, Any] | None = None  # flags of codeact train; data, model and output folder follow from the rest


def read_settings(path: str | Path) -> RunSettings:
    """Read a run's YAML file.

    Raises:
        InputError: it cannot be read, or a key is unknown (the closest valid one is named), missing or of a wrong type.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings; it needs output, data and score")
    try:
        return RunSettings.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {'; '.join(_complaint(item) for item in error.errors())}") from None


def _complaint(item: Any) -> str:
    *parents, key = [str(part) for part in item["loc"]]
    if item["type"] != "extra_forbidden":
        return f"{'.'.join([*parents, key])}: {item['msg'].lower()}"
    section: Any = RunSettings
    for parent in parents:
        section = section.model_fields[parent].annotation
    closest = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.0)[0]
    return f"{'.'.join([*parents, key])}: unknown key; did you mean {closest}?"


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
        output: the folder; see ``codeact.scores``.
        shard: ``(i, n)``: do shards i, i + n, i + 2 n ... only, and leave the merge to ``codeact merge``.
        overwrite: discard scores made with other settings.
        strict: stop at the first bad row instead of counting it.

    Returns:
        The totals of the merged table, or None where another process has shards to do.

    Raises:
        InputError: see the stages.
    """
    from codeact.devices import resolve_device, resolve_dtype
    from codeact.ifd import IfdScorer
    from codeact.models import load_causal_lm, model_fingerprint, quiet_transformers
    from codeact.scores import ScoreFolder

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
                "source": _absolute(data.source),
                "rows": len(records),
                "fingerprint": records.fingerprint,
            },
            "model": {"name": _absolute(settings.model), "fingerprint": model_fingerprint(settings.model, model)},
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
    _say(f"scoring {records.source}: {len(missing)} of {folder.shards} shards to do, {dtype} on {device}")
    with _RowBar(sum(folder.shard_rows(number) for number in missing)) as bar:
        folder.score(records, scorer, missing, bar)
    return folder.merge() if count == 1 else None


def embed(data: DataSettings, settings: EmbedSettings, output: str | Path) -> None:
    """Embed the questions of a data set into ``output`` (.npy); done already for this data and model: nothing to do."""
    from codeact.devices import resolve_device, resolve_dtype
    from codeact.embedding import embed_records, embedder_fingerprint, read_embeddings
    from codeact.models import quiet_transformers

    records = data.open()
    dtype = str(resolve_dtype(settings.dtype, resolve_device(settings.device))).removeprefix("torch.")
    wanted = (records.fingerprint, settings.model, embedder_fingerprint(settings.model), dtype)
    if Path(output).exists():
        try:
            known = read_embeddings(output).metadata
        except InputError:
            known = None  # of a killed or another run: made anew
        if known and (known.data_fingerprint, known.model, known.model_fingerprint, known.dtype) == wanted:
            _say(f"{output} is up to date: {known.rows:,} embeddings")
            return
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
    _say(
        f"embedded {done.rows:,} questions ({done.tokens:,} tokens; {done.truncated:,} cut to the model's length; "
        f"{done.skipped:,} rows without a question skipped)"
    )


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
        The fields of ``codeact.selection.Selection``, and ``clustered``: whether there were embeddings.
    """
    from codeact.clustering import cluster
    from codeact.embedding import read_embeddings
    from codeact.scores import ScoreFolder
    from codeact.selection import join_labels, plan_selection, write_selection

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


def run(settings: RunSettings, overwrite: bool = False) -> list[tuple[str, str]]:
    """Run every stage into ``settings.output``; what is done already is kept. Returns the summary table's lines.

    Args:
        settings: the run.
        overwrite: discard scores that were made there with other settings.
    """
    output = settings.output
    begin = time.perf_counter()
    totals = score(settings.data, settings.score, output / "scores", overwrite=overwrite)
    assert totals is not None
    embed(settings.data, settings.embed, output / "embeddings.npy")
    chosen = select(
        output / "scores", output / "embeddings.npy", output / "selected.jsonl", settings.select, settings.data.source
    )
    lines = [*score_lines(totals, output / "scores"), *selection_lines(chosen)]
    if settings.train is not None:
        lines += train(settings, output / "selected.jsonl")
    lines.append(("wall time", f"{time.perf_counter() - begin:.0f} s"))
    return lines


def train(settings: RunSettings, selected: Path) -> list[tuple[str, str]]:
    """Train on the chosen rows, by the flags in ``settings.train``. Returns lines of the summary table."""
    from codeact import training
    from codeact.training_arguments import parse_mapping

    flags = {
        "model_name_or_path": settings.score.model,
        "data_path": str(selected),
        "output_dir": str(settings.output / "model"),
    }
    result = training.run(parse_mapping({**flags, **(settings.train or {})}, "train"))
    lines = [("trained", f"{result.steps:,} steps, into {result.output}")]
    if result.held_out_loss_after is not None:
        before = "" if result.held_out_loss_before is None else f"{result.held_out_loss_before:.4f} before, "
        lines.append(("held-out loss", f"{before}{result.held_out_loss_after:.4f} after training"))
    return lines


def score_lines(totals: dict[str, Any], folder: str | Path) -> list[tuple[str, str]]:
    """Lines of the summary table about the scores."""
    from codeact.scores import ScoreFolder

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


def demo(output: Path, rows: int) -> None:
    """Run the whole flow on small embedded models and on functions of this Python's standard library."""
    from codeact import embedded
    from codeact.devices import cpu_has_bf16
    from codeact.eval_stages import demo_evaluate
    from codeact.harvest import write_harvest

    model, embedder = embedded.causal_lm(), embedded.sentence_embedder()
    data = output / "stdlib.jsonl"
    _say(str(write_harvest("stdlib", data, limit=rows)))
    settings = RunSettings(
        output=output,
        data=DataSettings(source=str(data), id="id"),
        score=ScoreSettings(model=str(model), shard_size=64),
        embed=EmbedSettings(model=str(embedder)),
        train={
            "lora": True,
            "bf16": cpu_has_bf16(),
            "max_seq_len": 1024,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-3,
            "eval_ratio": 0.2,
            "eval_on_start": True,
            "save_strategy": "no",
            "logging_steps": 5,
            "overwrite_output_dir": True,  # of an earlier demo of other rows
        },
    )
    with atomic_path(output / "run.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(json.loads(settings.model_dump_json()), sort_keys=False))
    lines = run(settings, overwrite=True)  # of an earlier demo of other rows
    lines += demo_evaluate(str(model), output, "before")
    lines += demo_evaluate(str(model), output, "after", adapter=str(output / "model"))
    print()
    print_table(lines)
    print(f"""
The files are in {output}:
  {data.name:<18}the rows, harvested from the standard library of this Python
  {"scores/":<18}IFD of every row: scores.parquet, and manifest.json with settings, versions and totals
  {"embeddings.npy":<18}question vectors; their row ids in embeddings.rows.parquet
  {"selected.jsonl":<18}the chosen rows as conversations
  {"model":<18}LoRA adapters trained on four fifths of them, and what that cost: cost.json, training.json
  {"run.yaml":<18}the settings of this run
  {"humaneval-*":<18}programs for a few easy tasks of HumanEval, and what became of them; of all 164 a model of
                    135M parameters solves few, about 6 %, and a minute of training need not add any

Next, with your own rows and model (or a name on the hub):
  codeact score DATA --model MODEL --question-column Q --answer-column A --output scores
  codeact embed DATA --question-column Q --answer-column A --output embeddings.npy
  codeact select --scores scores --embeddings embeddings.npy --output selected.jsonl
  codeact train --model_name_or_path MODEL --data_path selected.jsonl --output_dir model --lora True --bf16 True
or all four from one file: edit a copy of {output / "run.yaml"}, then: codeact run COPY""")


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


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _say(text: str) -> None:
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
