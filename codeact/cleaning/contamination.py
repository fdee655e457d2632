"""Rows that give away a task of an evaluation set: by n-grams of its question and solution, and by similar questions.

A task's own words decide how rare a word is, so what becomes of a row does not depend on the other rows.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from codeact.base.parsing import UNPARSABLE, parse_python
from codeact.cleaning.shingles import HashBlock

TASK_GRAM = 8
"""Tokens of the n-grams that rows and tasks are compared by."""

Measure = Literal["question_ngrams", "solution_ngrams", "question_words", "question_vector"]
MEASURES: tuple[str, ...] = get_args(Measure)

_EXAMPLE = re.compile(r"^\s*(?:>>>|assert\b|for (?:ex|s)am?ple|examples?\b|e\.g\.)", re.IGNORECASE | re.MULTILINE)
_DOCSTRING = re.compile(r"(\"\"\"|''')(.*?)\1", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationTask:
    """What a row must not give away. ``question`` is in words, without signature and examples."""

    id: str
    question: str
    solution: str


def question_of_prompt(prompt: str) -> str:
    """The words of a prompt that is Python: its last docstring, up to the first example."""
    text = _docstring(prompt)
    example = _EXAMPLE.search(text)
    words = text[: example.start()] if example else text
    return " ".join((words if words.strip() else text).split())


def _docstring(prompt: str) -> str:
    try:
        found = [
            ast.get_docstring(node) for node in ast.walk(parse_python(prompt)) if isinstance(node, _WITH_DOCSTRING)
        ]
    except UNPARSABLE:
        found = [match[2] for match in _DOCSTRING.finditer(prompt)]
    return next((text for text in reversed(found) if text), prompt)


_WITH_DOCSTRING = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """Of every row the task that it is nearest to, against its threshold: (rows,) each.

    ``task`` is -1 where nothing is shared; ``similarity`` is a share or a cosine, ``measure`` a place in ``MEASURES``;
    ``excess`` is similarity / threshold: from 1 on the row gives the task away.
    """

    task: NDArray[np.int64]
    similarity: NDArray[np.float64]
    measure: NDArray[np.int64]
    excess: NDArray[np.float64]

    @classmethod
    def none(cls, rows: int) -> Matches:
        """Nothing is shared."""
        return cls(np.full(rows, -1, np.int64), np.zeros(rows), np.zeros(rows, np.int64), np.zeros(rows))

    def put(self, start: int, block: Matches) -> None:
        """Take over those of a block of rows that begins at ``start``."""
        for field in fields(self):
            part = getattr(block, field.name)
            getattr(self, field.name)[start : start + len(part)] = part

    def note(
        self, rows: NDArray[np.int64], tasks: NDArray[np.int64], similarity: Any, measure: Measure, threshold: float
    ) -> None:
        """Take in one comparison of each of these rows."""
        excess = np.asarray(similarity, np.float64) / threshold
        more = excess > self.excess[rows]
        rows = rows[more]
        self.task[rows], self.similarity[rows] = tasks[more], np.asarray(similarity)[more]
        self.measure[rows], self.excess[rows] = MEASURES.index(measure), excess[more]


class TaskIndex:
    """Tasks, ready to compare blocks of rows with."""

    def __init__(self, tasks: Sequence[EvaluationTask], overlap: float, words: float) -> None:
        """Index tasks.

        Args:
            tasks: of all sets.
            overlap: share of a task's n-grams from which on a row gives it away.
            words: cosine of two questions, by words weighted by how rare they are among the tasks, likewise.
        """
        self.tasks, self._overlap, self._threshold = tasks, overlap, words
        questions = [HashBlock.tokens_of([task.question]) for task in tasks]
        solutions = [HashBlock.tokens_of([task.solution]) for task in tasks]
        self._grams: list[tuple[Measure, _Lookup]] = [
            ("question_ngrams", _Lookup([block.grams(TASK_GRAM).hashes for block in questions])),
            ("solution_ngrams", _Lookup([block.grams(TASK_GRAM).hashes for block in solutions])),
        ]
        self._words = _Lookup([block.words().hashes for block in questions])
        self._vocabulary, counts = np.unique(self._words.hashes, return_counts=True)
        self._weights = np.log((1 + len(tasks)) / counts).astype(np.float32)
        self._unknown = float(np.log(1 + len(tasks)))  # of a word in no task: as of one in a single task
        self._vectors = np.zeros((len(tasks), len(self._vocabulary)), np.float32)
        places = np.searchsorted(self._vocabulary, self._words.hashes)
        self._vectors[self._words.tasks, places] = self._weights[places]
        self._vectors /= np.maximum(np.linalg.norm(self._vectors, axis=1, keepdims=True), 1e-9)

    def matches(self, rows: HashBlock, questions: HashBlock) -> Matches:
        """Compare a block of rows.

        Args:
            rows: the tokens of all that each row says.
            questions: those of the question of each.
        """
        found = Matches.none(rows.texts)
        grams = rows.grams(TASK_GRAM)
        for measure, lookup in self._grams:
            if not self._overlap:
                break
            owners, tasks, shares = lookup.shares(grams)
            best = np.lexsort((tasks, -shares, owners))
            best = best[np.diff(owners[best], prepend=-1) > 0]
            found.note(owners[best], tasks[best], shares[best], measure, self._overlap)
        if not self._threshold:
            return found
        cosines = self._cosines(questions.words().distinct())
        best = cosines.argmax(axis=1)
        found.note(np.arange(rows.texts), best, cosines[np.arange(rows.texts), best], "question_words", self._threshold)
        return found

    def _cosines(self, words: HashBlock) -> NDArray[np.float32]:
        """(rows, tasks)."""
        places = np.minimum(np.searchsorted(self._vocabulary, words.hashes), len(self._vocabulary) - 1)
        known = self._vocabulary[places] == words.hashes
        weights = np.where(known, self._weights[places], self._unknown)
        norms = np.sqrt(np.bincount(words.owners, weights**2, words.texts)).astype(np.float32)
        vectors = np.zeros((words.texts, len(self._vocabulary)), np.float32)
        vectors[words.owners[known], places[known]] = weights[known]
        vectors /= np.maximum(norms, 1e-9)[:, None]
        cosines: NDArray[np.float32] = vectors @ self._vectors.T
        return cosines


class _Lookup:
    """``hashes`` ascending, and ``tasks``, whose each is."""

    def __init__(self, sets: Sequence[NDArray[np.uint64]]) -> None:
        # As ``distinct`` leaves the hashes of rows: without what that loses.
        sets = [np.unique(HashBlock(hashes, np.zeros(len(hashes), np.int64), 1).distinct().hashes) for hashes in sets]
        self._sizes = np.array([max(1, len(hashes)) for hashes in sets])
        hashes = np.concatenate(sets)
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.tasks = hashes[order], np.repeat(np.arange(len(sets)), list(map(len, sets)))[order]
        # Nearly all hashes of rows are those of no task, and a table of 2^20 places says so of all but a few.
        self._there = np.zeros(1 << 20, np.bool_)
        self._there[hashes >> np.uint64(44)] = True

    def shares(self, rows: HashBlock) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Pairs of a row and a task that have something in common, and which share of the task's set the row has."""
        maybe = np.flatnonzero(self._there[rows.hashes >> np.uint64(44)])
        rows = HashBlock(rows.hashes[maybe], rows.owners[maybe], rows.texts).distinct()
        first = np.searchsorted(self.hashes, rows.hashes, "left")
        counts = np.searchsorted(self.hashes, rows.hashes, "right") - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        tasks = self.tasks[np.repeat(first, counts) + within]
        pairs, shared = np.unique(np.repeat(rows.owners, counts) * len(self._sizes) + tasks, return_counts=True)
        owners, tasks = np.divmod(pairs, len(self._sizes))
        return owners, tasks, shared / self._sizes[tasks]


def vector_matches(
    matches: Matches, vectors: Any, rows: NDArray[np.int64], tasks: NDArray[np.float32], threshold: float
) -> None:
    """Compare rows with tasks by the vectors of their questions, and note it in ``matches``.

    Args:
        vectors: (N, D) float32 unit vectors of rows, also in a memory-mapped file.
        rows: (N,) which row each belongs to.
        tasks: (tasks, D) unit vectors of the tasks' questions.
        threshold: a cosine.
    """
    for start in range(0, len(rows), 4096):
        cosines = np.asarray(vectors[start : start + 4096]) @ tasks.T
        best = cosines.argmax(axis=1)
        block = rows[start : start + 4096]
        matches.note(block, best, cosines[np.arange(len(best)), best], "question_vector", threshold)


def number_of_tasks(tasks: Iterable[EvaluationTask]) -> dict[str, int]:
    """How many tasks there are of every set, by what stands before the slash of their ids."""
    counts: dict[str, int] = {}
    for task in tasks:
        name = task.id.partition("/")[0]
        counts[name] = counts.get(name, 0) + 1
    return counts
