"""The whole flow from one YAML file: score, embed, select, train, generate, evaluate, report.

Every stage is made of steps that are kept under a hash of what decides their result (``codeact.run.folder``); a rerun
does the steps whose hash has changed. At the end the ledger of rows and tokens has to balance
(``codeact.base.ledger``).
"""

from __future__ import annotations

import time
from pathlib import Path

import yaml

from codeact.base.errors import InputError, one_of
from codeact.base.files import atomic_path
from codeact.base.ledger import Ledger
from codeact.run import stages as data_stages
from codeact.run.folder import RunFolder, Step, key_of
from codeact.run.settings import RunSettings

TAKEN_FLAGS = ("model_name_or_path", "data_path", "output_dir")
"""Flags of training that follow from the rest of a run's settings."""

STAGES = ("score", "embed", "select", "train", "generate", "evaluate", "report")


class LedgerError(RuntimeError):
    """Rows or tokens are missing that no stage accounts for."""


def run(settings: RunSettings, first: str | None = None, last: str | None = None) -> Ledger:
    """Run the stages into ``settings.output``; what is there already for the same inputs and settings is kept.

    Args:
        settings: the run.
        first: a stage: those before it are taken as they are, whatever their settings now.
        last: a stage: those after it are left for another time.

    Returns:
        The ledger of every stage that is done.

    Raises:
        InputError: see the stages; or a stage before ``first`` is not done.
        LedgerError: the ledger does not balance.
    """
    from codeact.run.count import ledger_of

    begin = time.perf_counter()
    folder = RunFolder(settings.output)
    steps = steps_between(settings, folder, first, last)
    check(settings)
    with folder.locked():
        folder.describe(settings.model_dump(mode="json"))
        for step, wanted in steps:
            if not wanted:
                if not folder.finished(step):
                    raise InputError(f"step {step.name} is not done in {folder.folder}; leave out --from {first}")
                continue
            key = key_of({"step": step.name, **step.inputs()})
            if folder.reusable(step, key):
                data_stages.say(f"{step.name}: done already")
                continue
            data_stages.say(f"{step.name} ...")
            folder.do(step, key)
            if step.stage in ("score", "select", "generate", "evaluate"):  # the others have said it themselves
                data_stages.print_table(folder.lines(step.name))
        ledger = ledger_of(settings.output)
        ledger.write(settings.output / "ledger.json")
        print(f"\n{ledger.table()}\n")
        complaints = ledger.complaints()
        if complaints:
            raise LedgerError(
                f"the ledger of {settings.output} does not balance: {'; '.join(complaints)}; files there were changed, "
                "or a stage loses rows without saying so, which is a bug to report"
            )
    data_stages.say(f"{time.perf_counter() - begin:.0f} s")
    return ledger


def steps_between(
    settings: RunSettings, folder: RunFolder, first: str | None, last: str | None
) -> list[tuple[Step, bool]]:
    """The configured steps up to stage ``last``, each with whether it is to be done rather than taken as it is.

    Raises:
        InputError: a stage is unknown or not configured, or ``first`` comes after ``last``.
    """
    from codeact.run.steps import steps_of

    steps = steps_of(settings, folder)
    configured = list(dict.fromkeys(step.stage for step in steps))
    for flag, stage in (("--from", first), ("--until", last)):
        if stage is not None and one_of(flag, stage, STAGES) not in configured:
            raise InputError(f"{flag} {stage}: the settings have no section {stage}; there are {', '.join(configured)}")
    start = configured.index(first) if first else 0
    stop = configured.index(last) if last else len(configured) - 1
    if start > stop:
        raise InputError(f"--from {first} comes after --until {last}")
    kept = configured[: stop + 1]
    return [(step, configured.index(step.stage) >= start) for step in steps if step.stage in kept]


def check(settings: RunSettings) -> None:
    """Find now what would stop a later stage after hours.

    Raises:
        InputError: a flag of training is unknown or of a wrong type; training's library is absent; or programs could
            not be isolated.
    """
    if settings.train is not None:
        from codeact.training.flags import check_flags

        check_flags(settings.train, "train", taken=TAKEN_FLAGS)
    if settings.generate is not None:
        from codeact.run.steps import problems_of

        problems_of(settings.generate)
    if settings.evaluate is not None:
        from codeact.evaluation.sandbox.sandbox import Limits, Sandbox

        Sandbox(Limits())


def write_settings(settings: RunSettings, path: Path) -> None:
    """Write settings as the YAML file that ``read_settings`` reads; what has its default is left out."""
    content = settings.model_dump(mode="json", exclude_defaults=True)
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
