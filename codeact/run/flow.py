"""The whole flow from one YAML file: a loop over the stages.

A stage is kept under a hash of what decides its result (``codeact.run.folder``); a rerun does those whose hash has
changed. At the end the ledger of rows and tokens has to balance (``codeact.base.ledger``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from codeact.base.console import aligned, duration, say
from codeact.base.errors import InputError, in_file, one_of
from codeact.base.ledger import Entry, Ledger
from codeact.base.settings import Settings
from codeact.base.stage import Stage
from codeact.base.yaml_files import located, read_yaml
from codeact.cleaning.stage import Clean
from codeact.data.forms import Columns
from codeact.data.settings import DataSettings
from codeact.embedding.stage import Embed
from codeact.evaluation.stage import Evaluate, Generate
from codeact.padding.stage import Padding
from codeact.report.stage import Report
from codeact.run.folder import RunFolder, key_of
from codeact.run.settings import RunSettings, read_settings, settings_class, shipped
from codeact.scoring.stage import Score, ScoreSettings
from codeact.selection.stage import Select
from codeact.training.stage import Train

S = TypeVar("S", bound=Settings)

STAGES: tuple[Stage, ...] = (
    Score(),
    Embed(),
    Clean(),
    Select(),
    Padding(),
    Train(),
    Generate("before"),
    Generate("after"),
    Evaluate("before"),
    Evaluate("after"),
    Report(),
)
"""In order. To add a stage, write it and put it here."""


class LedgerError(RuntimeError):
    """Rows or tokens are missing that no stage accounts for."""


class Flow:
    """One run: its settings, its folder and its stages. What a stage may ask of it: ``codeact.base.stage.Run``."""

    def __init__(
        self, settings: RunSettings, stages: Sequence[Stage] = STAGES, source: str | Path | None = None
    ) -> None:
        self.settings, self.all_stages, self.source = settings, stages, source
        self.output, self.processes = settings.output, settings.processes
        self.engine, self.address = settings.engine, settings.address
        self.folder = RunFolder(settings.output)
        self._identities: dict[str, str] = {}
        self.stages = [stage for stage in stages if stage.configured(self)]

    @property
    def data(self) -> DataSettings:
        """The rows that the run is about."""
        return self.settings.data

    @property
    def model(self) -> str:
        """The model that scores, and is trained and tried."""
        return self.of(ScoreSettings).model

    def section(self, name: str) -> Any:
        """Settings of a section by its name."""
        return getattr(self.settings, name, None)

    def of(self, settings: type[S]) -> S:
        """Settings of a section by their class."""
        return self.settings.of(settings)

    def data_fingerprint(self) -> str:
        """The sha256 of the data."""
        return self._data_facts[0]

    def data_columns(self) -> Columns:
        """Which columns of the data hold what."""
        return self._data_facts[1]

    @cached_property
    def _data_facts(self) -> tuple[str, Columns]:
        records = self.data.open()
        return records.fingerprint, records.columns

    def identity(self, model: str) -> str:
        """What tells a model from every other; asked once a run."""
        from codeact.models.loading import model_identity

        if model not in self._identities:
            self._identities[model] = model_identity(model)
        return self._identities[model]

    def digest(self, *stages: str) -> Mapping[str, str]:
        """The sha256 of what these stages made."""
        return self.folder.digest(*stages)

    def keys(self) -> Mapping[str, str]:
        """The keys of all stages that are done."""
        return self.folder.keys()

    def key(self, stage: Stage) -> str:
        """The hash of what decides the stage's result; the stages that it needs are done."""
        return key_of({"step": stage.name, **stage.inputs(self)})

    def ledger(self) -> Ledger:
        """Counted now, from the files; see ``ledger_of``."""
        return ledger_of(self.output, self.all_stages)

    def between(self, first: str | None, last: str | None) -> list[tuple[Stage, bool]]:
        """The stages up to section ``last``, each with whether it is to be done rather than taken as it is.

        Raises:
            InputError: a section is unknown or not configured, or ``first`` comes after ``last``.
        """
        sections = list(dict.fromkeys(stage.section for stage in self.stages))
        known = list(dict.fromkeys(stage.section for stage in self.all_stages))
        for flag, name in (("--from", first), ("--until", last)):
            if name is not None and one_of(flag, name, known) not in sections:
                raise InputError(f"{flag} {name}: the settings have no section {name}; there are {', '.join(sections)}")
        start = sections.index(first) if first else 0
        stop = sections.index(last) if last else len(sections) - 1
        if start > stop:
            raise InputError(f"--from {first} comes after --until {last}")
        kept = sections[: stop + 1]
        return [(stage, sections.index(stage.section) >= start) for stage in self.stages if stage.section in kept]

    def check(self) -> None:
        """Find now what would stop a later stage after hours.

        Raises:
            InputError: what it is.
        """
        for stage in self.stages:
            with self.naming_the_line(stage.section):
                stage.check(self)

    @contextmanager
    def naming_the_line(self, section: str) -> Iterator[None]:
        """Begin an InputError about a section with the file and the line that it is about."""
        with in_file():
            try:
                yield
            except InputError as error:
                if self.source is None:
                    raise
                path = shipped(Path(self.source))
                raise InputError(located(error.args[0], path, read_yaml(path)[1], section)) from None

    def run(self, first: str | None = None, last: str | None = None) -> Ledger:
        """Do the stages; what is there already for the same inputs and settings is kept.

        Args:
            first: a section: stages before it are taken as they are, whatever their settings now.
            last: a section: stages after it are left for another time.

        Returns:
            The ledger of every stage that is done.

        Raises:
            InputError: see the stages; or one before ``first`` is not done.
            LedgerError: the ledger does not balance.
        """
        begin = time.perf_counter()
        planned = self.between(first, last)
        self.check()
        with self.folder.locked():
            self.folder.describe(self.settings.model_dump(mode="json"))
            for stage, to_do in planned:
                if not to_do:
                    if not self.folder.finished(stage):
                        raise InputError(f"step {stage.name} is not done in {self.output}; leave out --from {first}")
                    continue
                with in_file():
                    key = self.key(stage)
                    if self.folder.reusable(stage, key):
                        say(f"{stage.name}: done already")
                        continue
                    say(f"{stage.name} ...")
                    lines = self.folder.do(stage, key, self)
                if stage.told:
                    print(aligned(lines))
            ledger = self.ledger()
            ledger.write(self.output / "ledger.json")
        print(f"\n{ledger.table()}\n")
        if complaints := ledger.complaints():
            raise LedgerError(
                f"the ledger of {self.output} does not balance: {'; '.join(complaints)}; files there were changed, "
                "or a stage loses rows without saying so, which is a bug to report"
            )
        say(duration(time.perf_counter() - begin))
        return ledger


def ledger_of(output: Path, stages: Sequence[Stage] = STAGES) -> Ledger:
    """Count anew, from the files in a run's folder, what every stage took in, lost and gave out.

    Stages that are not done are left out; those made from other results than lie there now are named as stale.
    """
    folder = RunFolder(output)
    stale: set[str] = set()

    def entries() -> Iterator[Entry]:
        for stage in stages:
            if folder.stale(stage) or stale & {*stage.needs, *stage.takes}:
                stale.add(stage.name)
            else:
                yield from stage.account(output)

    return Ledger(
        entries=tuple(entries()), stale=tuple(stage.name for stage in stages if stage.name in stale & folder.started())
    )


def open_flow(config: str | Path, stages: Sequence[Stage] = STAGES, changes: Sequence[str] = ()) -> Flow:
    """The run that a YAML file tells, or one that codeact brings, with changes such as ``select.ratio=0.5``.

    Raises:
        InputError: see ``codeact.run.settings.read_settings``.
    """
    return Flow(read_settings(config, settings_class(stages), changes), stages, config)
