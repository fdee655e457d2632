"""What the rows say, from the data that was scored: what clusters are about, rows not chosen, and a list of rows."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

from codeact.base.console import counted
from codeact.base.errors import InputError
from codeact.data.records import BadRow, Record
from codeact.report.rows import Example, Rows, draw_positions, talk
from codeact.report.tables import Cell, Table, reason_name
from codeact.scoring.folder import ScoreFolder
from codeact.scoring.stage import SCORES_FOLDER
from codeact.selection.stage import open_scored_data

_CLUSTERS, _READ = 60, 60  # clusters in the table, and the questions read of each
_LISTED = 150  # rows of the list that were chosen, and rows that were not
_REASONS, _SHOWN = 5, 2  # the most frequent reasons not to choose a row, and examples of each
_CUT = 200  # characters of a question


class Texts:
    """The data of a run; ``missing`` is why it cannot be read, empty where it can."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.missing = ""
        try:
            self._records = open_scored_data(ScoreFolder.open(folder / SCORES_FOLDER))
            if len(self._records) != rows:
                raise InputError(f"{self._records.source} has {len(self._records):,} rows and not {rows:,}")
        except InputError as error:
            why = str(error).split("; ")[0]  # the remedies are of other commands
            self.missing = f"Not shown, for the rows cannot be read: {why}. Put them back, and run codeact report."

    def __getitem__(self, row: int) -> Record | BadRow:
        return self._records.rows(row, row + 1)[0]

    def question(self, row: int) -> str:
        """The last question of a row in one line, cut; of a row that is none, what is wrong with it."""
        record = self[row]
        text = record.question if isinstance(record, Record) else record.message
        line = " ".join(text[: 4 * _CUT].split())
        return line if len(line) <= _CUT else f"{line[:_CUT]} \N{HORIZONTAL ELLIPSIS}"


def cluster_table(rows: Rows, texts: Texts) -> Table | None:
    """What every cluster is about: words that its questions have and others have not, and its most central question."""
    assert rows.chosen is not None
    labels, sizes = np.unique([] if rows.cluster is None else rows.cluster[rows.cluster >= 0], return_counts=True)
    if len(labels) < 2:
        return None
    shown = np.sort(labels[np.argsort(-sizes, kind="stable")[:_CLUSTERS]]).tolist()
    members = [np.flatnonzero(rows.cluster == label) for label in shown]
    read = [draw_positions(inside, _READ) for inside in members]
    questions = [[texts.question(int(row)) for row in drawn] for drawn in read]
    body: list[list[Cell]] = []
    columns = zip(shown, members, read, questions, telling_words(questions), strict=True)
    for label, inside, drawn, asked, words in columns:
        central = 0  # where there are no vectors
        if rows.embedded is not None and np.isin(drawn, rows.embedded.rows).all():
            vectors = rows.embedded.vectors[np.searchsorted(rows.embedded.rows, drawn)]
            central = int((vectors @ vectors.mean(axis=0)).argmax())
        ifd = rows.ifd[inside][np.isfinite(rows.ifd[inside])]
        median, told = f"{np.median(ifd):.3f}" if len(ifd) else None, ", ".join(words) or None
        body.append([str(label), len(inside), int(rows.chosen[inside].sum()), median, told, asked[central]])
    caption = (
        f"What {'every cluster is' if len(shown) == len(labels) else f'the {len(shown)} largest clusters are'} about: "
        f"words that its questions have more often than others', and the question nearest to its middle. From at most "
        f"{_READ} questions of each."
    )
    heads = ["cluster", "rows", "chosen", "median IFD", "words", "typical question"]
    return Table(caption, heads, body, numbers=(1, 2, 3), texts=(4, 5), listed=True)


def telling_words(groups: list[list[str]], most: int = 6) -> list[list[str]]:
    """The words that tell the texts of each group from those of all, the most telling first.

    A word counts once a text. It weighs p log(p / q), its part of the Kullback-Leibler divergence, for the shares p and
    q of the texts that have it, in this group and in all groups alike; so words that are everywhere weigh nothing.
    """
    found = [
        Counter(word for text in texts for word in {*re.findall(r"[^\W\d_]{3,20}", text.lower())}) for texts in groups
    ]
    shares = [{word: n / len(texts) for word, n in of.items()} for of, texts in zip(found, groups, strict=True)]
    sums: Counter[str] = Counter()
    for share in shares:
        sums.update(share)
    weights = [{word: p * math.log(p * len(groups) / sums[word]) for word, p in share.items()} for share in shares]
    return [
        sorted((word for word in of if of[word] > 0.01), key=lambda word: (-of[word], word))[:most] for of in weights
    ]


def left_out(rows: Rows, texts: Texts) -> list[tuple[str, str, list[Example]]]:
    """Of every reason not to choose a row: title, introduction, and its rows of highest IFD."""
    groups = []
    for reason, count in rows.reasons.most_common(_REASONS):
        inside = np.flatnonzero(rows.fate == list(rows.reasons).index(reason))
        examples = []
        for row in inside[np.argsort(-rows.ifd[inside], kind="stable")[:_SHOWN]].tolist():
            record = texts[row]
            turns = record.turns if isinstance(record, Record) else (("cannot be read", record.message),)
            examples.append(talk(row, record.id, float(rows.ifd[row]), rows.label(row), turns))
        intro = f"Of {counted(count, 'such row')}, those of highest IFD: what the choice passed over."
        groups.append((f"Not chosen: {reason_name(reason)}", intro, examples))
    return groups


def row_table(rows: Rows, texts: Texts) -> Table:
    """A list of rows, chosen and not."""
    drawn = [draw_positions(np.flatnonzero(of), _LISTED) for of in (rows.fate < 0, rows.fate >= 0)]
    reasons = [*map(reason_name, rows.reasons), "chosen"]  # -1 is the last
    body: list[list[Cell]] = []
    for row in np.sort(np.concatenate(drawn)).tolist():
        ifd = f"{rows.ifd[row]:.3f}" if np.isfinite(rows.ifd[row]) else None
        body.append([row, reasons[rows.fate[row]], rows.label(row), ifd, int(rows.tokens[row]), texts.question(row)])
    many = "All" if len(body) == len(rows.ifd) else f"A random sample of {len(body):,} of"
    caption = f"{many} {counted(len(rows.ifd), 'row')}: what became of each, and what it asks"
    columns = ["row", "fate", "cluster", "IFD", "tokens", "question"]
    return Table(caption, columns, body, numbers=(2, 3, 4), texts=(5,), folded=True, listed=True)
