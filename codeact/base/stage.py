"""What a stage of a run is: one class says what it needs, what decides its result, how to make it and what it lost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from codeact.base.ledger import Entry, Ledger
from codeact.base.settings import Settings

Lines = list[tuple[str, str]]
S = TypeVar("S", bound=Settings)


class Run(Hashable, Protocol):
    """What a stage may ask of the run that it is a part of."""

    output: Path
    """The folder that all stages write to."""
    processes: int
    """That may compute at the same time, one a GPU."""
    engine: Any
    """Where they score and embed: local or ray."""
    address: str | None
    """Of a Ray cluster."""

    @property
    def data(self) -> Any:
        """``codeact.data.settings.DataSettings``: the rows that the run is about."""

    @property
    def model(self) -> str:
        """Name or folder of the model that scores, and is trained and tried."""

    def data_fingerprint(self) -> str:
        """The sha256 of the data's content."""

    def data_columns(self) -> Any:
        """``codeact.data.forms.Columns``: which columns of the data hold what."""

    def identity(self, model: str) -> str:
        """What tells a model from every other: the sha256 of its files, or its name and commit on the hub."""

    def section(self, name: str) -> Any:
        """Settings of a section by its name; None: the file has none."""

    def of(self, settings: type[S]) -> S:
        """Settings of a section by their class."""

    def digest(self, *stages: str) -> Mapping[str, str]:
        """The sha256 of every file that these stages made for others."""

    def keys(self) -> Mapping[str, str]:
        """What decided the result of every stage that is done."""

    def ledger(self) -> Ledger:
        """Rows and tokens of every stage that is done, counted now."""


class Stage(ABC):
    """A piece of a run that is done, kept and reused as a whole.

    Attributes:
        name: unique; ``section`` or ``section.part``.
        section: of the settings, and what ``--from`` and ``--until`` take. Several stages may share one.
        settings: type of that section's values; None: there is no such section.
        default: the section where the file has none; ``...``: it must have one, None: then the stage is left out.
        needs: stages whose results it takes in.
        takes: the same of those that a run may leave out.
        outputs: files and folders it writes, relative to the run's folder.
        products: patterns of the files among them that others read; a change of these makes those run again.
        told: whether the run prints its lines; a stage that has said all itself says no.
    """

    name: str
    section: str
    settings: ClassVar[Any] = None
    default: ClassVar[Any] = None
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    outputs: tuple[str, ...]
    products: tuple[str, ...] = ()
    told: bool = True

    def configured(self, run: Run) -> bool:
        """Whether this run has the stage."""
        return self.settings is None or run.section(self.section) is not None

    def check(self, run: Run) -> None:  # noqa: B027 - most have nothing to find
        """Find, before the first stage begins, what would stop this one; no model is loaded.

        Raises:
            InputError: what it is.
        """

    @abstractmethod
    def inputs(self, run: Run) -> dict[str, Any]:
        """Everything that decides the result, as JSON values; called when the stages that it needs are done."""

    @abstractmethod
    def work(self, run: Run) -> Lines:
        """Make the outputs, going on where a killed run was; returns lines for the summary."""

    def account(self, output: Path) -> Iterator[Entry]:
        """Count rows and tokens from the files in the run's folder alone: a stage does not vouch for itself."""
        yield from ()
