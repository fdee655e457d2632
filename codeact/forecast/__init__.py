"""``codeact run CONFIG.yaml --dry-run``: what a run would do, and what that would cost. Nothing is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codeact.base.errors import InputError, MissingExtraError
from codeact.forecast.cost import GIB
from codeact.forecast.models import hub_if_reached
from codeact.forecast.steps import TO_DO, Plan, StepForecast
from codeact.run.folder import RunFolder, Step, key_of
from codeact.run.settings import RunSettings

HASHED_BYTES = 2 * GIB
"""Weights above this are not hashed for a plan."""
_WEIGHTS_DECIDE = {
    "score": ("data", "score"),
    "train": ("data", "score", "embed", "select", "train"),
    "generate": ("data", "score", "embed", "select", "train", "generate"),
}
"""Stages whose key holds the model's fingerprint, and the sections of the settings that decide them beside it."""

_NEEDS = {
    "select": {"score", "embed"},
    "train": {"select"},
    "generate.after": {"train"},
    "evaluate.before": {"generate.before"},
    "evaluate.after": {"generate.after"},
}
"""Steps whose results a step takes in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The plan: steps in order, where the figures come from, what is assumed, and what will not work."""

    output: str
    steps: list[StepForecast]
    sources: list[str]
    assumptions: list[str]
    warnings: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of all that is to do."""
        return sum(step.seconds or 0.0 for step in self.steps)

    def table(self) -> str:
        """Return the plan as text."""
        head = ("step", "state", "rows", "tokens", "time", "peak memory", "disk")
        body = [head, *(_cells(step) for step in self.steps)]
        body.append(("in all", "", "", "", _time(self.seconds), "", _bytes(sum(s.disk or 0.0 for s in self.steps))))
        widths = [max(len(row[i]) for row in body) for i in range(len(head))]
        lines = [f"plan of a run into {self.output}; nothing is done or written", ""]
        for row in body:
            left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  " + "  ".join([*left, *right]).rstrip())
        for title, texts in (("from", self.sources), ("assumed", self.assumptions), ("beware", self.warnings)):
            lines += ["", *(f"  {title if n == 0 else '':<8} {text}" for n, text in enumerate(texts))] if texts else []
        return "\n".join(lines)

    def json(self) -> str:
        """Return all figures, with every part of the memory, as JSON."""
        return json.dumps({**dataclasses.asdict(self), "seconds": self.seconds}, indent=1)


def forecast(settings: RunSettings, first: str | None = None, last: str | None = None) -> Forecast:
    """Plan a run without starting it; nothing in ``settings.output`` is made or changed.

    Args:
        settings, first, last: as ``codeact.run.flow.run`` takes them.

    Raises:
        InputError: settings that would stop the run at once; or data or model cannot be reached and the section
            ``forecast`` does not say what to assume.
    """
    from codeact.models.loading import quiet_transformers
    from codeact.run.flow import TAKEN_FLAGS, steps_between
    from codeact.training.flags import check_flags

    quiet_transformers()
    flags = None if settings.train is None else check_flags(settings.train, "train", taken=TAKEN_FLAGS)
    folder = RunFolder(settings.output)
    planned = steps_between(settings, folder, first, last)
    with hub_if_reached():
        states, warnings = _states(settings, folder, planned)
        to_do = {step.stage for step, _ in planned if states[step.name] in TO_DO}
        warnings += _obstacles(settings, to_do)
        if not to_do:  # so nothing has to be known of data and machine
            steps = [StepForecast(name=step.name, state=states[step.name]) for step, _ in planned]
            return Forecast(output=str(settings.output), steps=steps, sources=[], assumptions=[], warnings=warnings)
        plan = Plan(settings, flags, states, to_do)
        steps = plan.steps([(step.stage, step.name, states[step.name]) for step, _ in planned])
    return Forecast(
        output=str(settings.output),
        steps=steps,
        sources=plan.sources,
        assumptions=plan.assumptions(to_do),
        warnings=[*warnings, *plan.warnings(steps)],
    )


# ------------------------------------------------------------------------------------------------- what is done already


def _states(
    settings: RunSettings, folder: RunFolder, planned: list[tuple[Step, bool]]
) -> tuple[dict[str, str], list[str]]:
    """What would become of every step, by its name, and what would stop the run."""
    states: dict[str, str] = {}
    warnings: list[str] = []
    started = folder.started()
    for step, wanted in planned:
        try:
            if not wanted:
                there = folder.finished(step)
                states[step.name] = "left as it is" if there else "not done"
                if not there:
                    warnings.append(f"will stop: step {step.name} is not done in {folder.folder}; leave out --from")
            else:
                states[step.name] = _state(settings, folder, step, started, states)
        except InputError as error:
            states[step.name] = "to do"
            warnings.append(f"will stop: {error}")
    size = _weight_bytes(settings.score.model)
    if size > HASHED_BYTES and started:
        warnings.append(
            f"{size / GIB:,.0f} GiB of weights are not hashed for a plan: what is done follows from settings alone"
        )
    return states, warnings


def _state(settings: RunSettings, folder: RunFolder, step: Step, started: set[str], states: dict[str, str]) -> str:
    before = {name for name, state in states.items() if state in ("to do", "goes on", "put back")}
    needs = _NEEDS.get(step.name, set(states) if step.stage == "report" else set())
    if step.name not in started or needs & before:  # what it takes in is not there yet
        return "to do"
    if step.stage in _WEIGHTS_DECIDE and _weight_bytes(settings.score.model) > HASHED_BYTES:
        known, now = folder.settings(), settings.model_dump(mode="json")
        same = all(known.get(section) == now[section] for section in _WEIGHTS_DECIDE[step.stage])
        return "to do" if not same else "done already" if folder.finished(step) else "goes on"
    try:
        key = key_of({"step": step.name, **step.inputs()})
    except (InputError, MissingExtraError, KeyError):
        return "to do"
    if folder.known(step, key):
        return "done already" if folder.current(step, key) else "put back"
    return "goes on" if folder.current(step, key) else "to do"


def _weight_bytes(name: str) -> int:
    folder = Path(name).expanduser()
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) if folder.is_dir() else 0


def _obstacles(settings: RunSettings, stages: set[str]) -> Iterator[str]:
    """What would stop one of these stages."""
    checks: list[Any] = []
    if settings.generate is not None and stages & {"generate", "evaluate"}:
        checks.append(lambda: _problems(settings))
    if "evaluate" in stages:
        checks.append(_sandbox)
    for check in checks:
        try:
            check()
        except (InputError, MissingExtraError) as error:
            yield f"will stop: {error}"


def _problems(settings: RunSettings) -> Any:
    from codeact.run.steps import problems_of

    return problems_of(settings.generate)


def _sandbox() -> None:
    from codeact.evaluation.sandbox.sandbox import Limits, Sandbox

    Sandbox(Limits())


# ------------------------------------------------------------------------------------------------------------- as text


def _cells(step: StepForecast) -> tuple[str, ...]:
    tokens = "" if step.tokens is None else _count(step.tokens)
    if step.error:
        tokens += f" ± {_count(step.error)}"
    return (
        step.name,
        step.state,
        "" if step.rows is None else f"{step.rows:,}",
        tokens,
        "" if step.seconds is None else _time(step.seconds),
        "" if step.memory is None else f"{step.memory.total / GIB:,.1f} GiB",
        "" if step.disk is None else _bytes(step.disk),
    )


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def _bytes(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:.0f} B"
