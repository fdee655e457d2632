"""Stage lab: strategies x budgets x seeds, each trained and tried on held-out rows -> what differs beyond noise."""

from __future__ import annotations

import gc
import json
import shutil
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeact.base.console import say
from codeact.base.errors import InputError
from codeact.base.files import atomic_path
from codeact.base.parsing import read_json
from codeact.base.settings import decisive
from codeact.base.stage import Lines, Run, Stage
from codeact.base.trackers import check_trackers, report_figures
from codeact.embedding.stage import EMBEDDINGS_FILE
from codeact.lab.compare import Trial, compare
from codeact.lab.settings import Arm, LabSettings
from codeact.run.flow import STAGES, Flow, open_flow
from codeact.run.folder import key_of
from codeact.scoring.stage import SCORES_FOLDER
from codeact.selection.settings import SelectSettings
from codeact.selection.stage import check_kept, cluster_rows, read_scores
from codeact.training.stage import TAKEN_FLAGS, check_training

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from codeact.data.records import Record, RecordSet
    from codeact.evaluation.problems import ProblemSet
    from codeact.training.flags import TrainSettings

LAB_FOLDER = "lab"
TRIALS = "lab-trials"  # beside it, each under a hash of what decides it: other settings of the lab share them


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """What all trials share: rows to choose from, their clusters and vectors, and what they are tried on."""

    records: RecordSet
    table: pa.Table
    labels: NDArray[np.int32]
    vectors: NDArray[np.float32]
    held_out: list[Record]
    held_clusters: NDArray[np.int32]
    problems: list[ProblemSet]


class Lab(Stage):
    """On the scores and embeddings of a run."""

    name = section = "lab"
    settings, default = LabSettings, None
    needs = ("score", "embed")
    outputs, products = (LAB_FOLDER,), ()

    def check(self, run: Run) -> None:
        """Flags of the trainings, a difficulty whose numbers the scoring does not keep, problems that are not here."""
        if run.section(self.section) is not None:
            check_kept(run, self.section, [arm.difficulty for arm in run.of(LabSettings).strategies])
            taken = (*TAKEN_FLAGS, "seed", "eval_ratio", "eval_path")
            check_training(run.of(LabSettings).train, "lab.train", taken, run.model)
            _problems(run.of(LabSettings).tasks)
            check_trackers(run.of(LabSettings).report_to)

    def inputs(self, run: Run) -> dict[str, Any]:
        """Scores, vectors, the model, and what is compared."""
        return {**_shared(run), **decisive(run.of(LabSettings))}

    def work(self, run: Run) -> Lines:
        """Do the trials that are missing, and compare."""
        settings = run.of(LabSettings)
        pool = _open_pool(run, settings)
        paths = {
            trial: run.output / TRIALS / f"{trial.name}-{_key(run, trial)[:16]}.json" for trial in _trials(settings)
        }
        todo = [trial for trial, path in paths.items() if not path.exists()]
        begin, longest, stopped = time.monotonic(), 0.0, ""
        for number, trial in enumerate(todo, 1):
            start = time.monotonic()
            if settings.minutes is not None and start - begin + longest > 60 * settings.minutes:
                stopped = (
                    f"{len(todo) - number + 1} of {len(paths)} trainings are left after {settings.minutes:g} minutes"
                )
                break
            say(f"lab: {trial.name} ({number} of {len(todo)})")
            result = _try(run, settings, trial, pool)
            with atomic_path(paths[trial]) as temporary:
                temporary.write_text(json.dumps(result), encoding="utf-8")
            longest = max(longest, time.monotonic() - start)
        results = {trial: read_json(path) for trial, path in paths.items() if path.exists()}
        comparison = compare(settings, results, pool.held_clusters)
        figures = {f"{t.name}/held_out_loss": sum(r["losses"]) / sum(r["loss_tokens"]) for t, r in results.items()}
        report_figures(settings.report_to, "lab", run.output / LAB_FOLDER, settings, figures)
        page = run.output / LAB_FOLDER / "lab.md"
        with atomic_path(page) as temporary:
            temporary.write_text(comparison.page(stopped), encoding="utf-8")
        if stopped:
            raise InputError(f"lab: {stopped}; {page} compares those that are done, the same command does more")
        return [("compared", f"{len(paths):,} trainings, {page}"), *(("", line) for line in comparison.sentences)]


def lab_flow(config: str | Path) -> Flow:
    """The run that a YAML file tells, with a section lab; its stages before are shared with ``codeact run``.

    Raises:
        InputError: see ``codeact.run.settings.read_settings``; or there is no section lab.
    """
    stages = [*STAGES]
    stages.insert([stage.name for stage in STAGES].index("embed") + 1, Lab())
    flow = open_flow(config, stages)
    if flow.section("lab") is None:
        raise InputError(f"{config} has no section lab; add one, with budgets: [TOKENS, ...]")
    return flow


def _shared(run: Run) -> dict[str, Any]:
    """What decides every trial, beside its own settings."""
    select = run.of(SelectSettings)
    clusters = [select.clusters, select.seed, select.backend]
    return {**run.digest("score", "embed"), "model": run.identity(run.model), "clusters": clusters}


def _key(run: Run, trial: Trial) -> str:
    settings = run.of(LabSettings)
    arm = {arm.name: arm.model_dump() for arm in settings.arms()}.get(trial.arm)
    tried = {"held_out": settings.held_out, "tasks": settings.tasks, "max_new_tokens": settings.max_new_tokens}
    kept = {**tried, "train": settings.train, "arm": arm}
    return key_of({**_shared(run), **kept, "trial": [trial.arm, trial.budget, trial.seed]})


def _trials(settings: LabSettings) -> list[Trial]:
    """Seed by seed, so that a lab that was stopped has compared all arms at least once."""
    trials = [Trial(arm="untrained", budget=0, seed=0)]
    for seed in settings.seeds:
        trials += [
            Trial(arm=arm.name, budget=budget, seed=seed) for budget in settings.budgets for arm in settings.arms()
        ]
        trials.append(Trial(arm="all", budget=0, seed=seed))
    return trials


def _open_pool(run: Run, settings: LabSettings) -> _Pool:
    """Hold rows out, by whole questions: no answer to a held-out question is left to choose."""
    import numpy as np

    from codeact.data.chosen import row_tokens
    from codeact.data.records import Record
    from codeact.scoring.folder import ScoreFolder
    from codeact.selection.choose import question_numbers
    from codeact.selection.difficulty import ok_rows

    folder, select = ScoreFolder.open(run.output / SCORES_FOLDER), run.of(SelectSettings)
    table, records = read_scores(folder, [arm.difficulty for arm in settings.strategies]), run.data.open()
    embeddings = run.output / EMBEDDINGS_FILE
    clustered = cluster_rows(table, folder, embeddings, select.clusters, select.seed, select.backend)
    questions, ok = question_numbers(records, table), ok_rows(table)
    order = np.random.default_rng(0).permutation(np.flatnonzero(ok))
    held = order[: settings.held_out]
    kept = ok & ~np.isin(questions, questions[held])
    tokens = row_tokens(table)
    if len(held) < settings.held_out or tokens[kept].sum() < max(settings.budgets):
        raise InputError(
            f"lab: {int(ok.sum()):,} scored rows less {settings.held_out:,} held out leave {int(tokens[kept].sum()):,} "
            f"tokens, fewer than the budget of {max(settings.budgets):,}; lower budgets or held_out"
        )
    held_out = [record for row in np.sort(held).tolist() for record in records.rows(row, row + 1)]
    assert all(isinstance(record, Record) for record in held_out), "what was scored can be read"
    return _Pool(
        records=records,
        table=table.filter(kept),
        labels=clustered.labels[kept],
        vectors=clustered.vectors[clustered.places[kept]],
        held_out=held_out,
        held_clusters=clustered.labels[np.sort(held)],
        problems=_problems(settings.tasks),
    )


def _problems(tasks: Sequence[str]) -> list[ProblemSet]:
    """The tasks, those of a data set together."""
    from codeact.evaluation.problems import DATASETS, load_problems

    of = {
        dataset: [task for task in tasks if task.startswith("Human") == (dataset == "humaneval")]
        for dataset in DATASETS
    }
    return [load_problems(dataset, tasks=wanted) for dataset, wanted in of.items() if wanted]


def _try(run: Run, settings: LabSettings, trial: Trial, pool: _Pool) -> dict[str, Any]:
    """Choose, train, and try; what was trained is removed again."""
    from codeact.selection.choose import plan_selection, write_selection
    from codeact.training.flags import parse_mapping
    from codeact.training.train import train_from_settings

    work = run.output / TRIALS / "work" / trial.name
    work.mkdir(parents=True, exist_ok=True)
    flags = {**settings.train, "model_name_or_path": run.model, "seed": trial.seed, "output_dir": str(work / "model")}
    chosen = parse_mapping({**flags, "data_path": str(work / "selected.jsonl")}, "lab.train")
    facts: dict[str, Any] = {"rows": 0, "tokens": 0}
    if trial.arm != "untrained":
        arm = {arm.name: arm for arm in settings.arms()}.get(trial.arm, Arm(strategy="random"))
        selection = plan_selection(
            pool.table,
            pool.labels,
            budget_tokens=trial.budget or int(1e18),
            seed=trial.seed,
            vectors=pool.vectors,
            **arm.model_dump(),
        )
        write_selection(work / "selected.jsonl", pool.records, pool.table, selection, pool.labels)
        with (work / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log):
            steps = train_from_settings(chosen).steps
        gc.collect()  # what was trained holds on to itself in circles
        known = read_json(work / "model" / "training.json")
        facts = {"rows": len(selection.positions), "tokens": selection.tokens_chosen}
        facts |= {"trained_on_tokens": known["trained_on_tokens"], "steps": steps}
    model, adapter = run.model, None
    if trial.arm != "untrained" and chosen.model.lora:
        adapter = work / "model"
    elif trial.arm != "untrained":
        model = str(work / "model")
    facts |= _losses(model, adapter, chosen, pool)
    if settings.max_new_tokens:
        facts["passed"] = _passed(model, adapter, chosen, pool.problems, settings.max_new_tokens, work)
    shutil.rmtree(work)
    return facts


def _losses(name: str, adapter: Path | None, chosen: TrainSettings, pool: _Pool) -> dict[str, Any]:
    """Of every row that is tried the summed loss of the answers that training learns, and their tokens; 0: too long."""
    import torch

    from codeact.base.devices import resolve_device
    from codeact.data.records import Record
    from codeact.models.adapters import apply_adapter
    from codeact.models.loading import load_causal_lm, quiet_transformers
    from codeact.scoring.ifd import IfdScorer

    quiet_transformers()
    # float32: what a short training adds is smaller than the rounding of bfloat16
    model, tokenizer = load_causal_lm(name, resolve_device("auto"), torch.float32)
    if adapter is not None:
        model = apply_adapter(model, adapter)
    turns = "last" if chosen.data.last_answer_only else "all"
    scorer = IfdScorer(model, tokenizer, chosen.data.model_type, chosen.packs.max_length, turns=turns)
    losses, tokens = scorer.answer_losses(pool.held_out)
    if not tokens.any():
        raise InputError(f"lab: no held-out row fits into max_length {chosen.packs.max_length}; raise it in lab.train")
    problems = [problem for some in pool.problems for problem in some.problems]
    solved = [
        Record(id=problem.task_id, row=row, question=problem.prompt, answer=problem.canonical_solution)
        for row, problem in enumerate(problems)
    ]
    solutions, solution_tokens = scorer.answer_losses(solved)
    return {
        "losses": losses.tolist(),
        "loss_tokens": tokens.tolist(),
        "solution_losses": solutions.tolist(),
        "solution_tokens": solution_tokens.tolist(),
    }


def _passed(
    name: str, adapter: Path | None, chosen: TrainSettings, problems: list[ProblemSet], tokens: int, work: Path
) -> list[bool]:
    """Of every task whether the greedy program passes all its tests."""
    from codeact.evaluation.settings import EvaluateSettings, GenerationSettings
    from codeact.evaluation.stage import evaluate_file, generate_programs

    passed: list[bool] = []
    for some in problems:
        path, tasks = work / f"{some.dataset}.jsonl", [problem.task_id for problem in some.problems]
        template = chosen.data.model_type
        asked = {"dataset": some.dataset, "tasks": tasks, "max_new_tokens": tokens, "template": template}
        settings = GenerationSettings.model_validate(asked)
        generate_programs(settings, name, path, adapter=str(adapter) if adapter else None)
        results, _ = evaluate_file(some.dataset, path, EvaluateSettings(base_only=True), tasks=tasks)
        passed += [any(item.verdict.base == "pass" for item in results.samples[task]) for task in tasks]
    return passed
