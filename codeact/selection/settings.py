"""What is chosen, for the command, a run and Python: the names there are, and which of them go together."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import model_validator

from codeact.base.errors import InputError
from codeact.base.settings import Protocol, Settings, setting

Strategy = Literal["cdas", "top_ifd", "random", "longest", "facility_location"]
Difficulty = Literal["ifd", "ifd_length_adjusted", "loss", "loss_gain", "ifd_loss", "s_ifd"]
SamplingName = Literal["top", "proportional"]
PerQuestion = Literal["best_fit", "hardest", "first"]
SELECTION_STRATEGIES: tuple[str, ...] = get_args(Strategy)
DIFFICULTIES: tuple[str, ...] = get_args(Difficulty)
SAMPLINGS: tuple[str, ...] = get_args(SamplingName)
PER_QUESTION: tuple[str, ...] = get_args(PerQuestion)
BY_DIFFICULTY = ("cdas", "top_ifd")
BY_CLUSTER = ("cdas", "facility_location")
RATIO = 0.4


class SelectSettings(Settings):
    """What is chosen; see ``codeact.selection.choose.plan_selection``."""

    ratio: float = setting(RATIO, "Share of the rows to choose, above 0, at most 1.", gt=0, le=1)
    budget_rows: int | None = setting(None, "Choose so many rows, instead of --ratio.", ge=1)
    budget_tokens: int | None = setting(None, "Choose at most so many question + answer tokens.", ge=1)
    clusters: int = setting(10, "Number of clusters.", ge=1)
    strategy: Strategy = setting("cdas", "cdas, top_ifd, random, longest or facility_location.")
    difficulty: Difficulty = setting("ifd", "What cdas and top_ifd rank by; see docs/select.md.")
    easiest: bool = setting(False, "Choose from the other end: the least difficult.")
    sampling: SamplingName = setting("top", "Of a cluster: the top, or drawn in proportion to the difficulty.")
    per_question: PerQuestion | None = setting(
        None, "Keep one of several answers to a question: best_fit, hardest or first."
    )
    protocol: Protocol = setting("exact", "exact, or paper: the choice of the paper's scripts.")
    seed: int = setting(42, "Of k-means and of whatever is drawn.", ge=0)
    backend: Literal["auto", "native", "sklearn", "torch", "cuml"] = setting(
        "auto", "k-means of: auto, native, sklearn, torch or cuml."
    )

    @model_validator(mode="after")
    def _go_together(self) -> SelectSettings:
        check_choice(self.strategy, self.choice(), self.ratio)
        return self

    def choice(self) -> dict[str, Any]:
        """What ``plan_selection`` takes by name."""
        return self.model_dump(exclude={"ratio", "strategy", "clusters", "backend"})

    def rows_of(self, rows: int, tokens: float) -> float:
        """About how many of ``rows`` are chosen, if a row has so many ``tokens`` on average."""
        if self.budget_tokens is not None:
            return min(rows, self.budget_tokens / max(1.0, tokens))
        return rows * self.ratio if self.budget_rows is None else min(rows, self.budget_rows)

    def told(self) -> str:
        """In a line for people."""
        parts = [self.strategy if self.difficulty == "ifd" else f"{self.strategy} by {self.difficulty}"]
        parts += ["easiest first"] * self.easiest
        parts += ["drawn in proportion"] * (self.sampling == "proportional")
        parts += [f"{self.per_question} of a question"] * (self.per_question is not None)
        if self.budget_tokens is not None:
            parts.append(f"at most {self.budget_tokens:,} tokens")
        elif self.budget_rows is None:
            parts.append(f"ratio {self.ratio}")
        return ", ".join([*parts, f"protocol {self.protocol}"])


def check_choice(strategy: str, choice: dict[str, Any], ratio: Any = RATIO) -> None:
    """Refuse what does not go together.

    Raises:
        InputError: it names both, and what to leave out.
    """
    rows, tokens = choice["budget_rows"], choice["budget_tokens"]
    budgets = {"--budget-rows": rows is not None, "--budget-tokens": tokens is not None, "--ratio": ratio != RATIO}
    if len(given := [name for name, there in budgets.items() if there]) > 1:
        raise InputError(f"{' and '.join(given)} are {len(given)} budgets; say one of them")
    for name, budget in (("--budget-rows", rows), ("--budget-tokens", tokens)):
        if budget is not None and budget < 1:
            raise InputError(f"{name} must be 1 or more, not {budget}")
    if strategy not in BY_DIFFICULTY:
        for name, there in (("--easiest", choice["easiest"]), ("--sampling", choice["sampling"] != "top")):
            if there:
                raise InputError(f"{name} is about the difficulty, which strategy {strategy} does not choose by")
        if choice["difficulty"] != "ifd" and choice["per_question"] != "hardest":
            raise InputError(f"strategy {strategy} chooses by no --difficulty {choice['difficulty']}; leave it out")
    if choice["easiest"] and choice["sampling"] != "top":
        raise InputError("--sampling proportional draws the difficult ones more often; leave out --easiest")
    if choice["protocol"] == "paper":
        others = {
            f"--strategy {strategy}": strategy not in ("cdas", "top_ifd", "random"),
            f"--difficulty {choice['difficulty']}": choice["difficulty"] != "ifd",
            "--easiest": choice["easiest"],
            "--sampling": choice["sampling"] != "top",
            "--per-question": choice["per_question"] is not None,
            "--budget-rows": rows is not None,
            "--budget-tokens": tokens is not None,
        }
        if named := [name for name, there in others.items() if there]:
            raise InputError(f"the paper's script knows no {' and no '.join(named)}; leave out --protocol paper")
