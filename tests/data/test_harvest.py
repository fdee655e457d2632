"""Harvest: every answer is the program that was written, minus its docstring; nothing is imported on the way."""

from __future__ import annotations

import ast
import gc
import importlib.util
import json
import os
import sys
import sysconfig
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from codeact.base.errors import InputError
from codeact.data.harvest import STDLIB_EXCLUDED, HarvestLimits, HarvestSummary, harvest, write_harvest
from codeact.data.records import Columns, Record, open_records

EVERYTHING = HarvestLimits(min_docstring=1, min_lines=1, max_lines=10**9, max_characters=10**9)
DOC = '"""Return one more than it is given."""'


def rows_of(tmp_path: Path, source: str | bytes, limits: HarvestLimits = EVERYTHING) -> list[dict[str, Any]]:
    path = tmp_path / "source.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    return list(harvest(str(path), limits=limits))


def answer(tmp_path: Path, source: str | bytes) -> str:
    (row,) = rows_of(tmp_path, source)
    return str(row["output"])


def skipped(tmp_path: Path, source: str, limits: HarvestLimits | None = None) -> Counter[str]:
    (tmp_path / "source.py").write_text(source)
    summary = HarvestSummary()
    rows = list(harvest(str(tmp_path / "source.py"), limits=limits, summary=summary))
    assert summary.kept == len(rows)
    assert summary.functions == summary.kept + summary.skipped.total()
    return summary.skipped


def without_docstring(function: Any) -> str:
    function.body = function.body[1:]
    return ast.dump(function)


# ------------------------------------------------------------------------------------------- the whole standard library


@pytest.fixture(autouse=True, scope="module")
def _without_garbage_collection() -> Iterator[None]:
    """Trees hold no cycles; to look for some in all that other tests have loaded nearly doubles the time."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def stdlib() -> tuple[list[dict[str, Any]], HarvestSummary]:
    summary = HarvestSummary()
    return list(harvest("stdlib", limits=EVERYTHING, summary=summary)), summary


def same(one: object, other: object) -> bool:
    """Whether two trees are equal but for their positions; `ast.dump` of both would say the same, slower."""
    if isinstance(one, ast.AST):
        fields = one._fields
        return type(one) is type(other) and all(same(getattr(one, key), getattr(other, key)) for key in fields)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


def functions_of(node: Any) -> Iterator[Any]:
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            else:
                yield from functions_of(child)


def test_every_answer_of_the_standard_library_is_its_original(
    stdlib: tuple[list[dict[str, Any]], HarvestSummary],
) -> None:
    rows, summary = stdlib
    for path, of_file in groupby(rows, key=itemgetter("path")):
        with tokenize.open(Path(sysconfig.get_path("stdlib"), path)) as handle:
            originals = {function.lineno: function for function in functions_of(ast.parse(handle.read()))}
        for row in of_file:
            (parsed,) = ast.parse(row["output"]).body
            original = originals.pop(row["line"])
            del original.body[0]
            assert ast.get_docstring(parsed) is None
            assert same(parsed, original), row["id"]
    assert len(rows) > 3000
    assert summary.kept == len(rows)
    assert summary.skipped["unfaithful"] == 0
    assert summary.functions == summary.kept + summary.skipped.total()


def test_the_rows_of_the_standard_library_in_order_and_unique(
    stdlib: tuple[list[dict[str, Any]], HarvestSummary],
) -> None:
    rows, _ = stdlib
    places = [(row["path"], row["line"]) for row in rows]
    assert places == sorted(places)
    assert len({row["id"] for row in rows}) == len({row["output"] for row in rows}) == len(rows)
    assert not any(STDLIB_EXCLUDED & set(Path(path).parts) for path, _ in places)
    assert "json.decoder:JSONDecoder.decode" in {row["id"] for row in rows}


@pytest.fixture(scope="module")
def asyncio_ids() -> list[str]:
    return [row["id"] for row in harvest("asyncio", limits=EVERYTHING)]


@pytest.mark.parametrize("limit", [1, 7, 100, 10**6])
def test_an_evenly_spread_sample(asyncio_ids: list[str], limit: int) -> None:
    ids = asyncio_ids
    assert len(ids) > 150
    summary = HarvestSummary()
    sample = [row["id"] for row in harvest("asyncio", limit=limit, limits=EVERYTHING, summary=summary)]
    chosen = [ids.index(row_id) for row_id in sample]
    assert len(sample) == summary.kept == min(limit, len(ids))
    gaps = [b - a for a, b in pairwise([-1, *chosen])]  # the first row is as far from the start as the others apart
    assert max(gaps) - min(gaps) <= 1
    assert chosen[-1] == len(ids) - 1
    assert summary.functions == summary.kept + summary.skipped.total()


def test_the_summary_is_one_line_for_a_person(tmp_path: Path) -> None:
    function = f"def f(x):\n    {DOC}\n    return x + %d\n"
    (tmp_path / "a.py").write_text(
        "".join(function % number for number in range(1200)) + "def g():\n    return 1\n" * 2
    )
    summary = write_harvest(str(tmp_path), tmp_path / "out.jsonl", limit=1100)
    assert str(summary) == (
        "harvested 1,100 of 1,200 usable functions (1,202 in 1 files; skipped: 2 without a docstring)"
    )
    (tmp_path / "b.py").write_text("def f(:\n")
    (tmp_path / "c.py").write_text(function % 1 + f"def f():\n    {DOC}\n")
    summary = write_harvest(str(tmp_path), tmp_path / "out.jsonl")
    assert str(summary) == (
        "harvested 1,200 of 1,200 usable functions (1,204 in 3 files; skipped: 2 without a docstring, 1 duplicate, "
        "1 trivial body, 1 unreadable files)"
    )
    (tmp_path / "b.py").write_text(function % 1)
    for name in "ac":
        (tmp_path / f"{name}.py").unlink()
    summary = write_harvest(str(tmp_path), tmp_path / "out.jsonl")
    assert str(summary) == "harvested 1 of 1 usable functions (1 in 1 files; skipped: none)"


# -------------------------------------------------------------------------------------------------- how source is cut


def test_a_row_as_a_reader_sees_it(tmp_path: Path) -> None:
    source = f'''
    class Outer:
        class Inner:
            # a comment above is not part of it
            @staticmethod
            @cache(
                size=3
            )
            async def next(x: int,
                           /) -> int:  # why
                # before
                """Return one more.

                    Indented.
                """  # gone

                y = """kept
                as it is"""
                {"# after"}
                return x + 1
    '''
    (row,) = rows_of(tmp_path, textwrap.dedent(source))
    assert (row["id"], row["path"], row["line"]) == ("source:Outer.Inner.next", "source.py", 9)
    assert row["instruction"] == (
        "Write the Python method `next` of the class `Inner` that this signature and docstring describe.\n\n"
        "```python\n@staticmethod\n@cache(\n    size=3\n)\nasync def next(x: int,\n               /) -> int:  # why\n"
        '    # before\n    """Return one more.\n\n        Indented.\n    """\n```'
    )
    assert row["output"] == (
        "@staticmethod\n@cache(\n    size=3\n)\nasync def next(x: int,\n               /) -> int:  # why\n"
        '    # before\n    y = """kept\n            as it is"""\n    # after\n    return x + 1'
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('def f(): "doc"; return 1', "def f(): return 1"),
        ('def f(): "doc" ;  x = 1; return x  # y', "def f(): x = 1; return x"),
        ('def f(): ("do"\n"c"); return 1', "def f(): return 1"),
        ('def f(): "doc"; \\\n  return 1', "def f(): return 1"),
        ('def f():\n    "doc"; return 1', "def f():\n    return 1"),
        ('def f():\n    "doc";\n\n    return 1', "def f():\n    return 1"),
        ('def f():\n  ("""do\n""" "c")\n  return 1', "def f():\n  return 1"),
        ('def f():\n    """é"""; return "é𝄞"', 'def f():\n    return "é𝄞"'),
        ('class é:\n def f(é="𝄞"): "é𝄞"; return é', 'def f(é="𝄞"): return é'),
        ('class A:\n\tdef f(self):\n\t\t"doc"\n\t\treturn 1', "def f(self):\n\treturn 1"),
        ('class A:\n \tdef f(self):\n \t  "doc"\n \t  return 1', "def f(self):\n  return 1"),
        ('\fdef f():\n    "doc"\n\f\n    return 1', "def f():\n    return 1"),
        ('class A:\n\f  def f(self):\n    "do\fc"\n\f    return "\f"', 'def f(self):\n\f    return "\f"'),
        (
            'class A:\n  def f(self):\n    "doc"\n    return (1,\n2, # two\n    3)',
            "def f(self):\n  return (1,\n2, # two\n  3)",
        ),
        ('class A:\n  def f(self):\n    "doc"\n# low\n    return 1', "def f(self):\n# low\n  return 1"),
        (
            'class A:\n  def f(self):\n    "doc"\n    return f"""\n    {1}\n  """',
            'def f(self):\n  return f"""\n    {1}\n  """',
        ),
        ('class A:\n  def f(self):\n    "doc"\n    return "a\\\n    b"', 'def f(self):\n  return "a\\\n    b"'),
        ('def f():\n    "doc"\n    return 1 \\\n\n', "def f():\n    return 1"),
        ('def f():\n    "doc"\n    def g():\n        "not a row of its own"\n        return 1', None),
        ("def f():\n    r'''d\\oc'''\n    return 1\n# after", "def f():\n    return 1"),
        ('if 1:\n  try: pass\n  except E:\n    def f():\n      "doc"\n      return 1', "def f():\n  return 1"),
        ('match x:\n  case 1:\n    def f():\n      "doc"\n      return 1', "def f():\n  return 1"),
        ('def f():\n    "\u2028\x1c\x85 doc"\n    return "\u2028"', 'def f():\n    return "\u2028"'),
    ],
)
def test_awkward_source(tmp_path: Path, source: str, expected: str | None) -> None:
    found = answer(tmp_path, source)
    if expected is not None:
        assert found == expected
    for newline in ("\r\n", "\r"):
        assert answer(tmp_path, source.replace("\n", newline)) == found


def test_source_in_other_encodings(tmp_path: Path) -> None:
    source = '# coding: latin-1\ndef f():\n    "Größe"\n    return "é"\n'
    assert answer(tmp_path, source.encode("latin-1")) == 'def f():\n    return "é"'
    assert answer(tmp_path, b"\xef\xbb\xbf" + b'def f():\n    "doc"\n    return 1') == "def f():\n    return 1"


def test_a_docstring_with_a_fence_gets_a_longer_fence(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, 'def f():\n    """As ````x````."""\n    return 1')
    assert "\n`````python\n" in row["instruction"]
    assert row["instruction"].endswith("\n`````")


def test_decorators_stay_whole(tmp_path: Path) -> None:
    kept = "@(  # one\n  z\n)\n@a.b[1](\n  2\n)\n@c\ndef f():\n    return 1"
    assert answer(tmp_path, kept.replace("    return", '    "doc"\n    return')) == kept


names = st.sampled_from(["x", "é", "yy"])
strings = st.sampled_from(
    ['"s"', "'''a\n  b'''", '"""\t\n\n"""', 'f"""\n {1}\n"""', "b'q'", '"𝄞" "t"', '("a"\n    "b")']
)
simple = st.one_of(
    st.just("pass"),
    names.map("del {}".format),
    strings.map("return {}".format),
    st.tuples(names, strings).map(" = ".join),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    docstring=st.sampled_from(
        ['"doc"', '"""two\n      lines é"""', "r'''x\n\ty'''", '("do"\n\n"c")', "'d' \\\n  'oc'"]
    ),
    body=st.lists(simple, min_size=1, max_size=4),
    joins=st.lists(
        st.sampled_from(["\n", "\n\n", "; ", " ;\n", "  # c\n", "\n# low\n", "\n\f\n"]), min_size=5, max_size=5
    ),
    inline=st.booleans(),
    depth=st.integers(0, 2),
    indent=st.sampled_from([" ", "\t", "    "]),
)
def test_any_layout_is_cut_faithfully(
    tmp_path: Path, *, docstring: str, body: list[str], joins: list[str], inline: bool, depth: int, indent: str
) -> None:
    source = "".join(f"{indent * level}class C{level}:\n" for level in range(depth)) + indent * depth + "def f(a, é=1):"
    statement_margin = indent * (depth + 1)
    if inline:
        source += " " + "; ".join([docstring, *body])
    else:
        source += "\n" + statement_margin + docstring
        for join, statement in zip(joins, body, strict=False):
            source += join + (statement_margin if join.endswith(("\n", "\f")) else "") + statement
    try:
        tree = ast.parse(source)
    except SyntaxError:
        assume(False)
    original = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    if all(isinstance(node, ast.Pass) for node in original.body[1:]):
        return
    (parsed,) = ast.parse(answer(tmp_path, source)).body
    assert ast.dump(parsed) == without_docstring(original)


# -------------------------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return 1", "no_docstring"),
        ('f"""Return one more than it is given."""\n    return 1', "no_docstring"),
        ('"""Short."""\n    return 1', "short_docstring"),
        (DOC, "trivial_body"),
        (f"{DOC}\n    pass", "trivial_body"),
        (f"{DOC}\n    ...", "trivial_body"),
        (f"{DOC}\n    raise NotImplementedError", "trivial_body"),
        (f'{DOC}\n    raise NotImplementedError("later")', "trivial_body"),
        (f"{DOC}; return 1", "too_short"),
        (f"{DOC}\n    return [" + "\n0," * 200 + "]", "too_long"),
        (f"{DOC}\n    return '" + "x" * 9000 + "'", "too_long"),
        ('"""' + "x" * 9000 + '"""\n    return 1', "too_long"),
        (f'{DOC}\n    "a second string would become the docstring"\n    return 1', "unfaithful"),
    ],
)
def test_what_is_skipped_is_counted(tmp_path: Path, body: str, reason: str) -> None:
    one_line = reason == "too_short"
    source = f"def f():{' ' if one_line else chr(10) + '    '}{body}"
    assert skipped(tmp_path, source) == {reason: 1}


def test_equal_answers_are_kept_once_and_equal_names_get_their_line(tmp_path: Path) -> None:
    function = f"def f(x):\n    {DOC}\n    return x + %d\n"
    (tmp_path / "a.py").write_text(function % 1 + function % 1 + function % 2 + function % 3)
    (tmp_path / "b.py").write_text(function % 1)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "__init__.py").write_text(function % 4)
    (tmp_path / "c.py").write_text(function % 5)
    summary = HarvestSummary()
    rows = list(harvest(str(tmp_path), summary=summary))
    assert [row["id"] for row in rows] == ["a:f", "a:f:7", "a:f:10", "c:f", "c:f:1"]
    assert [row["path"] for row in rows] == ["a.py"] * 3 + ["c.py", "c/__init__.py"]
    assert summary.skipped == {"duplicate": 2}


def test_files_that_cannot_be_read_are_reported(tmp_path: Path) -> None:
    good = f"def f(x):\n    {DOC}\n    return x\n".encode()
    for name, content in {
        "a_good.py": good,
        "broken.py": b"def f(:\n",
        "bytes.py": b"x = '\xff'",
        "cookie.py": b"# coding: no-such-code\n",
        "deep.py": b"x = " + b"(" * 5000 + b")" * 5000,
        "nul.py": b"x\x00",
        ".hidden.py": good,
        "__pycache__/x.py": good,
        "env/pyvenv.cfg": b"",
        "env/x.py": good,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    summary = HarvestSummary()
    (row,) = harvest(str(tmp_path), summary=summary)
    assert row["id"] == "a_good:f"
    assert summary.files == 6
    assert [line.split(":")[0] for line in summary.unreadable] == [
        "broken.py",
        "bytes.py",
        "cookie.py",
        "deep.py",
        "nul.py",
    ]
    assert all(len(line) <= 200 and "\n" not in line for line in summary.unreadable)


# -------------------------------------------------------------------------------------------------------- finding it


def test_packages_modules_and_folders(tmp_path: Path) -> None:
    assert {row["path"] for row in harvest("json")} >= {"json/__init__.py", "json/decoder.py"}
    assert {row["id"].split(":")[0] for row in harvest("xml.dom")} >= {"xml.dom.minidom"}
    assert {row["id"].split(":")[0] for row in harvest("os")} == {"os"}
    assert {(row["id"].split(":")[0], row["path"]) for row in harvest("email.message")} == {
        ("email.message", "message.py")
    }
    package = tmp_path / "things"
    package.mkdir()
    (package / "part.py").write_text(f"def f(x):\n    {DOC}\n    return x\n")
    assert [(row["id"], row["path"]) for row in harvest(str(package))] == [("part:f", "part.py")]
    (package / "__init__.py").touch()
    assert [(row["id"], row["path"]) for row in harvest(str(package))] == [("things.part:f", "things/part.py")]


def test_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "trap_package" / "inner"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "__init__.py").write_text(f"raise SystemExit('imported')\ndef f(x):\n    {DOC}\n    return x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for target in ("trap_package", "trap_package.inner"):
        (row,) = harvest(target)
        assert (row["id"], row["path"]) == ("trap_package.inner:f", "trap_package/inner/__init__.py")
    assert not any(name.startswith("trap_package") for name in sys.modules)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("jsn", "no folder or package 'jsn'; did you mean 'json'"),
        ("stdlibs", "did you mean 'stdlib'"),
        ("json.decodr", "no module 'json.decodr'; did you mean 'decoder'"),
        ("json.decoder.x", "no module 'json.decoder.x'; give"),
        ("sys", "no Python source"),
        ("__main__x", "no folder or package"),
        ("./no/such", "is no folder, .py file or package name"),
        ("", "is no folder"),
        ("a\nb", r"'a\nb' is no folder"),
        ("json..decoder", "is no folder"),
    ],
)
def test_a_target_that_is_not_there(target: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        harvest(target)
    assert text in str(caught.value)
    assert str(caught.value).isprintable()


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.py file"):
        harvest(str(tmp_path))
    with pytest.raises(InputError, match="limit is 0"):
        harvest("json", limit=0)
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="no function of"):
        write_harvest(str(tmp_path), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


# --------------------------------------------------------------------------------------------------------- written out


def test_what_is_written_is_read_as_records(tmp_path: Path) -> None:
    summary = write_harvest("email", tmp_path / "out.jsonl", limit=20)
    assert summary.kept == 20
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == list(harvest("email", limit=20))
    assert list(rows[0]) == ["id", "instruction", "output", "path", "line"]
    records = list(open_records(tmp_path / "out.jsonl", Columns(id="id")))
    assert [record.id for record in records if isinstance(record, Record)] == [row["id"] for row in rows]
    assert len(list(harvest("json", limit=10**6))) == len(list(harvest("json")))
    assert importlib.util.find_spec("email") is not None


def test_a_pipe_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('def f(x):\n    """Add one to the number x."""\n    y = x + 1\n    return y\n')
    os.mkfifo(tmp_path / "b.py")
    (tmp_path / "c.py").symlink_to(tmp_path)
    summary = HarvestSummary()
    assert [row["path"] for row in harvest(str(tmp_path), summary=summary)] == ["a.py"]
    assert [line.partition(":")[0] for line in summary.unreadable] == ["b.py", "c.py"]
