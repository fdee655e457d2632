"""What a run left in its folder, read and checked: one small record a file; a stage that was not run is None.

run.json ledger.json scores/ embeddings.npy selected.jsonl selected.rows.parquet pack_stats.json pack_lengths.npy
model/cost.json model/training.json evaluation/{before,after}/NAME-sanitized_eval.json
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from codeact.base.errors import InputError
from codeact.base.ledger import Ledger
from codeact.base.parsing import read_json
from codeact.padding.strategies import StrategyStats, strategy_of
from codeact.report.rows import Rows
from codeact.scoring.stage import TABLE


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class StageRecord(_Record):
    """A stage of ``run.json``; times in seconds, memory in bytes."""

    started: str = ""
    seconds: float | None = None
    peak_memory: int | None = None
    lines: list[tuple[str, str]] = []


class RunRecord(_Record):
    """``run.json``."""

    codeact: str
    commit: str | None = None
    settings: dict[str, Any] = {}
    versions: dict[str, str | None] = {}
    machine: dict[str, Any] = {}
    stages: dict[str, StageRecord] = {}


class PackFigures(_Record):
    """``pack_stats.json``."""

    capacity: int
    batch_size: int
    seed: int = 42
    strategies: list[StrategyStats]


class Cost(_Record):
    """``model/cost.json`` without its steps."""

    tokens: int
    padding: int
    supervised: int
    samples: int
    devices: int
    seconds: float
    peak_resident_bytes: int
    peak_cuda_allocated_bytes: int | None = None
    model_utilisation: float | None = None


class LogEntry(_Record):
    """A line of the Trainer's log."""

    step: int
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None


class Training(_Record):
    """``model/training.json``. ``result`` is None in a run that has not ended."""

    settings: dict[str, Any]
    held_out: int = 0
    result: dict[str, Any] | None = None
    log: list[LogEntry] = []

    @property
    def strategy(self) -> str:
        """The mode of the run, a key of ``codeact.padding.strategies.STRATEGIES``."""
        return strategy_of(str(self.settings.get("pad_mode")), str(self.settings.get("pack_scope")))

    def points(self, kind: str) -> NDArray[np.float64]:
        """Steps and values of "loss" or "eval_loss" where one was logged and is a number: (points, 2)."""
        pairs = [(entry.step, getattr(entry, kind)) for entry in self.log]
        kept = [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]
        return np.array(kept, np.float64).reshape(-1, 2)


class ProgramVerdict(_Record):
    """Of one program, with the first test that it failed."""

    base: str
    plus: str | None = None
    message: str = ""
    input: str = ""
    solution: str = ""

    @property
    def outcome(self) -> str:
        """Of base and plus tests together."""
        return self.plus or self.base

    def why(self) -> str | None:
        """What went wrong, and on what input, cut; None if it passed."""
        told = "\n".join(filter(None, (self.message[:300], self.input[:300])))
        return None if self.outcome == "pass" else told or self.outcome


class Evaluation(_Record):
    """``NAME-sanitized_eval.json``. ``pass_at``: by kind of tests ("base", "plus") and by name ("pass@1")."""

    dataset: str
    isolated: bool
    tasks: int
    pass_at: dict[str, dict[str, float]]
    outcomes: dict[str, int]
    samples: dict[str, list[ProgramVerdict]]

    def solved(self, kind: str) -> set[str]:
        """Tasks whose first program passes the tests of a kind."""
        return {task for task, verdicts in self.samples.items() if verdicts and getattr(verdicts[0], kind) == "pass"}


class Evaluations(NamedTuple):
    """Of one data set, of the base model and of the trained one."""

    before: Evaluation | None
    after: Evaluation | None

    def pass_at(self, kind: str, k: str) -> tuple[float | None, float | None]:
        """Before and after, such as of kind "base" and k "pass@1"."""
        before, after = (None if side is None else side.pass_at.get(kind, {}).get(k) for side in self)
        return before, after


class RunData:
    """Everything in a run's folder that the report shows. ``lengths``: (conversations,), tokens of each chosen one.

    Raises:
        InputError: it is no run's folder, or a file in it is damaged or of another run; the message names the file.
    """

    def __init__(self, folder: Path) -> None:
        record = _read(folder / "run.json", RunRecord)
        if record is None:
            raise InputError(f"{folder} is no run folder (it has no run.json); make one with: codeact run CONFIG.yaml")
        self.record = record
        self.ledger = Ledger.read(ledger) if (ledger := folder / "ledger.json").exists() else None
        self.rows = Rows(folder) if (folder / TABLE).exists() else None
        self.packs = _read(folder / "pack_stats.json", PackFigures)
        self.lengths = _read_lengths(folder / "pack_lengths.npy")
        self.cost = _read(folder / "model" / "cost.json", Cost)
        self.training = _read(folder / "model" / "training.json", Training)
        self.evaluations: dict[str, Evaluations] = {}
        suffix, sides = "-sanitized_eval.json", [folder / "evaluation" / side for side in ("before", "after")]
        for name in sorted({path.name for side in sides for path in side.glob(f"*{suffix}")}):
            both = (_read(side / name, Evaluation) for side in sides)
            self.evaluations[name.removesuffix(suffix)] = Evaluations(*both)


_R = TypeVar("_R", bound=_Record)


def _read(path: Path, kind: type[_R]) -> _R | None:
    try:
        return TypeAdapter(kind).validate_python(read_json(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        what = " ".join(str(error).split())
        if isinstance(error, ValidationError):
            problem = error.errors()[0]
            what = f"{'.'.join(map(str, problem['loc'])) or 'the whole'}: {problem['msg'].lower()}"
        raise InputError(f"{path} is damaged: {what}; run its stage again") from None


def _read_lengths(path: Path) -> NDArray[np.int64] | None:
    try:
        lengths = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged: {error}; run stage select again") from None
    if lengths.ndim != 1 or lengths.dtype != np.int64 or (len(lengths) and lengths.min() < 1):
        raise InputError(f"{path} holds no lengths of conversations; run stage select again")
    return np.asarray(lengths)


# ------------------------------------------------------------------------------------------------------ in plain words


def moved(before: float, after: float, show: Callable[[float], str]) -> str:
    """How a value went: rose from 1 to 2, fell from 2 to 1, stayed at 1. ``show`` writes it."""
    if show(before) == show(after):
        return f"stayed at {show(after)}"
    return f"{'rose' if after > before else 'fell'} from {show(before)} to {show(after)}"


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def proper_name(dataset: str) -> str:
    """The name that a data set of problems is known by."""
    return {"humaneval": "HumanEval", "mbpp": "MBPP"}.get(dataset, dataset)
