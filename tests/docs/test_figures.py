"""Figures in the pages are those of one run of the benchmarks, and a figure that is not is found."""

from __future__ import annotations

import re

import pytest

from benchmarks.pages import PAGES, figures, fill, newest


@pytest.fixture(scope="module")
def known() -> dict[str, str]:
    return figures(newest())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_of_a_page_is_of_the_results(known, page):
    text = page.read_text()
    assert fill(text, known) == (text, [])


def test_pages_agree_as_they_name_the_same_figure(known):
    """What once contradicted: training's speed on two pages, the share of the floor on two, who computes attention."""
    pages = {page.name: page.read_text() for page in PAGES}
    for name, *where in (
        ("train.pack.speed", "README.md", "train.md"),
        ("ifd.bfloat16.floor", "README.md", "score.md"),
        ("attention.ratio", "README.md", "backends.md"),
        ("pack.numba.time", "README.md", "pack-stats.md"),
    ):
        assert all(f"<!--= {name} -->{known[name]}<!--=-->" in pages[page] for page in where), name
    # A row of the table that is made of the same results.
    assert f"| dynamic_pack | {known['train.pack.speed']} |" in pages["figures.md"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("4.76", "train.pack.speed is '5.96', not '4.76'"),
        ("", "not ''"),
        ("5.96 samples/s", "is '5.96', not '5.96 samples/s'"),
    ],
)
def test_a_figure_that_was_changed_by_hand_is_told_and_mended(known, text, complaint):
    page = f"It makes <!--= train.pack.speed -->{text}<!--=--> samples/s."
    filled, (told,) = fill(page, known)
    assert complaint in told
    assert filled == f"It makes <!--= train.pack.speed -->{known['train.pack.speed']}<!--=--> samples/s."


def test_what_no_run_of_the_benchmarks_tells_is_refused(known):
    assert fill("<!--= train.speed -->5<!--=-->", known)[1] == ["there is no figure train.speed"]
    assert fill("4.76 samples/s (commit e600be4)", known)[1] == ["figures of commit e600be4 are not from the results"]
    assert fill("23.8 s (commit fe20269)", known)[1] == []  # of a run of its own, and said to be


def test_what_is_counted_in_words_is_counted():
    """Numbers that no benchmark gives: how many attacks there are, and on what the benchmarks ran."""
    from tests.evaluation import attacks

    pages, results = {page.name: page.read_text() for page in PAGES}, newest()
    attacked = len(attacks.BODIES) + len(attacks.PROGRAMS)
    for name in ("README.md", "evaluate.md"):
        assert re.findall(r"(\d+) attacks", pages[name]) == [str(attacked)], name
    machine = (f"on {results['cpus']} cores of an {results['cpu']}", f"Python {results['python'].rpartition('.')[0]}")
    for name in ("README.md", "figures.md"):
        assert all(words in pages[name] for words in machine), name
