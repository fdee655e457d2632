"""``codeact run CONFIG.yaml --dry-run``: what a run would do, and what that would cost. Nothing is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from codeact.base.console import aligned, duration, if_known, short, size
from codeact.base.errors import InputError, MissingExtraError, NotHereError, in_file
from codeact.base.machine import GIB
from codeact.base.stage import Stage
from codeact.forecast.models import hub_if_reached, weight_bytes
from codeact.forecast.steps import TO_DO, RunPlan, StepForecast
from codeact.models.loading import quiet_transformers
from codeact.run.flow import Flow
from codeact.training.flags import check_flags
from codeact.training.stage import TAKEN_FLAGS

HASHED_BYTES = 2 * GIB
"""Weights above this are not hashed for a plan."""


@dataclass(slots=True, kw_only=True)
class Forecast:
    """The plan: steps in order, where the figures come from, what is assumed, and what will not work."""

    output: str
    steps: list[StepForecast]
    sources: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of all that is to do."""
        return sum(step.seconds or 0.0 for step in self.steps)

    def table(self) -> str:
        """Return the plan as text."""
        head = ("step", "state", "rows", "tokens", "time", "peak memory", "disk")
        disk = sum(step.disk or 0.0 for step in self.steps)
        total = ("in all", "", "", "", duration(self.seconds), "", size(disk))
        table = aligned([head, *map(_cells, self.steps), total])
        lines = [f"plan of a run into {self.output}; nothing is done or written", "", table]
        for title, texts in (("from", self.sources), ("assumed", self.assumptions), ("beware", self.warnings)):
            lines += ["", *(f"  {title if n == 0 else '':<8} {text}" for n, text in enumerate(texts))] if texts else []
        return "\n".join(lines)

    def json(self) -> str:
        """Return all figures, with every part of the memory, as JSON."""
        return json.dumps({**dataclasses.asdict(self), "seconds": self.seconds}, indent=1)


def _cells(step: StepForecast) -> list[str | None]:
    tokens = if_known(short, step.tokens)
    if step.error:
        tokens = f"{tokens} ± {short(step.error)}"
    rows, seconds = if_known("{:,}".format, step.rows), if_known(duration, step.seconds)
    memory, disk = if_known(size, step.memory and step.memory.total), if_known(size, step.disk)
    return [step.name, step.state, rows, tokens, seconds, memory, disk]


def forecast(flow: Flow, first: str | None = None, last: str | None = None) -> Forecast:
    """Plan a run without starting it; nothing in its folder is made or changed.

    Args:
        flow: the run.
        first, last: as ``Flow.run`` takes them.

    Raises:
        InputError: settings that would stop the run at once; or data or model cannot be reached and the section
            ``forecast`` does not say what to assume.
    """
    quiet_transformers()
    settings = flow.settings
    here = settings.forecast.device is None
    with flow.naming_the_line("train"):
        flags = None if settings.train is None else check_flags(settings.train, "train", TAKEN_FLAGS, here=here)
    planned = flow.between(first, last)
    with hub_if_reached():
        states, warnings = _states(flow, planned)
        steps = [StepForecast(name=stage.name, state=states[stage.name]) for stage, _ in planned]
        to_do = [stage for stage, _ in planned if states[stage.name] in TO_DO]
        warnings += _obstacles(flow, to_do, here)
        result = Forecast(output=str(flow.output), steps=steps, warnings=warnings)
        if to_do:  # else nothing has to be known of data and machine
            sections = {stage.section for stage in to_do}
            plan = RunPlan(settings, flags, states, sections)
            plan.fill_in(steps)
            result.sources, result.assumptions = plan.sources, plan.assumptions(sections)
            result.warnings += plan.warnings(steps)
    return result


def _states(flow: Flow, planned: list[tuple[Stage, bool]]) -> tuple[dict[str, str], list[str]]:
    """What would become of every stage, by its name, and what would stop the run."""
    states: dict[str, str] = {}
    warnings: list[str] = []
    started, weights = flow.folder.started(), weight_bytes(flow.model)
    for stage, to_do in planned:
        try:
            if to_do:
                states[stage.name] = _state(flow, stage, started, states, weights > HASHED_BYTES)
            elif flow.folder.finished(stage):
                states[stage.name] = "left as it is"
            else:
                states[stage.name] = "not done"
                warnings.append(f"will stop: step {stage.name} is not done in {flow.output}; leave out --from")
        except InputError as error:
            states[stage.name] = "to do"
            warnings.append(f"will stop: {error}")
    if weights > HASHED_BYTES and started:
        unhashed = f"{weights / GIB:,.0f} GiB of weights are not hashed for a plan"
        warnings.append(f"{unhashed}: what is done follows from settings alone")
    return states, warnings


def _state(flow: Flow, stage: Stage, started: set[str], states: dict[str, str], heavy: bool) -> str:
    before = {name for name, state in states.items() if state in ("to do", "goes on", "put back")}
    needs = {*stage.needs, *stage.takes} if stage.settings is not None else set(states)  # the report shows them all
    if stage.name not in started or needs & before:  # what it takes in is not there yet
        return "to do"
    if heavy and stage.settings is not None:
        known, now = flow.folder.settings(), flow.settings.model_dump(mode="json")
        same = all(known.get(section) == now[section] for section in ("data", "score", *_sections(flow, stage)))
        return "to do" if not same else "done already" if flow.folder.finished(stage) else "goes on"
    try:
        key = flow.key(stage)
    except (InputError, MissingExtraError, KeyError):
        return "to do"
    if flow.folder.known(stage, key):
        return "done already" if flow.folder.current(stage, key) else "put back"
    return "goes on" if flow.folder.current(stage, key) else "to do"


def _sections(flow: Flow, stage: Stage) -> set[str]:
    """The settings that decide a stage: its own, and those of all that it builds on."""
    needed = (other for other in flow.stages if other.name in (*stage.needs, *stage.takes))
    return {stage.section}.union(*(_sections(flow, other) for other in needed))


def _obstacles(flow: Flow, stages: list[Stage], here: bool) -> Iterator[str]:
    """What would stop one of these stages, here or on another machine."""
    for stage in stages:
        try:
            with in_file():
                stage.check(flow)
        except (InputError, MissingExtraError) as error:
            if here or not isinstance(error, NotHereError | MissingExtraError):
                yield f"will stop: {error}"
