"""The steps of a run: what decides the result of each, what it writes, and the call that does it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from codeact import __version__
from codeact.base.errors import InputError
from codeact.base.files import atomic_path
from codeact.run import stages as data_stages
from codeact.run.folder import Lines, RunFolder, Step
from codeact.run.settings import EvaluateSettings, GenerateSettings, RunSettings, Settings

_PLACES = {"device", "batch_size", "parallel", "shard_size", "tokens_per_pack"}
"""Settings that say where and how fast, not what."""


def steps_of(settings: RunSettings, folder: RunFolder) -> list[Step]:
    """The steps that the settings have a section for, in order."""
    return list(_steps(settings, folder))


def _steps(settings: RunSettings, folder: RunFolder) -> Iterator[Step]:
    yield Step(
        name="score",
        stage="score",
        inputs=lambda: {
            "data": _data_fingerprint(settings),
            "model": _model_identity(settings.score.model),
            **_decisive(settings.score, "model"),
        },
        outputs=("scores",),
        products=("scores/scores.parquet",),
        work=partial(_score, settings),
    )
    yield Step(
        name="embed",
        stage="embed",
        inputs=lambda: {
            "data": _data_fingerprint(settings),
            "model": _model_identity(settings.embed.model),
            **_decisive(settings.embed, "model"),
        },
        outputs=("embeddings.npy", "embeddings.rows.parquet"),
        products=("embeddings.npy",),
        work=partial(_embed, settings),
    )
    yield Step(
        name="select",
        stage="select",
        inputs=lambda: {**folder.digest("score"), **folder.digest("embed"), **_decisive(settings.select)},
        outputs=("selected.jsonl", "selected.rows.parquet"),
        products=("selected.jsonl",),
        work=partial(_select, settings),
    )
    if settings.train is not None:
        yield Step(
            name="train",
            stage="train",
            inputs=lambda: {
                **folder.digest("select"),
                "model": _model_identity(settings.score.model),
                "flags": settings.train,
            },
            outputs=("model", "pack_stats.json", "pack_lengths.npy"),
            products=("model/*.safetensors", "model/*config.json"),
            work=partial(_train, settings),
        )
    if settings.generate is not None:
        yield from _programs(settings, settings.generate, folder)
    yield Step(
        name="report",
        stage="report",
        inputs=lambda: {**folder.keys(), "codeact": __version__},
        outputs=("report.html",),
        products=(),
        work=partial(_report, settings),
    )


def _programs(settings: RunSettings, wanted: GenerateSettings, folder: RunFolder) -> Iterator[Step]:
    parts = ("before", "after") if wanted.before else ("after",)
    for part in parts:
        yield Step(
            name=f"generate.{part}",
            stage="generate",
            inputs=partial(_generate_inputs, settings, wanted, folder, part),
            outputs=(f"programs/{part}",),
            products=(f"programs/{part}/{wanted.dataset}.jsonl",),
            work=partial(_generate, settings, wanted, part),
        )
    if settings.evaluate is None:
        return
    for part in parts:
        yield Step(
            name=f"evaluate.{part}",
            stage="evaluate",
            inputs=partial(_evaluate_inputs, settings.evaluate, wanted, folder, part),
            outputs=(f"evaluation/{part}",),
            products=(f"evaluation/{part}/{wanted.dataset}-sanitized_eval.json",),
            work=partial(_evaluate, settings, settings.evaluate, wanted, part),
        )


# ---------------------------------------------------------------------------------------------------- what decides


def _decisive(section: Settings, *without: str) -> dict[str, Any]:
    content = section.model_dump(mode="json")
    return {name: value for name, value in content.items() if name not in _PLACES and name not in without}


def _generate_inputs(settings: RunSettings, wanted: GenerateSettings, folder: RunFolder, part: str) -> dict[str, Any]:
    return {
        "problems": problems_of(wanted).fingerprint,
        "model": _model_identity(settings.score.model),
        **(folder.digest("train") if part == "after" else {}),
        **_decisive(wanted, "data", "before"),
    }


def _evaluate_inputs(
    judged: EvaluateSettings, wanted: GenerateSettings, folder: RunFolder, part: str
) -> dict[str, Any]:
    return {
        **folder.digest(f"generate.{part}"),
        "problems": problems_of(wanted).fingerprint,
        **_decisive(judged),
    }


def _data_fingerprint(settings: RunSettings) -> str:
    return settings.data.open().fingerprint


@cache
def _model_identity(name: str) -> str:
    from codeact.models.loading import model_identity

    return model_identity(name)


@cache
def problems_of(wanted: GenerateSettings) -> Any:
    """The problems that programs are written for."""
    from codeact.evaluation.problems import load_problems

    return load_problems(wanted.dataset, wanted.data, tasks=wanted.tasks)


# ------------------------------------------------------------------------------------------------------------ the work


def _score(settings: RunSettings) -> Lines:
    output = settings.output / "scores"
    if settings.processes == 1:
        totals = data_stages.score(settings.data, settings.score, output)
    else:
        totals = data_stages.score_in_processes(settings.data, settings.score, output, settings.processes)
    assert totals is not None
    return data_stages.score_lines(totals, output)


def _embed(settings: RunSettings) -> Lines:
    done = data_stages.embed(settings.data, settings.embed, settings.output / "embeddings.npy")
    return [
        ("embedded", f"{done.rows:,} questions, {done.tokens:,} tokens"),
        ("cut", f"{done.truncated:,} to the embedder's length"),
    ]


def _select(settings: RunSettings) -> Lines:
    at = settings.output
    files = (at / "scores", at / "embeddings.npy", at / "selected.jsonl")
    return data_stages.selection_lines(data_stages.select(*files, settings.select, settings.data.source))


def _train(settings: RunSettings) -> Lines:
    """Train by the flags in ``settings.train``; in several processes under torchrun."""
    at, selected = settings.output, settings.output / "selected.jsonl"
    flags = {
        **(settings.train or {}),
        "model_name_or_path": settings.score.model,
        "data_path": str(selected),
        "output_dir": str(at / "model"),
    }
    _pack_stats(settings, selected)
    if settings.processes == 1:
        from codeact.training import stage as training
        from codeact.training.flags import parse_mapping

        training.run(parse_mapping(flags, "train"))
    else:
        path = at / "train.yaml"
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(flags), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(settings.processes), "-m", "codeact", "train", str(path)]
        code = subprocess.run(command, check=False).returncode
        if code:
            raise InputError(f"training in {settings.processes} processes ended with exit code {code}; see above")
    result = json.loads((at / "model" / "training.json").read_text(encoding="utf-8"))["result"]
    lines = [("trained", f"{result['steps']:,} steps, into {result['output']}")]
    before, after = result["held_out_loss_before"], result["held_out_loss_after"]
    if after is not None:
        lines.append(("held-out loss", ("" if before is None else f"{before:.4f} before, ") + f"{after:.4f} after"))
    return lines


def _pack_stats(settings: RunSettings, selected: Path) -> None:
    """What every way of batching the chosen rows would cost, for the report."""
    from codeact.padding.stats import stats_for_data
    from codeact.training.flags import DataArguments
    from codeact.training.trainer import PackOptions

    flags = settings.train or {}
    stats = stats_for_data(
        selected,
        settings.score.model,
        flags.get("max_seq_len", PackOptions().max_seq_len),
        model_type=flags.get("model_type", DataArguments().model_type),
        on_overflow=flags.get("on_overflow", DataArguments().on_overflow),
    )
    stats.write_json(settings.output / "pack_stats.json")
    with atomic_path(settings.output / "pack_lengths.npy") as temporary, temporary.open("wb") as file:
        np.save(file, stats.lengths)


def _generate(settings: RunSettings, wanted: GenerateSettings, part: str) -> Lines:
    from codeact.evaluation import stage as eval_stages
    from codeact.evaluation.generate import GenerationSettings

    model, adapter = settings.score.model, None
    if part == "after":
        trained = settings.output / "model"
        if (trained / "adapter_config.json").exists():
            adapter = str(trained)
        else:
            model = str(trained)
    text = eval_stages.generate_samples(
        wanted.dataset,
        model,
        settings.output / "programs" / part / f"{wanted.dataset}.jsonl",
        GenerationSettings(
            template=wanted.template if wanted.instruct else None,
            max_new_tokens=wanted.max_new_tokens,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            samples=wanted.samples,
            seed=wanted.seed,
        ),
        adapter=adapter,
        data=wanted.data,
        tasks=wanted.tasks,
        backend=wanted.backend,
        dtype=wanted.dtype,
        device=wanted.device,
        batch_size=wanted.batch_size,
    )
    return [(f"programs {part}", text)]


def _evaluate(settings: RunSettings, judged: EvaluateSettings, wanted: GenerateSettings, part: str) -> Lines:
    from codeact.evaluation import stage as eval_stages

    samples = settings.output / "programs" / part / f"{wanted.dataset}.jsonl"
    cleaned = settings.output / "evaluation" / part / f"{wanted.dataset}-sanitized.jsonl"
    eval_stages.sanitize_file(samples, cleaned, wanted.data)
    report, _ = eval_stages.evaluate_file(
        wanted.dataset,
        cleaned,
        data=wanted.data,
        tasks=wanted.tasks,
        parallel=judged.parallel,
        base_only=judged.base_only,
    )
    kinds = {"base": wanted.dataset, "plus": f"{wanted.dataset}+"}
    lines = []
    for kind in ("base", "plus") if report.plus else ("base",):
        scores = ", ".join(f"pass@{k} {100 * value:.1f} %" for k, value in report.pass_at(kind).items())
        lines.append((f"{kinds[kind]} {part}", f"{scores} of {len(report.samples):,} tasks"))
    return lines


def _report(settings: RunSettings) -> Lines:
    from codeact.report import write_report
    from codeact.run.count import ledger_of

    ledger_of(settings.output).write(settings.output / "ledger.json")
    return [("report", str(write_report(settings.output)))]
