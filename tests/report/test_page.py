"""The report of a run: what it says, that rows stay text, that it is the same every time, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from codeact.base.console import percent, visible
from codeact.base.errors import InputError, MissingExtraError
from codeact.report.page import write_report
from codeact.report.rows import Rows, draw_positions
from codeact.report.texts import telling_words
from tests.helpers.run_folder import HOSTILE, make_run, write_json, write_scores, write_selected

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Every element with its attributes, the texts of code blocks, and all text; checks that tags are closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.code: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []
        self.words = " ".join(self.text.split())  # also without no-break spaces

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("code", "script"):
            (self.code if tag == "code" else self.scripts).append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
            return
        self.text += data
        if "code" in self._open:
            self.code[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(write_report(folder))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "run"))


def test_every_section_is_filled_from_the_run(page: Page) -> None:
    assert "Not run" not in page.text
    names = [attributes["id"] for attributes in page.named("figure")]
    assert names == [
        f"figure-{name}" for name in ("ifd", "clusters", "losses", "map", "lengths", "packs", "loss", "pass-humaneval")
    ]
    assert len(page.named("figcaption")) == len(names) == len(page.named("svg"))
    for expected in (
        "24 of 60 rows kept (40.0 %)",
        "the held-out loss fell from 1.900 to 1.500",
        "pass@1 on 8 tasks of HumanEval+ rose from 37.5 % to 62.5 %",
        "It balances",
        "1 h 2 min",  # of a stage
        "16.00 GiB",  # of the machine
        "(measured)",
        "(estimated)",
        "The loss of the 6 held-out rows fell from 1.900 to 1.500 nats per token (\N{MINUS SIGN}21.1 %)",
        "2 tasks are solved only after training, 0 only before",
        "p = 0.50",
    ):
        assert expected in page.words, expected


def test_every_cluster_is_told_by_its_words_and_its_most_central_question(folder: Path, page: Page) -> None:
    rows = Rows(folder)
    assert rows.cluster is not None
    assert rows.embedded is not None
    data = [json.loads(line) for line in (folder.parent / "run-rows.jsonl").read_text().splitlines()]
    for label in range(5):
        inside = np.flatnonzero(rows.cluster == label)
        vectors = rows.embedded.vectors[[rows.embedded.rows.tolist().index(row) for row in inside]]
        row = int(inside[np.linalg.norm(vectors - vectors.mean(axis=0), axis=1).argmin()])
        shown = visible(" ".join(data[row]["question"][:100].split()))
        assert re.search(rf"\n{label}\n{len(inside)}\n.*\n.*\n.*\n{re.escape(shown)}", page.text), (label, shown)


def test_words_tell_what_a_group_has_and_others_have_not() -> None:
    groups = [
        ["Sort the list", "sort the SORTED list", "the list of 3 2"],
        ["Open the socket", "the socket, the socket"],
    ]
    assert telling_words(groups) == [["list", "sort", "sorted"], ["socket", "open"]]
    assert telling_words([["the same"], ["the same"]]) == [[], []]
    assert telling_words([[""], ["one"]]) == [[], ["one"]]
    assert telling_words(groups, most=1) == [["list"], ["socket"]]


def test_rows_that_were_not_chosen_are_shown_with_the_reason(folder: Path, page: Page) -> None:
    rows, text = Rows(folder), page.words
    assert rows.chosen is not None
    for reason, name in (("below_budget", "below budget"), ("ifd_at_least_1", "IFD of 1 or more")):
        part = text[text.index(f"Not chosen: {name}") :]
        left = np.flatnonzero(rows.fate == list(rows.reasons).index(reason))
        assert not rows.chosen[left].any()
        assert part.startswith(f"Not chosen: {name} Of {len(left)} such rows, those of highest IFD")
        assert f"IFD {rows.ifd[left].max():.3f}row {left[rows.ifd[left].argmax()]}, " in part
    assert "Not chosen: empty answer" in text
    assert "no IFDrow 16, id 16" in text
    listed = re.search(r"All 60\srows: what became of each.*?</table>", (folder / "report.html").read_text(), re.DOTALL)
    assert listed is not None
    assert listed[0].count("<tr") == 61
    assert listed[0].count(">chosen</td>") == 24


@pytest.mark.parametrize("how", ["gone", "changed", "no manifest"])
def test_without_the_data_the_page_says_what_it_cannot_show(copy: Path, how: str) -> None:
    manifest = copy / "scores" / "manifest.json"
    content = json.loads(manifest.read_text())
    if how == "gone":
        content["settings"]["data"]["source"] = "/nowhere/<b>.jsonl"
    content["settings"]["data"]["fingerprint"] = "0" * 64
    write_json(manifest, content)
    if how == "no manifest":
        manifest.unlink()
    page = Page(write_report(copy))
    assert "Not shown, for the rows cannot be read: " in page.words
    assert ("/nowhere/<b>.jsonl" in page.text) == (how == "gone")
    assert "--data" not in page.text
    assert "Not chosen: " not in page.words
    assert "figure-map" in [attributes["id"] for attributes in page.named("figure")]


def test_what_was_generated_and_why_it_failed(page: Page) -> None:
    text = page.words[page.words.index("Every task of HumanEval") :]
    assert "HumanEval/7 exception time <b>time f(7)" in text
    assert re.search(r"HumanEval/4 exception pass \N{EN DASH}", text)
    shown = text[text.index("Programs that failed") :]
    for outcome, task in (("wrong", 5), ("exception", 6), ("time", 7)):
        assert f"{outcome}HumanEval/{task} program" in shown
        assert visible(f"# {outcome}\n{HOSTILE[task]}")[:4000] in page.code
        assert f"f({task})" in page.code


def test_a_loss_measured_once_is_a_headline_too(copy: Path) -> None:
    training = json.loads((copy / "model" / "training.json").read_text())
    training["log"] = [entry for entry in training["log"] if entry["step"] != 0]
    write_json(copy / "model" / "training.json", training)
    assert "the held-out loss is 1.500;" in Page(write_report(copy)).words


def test_links_lead_to_the_files_of_the_run(folder: Path, page: Page) -> None:
    links = [unquote(a["href"] or "") for a in page.named("a") if not (a["href"] or "").startswith("#")]
    assert all((folder / link).exists() for link in links)
    expected = {"selected.jsonl", "scores/scores.parquet", "run.json", "ledger.json", "model"}
    assert expected | {"evaluation/after/humaneval-sanitized_eval.json"} <= {link.removeprefix("./") for link in links}


def test_the_captions_are_computed(folder: Path, page: Page) -> None:
    rows = Rows(folder)
    assert rows.chosen is not None
    scored = np.isfinite(rows.ifd)
    gain = (rows.uncond - rows.cond)[scored]
    for expected in (
        f"{percent((rows.ifd[scored] >= 1).mean())} of the {scored.sum()} scored rows have an IFD of 1 or more",
        f"The median row has {np.median(rows.tokens[rows.tokens > 0]):,.0f} tokens",
        f"{np.median(gain):.2f} nats per token off",
        f"{percent((gain > 0).mean())} of the rows lie below",
    ):
        assert expected.replace("\xa0", " ") in page.words, expected


def test_hostile_rows_stay_text(page: Page, folder: Path) -> None:
    """Every text is there to the letter, and no element or attribute is on the page that the template has not."""
    assert not {"iframe", "img", "b", "i", "object", "embed", "form", "base"} & {n for n, _ in page.elements}
    *data, script = page.scripts
    assert script == (Path(__file__).parents[2] / "codeact" / "report" / "page.js").read_text()
    assert len(data) == 5  # all plots but those of clusters, packs and outcomes
    assert page.named("script") == [{"type": "application/json"}] * len(data) + [{}]
    assert not any(set("<>&'") & set(text) for text in data)
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")], name
        for key in ("href", "src", "xlink:href"):
            value = attributes.get(key)
            known = value is None or value.startswith("#") or (name == "link" and value == "data:,")
            assert known or (name == "a" and (folder / unquote(value or "")).resolve().is_relative_to(folder.resolve()))
    assert "(empty)" in page.text
    for text in filter(None, HOSTILE):
        assert visible(text)[:4000] in page.code, text[:40]
    assert "<img src=x>" in page.text  # a setting
    assert "<i>b" in page.text  # a line of a stage
    assert re.search(r"<b>\d+</b>", page.text)  # an id


def test_the_page_loads_nothing_and_may_not(page: Page, folder: Path) -> None:
    policy = next(a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert policy.startswith(
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    )
    source = (folder / "report.html").read_text()
    assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z]", re.sub(r"&lt;.*", "", source))
    assert "@import" not in source


def test_structure_for_screen_readers(page: Page) -> None:
    assert page.named("html") == [{"lang": "en"}]
    assert len(page.named("h1")) == 1
    for svg in page.named("svg"):
        assert svg["role"] == "img"
        assert svg["aria-label"]
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.named("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"] for name, a in page.elements if (a.get("href") or "").startswith("#")}
    targets |= {f"#{x}" for _, a in page.elements for v in a.values() for x in re.findall(r"url\(#(.+?)\)", v or "")}
    assert targets <= {f"#{name}" for name in ids}


def test_colours_follow_the_page(page: Page, folder: Path) -> None:
    css = Path(__file__).parents[2] / "codeact" / "report" / "page.css"
    defined = set(re.findall(r"(--[\w-]+):", css.read_text()))
    used = set(re.findall(r"var\((--[\w-]+)\)", (folder / "report.html").read_text()))
    assert {"--chosen", "--other", "--c0", "--s0", "--waste"} <= used <= {*defined, "--share"}
    styles = " ".join(a.get("style") or "" for _, a in page.elements)
    assert not re.search(r"#[0-9a-f]{6}", styles)
    assert "font-family" not in styles


def test_the_same_folder_gives_the_same_bytes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_report(copy).read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert write_report(copy).read_bytes() == first


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        (["ledger.json"], 0),
        (["evaluation"], 1),
        (["evaluation", "model"], 2),
        (["evaluation", "model", "pack_stats.json", "pack_lengths.npy"], 3),
        (["evaluation", "model", "pack_stats.json", "selected.jsonl", "selected.rows.parquet"], 4),
        (["evaluation", "model", "pack_stats.json", "selected.jsonl", "selected.rows.parquet", "embeddings.npy"], 5),
        (["evaluation", "model", "pack_stats.json", "scores", "selected.jsonl", "ledger.json"], 8),
        (["evaluation/before", "model/cost.json", "pack_lengths.npy"], 0),
        (["evaluation/after", "model/training.json"], 0),
    ],
)
def test_a_partial_run_says_what_was_not_run(copy: Path, gone: list[str], missing: int) -> None:
    for name in gone:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(write_report(copy))
    assert page.text.count("Not run") == missing


def test_a_run_that_has_only_begun(copy: Path) -> None:
    for path in copy.iterdir():
        if path.name != "run.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(copy / "run.json", {"format": 1, "codeact": "0.1.0"})
    assert "No stage has run yet." in Page(write_report(copy)).text


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("run.json", b"{", "run.json is damaged"),
        ("run.json", b"[1]", "run.json is damaged"),
        ("ledger.json", b'{"stages": [{"stage": "score"}]}', "ledger.json: "),
        ("model/cost.json", b"\xff\xfe", "cost.json is damaged"),
        ("model/training.json", b"[" * 100_000, "training.json is damaged"),
        ("pack_stats.json", b"{}", "pack_stats.json is damaged: capacity"),
        ("pack_lengths.npy", b"\x80\x04cos\nsystem\n", "pack_lengths.npy is damaged"),
        ("evaluation/after/humaneval-sanitized_eval.json", b"null", "humaneval-sanitized_eval.json is damaged"),
        ("scores/scores.parquet", b"PAR1", "scores.parquet is damaged"),
        ("selected.rows.parquet", b"", "selected.rows.parquet is damaged"),
        ("embeddings.rows.parquet", b"", "embeddings.rows.parquet cannot be read"),
        ("selected.jsonl", b"{}\n", "selected.jsonl has fewer lines"),
        ("selected.jsonl", b"[]\n" * 100, "selected.jsonl, line 1 is damaged"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(copy: Path, name: str, content: bytes, complaint: str) -> None:
    (copy / name).write_bytes(content)
    if name == "selected.jsonl" and content.startswith(b"[]"):
        complaint = "is damaged"
    with pytest.raises(InputError, match=re.escape(complaint)) as raised:
        write_report(copy)
    assert "\n" not in str(raised.value)


def test_files_of_different_runs_are_refused(copy: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", rows=40)
    shutil.copy(other / "selected.rows.parquet", copy)
    with pytest.raises(InputError, match="not of the same rows"):
        write_report(copy)


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no run folder \(it has no run\.json\)"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="is no run folder"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf'{library}: pip install "codeact\[report\]"'):
        write_report(copy)


def test_a_ledger_that_does_not_balance_is_said(copy: Path) -> None:
    ledger = json.loads((copy / "ledger.json").read_text())
    ledger["stages"][1]["rows_out"] -= 1
    write_json(copy / "ledger.json", ledger)
    assert "IT DOES NOT BALANCE: select: " in Page(write_report(copy)).text


def test_a_large_table_gives_a_small_page(copy: Path) -> None:
    """Half a million rows: histograms are of all, scatter plots of a sample that the caption tells of."""
    rows, rng = 500_000, np.random.default_rng(1)
    uncond = rng.gamma(9, 0.25, rows)
    ifd = np.exp(rng.normal(-0.4, 0.4, rows))
    ifd[7] = 1e300  # one absurd row must not squeeze the others into one bin
    refused, tokens = np.zeros(rows, np.bool_), rng.lognormal(5, 1.2, rows).astype(np.int32) + 1
    write_scores(copy / "scores" / "scores.parquet", refused, ifd, uncond + np.log(ifd), uncond, tokens // 3, tokens)
    chosen = np.zeros(rows, np.bool_)
    chosen[:24] = True  # as many as there are conversations
    write_selected(copy, chosen, rng.integers(0, 40, rows).astype(np.int32), np.full(rows, "below_budget"))
    path = write_report(copy)
    assert path.stat().st_size < 1_500_000
    text = Page(path).words
    assert f"{100 * (ifd >= 1).mean():.1f} % of the 500,000 scored rows" in text
    assert "a random sample of 2,500" in text
    assert "Shown are the 12 largest of 40 clusters" in text
    assert "beyond the axis, the largest at 1e+300" in text
    assert "(logarithmic)" in text


def test_what_the_choice_owes_to_length_is_on_the_page(copy: Path) -> None:
    path = copy / "selected.rows.parquet"
    line = "Spearman(ifd, answer tokens) 0.87; 20 of 24 chosen are among the 24 longest answers (by chance 10)"
    pq.write_table(pq.read_table(path).replace_schema_metadata({"length": line}), path)
    assert f"What became of the 60 rows. {line}." in Page(write_report(copy)).words


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_very_few_rows(copy: Path, rows: int) -> None:
    for name in ("embeddings.npy", "model", "evaluation", "pack_stats.json"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    ones, refused = np.ones(rows), np.zeros(rows, np.bool_)
    write_scores(copy / "scores" / "scores.parquet", refused, ones, ones, ones, np.int32(ones), np.int32(ones))
    write_selected(copy, ~refused, np.zeros(rows, np.int32), np.full(rows, "x"))
    Page(write_report(copy))


def test_all_the_same_embedding_has_no_map(copy: Path) -> None:
    from codeact.embedding.files import EmbeddingMetadata, write_embeddings

    metadata = EmbeddingMetadata(model="m", data_fingerprint="f", rows=60, skipped=0, truncated=0, tokens=0)
    vectors = np.tile(np.eye(4, dtype=np.float32)[0], (60, 1))
    write_embeddings(copy / "embeddings.npy", vectors, list(map(str, range(60))), np.arange(60), metadata)
    page = Page(write_report(copy))
    assert "figure-map" not in [attributes["id"] for attributes in page.named("figure")]
    assert "What every cluster is about" in page.words


def test_a_sample_is_the_same_every_time_and_sorted() -> None:
    positions = np.arange(0, 3_000_000, 3)
    drawn = draw_positions(positions, 1000)
    assert (drawn == draw_positions(positions, 1000)).all()
    assert len(np.unique(drawn)) == 1000
    assert (np.diff(drawn) > 0).all()
    assert abs(drawn.mean() / positions.mean() - 1) < 0.05
    assert draw_positions(positions[:5], 1000) is not None


def test_columns_of_another_type_are_refused(copy: Path) -> None:
    path = copy / "selected.rows.parquet"
    table = pq.read_table(path)
    texts = pa.array(["x"] * table.num_rows)
    pq.write_table(table.set_column(table.column_names.index("row"), "row", texts), path)
    with pytest.raises(InputError, match=r"selected\.rows\.parquet is damaged: Failed to parse string"):
        write_report(copy)
    pq.write_table(table.drop_columns("chosen"), path)
    with pytest.raises(InputError, match=r"selected\.rows\.parquet is damaged: .*chosen"):
        write_report(copy)


def test_a_number_and_its_unit_stay_on_one_line(page: Page) -> None:
    for expected in ("24\xa0of 60\xa0rows kept (40.0\xa0%)", "1\xa0h 2\xa0min", "16.00\xa0GiB", "\xa0tokens/s"):
        assert expected in page.text, expected
    assert not re.search(r"\d\xa0", "".join(page.code))  # a program is shown to the letter
