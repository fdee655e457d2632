"""Stages generate and evaluate: a model -> programs for the tasks of HumanEval or MBPP -> what became of them."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeact.base.errors import InputError
from codeact.base.ledger import Entry, changes
from codeact.base.parsing import read_json
from codeact.base.settings import decisive
from codeact.base.stage import Lines, Run, Stage
from codeact.base.trackers import check_trackers, report_figures
from codeact.evaluation.settings import EvaluateSettings, GenerationSettings

if TYPE_CHECKING:
    from codeact.evaluation.problems import Problem, ProblemSet
    from codeact.evaluation.results import Results
    from codeact.evaluation.sandbox.sandbox import Limits

_PREFIXES = {"HumanEval/": "humaneval", "Mbpp/": "mbpp"}


def generate_programs(
    settings: GenerationSettings,
    model: str | None,
    output: Path,
    *,
    adapter: str | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> str:
    """Generate what is missing in ``output``; returns a line about it.

    Args:
        settings: which tasks, and how.
        model: causal language model: a folder or a hub name; its name at ``settings.server``, None: the only one there.
        output: JSON lines.
        adapter: LoRA adapter on the model: a folder or a hub name.
        limit: only so many tasks.
        overwrite: discard samples of other settings there.

    Raises:
        InputError: tasks or model cannot be read, or ``output`` holds samples of other settings.
    """
    if settings.server is None:  # what these libraries lack is said before anything is downloaded
        from codeact.evaluation.generators import load_generator
        from codeact.models.loading import quiet_transformers
    from codeact.base.console import Progress, say
    from codeact.base.files import check_kind
    from codeact.evaluation.generate import Generator, generate
    from codeact.evaluation.server import Server, ServerGenerator
    from codeact.evaluation.tasks import open_problems

    check_kind(output, folder=False)
    problems = open_problems(settings.dataset, settings.data, limit, settings.tasks)
    generator: Generator
    if settings.server is not None:
        if adapter is not None:
            raise InputError("an adapter is loaded by the server; leave --adapter out, and name it by --model")
        generator = ServerGenerator(Server(settings.server), model, settings.parallel)
        say(f"asking {generator.model} at {settings.server}")
    elif model is None:
        raise InputError("--model is needed: a folder, a hub name, or with --server the name of a model there")
    else:
        quiet_transformers()
        say(f"loading {model}" + (f" with {adapter}" if adapter else ""))
        generator = load_generator(model, adapter, settings.backend, settings.dtype, settings.device)
    begin, tokens = time.perf_counter(), 0
    with Progress(len(problems.problems) * settings.samples, "samples", "generating") as step:

        def progress(samples: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            step(samples, new_tokens)

        count = generate(
            problems,
            generator,
            output,
            settings,
            batch_size=settings.batch_size,
            overwrite=overwrite,
            progress=progress,
        )
    seconds = time.perf_counter() - begin
    if not count:
        return f"all samples were in {output} already"
    return f"{count:,} samples, {tokens:,} tokens in {seconds:.0f} s ({tokens / seconds:,.0f} tokens/s) -> {output}"


def sanitize_file(samples: Path, output: Path | None = None, data: Path | None = None) -> tuple[Path, int, int]:
    """Sanitize a file of samples into ``NAME-sanitized.jsonl``; returns it, its samples and how many changed.

    The entry points are those in the rows (`codeact generate` writes them), or of the data sets that the task ids name.
    """
    from codeact.base.console import say
    from codeact.evaluation.problems import DATASETS, load_problems
    from codeact.evaluation.programs import left_out_note, read_rows, write_samples
    from codeact.evaluation.sanitize import last_block, sanitize

    problems: dict[str, Problem] = {}
    rows = read_rows(samples)
    incomplete = [row["task_id"] for row in rows if "entry_point" not in row or "solution" not in row]
    for prefix, dataset in _PREFIXES.items():
        if any(task.startswith(prefix) for task in incomplete):
            problems |= load_problems(dataset, data).by_id()
    unknown = Counter(task for task in incomplete if task not in problems and task.startswith(tuple(_PREFIXES)))
    if unknown:
        say(f"{samples}: {left_out_note(unknown)}")
    cleaned, changed = [], 0
    for number, row in enumerate(rows, 1):
        problem = problems.get(row["task_id"])
        entry_point = row.get("entry_point", problem and problem.entry_point)
        text = row.get("solution")
        if row["task_id"] in unknown and (entry_point is None or not text):
            continue
        if text is None and problem is not None and isinstance(row.get("completion"), str):
            text = problem.prompt + row["completion"]
        if not isinstance(text, str) or not isinstance(entry_point, str):
            raise InputError(
                f"{samples}, sample {number}: no sample of {' or '.join(DATASETS)}: it needs task_id and solution"
            )
        solution = sanitize(text, entry_point) if entry_point else last_block(text)  # a script of a task of one's own
        changed += solution.strip() != text.strip()
        kept = {key: value for key, value in row.items() if key != "completion"}
        cleaned.append({**kept, "solution": solution})
    if not cleaned:
        raise InputError(f"{samples} holds no sample of a task that is known; give a file of codeact generate")
    target = output or samples.with_name(f"{samples.name.removesuffix('.jsonl')}-sanitized.jsonl")
    write_samples(target, cleaned)
    return target, len(cleaned), changed


def evaluate_file(
    dataset: str,
    samples: Path,
    settings: EvaluateSettings,
    *,
    data: Path | None = None,
    limits: Limits | None = None,
    limit: int | None = None,
    tasks: Sequence[str] | None = None,
    unsafe: bool = False,
) -> tuple[Results, list[Path]]:
    """Judge a file of samples; returns the results and the files they were written to."""
    from codeact.base.console import Progress, say
    from codeact.evaluation.programs import left_out_note, read_samples
    from codeact.evaluation.results import evaluate, results_path, write_results
    from codeact.evaluation.sandbox.sandbox import Sandbox
    from codeact.evaluation.tasks import open_problems

    check_trackers(settings.report_to)
    problems = open_problems(dataset, data, limit, tasks)
    sandbox = Sandbox(limits or settings.limits(), unsafe=unsafe)
    if not sandbox.isolated:
        say(
            "codeact: WARNING: generated programs run without isolation: they can read, change and send away whatever "
            "you can"
        )
    programs, left_out = read_samples(samples, problems.by_id())
    if not programs:
        raise InputError(f"{samples} holds no sample of a task in {problems.source}; is it of another data set?")
    if left_out:
        say(f"{samples}: {left_out_note(left_out)}")
    with Progress(len(programs), "samples", "judging") as step:
        results = evaluate(
            problems,
            programs,
            sandbox,
            results_path(samples),
            parallel=settings.parallel,
            base_only=settings.base_only,
            progress=step,
        )
    results = replace(results, left_out=left_out, ks=settings.ks)
    files = list(write_results(results, samples))
    report_figures(settings.report_to, "evaluate", samples.parent, settings, results.figures())
    return results, files


# ------------------------------------------------------------------------------------------------------------- in a run


@functools.cache
def problems_of(settings: GenerationSettings) -> ProblemSet:
    """The problems that programs are written for."""
    from codeact.evaluation.tasks import open_problems

    return open_problems(settings.dataset, settings.data, tasks=settings.tasks)


class _Part(Stage):
    """``part``: before or after, of training."""

    def __init__(self, part: str) -> None:
        self.part, self.name = part, f"{self.section}.{part}"

    def configured(self, run: Run) -> bool:
        """Before training only where that is asked for."""
        return super().configured(run) and (self.part == "after" or run.of(GenerationSettings).before)


class Generate(_Part):
    """Programs of the model before training, or after it."""

    section = "generate"
    settings = GenerationSettings

    def __init__(self, part: str) -> None:
        super().__init__(part)
        self.needs = ("train",) if part == "after" else ()
        self.outputs = (f"programs/{part}",)
        self.products = (f"programs/{part}/*.jsonl",)

    def check(self, run: Run) -> None:
        """The problems are there, the device, and a template to ask by."""
        from codeact.base.devices import check_device
        from codeact.evaluation.generators import check_generator
        from codeact.evaluation.prompts import PromptWriter
        from codeact.evaluation.server import Server
        from codeact.models.loading import load_tokenizer

        settings = run.of(GenerationSettings)
        problems = problems_of(settings).problems
        if settings.server is not None:
            Server(settings.server)
            return
        check_device(settings.device, settings.dtype)
        check_generator(settings.backend)
        writer = PromptWriter(load_tokenizer(run.model), settings.chat, settings.protocol)
        writer.write(problems[0])

    def inputs(self, run: Run) -> dict[str, Any]:
        """Problems, model, and how."""
        settings = run.of(GenerationSettings)
        return {
            "problems": problems_of(settings).fingerprint,
            "model": run.identity(run.model),
            **run.digest(*self.needs),
            **decisive(settings, "data", "before", "server", "served"),
            # Not its address, under which it need not come back.
            **({} if settings.server is None else {"served": self._served(run)}),
        }

    def work(self, run: Run) -> Lines:
        """Write what is missing."""
        settings, model, adapter = run.of(GenerationSettings), run.model, None
        if settings.server is not None:
            model = self._served(run)
        elif self.part == "after":
            trained = run.output / "model"
            if (trained / "adapter_config.json").exists():
                adapter = str(trained)
            else:
                model = str(trained)
        text = generate_programs(settings, model, programs_path(run, self.part), adapter=adapter)
        return [(f"programs {self.part}", text)]

    def _served(self, run: Run) -> str:
        """Name of the model at the server."""
        return run.of(GenerationSettings).served or str(run.output / "model") if self.part == "after" else run.model

    def account(self, output: Path) -> Iterator[Entry]:
        """Tasks -> programs."""
        from codeact.evaluation.programs import read_rows

        for samples in sorted((output / "programs" / self.part).glob("*.jsonl")):
            settings = read_json(samples.with_name(f"{samples.name}.settings.json"))
            rows = read_rows(samples)
            tasks = len({row["task_id"] for row in rows})
            rows_in = tasks * settings["samples"]
            yield Entry(stage=self.name, what="programs", after=None, rows_in=rows_in, rows_out=len(rows))


class Evaluate(_Part):
    """Verdicts on these programs."""

    section = "evaluate"
    settings = EvaluateSettings

    def __init__(self, part: str) -> None:
        super().__init__(part)
        self.needs = (f"generate.{part}",)
        self.outputs = (f"evaluation/{part}",)
        self.products = (f"evaluation/{part}/*_eval.json",)

    def check(self, run: Run) -> None:
        """Programs can be isolated here."""
        from codeact.evaluation.sandbox.sandbox import Limits, Sandbox

        Sandbox(Limits())

    def inputs(self, run: Run) -> dict[str, Any]:
        """Programs, problems, and how."""
        problems = problems_of(run.of(GenerationSettings))
        return {**run.digest(*self.needs), "problems": problems.fingerprint, **decisive(run.of(EvaluateSettings))}

    def work(self, run: Run) -> Lines:
        """Sanitize and judge."""
        settings, samples = run.of(GenerationSettings), programs_path(run, self.part)
        cleaned = run.output / "evaluation" / self.part / f"{samples.stem}-sanitized.jsonl"
        sanitize_file(samples, cleaned, settings.data)
        results, _ = evaluate_file(
            settings.dataset, cleaned, run.of(EvaluateSettings), data=settings.data, tasks=settings.tasks
        )
        names = {"base": settings.dataset, "plus": f"{settings.dataset}+"}
        lines = []
        for kind in ("base", "plus") if results.plus else ("base",):
            scores = ", ".join(f"pass@{k} {100 * value:.1f} %" for k, value in results.pass_at(kind).items())
            lines.append((f"{names[kind]} {self.part}", f"{scores} of {len(results.samples):,} tasks"))
        return lines

    def account(self, output: Path) -> Iterator[Entry]:
        """Programs -> those that pass."""
        for path in sorted((output / "evaluation" / self.part).glob("*_eval.json")):
            verdicts = read_json(path)["samples"].values()
            outcomes = Counter(item["plus"] or item["base"] for of_task in verdicts for item in of_task)
            yield Entry(
                stage=self.name,
                what="programs",
                after=f"generate.{self.part}",
                rows_in=sum(len(of_task) for of_task in verdicts),
                rows_out=outcomes["pass"],
                lost=changes({kind: (count, None) for kind, count in sorted(outcomes.items()) if kind != "pass"}),
            )


def programs_path(run: Run, part: str) -> Path:
    """Where a run's programs lie."""
    return run.output / "programs" / part / f"{run.of(GenerationSettings).dataset}.jsonl"
