"""What is said, shown and counted for a person."""

import io
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from codeact.base import console
from codeact.base.console import Progress, aligned, counted, duration, percent, say, short, size, visible


class Terminal(io.StringIO):
    """A standard error that is looked at."""

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The seconds that ``Progress`` reads; a test moves them."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: now.seconds)
    return now


def open_terminal(monkeypatch):
    """Somebody looks at the standard error; not a fixture, as pytest puts its own there when a test begins."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_nothing_heavy_is_loaded():
    code = (
        "import sys, codeact.base.console as c; c.say(c.aligned([('a', 'b')]))\n"
        "with c.Progress(1, 'rows', 'x') as step: step(1)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'pyarrow', 'numpy', 'tqdm'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == "  a  b\nx: 1 rows to do\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("a\r\nb\rc", "a\nb⟨U+000D⟩c"),
        ("\x1b[31mred\x1b[0m\x9b1m\x07", "⟨U+001B⟩[31mred⟨U+001B⟩[0m⟨U+009B⟩1m⟨U+0007⟩"),
        ("\ud800 \udfff", "⟨U+D800⟩ ⟨U+DFFF⟩"),
        ("x\u202ey\u2066z\u2028", "x⟨U+202E⟩y⟨U+2066⟩z⟨U+2028⟩"),
        ("é 中 😀", "é 中 😀"),
    ],
)
def test_no_text_reaches_a_terminal_raw(text, shown, capsys):
    assert visible(text) == shown
    shown.encode()  # a lone surrogate could not be
    say(text)
    assert capsys.readouterr() == ("", shown + "\n")
    assert aligned([("k", text)]) == "  k  " + shown.replace("\n", " ").replace("\t", " ")


def test_a_table_is_as_wide_as_its_cells():
    assert aligned([("a", "one"), ("longer", "")]) == "  a       one\n  longer"
    assert (
        aligned([("step", "rows"), ("s", "1,234"), ("t", "5")], left=1) == "  step   rows\n  s     1,234\n  t         5"
    )
    rows = [("name", "n"), ("a", "10")]
    assert aligned(rows, left=1, markdown=True) == "| name |  n |\n| ---- | -: |\n| a    | 10 |"
    assert aligned([]) == ""
    with pytest.raises(ValueError, match="zip"):
        aligned([("a", "b"), ("c",)])


def test_a_log_gets_a_first_line_and_one_a_minute(capsys, clock):
    with Progress(1200, "rows", "scoring") as step:
        for _ in range(12):  # twelve parts of 25 seconds
            clock.seconds += 25
            step(99.5, 2500)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 1,200 rows to do",
        "scoring: 298 of 1,200 rows, 100 tokens/s, about 3 min 47 s left",
        "scoring: 597 of 1,200 rows, 100 tokens/s, about 2 min 32 s left",
        "scoring: 896 of 1,200 rows, 100 tokens/s, about 76.5 s left",
        "scoring: 1,194 of 1,200 rows, 100 tokens/s, about 1.5 s left",
    ]


def test_nothing_to_do_or_to_show_is_silent(monkeypatch, clock):
    terminal = open_terminal(monkeypatch)
    for total, show in ((0, True), (5, False)):
        with Progress(total, "rows", "scoring", show=show) as step:
            clock.seconds += 100
            step(1)
    assert terminal.getvalue() == ""


def test_shares_that_add_up_to_a_hair_more_are_all(capsys, clock):
    with Progress(1, "rows", "scoring") as step:
        for _ in range(11):
            clock.seconds += 30
            step(0.1)
    assert "1 of 1 rows, about 0.0 s left" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch, clock):
    terminal = open_terminal(monkeypatch)
    with Progress(40, "rows", "scoring") as step:
        clock.seconds += 1
        step(10, 1000)
        say("a line")
        logging.getLogger("codeact.test").warning("logged")
        step(30, 1000)
    shown = terminal.getvalue()
    assert re.search(r"scoring: 100% \|#+\| 40 of 40 rows \[[\d:]+<[\d:]+, 2,000 tokens/s\]", shown)
    before = shown.split("a line\n")[0]
    assert before.endswith("\r")  # the bar was taken away first


def test_numbers_have_one_set_of_units():
    assert [counted(n, "row") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
    assert [percent(share) for share in (0.25, 0)] == ["25.0 %", "0.0 %"]
    assert percent(None) == percent(float("nan")) == "\N{EN DASH}"
    assert percent(0.256, 0) == "26 %"
    assert counted(2, "entry", "entries") == "2 entries"
    assert [size(b) for b in (0, 2047, 2**20, 2**30 - 1, 1.5 * 2**30)] == [
        "0 MiB",
        "2 KiB",
        "1 MiB",
        "1,024 MiB",
        "1.50 GiB",
    ]
    seconds = (0.04, 99.9, 100, 3599.6, 3723, 360_000)
    assert [duration(s) for s in seconds] == ["0.0 s", "99.9 s", "1 min 40 s", "1 h 0 min", "1 h 2 min", "100 h 0 min"]
    assert [short(v) for v in (0, 0.5, 950, 2000, 12_000, 1_500_000, 2e9)] == "0 0.5 950 2,000 12k 1.5M 2G".split()
