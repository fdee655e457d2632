"""What the rows say, from the data that was scored: what clusters are about, rows not chosen, and a list of rows."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from codeact.base.console import counted
from codeact.base.errors import InputError
from codeact.data.records import Record
from codeact.report.rows import Example, Rows, draw_positions, talk
from codeact.report.tables import Cell, Table, reason_name
from codeact.scoring.folder import ScoreFolder
from codeact.scoring.stage import SCORES_FOLDER
from codeact.selection.stage import open_scored_data

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CLUSTERS, _READ = 60, 60  # clusters in the table, and the questions read of each
_LISTED = 150  # rows of the list that were chosen, and rows that were not
_REASONS, _SHOWN = 5, 2  # examples of rows that were not chosen: the most frequent reasons, and rows of each
_WORDS = 6
_CUT = 200  # characters of a question


class Texts:
    """The data of a run; ``missing`` is why it cannot be read, empty where it can."""

    def __init__(self, folder: Path) -> None:
        self.missing = ""
        try:
            self._records = open_scored_data(ScoreFolder.open(folder / SCORES_FOLDER))
        except InputError as error:
            self.missing = f"Not shown, for the rows themselves cannot be read: {error}."

    def question(self, row: int) -> str:
        """The last question of a row in one line, cut; of a row that is none, what is wrong with it."""
        record = self._records.rows(row, row + 1)[0]
        words = (record.question if isinstance(record, Record) else record.message)[: 4 * _CUT].split()
        line = " ".join(words)
        return line if len(line) <= _CUT else f"{line[:_CUT]} \N{HORIZONTAL ELLIPSIS}"

    def example(self, row: int, ifd: float, cluster: int) -> Example:
        """A row in full."""
        record = self._records.rows(row, row + 1)[0]
        turns = record.turns if isinstance(record, Record) else (("cannot be read", record.message),)
        return talk(row, record.id, ifd, None if cluster < 0 else cluster, turns)


def cluster_table(rows: Rows, texts: Texts) -> Table | None:
    """What every cluster is about: words that its questions have and others have not, and its most central question."""
    if rows.cluster is None or rows.chosen is None:
        return None
    labels, sizes = np.unique(rows.cluster[rows.cluster >= 0], return_counts=True)
    if len(labels) < 2:
        return None
    shown = np.sort(labels[np.argsort(-sizes, kind="stable")[:_CLUSTERS]]).tolist()
    members = {label: np.flatnonzero(rows.cluster == label) for label in shown}
    read = {label: draw_positions(members[label], _READ) for label in shown}
    questions = {label: [texts.question(int(row)) for row in read[label]] for label in shown}
    words = telling_words(questions)
    body: list[list[Cell]] = []
    for label in shown:
        inside = members[label]
        ifd = rows.ifd[inside][np.isfinite(rows.ifd[inside])]
        median = f"{np.median(ifd):.3f}" if len(ifd) else None
        typical = questions[label][_central(rows, read[label])]
        body.append([str(label), len(inside), int(rows.chosen[inside].sum()), median, words[label] or None, typical])
    caption = "What every cluster is about: words that its questions have more often than others', and the question "
    caption += f"nearest to its middle. From at most {_READ} questions of each."
    if len(shown) < len(labels):
        caption += f" Shown are the {len(shown)} largest of {len(labels):,} clusters."
    columns = ["cluster", "rows", "chosen", "median IFD", "words", "typical question"]
    return Table(caption, columns, body, numbers=(1, 2, 3), texts=(4, 5), listed=True)


def telling_words(questions: dict[int, list[str]]) -> dict[int, str]:
    """The words that tell the questions of each label from those of all, the most telling first.

    A word counts once a question. It weighs p log(p / q), its part of the Kullback-Leibler divergence, for the shares p
    and q of the questions that have it, of this label and of all labels alike; so words of every label weigh nothing.
    """
    shares: dict[int, dict[str, float]] = {}
    everywhere: Counter[str] = Counter()
    for label, texts in questions.items():
        found = Counter(word for text in texts for word in sorted({*re.findall(r"[^\W\d_]{3,20}", text.lower())}))
        shares[label] = {word: count / len(texts) for word, count in found.items() if count > 1 or len(texts) < 4}
        everywhere.update(shares[label])
    told = {}
    for label, of_label in shares.items():
        weights = {word: p * math.log(p * len(shares) / everywhere[word]) for word, p in of_label.items()}
        best = sorted((word for word in weights if weights[word] > 0.01), key=lambda word: (-weights[word], word))
        told[label] = ", ".join(best[:_WORDS])
    return told


def _central(rows: Rows, read: NDArray[np.int64]) -> int:
    """Which of these rows is nearest to their mean: the first where they have no vectors."""
    if rows.embedded is None or not np.isin(read, rows.embedded.rows).all():
        return 0
    vectors = rows.embedded.vectors[np.searchsorted(rows.embedded.rows, read)]
    return int((vectors @ vectors.mean(axis=0)).argmax())


def left_out(rows: Rows, texts: Texts) -> list[tuple[str, str, list[Example]]]:
    """Of every reason not to choose a row: title, introduction, and its rows of highest IFD."""
    groups = []
    for reason, count in rows.reasons.most_common(_REASONS):
        inside = np.flatnonzero(rows.fate == list(rows.reasons).index(reason))
        best = inside[np.argsort(-rows.ifd[inside], kind="stable")[:_SHOWN]]
        clusters = np.full(len(best), -1) if rows.cluster is None else rows.cluster[best]
        shown = [texts.example(int(n), rows.ifd[n], int(c)) for n, c in zip(best, clusters, strict=True)]
        intro = f"Of {counted(count, 'such row')}, those of highest IFD: what the choice passed over."
        groups.append((f"Not chosen: {reason_name(reason)}", intro, shown))
    return groups


def row_table(rows: Rows, texts: Texts) -> Table | None:
    """A list of rows, chosen and not."""
    if rows.chosen is None:
        return None
    drawn = [draw_positions(np.flatnonzero(of), _LISTED) for of in (rows.chosen, ~rows.chosen)]
    reasons = [*map(reason_name, rows.reasons), "chosen"]  # -1 is the last
    body: list[list[Cell]] = []
    for row in np.sort(np.concatenate(drawn)).tolist():
        cluster = -1 if rows.cluster is None else int(rows.cluster[row])
        ifd = f"{rows.ifd[row]:.3f}" if np.isfinite(rows.ifd[row]) else None
        place = None if cluster < 0 else cluster
        body.append([row, reasons[rows.fate[row]], place, ifd, int(rows.tokens[row]), texts.question(row)])
    many = "All" if len(body) == len(rows.ifd) else f"A random sample of {len(body):,} of"
    caption = f"{many} {counted(len(rows.ifd), 'row')}: what became of each, and what it asks"
    columns = ["row", "fate", "cluster", "IFD", "tokens", "question"]
    return Table(caption, columns, body, numbers=(2, 3, 4), texts=(5,), folded=True, listed=True)
