"""The folder of scores: shards, resume after kill -9, sharing, merging and refusing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, TimeoutExpired

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from codeact.base.errors import InputError
from codeact.base.files import TEMPORARY_PREFIX
from codeact.data.records import Record, write_jsonl
from codeact.data.settings import DataSettings
from codeact.scoring.folder import ScoreFolder
from codeact.scoring.stage import ScoreSettings, prepare_scoring, score_data
from codeact.scoring.token_losses import losses_path, selective_ifd
from codeact.selection.stage import open_scored_data
from tests.conftest import make_records
from tests.helpers import forked

ROWS = 120


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": r.question, "output": r.answer, "tag": r.row} for r in make_records(ROWS)]
    rows[7]["output"] = "  "
    rows[50]["instruction"] = None
    write_jsonl(path, rows)
    return path


def settings(tiny_model_path, **more) -> ScoreSettings:
    return ScoreSettings(**{"model": str(tiny_model_path), "max_length": 256, "shard_size": 5, **more})


def score(data_path, tiny_model_path, output, only=None, overwrite=False, strict=False, **more):
    """All of it, or ``only`` some shards, as what a killed run has done."""
    data = DataSettings(source=str(data_path))
    chosen = settings(tiny_model_path, **more)
    if only is None:
        return score_data(data, chosen, output, overwrite=overwrite, strict=strict)
    job = prepare_scoring(data, chosen, output)
    for shard in (n for n in only if n < job.folder.shards):
        job.do(shard, lambda rows, tokens: None)
    return None


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, data_path, tiny_model_path) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "scores"
    score(data_path, tiny_model_path, folder)
    return folder


def assert_same_table(folder: Path, expected: Path, rtol: float = 1e-6) -> None:
    ours, theirs = ScoreFolder.open(folder).read(), ScoreFolder.open(expected).read()
    for name in ours.column_names:
        if name in ("cond_nll_sum", "uncond_nll_sum", "ifd"):
            np.testing.assert_allclose(ours[name].to_numpy(), theirs[name].to_numpy(), rtol=rtol)
        else:
            assert ours[name].equals(theirs[name]), name


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (folder / "shards").glob("[0-9]*.parquet")}


def test_every_row_is_in_the_table_once(uninterrupted):
    table = ScoreFolder.open(uninterrupted).read()
    assert table["row"].to_pylist() == list(range(ROWS))
    assert table["status"].to_pylist()[7] == "empty_answer"
    assert table["status"].to_pylist()[50] == "unreadable"
    assert "row 50" in table["reason"].to_pylist()[50]
    assert table["status"].to_pylist().count("ok") == ROWS - 2


def test_totals_balance(uninterrupted):
    table = ScoreFolder.open(uninterrupted).read()
    totals = ScoreFolder.open(uninterrupted).totals()
    assert totals["rows"] == sum(totals["status"].values()) == ROWS
    assert sum(totals["refused"].values()) == ROWS - totals["status"]["ok"] == 2
    assert totals["sequences"] == 2 * totals["status"]["ok"]
    assert totals["scored_tokens"] == sum(table["scored_tokens"].to_pylist())
    # every token of both passes: the prompt once, the answer twice; no BOS, nothing truncated here
    assert totals["tokens"] == totals["prompt_tokens"] + 2 * totals["answer_tokens"]


def test_shard_size_and_pack_size_do_not_change_scores(data_path, tiny_model_path, tmp_path, uninterrupted):
    score(data_path, tiny_model_path, tmp_path / "s", shard_size=1000, tokens_per_pack=300)
    # other packs are other matrix shapes, which round their float32 sums in another order
    assert_same_table(tmp_path / "s", uninterrupted, rtol=1e-4)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_goes_on_with_another_shard_size(data_path, tiny_model_path, tmp_path, uninterrupted, workers):
    """What was begun in shards of 5 rows ends so: in ``codeact run`` there is no other folder to choose."""
    folder = tmp_path / "s"
    assert score(data_path, tiny_model_path, folder, only=range(1, 24, 3)) is None
    before = stamps(folder)
    data, other = DataSettings(source=str(data_path)), settings(tiny_model_path, shard_size=50)
    totals = score_data(data, other, folder, workers=workers)
    assert totals is not None
    assert {name: stamps(folder)[name] for name in before} == before
    assert len(stamps(folder)) == 24
    assert_same_table(folder, uninterrupted)
    with pytest.raises(InputError, match="max_length 256 there, 128 here"):
        score_data(data, settings(tiny_model_path, shard_size=50, max_length=128), folder)


def command(data_path, tiny_model_path, folder, *more: str) -> list[str]:
    options = ["--model", str(tiny_model_path), "--max-length", "256", "--shard-size", "5", "--output", str(folder)]
    return [sys.executable, "-m", "codeact", "score", str(data_path), *options, *more]


def test_kill_9_at_random_moments(data_path, tiny_model_path, tmp_path, uninterrupted):
    """A real process, killed again and again; what was done stays as it was, and the end is the same table."""
    print("seed", os.getpid())
    rng = random.Random(os.getpid())
    folder = tmp_path / "scores"
    done: dict[str, tuple[int, int]] = {}
    kills_midway = 0
    for attempt in range(12):
        process = forked.Popen(command(data_path, tiny_model_path, folder), stderr=PIPE)
        wanted = len(done) + rng.randint(3, 9)
        if attempt and rng.random() < 0.25:  # any moment: before the first shard, or between two
            with suppress(TimeoutExpired):
                process.wait(timeout=rng.uniform(0.1, 12))
            wanted = 0
        while process.poll() is None and len(stamps(folder)) < wanted:
            try:
                process.wait(timeout=rng.uniform(0.001, 0.01))
            except TimeoutExpired:
                continue
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
        now = stamps(folder)
        assert {name: now[name] for name in done} == done, "a finished shard was done again"
        done = now
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, stderr.decode()
        kills_midway += 0 < len(done) < ROWS // 5
    else:
        forked.run(command(data_path, tiny_model_path, folder), check=True, capture_output=True)
        assert {name: stamps(folder)[name] for name in done} == done
    assert kills_midway >= 1
    assert_same_table(folder, uninterrupted)
    assert not list(folder.rglob(f"{TEMPORARY_PREFIX}*")), "merge leaves no temporary files of killed processes"


def test_merge_waits(data_path, tiny_model_path, tmp_path, uninterrupted):
    folder = tmp_path / "scores"
    score(data_path, tiny_model_path, folder, only=range(1, 24, 3))
    with pytest.raises(InputError, match=r"16 of 24 shards are missing \(0, 2, 3, 5, .*run codeact score"):
        ScoreFolder.open(folder).merge()
    with pytest.raises(InputError, match="is not merged: run codeact merge"):
        ScoreFolder.open(folder).read()


def test_torchrun_shares_the_shards(data_path, tiny_model_path, tmp_path, uninterrupted):
    """Both processes get one command; none does a shard that the other has, and one of them merges."""
    folder = tmp_path / "scores"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    launched = [*start, *command(data_path, tiny_model_path, folder)[2:]]
    done = subprocess.run(launched, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rows scored") == 1
    assert done.stdout.count(f"all shards are done; another worker makes {folder}/scores.parquet") == 1
    assert_same_table(folder, uninterrupted)


LAUNCHERS = (
    {"RANK": "1", "WORLD_SIZE": "2"},  # torchrun and accelerate launch
    {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
)


@pytest.mark.parametrize(
    ("environment", "more", "message"),
    [
        (LAUNCHERS[0], {"workers": 2}, "each is a worker; leave out workers"),
        (LAUNCHERS[1], {"engine": "ray"}, "each is a worker; leave out engine ray"),
        ({}, {"engine": "torchrun"}, "no launcher started this: say torchrun"),
        ({}, {"engine": "dask"}, "engine 'dask' is unknown; choose one of: "),
        ({}, {"address": "h:1"}, "address is of a Ray cluster; say engine ray"),
    ],
)
def test_engines_that_do_not_fit(data_path, tiny_model_path, tmp_path, monkeypatch, environment, more, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        score_data(DataSettings(source=str(data_path)), settings(tiny_model_path), tmp_path / "scores", **more)


@pytest.mark.parametrize("environment", LAUNCHERS)
@pytest.mark.parametrize("name", ["select", "generate", "evaluate", "run", "lab", "ppl", "merge"])
def test_other_commands_are_refused_under_a_launcher(codeact, monkeypatch, name, environment):
    """Every process would do all of it, on one GPU and into one file."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    code, _, err = codeact(name, "x")
    assert code == 2
    assert f"codeact {name} is the work of one process, and a launcher started several" in err


@pytest.mark.parametrize("change", ["device", "attention", "nll"])
def test_shards_scored_in_different_ways_are_told(data_path, tiny_model_path, tmp_path, monkeypatch, caplog, change):
    from codeact.scoring.ifd import IfdScorer

    folder = tmp_path / "scores"
    score(data_path, tiny_model_path, folder, only=range(0, 24, 2))
    route = IfdScorer.route.fget
    other = {"device": ("cpu", "NVIDIA H100"), "attention": (", ", ", flash_"), "nll": ("native", "triton")}[change]
    monkeypatch.setenv("CODEACT_BACKEND", "torch") if change == "nll" else monkeypatch.setattr(
        IfdScorer, "route", property(lambda scorer: route(scorer).replace(*other, 1))
    )
    totals = score(data_path, tiny_model_path, folder)
    assert sorted(totals["routes"].values()) == [12, 12]
    (message,) = [m for m in caplog.messages if "shards were not all scored in one way" in m]
    assert all(f"12 by {name}" in message for name in totals["routes"])


def test_shards_scored_in_one_way_are_not(uninterrupted, caplog):
    totals = ScoreFolder.open(uninterrupted).merge()
    assert list(totals["routes"].values()) == [24]
    assert next(iter(totals["routes"])).startswith("cpu, ")
    assert "in one way" not in caplog.text


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory, data_path, tiny_model_path) -> Path:
    folder = tmp_path_factory.mktemp("two") / "scores"
    score(data_path, tiny_model_path, folder, shard_size=60)
    return folder


class TestRefusals:
    @pytest.fixture
    def folder(self, two_shards, tmp_path):
        return shutil.copytree(two_shards, tmp_path / "s")

    def test_other_settings(self, folder, data_path, tiny_model_path):
        ours = ScoreFolder.open(folder).hash
        with pytest.raises(
            InputError, match=rf"hash {ours}, this run [0-9a-f]{{16}}\): max_length 256 there, 128 here"
        ):
            score(data_path, tiny_model_path, folder, shard_size=60, max_length=128)

    def test_other_data(self, folder, data_path, tiny_model_path, tmp_path):
        other = tmp_path / "other.jsonl"
        other.write_bytes(data_path.read_bytes().replace(b"def", b"DEF", 1))
        with pytest.raises(InputError, match=r"data\.fingerprint"):
            score(other, tiny_model_path, folder, shard_size=60)

    def test_other_model(self, folder, data_path, tiny_model, tokenizer, tmp_path):
        tiny_model.lm_head.weight.data[0, 0] += 1
        tiny_model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        with pytest.raises(InputError, match=r"model\.fingerprint"):
            score(data_path, tmp_path / "model", folder, shard_size=60)

    def test_moved_data_and_model_are_the_same_run(self, folder, data_path, tiny_model_path, tmp_path):
        before = stamps(folder)
        moved = tmp_path / "moved.jsonl"
        moved.write_bytes(data_path.read_bytes())
        score(moved, tiny_model_path, folder, shard_size=60)
        assert stamps(folder) == before

    def test_overwrite_starts_anew(self, folder, data_path, tiny_model_path):
        (folder / "notes.txt").write_text("mine")
        score(data_path, tiny_model_path, folder, shard_size=60, max_length=128, overwrite=True)
        assert ScoreFolder.open(folder).settings["max_length"] == 128
        assert (folder / "notes.txt").read_text() == "mine"

    def test_overwrite_keeps_what_was_made_with_the_same_settings(self, folder, data_path, tiny_model_path):
        before = stamps(folder)
        score(data_path, tiny_model_path, folder, shard_size=60, overwrite=True)
        assert stamps(folder) == before

    def test_a_shard_of_another_run(self, folder, data_path, tiny_model_path, tmp_path):
        score(data_path, tiny_model_path, tmp_path / "t", shard_size=60, max_length=128)
        path = ScoreFolder.open(folder).path(1)
        path.write_bytes((tmp_path / "t" / "shards" / path.name).read_bytes())
        with pytest.raises(InputError, match=r"00001-of-00002.parquet was made with other settings"):
            ScoreFolder.open(folder).merge()

    def test_a_damaged_shard(self, folder):
        path = ScoreFolder.open(folder).path(0)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(InputError, match=r"is damaged .* delete it and run codeact score again"):
            ScoreFolder.open(folder).merge()

    def test_a_shard_damaged_in_the_middle(self, folder):
        path = ScoreFolder.open(folder).path(0)
        content = bytearray(path.read_bytes())
        content[4:600] = bytes(596)
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"00000-of-00002.parquet is damaged"):
            ScoreFolder.open(folder).merge()

    def test_a_shard_with_other_rows(self, folder):
        path = ScoreFolder.open(folder).path(0)
        table = pq.read_table(path)
        pq.write_table(table.slice(1), path)
        with pytest.raises(InputError, match="does not hold rows 0 to 59"):
            ScoreFolder.open(folder).merge()

    @pytest.mark.parametrize("content", ["", "{}", "[1]", '{"hash": 1, "settings": {}}'])
    def test_a_damaged_manifest(self, folder, content):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(InputError, match=r"cannot use .*manifest.json"):
            ScoreFolder.open(folder)

    def test_no_scores(self, tmp_path):
        with pytest.raises(InputError, match=r"holds no scores \(no manifest.json\)"):
            ScoreFolder.open(tmp_path)

    def test_strict_stops_at_the_first_bad_row(self, data_path, tiny_model_path, tmp_path):
        with pytest.raises(InputError, match=r"row 7 .*\(empty_answer\).*strict"):
            score(data_path, tiny_model_path, tmp_path / "s", strict=True)
        assert not (tmp_path / "s").exists()

    def test_a_place_that_cannot_be_written(self, data_path, tiny_model_path, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"cannot write .*choose another output"):
            score(data_path, tiny_model_path, tmp_path / "file" / "scores")

    def test_a_full_disk(self, data_path, tiny_model_path, tmp_path):
        """A limit on the size of files stands in for the full disk: the same call fails with an OSError."""
        limited = ["bash", "-c", 'ulimit -f 2; trap "" XFSZ; exec "$@"', "bash"]
        call = [*limited, *command(data_path, tiny_model_path, tmp_path / "s")]
        result = subprocess.run(call, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("codeact: error: cannot write ")
        assert "Traceback" not in result.stderr
        assert not list((tmp_path / "s").rglob("[0-9]*.parquet"))


def test_manifest_says_what_was_done(uninterrupted, data_path, tiny_model_path):
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    assert manifest["hash"] == ScoreFolder.hash_of(manifest["settings"])
    assert manifest["settings"]["data"]["source"] == str(data_path)
    assert manifest["settings"]["model"]["name"] == str(tiny_model_path)
    assert manifest["settings"]["model"]["fingerprint"].startswith("sha256:")
    assert manifest["versions"]["torch"]
    assert manifest["totals"]["rows"] == ROWS


@pytest.mark.parametrize("library", ["pandas", "polars", "duckdb"])
def test_the_table_opens_where_people_look_at_tables(uninterrupted, library):
    there = pytest.importorskip(library, reason=f"{library} is not installed (extra dev)")
    path = uninterrupted / "scores.parquet"
    table = pq.read_table(path)
    if library == "duckdb":
        found = there.sql(f"select * from '{path}'").arrow()
        found = found if isinstance(found, pa.Table) else found.read_all()
        hardest = there.sql(f"select id from '{path}' where status = 'ok' order by ifd desc limit 3").fetchall()
        hardest = [name for (name,) in hardest]
    elif library == "polars":
        frame = there.read_parquet(path)
        found = frame.to_arrow()
        hardest = frame.filter(frame["status"] == "ok").sort("ifd", descending=True)["id"][:3].to_list()
    else:
        frame = there.read_parquet(path, dtype_backend="pyarrow")
        found = pa.Table.from_pandas(frame, preserve_index=False)
        hardest = frame[frame["status"] == "ok"].sort_values("ifd", ascending=False)["id"][:3].tolist()
    assert found.to_pylist() == table.to_pylist()
    ok = table.filter(pc.equal(table["status"], "ok"))
    assert hardest == ok.sort_by([("ifd", "descending")])["id"][:3].to_pylist()


def test_paper_json(tiny_model_path, tiny_model, tokenizer, tmp_path):
    """What the paper's script writes, to the row: 0 of a score that failed, nothing of a row without an answer."""
    from codeact.scoring.reference import paper_ifd
    from codeact.scoring.table import write_paper_json

    pairs = [
        ("Add two.", "a + b"),
        ("", "a"),
        ("One token", "x"),
        ("long " * 80, "answer"),
        ("q", ""),
        ("Why?", "So it is."),
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in pairs))
    score(data, tiny_model_path, tmp_path / "s", protocol="paper", max_length=64, dtype="float32")
    folder = ScoreFolder.open(tmp_path / "s")
    assert write_paper_json(tmp_path / "paper.json", folder.read(), open_scored_data(folder)) == (4, 2)
    entries = json.loads((tmp_path / "paper.json").read_text())
    assert [(e["question"], e["answer"]) for e in entries] == [(q, a) for q, a in pairs if q and a]
    assert [entry["IFD"] == 0 for entry in entries] == [False, True, True, False]
    for place in (0, 3):
        record = Record(id="", row=0, question=entries[place]["question"], answer=entries[place]["answer"])
        assert entries[place]["IFD"] == pytest.approx(paper_ifd(tiny_model, tokenizer, record, 64), rel=1e-4)


def test_a_run_goes_on_with_another_pack_size_attention_and_device(data_path, tiny_model_path, tmp_path):
    """They are noted in the manifest and decide no score: what was done stays, the rest is done with the new ones."""
    folder, same = tmp_path / "s", {"shard_size": 60, "dtype": "float32"}
    score(data_path, tiny_model_path, folder, **same, only=[0], tokens_per_pack=4096)
    done = stamps(folder)
    others = {"tokens_per_pack": 1, "attention": "eager", "device": "cpu"}
    score(data_path, tiny_model_path, folder, **same, **others)
    assert {name: stamps(folder)[name] for name in done} == done != {}
    score(data_path, tiny_model_path, tmp_path / "at once", **same)
    assert_same_table(folder, tmp_path / "at once", rtol=1e-4)
    noted = ScoreFolder.open(folder).settings
    for more in (others, {"tokens_per_pack": 7}, {"device": "cuda:3"}, {"attention": "flash_attention_2"}):
        assert ScoreFolder.hash_of({**noted, **more}) == ScoreFolder.hash_of(noted)
    assert ScoreFolder.hash_of({**noted, "max_length": 255}) != ScoreFolder.hash_of(noted)


# ------------------------------------------------------------------------------------------ the loss of every token


def test_the_losses_of_all_tokens_are_kept_beside_every_shard(data_path, tiny_model_path, tmp_path, uninterrupted):
    folder = tmp_path / "scores"
    shutil.copytree(
        uninterrupted, folder
    )  # scored before without them: what is there is done again, to the same scores
    score(data_path, tiny_model_path, folder, keep_token_nll=True, tokens_per_pack=300)
    assert_same_table(folder, uninterrupted, rtol=1e-4)
    opened = ScoreFolder.open(folder)
    table = opened.read()
    tokens = table["scored_tokens"].to_numpy()
    for name, side in (("cond_nll_sum", 0), ("uncond_nll_sum", 1)):
        kept = np.concatenate([np.load(losses_path(opened.path(n)))[side] for n in range(opened.shards)])
        assert len(kept) == tokens.sum()
        sums = [part.astype(float).sum() for part in np.split(kept, np.cumsum(tokens)[:-1])]
        np.testing.assert_allclose(sums, np.nan_to_num(table[name].to_numpy()), rtol=1e-3)
    before = stamps(folder)
    score(data_path, tiny_model_path, folder, keep_token_nll=True)
    assert stamps(folder) == before  # nothing is left to do

    values = opened.selective_ifd()
    moves = [np.load(losses_path(opened.path(n))).astype(float) for n in range(opened.shards)]
    moves = np.concatenate([pair[0] - pair[1] for pair in moves])
    threshold = np.median(np.abs(moves))
    for row, part in enumerate(np.split(moves, np.cumsum(tokens)[:-1])):
        if tokens[row] == 0:
            assert np.isnan(values[row])
            continue
        near = np.abs(np.abs(part) - threshold) < 2e-3 * threshold  # a move is rounded to float16 to be counted
        if not near.any():
            moved = part[np.abs(part) > threshold]
            assert values[row] == pytest.approx(np.exp(moved.mean()) if len(moved) else 1.0)
    losses_path(opened.path(3)).unlink()
    with pytest.raises(InputError, match=r"s_ifd needs the loss of every token, and there is no .*--keep-token-nll"):
        opened.selective_ifd()


def test_selective_ifd_by_hand():
    # moves: 0.5, -2, -1 | none | 0, 0.25 | -4: half of the six are at most 0.5
    losses = np.array([[1.5, 1, 1, 2, 1.25, 0], [1, 3, 2, 2, 1, 4]], np.float16)
    shards = [(losses[:, :3], np.array([3, 0])), (losses[:, 3:], np.array([2, 1]))]
    values = selective_ifd(lambda: iter(shards))
    np.testing.assert_allclose(values, [np.exp(-1.5), np.nan, 1.0, np.exp(-4)])
    assert selective_ifd(lambda: iter([(np.empty((2, 0), np.float16), np.zeros(3, np.int64))])).shape == (3,)
    broken = np.array([[np.nan, 1], [1, 2]], np.float16)
    np.testing.assert_allclose(selective_ifd(lambda: iter([(broken, np.array([1, 1]))])), [np.nan, 1.0])


def test_losses_by_token_are_not_of_the_papers_protocol(data_path, tiny_model_path):
    with pytest.raises(ValueError, match="score different tokens; leave out keep_token_nll"):
        settings(tiny_model_path, protocol="paper", keep_token_nll=True)
