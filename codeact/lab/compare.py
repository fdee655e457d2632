"""What the trials of a lab found: a table of all arms against random rows, and which differences are beyond noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codeact.base.console import aligned
from codeact.lab.differences import Difference, differences
from codeact.lab.settings import LabSettings

HEAD = ("arm", "seeds", "rows", "tokens", "trained on", "steps", "loss a token", "a row", "to random, a token", "a row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One training: an arm's name ("all" and "untrained" among them), the tokens it may choose (0: all), and a seed."""

    arm: str
    budget: int
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return "-".join([self.arm, *([str(self.budget)] if self.budget else []), str(self.seed)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """``tables``: cells of every budget's table, its head first; ``sentences``: one a budget."""

    held_out: int
    tokens: int
    tables: Mapping[int, Sequence[Sequence[str]]]
    sentences: Sequence[str]

    def page(self, stopped: str = "") -> str:
        """As Markdown."""
        parts = [
            "# What the lab found",
            *([f"**Not finished: {stopped}.**"] if stopped else []),
            *self.sentences,
            f"The loss, in nats, of the answers of {self.held_out:,} rows that nobody chose from ({self.tokens:,} "
            "tokens): the mean over their tokens, and the mean over rows of each row's mean. Means over seeds. Less is "
            "better. Differences to random rows of as many tokens, with the interval that holds 95 % of the resamples "
            "of rows and seeds. Rows, tokens, steps: means over seeds; tokens are question + answer as scored, trained "
            "on: the whole samples in the format of the training. It says nothing of other models, data or budgets, "
            "nor of programs that run.",
        ]
        for budget, cells in self.tables.items():
            parts += [f"## {budget:,} tokens", aligned(cells, 1, markdown=True)]
        return "\n\n".join(parts) + "\n"


def compare(settings: LabSettings, results: Mapping[Trial, Mapping[str, Any]]) -> Comparison:
    """Put the results together, of as many seeds as there are.

    Args:
        settings: which arms and budgets there are.
        results: of each trial rows, tokens, trained_on_tokens, steps, and of all held-out rows losses and loss_tokens.
    """
    tokens = np.asarray(next((result["loss_tokens"] for result in results.values()), []), np.int64)
    fits = tokens > 0
    sizes = tokens[fits]
    tables, sentences = {}, []
    for budget in settings.budgets:
        names = [(arm.name, budget) for arm in settings.arms()]
        by_arm = {name: _of(results, name, size, fits) for name, size in [*names, ("all", 0), ("untrained", 0)]}
        random = by_arm["random"]
        if not random:
            continue
        body, verdicts = [], {}
        for name, (facts, losses) in ((name, found) for name, found in by_arm.items() if found):
            found = differences(losses, random[1], sizes) if name != "random" else None
            if found is not None and name not in ("all", "untrained"):
                verdicts[name] = found
            mean = losses.mean(axis=0)
            level = (mean.sum() / sizes.sum(), (mean / sizes).mean())
            seeds = str(len(losses)) if name != "untrained" else ""
            cells = [name, seeds, *facts, *(f"{value:.3f}" for value in level), *map(str, found or ("", ""))]
            body.append(cells)
        tables[budget] = [HEAD, *body]
        sentences.append(_sentence(budget, verdicts))
    return Comparison(held_out=int(fits.sum()), tokens=int(sizes.sum()), tables=tables, sentences=sentences)


def _of(
    results: Mapping[Trial, Mapping[str, Any]], arm: str, budget: int, fits: NDArray[np.bool_]
) -> tuple[list[str], NDArray[np.float64]] | None:
    """What is told of an arm, and its losses (seeds, rows); None: no trial is done."""
    done = [result for trial, result in results.items() if (trial.arm, trial.budget) == (arm, budget)]
    if not done:
        return None
    facts = []
    for name in ("rows", "tokens", "trained_on_tokens", "steps"):
        facts.append(f"{np.mean([result.get(name, 0) for result in done]):,.0f}")
    return facts, np.array([result["losses"] for result in done], np.float64)[:, fits]


def _sentence(budget: int, verdicts: Mapping[str, tuple[Difference, Difference]]) -> str:
    groups: dict[str, list[str]] = {"better": [], "worse": [], "mixed": [], "noise": []}
    for name, pair in verdicts.items():
        signs = {np.sign(difference.mean) for difference in pair if difference.beyond_noise}
        if all(difference.beyond_noise for difference in pair) and len(signs) == 1:
            groups["better" if signs == {-1} else "worse"].append(name)
        else:
            groups["mixed" if signs else "noise"].append(name)
    texts = {
        "better": "better than random rows by token and by row, by more than noise: {}",
        "worse": "worse by both: {}",
        "mixed": "different by one of the two means only, or better by one and worse by the other: {}",
        "noise": "no difference beyond noise: {}",
    }
    parts = [texts[kind].format(", ".join(names)) for kind, names in groups.items() if names]
    best = "" if groups["better"] else "nothing is better than random rows by both means. "
    return f"At {budget:,} tokens: {best}" + "; ".join(parts) + "."
