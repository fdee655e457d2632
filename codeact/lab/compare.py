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

_Cells = Sequence[Sequence[str]]

FACTS = ("rows", "tokens", "trained_on_tokens", "steps")
HEAD = ("arm", "seeds", "rows", "tokens", "trained on", "steps", "loss a token", "a row", "short", "middle", "long",
        "to random, a token", "a row")  # fmt: skip
TASK_HEAD = ("solutions, a token", "to random", "passed", "to random")


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
    """``tables``, ``clusters``: cells of every budget's tables, the head first; ``sentences``: one a budget."""

    held_out: int
    tokens: int
    tables: Mapping[int, _Cells]
    clusters: Mapping[int, _Cells]
    sentences: Sequence[str]

    def page(self, stopped: str = "") -> str:
        """As Markdown."""
        parts = [
            "# What the lab found",
            *([f"**Not finished: {stopped}.**"] if stopped else []),
            *self.sentences,
            f"The loss, in nats, of the answers of {self.held_out:,} rows that nobody chose from ({self.tokens:,} "
            "tokens): the mean over their tokens, and the mean over rows of each row's mean. Means over seeds. Less is "
            "better. Short, middle, long: the loss a token in thirds of these rows by length of answer. Differences to "
            "random rows of as many tokens, with the interval that holds 95 % of the resamples of rows and seeds. "
            "Rows, tokens, steps: means over seeds; tokens are question + answer as scored, trained on: the whole "
            "samples in the format of the training. Solutions, passed: the loss of the tasks' own solutions, and the "
            "share of tasks that the greedy program solves, where the lab was given tasks. It says nothing of other "
            "models, data or budgets.",
        ]
        for budget, cells in self.tables.items():
            parts += [f"## {budget:,} tokens", aligned(cells, 1, markdown=True)]
            parts += ["The loss a token by cluster of the question:", aligned(self.clusters[budget], 1, markdown=True)]
        return "\n\n".join(parts) + "\n"


def compare(
    settings: LabSettings, results: Mapping[Trial, Mapping[str, Any]], clusters: NDArray[np.int32]
) -> Comparison:
    """Put the results together, of as many seeds as there are.

    Args:
        settings: which arms and budgets there are.
        results: of each trial rows, tokens, trained_on_tokens, steps; of all held-out rows losses and loss_tokens; of
            all tasks, where there are some, solution_losses, solution_tokens, and passed.
        clusters: (held-out rows,) of their questions.
    """
    tokens = np.asarray(next((result["loss_tokens"] for result in results.values()), []), np.int64)
    fits = tokens > 0
    sizes, labels = tokens[fits], clusters[: len(tokens)][fits]
    thirds = np.array_split(np.argsort(sizes, kind="stable"), 3)
    kinds = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    tables, by_cluster, sentences = {}, {}, []
    for budget in settings.budgets:
        sides = {arm.name: budget for arm in settings.arms()} | {"all": 0, "untrained": 0}
        done = {
            name: [result for trial, result in results.items() if (trial.arm, trial.budget) == (name, size)]
            for name, size in sides.items()
        }
        if not done["random"]:
            continue
        random = done["random"]
        body, rows, verdicts = [], [], {}
        for name, found in ((name, found) for name, found in done.items() if found):
            losses = _stack(found, "losses")[:, fits]
            pair = differences(losses, _stack(random, "losses")[:, fits], sizes) if found is not random else None
            if pair is not None and sides[name]:
                verdicts[name] = pair
            mean = losses.mean(axis=0)
            level = [mean.sum() / sizes.sum(), (mean / sizes).mean()]
            level += [mean[third].sum() / max(sizes[third].sum(), 1) for third in thirds]
            facts = [np.mean([result.get(fact, 0) for result in found]) for fact in FACTS]
            seeds = str(len(found)) if name != "untrained" else ""
            shown = [*(f"{value:,.0f}" for value in facts), *(f"{value:.3f}" for value in level)]
            body.append([name, seeds, *shown, *map(str, pair or ("", "")), *_on_tasks(found, random)])
            rows.append([name, *(f"{mean[kind].sum() / sizes[kind].sum():.3f}" for kind in kinds)])
        tables[budget] = [[*HEAD, *TASK_HEAD][: len(body[0])], *body]
        by_cluster[budget] = [["arm", *(f"{labels[kind[0]]} ({len(kind)} rows)" for kind in kinds)], *rows]
        sentences.append(_sentence(budget, verdicts))
    return Comparison(
        held_out=int(fits.sum()),
        tokens=int(sizes.sum()),
        tables=tables,
        clusters=by_cluster,
        sentences=sentences,
    )


def _stack(results: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """(seeds, rows or tasks)."""
    return np.array([result[name] for result in results], np.float64)


def _on_tasks(found: Sequence[Mapping[str, Any]], random: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells of the loss of solutions, and of the programs that pass, as far as both were tried."""
    cells: list[str] = []
    sizes = np.asarray(found[0].get("solution_tokens", []), np.int64)
    for name, fits, weights in (
        ("solution_losses", sizes > 0, sizes[sizes > 0]),
        ("passed", slice(None), np.ones(len(sizes), np.int64)),
    ):
        if weights.size and name in found[0]:
            side, other = _stack(found, name)[:, fits], _stack(random, name)[:, fits]
            mean = side.mean(axis=0).sum() / weights.sum()
            cells += [f"{mean:.3f}", "" if found is random else str(differences(side, other, weights)[0])]
    return cells


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
