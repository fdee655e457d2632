"""What the lab compares."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from codeact.base.settings import Settings, setting
from codeact.selection.settings import Difficulty, SamplingName, SelectSettings, Strategy


class Arm(Settings):
    """A strategy that is tried; the fields are those of select."""

    strategy: Strategy = "cdas"
    difficulty: Difficulty = "ifd"
    easiest: bool = False
    sampling: SamplingName = "top"

    @property
    def name(self) -> str:
        """Short, and of letters that a file may have."""
        parts = [self.strategy, self.difficulty if self.difficulty != "ifd" else "", "easiest" if self.easiest else ""]
        return "-".join(filter(None, [*parts, "proportional" if self.sampling != "top" else ""]))


BASELINES = (Arm(strategy="random"), Arm(strategy="longest"))


class LabSettings(Settings):
    """What is compared: every strategy at every budget with every seed, and always random, longest and all rows."""

    strategies: tuple[Arm, ...] = setting((Arm(),), "Strategies beside random, longest and all rows.")
    budgets: tuple[int, ...] = setting(..., "Question + answer tokens that each may choose.")
    seeds: tuple[int, ...] = setting((0, 1, 2), "Of training, and of what is drawn.")
    held_out: int = setting(320, "Rows that are chosen by nobody and tried by all.", ge=2)
    tasks: tuple[str, ...] = setting((), "Of humaneval or mbpp: try all on their canonical solutions, too, ...")
    max_new_tokens: int = setting(0, "... and write programs of so many tokens for them, and run these.", ge=0)
    minutes: float | None = setting(None, "Begin no training that would end later.", place=True, gt=0)
    train: dict[str, Any] = setting({}, "Flags of codeact train.")
    report_to: str | None = setting(None, "Trackers of the losses: tensorboard, wandb, mlflow, ...", place=True)

    @model_validator(mode="after")
    def _something_to_compare(self) -> LabSettings:
        for name, values in (("budgets", self.budgets), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values) or min(values) < (name == "budgets"):
                raise ValueError(f"{name} needs whole numbers, each once")
        if self.max_new_tokens and not self.tasks:
            raise ValueError("max_new_tokens is of programs for tasks; say which tasks")
        for arm in self.strategies:
            SelectSettings(**arm.model_dump())  # says what does not go together
        return self

    def arms(self) -> list[Arm]:
        """All strategies, those that are always there included, each once."""
        arms = [*BASELINES, *self.strategies]
        return list({arm.name: arm for arm in arms}.values())
