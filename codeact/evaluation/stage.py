"""The stages that try a model, as the command line and a run use them: generate, sanitize, evaluate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from codeact.base.errors import InputError
from codeact.evaluation.generate import GenerationSettings, generate
from codeact.evaluation.problems import DATASETS, Problem, load_problems
from codeact.evaluation.programs import read_rows, read_samples, write_samples
from codeact.evaluation.results import Results, evaluate, results_path, write_results
from codeact.evaluation.sandbox.sandbox import Limits, Sandbox
from codeact.evaluation.sanitize import sanitize

_PREFIXES = {"HumanEval/": "humaneval", "Mbpp/": "mbpp"}


def generate_samples(
    dataset: str,
    model: str,
    output: Path,
    settings: GenerationSettings,
    *,
    adapter: str | None = None,
    data: Path | None = None,
    backend: str = "hf",
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int | None = None,
    limit: int | None = None,
    tasks: Sequence[str] | None = None,
    overwrite: bool = False,
) -> str:
    """Generate what is missing in ``output``; returns a line about it."""
    from codeact.evaluation.generators import load_generator
    from codeact.models.loading import quiet_transformers

    problems = load_problems(dataset, data, limit, tasks)
    quiet_transformers()
    generator = load_generator(model, adapter, backend, dtype, device)
    begin, tokens = time.perf_counter(), 0
    with _Bar(len(problems.problems) * settings.samples, "samples") as step:

        def progress(samples: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            step(samples)

        made = generate(
            problems, generator, output, settings, batch_size=batch_size, overwrite=overwrite, progress=progress
        )
    seconds = time.perf_counter() - begin
    if not made:
        return f"all samples were in {output} already"
    return f"{made:,} samples, {tokens:,} tokens in {seconds:.0f} s ({tokens / seconds:,.0f} tokens/s) -> {output}"


def sanitize_file(samples: Path, output: Path | None = None, data: Path | None = None) -> tuple[Path, int, int]:
    """Sanitize a file of samples into ``NAME-sanitized.jsonl``; returns it, its samples and how many changed.

    The entry points are those in the rows (`codeact generate` writes them), or of the data sets that the task ids name.
    """
    problems: dict[str, Problem] = {}
    rows = read_rows(samples)
    needed = {
        dataset
        for row in rows
        if "entry_point" not in row or "solution" not in row
        for prefix, dataset in _PREFIXES.items()
        if str(row.get("task_id")).startswith(prefix)
    }
    for dataset in sorted(needed):
        problems |= load_problems(dataset, data).by_id()
    cleaned, changed = [], 0
    for number, row in enumerate(rows, 1):
        problem = problems.get(str(row.get("task_id")))
        entry_point = row.get("entry_point") or (problem and problem.entry_point)
        text = row.get("solution")
        if text is None and problem is not None and isinstance(row.get("completion"), str):
            text = problem.prompt + row["completion"]
        if not isinstance(text, str) or not entry_point:
            raise InputError(
                f"{samples}, line {number}: no sample of {' or '.join(DATASETS)}: it needs task_id and solution"
            )
        solution = sanitize(text, entry_point)
        changed += solution.strip() != text.strip()
        kept = {key: value for key, value in row.items() if key != "completion"}
        cleaned.append({**kept, "solution": solution})
    target = output or samples.with_name(f"{samples.name.removesuffix('.jsonl')}-sanitized.jsonl")
    write_samples(target, cleaned)
    return target, len(cleaned), changed


def evaluate_file(
    dataset: str,
    samples: Path,
    *,
    data: Path | None = None,
    limits: Limits | None = None,
    parallel: int | None = None,
    base_only: bool = False,
    limit: int | None = None,
    tasks: Sequence[str] | None = None,
    unsafe: bool = False,
) -> tuple[Results, list[Path]]:
    """Judge a file of samples; returns the report and the files it was written to."""
    problems = load_problems(dataset, data, limit, tasks)
    sandbox = Sandbox(limits or Limits(), unsafe=unsafe)
    if not sandbox.isolated:
        print(
            "codeact: WARNING: generated programs run without isolation: they can read, change and send away whatever "
            "you can",
            file=sys.stderr,
            flush=True,
        )
    found = read_samples(samples, problems.by_id())
    if not found:
        raise InputError(f"{samples} holds no sample of a task in {problems.source}; is it of another data set?")
    with _Bar(len(found), "samples") as step:
        report = evaluate(
            problems,
            found,
            sandbox,
            results_path(samples),
            parallel=parallel,
            base_only=base_only,
            progress=step,
        )
    return report, list(write_results(report, samples))


class _Bar:
    """A bar, where somebody looks."""

    def __init__(self, total: int, unit: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit=f" {unit}", disable=None)

    def __enter__(self) -> Callable[[int], None]:
        return self._step

    def _step(self, count: int) -> None:
        self._bar.update(count)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
