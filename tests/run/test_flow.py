"""`codeact run`: what is done again and what is kept, what a kill leaves, and that no row goes missing in silence."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from codeact.base.errors import InputError
from codeact.base.ledger import Change, Entry, Ledger
from codeact.base.settings import Settings, setting
from codeact.base.stage import Stage
from codeact.data.records import write_jsonl
from codeact.run import flow as run_flow
from codeact.run.flow import STAGES, ledger_of, open_flow
from codeact.run.folder import RunFolder
from codeact.selection import audit as selection_audit
from codeact.training import stage as training_stage
from tests.conftest import make_records
from tests.helpers import forked

ROWS = 40
TASKS = ("HumanEval/0", "HumanEval/2")


@pytest.fixture
def config(tmp_path, tiny_model_path, embedder_path, monkeypatch) -> Path:
    """A run's file: 40 rows, one of them without an answer, one unreadable."""
    monkeypatch.chdir(tmp_path)
    rows = [{"q": record.question, "a": record.answer} for record in make_records(ROWS)]
    rows[3]["a"] = ""
    rows[5] = {"q": "only a question"}
    write_jsonl(tmp_path / "rows.jsonl", rows)
    content = {
        "output": "run",
        "data": {"source": "rows.jsonl", "question": "q", "answer": "a"},
        "score": {"model": str(tiny_model_path), "max_length": 256, "shard_size": 16},
        "embed": {"model": str(embedder_path)},
        "select": {"clusters": 3, "ratio": 0.25},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def training(config, isolated, tmp_path) -> Path:
    """The same with training and programs for two of three tasks."""
    task = {"base_input": [[1]], "plus_input": [[2]], "atol": 0}
    rows = [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f"def f{n}(x):\n",
            "entry_point": f"f{n}",
            "canonical_solution": f"    return x + {n}\n",
            **task,
        }
        for n in range(3)
    ]
    write_jsonl(tmp_path / "HumanEvalPlus.jsonl", rows)
    flags = {"max_length": 256, "max_steps": 2, "bf16": False, "eval_ratio": 0.2, "save_strategy": "no"}
    change(config, train={**flags, "lora": True, "disable_tqdm": True})
    change(config, generate={"data": "HumanEvalPlus.jsonl", "tasks": list(TASKS), "max_new_tokens": 4}, evaluate={})
    return config


def change(config: Path, **sections) -> None:
    content = yaml.safe_load(config.read_text())
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values} if isinstance(values, dict) else values
    config.write_text(yaml.safe_dump(content))


def did(err: str) -> list[str]:
    """The steps that were done, not those that were kept."""
    return [line.removesuffix(" ...") for line in err.splitlines() if line.endswith(" ...") and " " not in line[:-4]]


def test_the_whole_flow_and_again(codeact, training):
    code, out, err = codeact("run", training)
    assert code == 0, err
    parts = [f"{stage}.{part}" for stage in ("generate", "evaluate") for part in ("before", "after")]
    assert did(err) == ["score", "embed", "select", "padding", "train", *parts, "report"]
    assert "\r" not in err + out  # no bar of any library is drawn into a log
    assert "%|" not in err + out
    folder = Path("run")
    for name in ("ledger.json", "report.html", "selected.rows.parquet", "pack_stats.json", "pack_lengths.npy"):
        assert (folder / name).is_file()
    ledger = Ledger.read(folder / "ledger.json")
    assert ledger.complaints() == []
    assert ledger == ledger_of(folder)
    assert ledger.table() in out
    by_stage = {entry.stage: entry for entry in ledger.entries}
    assert [change.reason for change in by_stage["read"].lost] == ["empty_answer", "missing_column"]
    assert by_stage["select"].rows_out == 10
    assert by_stage["train"].rows_out == 8
    assert by_stage["generate.after"].rows_out == len(TASKS)
    assert by_stage["evaluate.after"].after == "generate.after"
    known = json.loads((folder / "run.json").read_text())
    assert known["settings"]["select"]["ratio"] == 0.25
    assert known["versions"]["torch"]
    assert all(record["seconds"] >= 0 for record in known["stages"].values())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    code, out, err = codeact("run", training)
    assert code == 0, err
    assert did(err) == []
    assert ledger.table() in out
    changed = {path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert changed <= {"run.json", "ledger.json", ".lock"}


def test_only_what_changed_is_done_again_and_comes_back(codeact, config):
    assert codeact("run", config)[0] == 0
    first = Path("run/selected.jsonl").read_bytes()
    change(config, select={"ratio": 0.5})
    code, _, err = codeact("run", config)
    assert code == 0, err
    assert did(err) == ["select", "report"]
    assert Path("run/selected.jsonl").read_bytes() != first
    change(config, select={"ratio": 0.25})
    code, _, err = codeact("run", config)
    assert code == 0, err
    assert did(err) == []
    assert Path("run/selected.jsonl").read_bytes() == first
    change(config, score={"max_length": 200})
    code, _, err = codeact("run", config)
    assert code == 0, err
    assert "embed: done already" in err
    assert did(err)[0] == "score"
    change(config, score={"max_length": 256, "shard_size": 7}, embed={"batch_size": 3})  # where and how fast, not what
    code, _, err = codeact("run", config)
    assert code == 0, err
    assert did(err) == []


def test_changed_data_is_scored_again(codeact, config):
    assert codeact("run", config, "--until", "score")[0] == 0
    with Path("rows.jsonl").open("a") as file:
        file.write('{"q": "one more", "a": "return value for key in list"}\n')
    code, out, err = codeact("run", config, "--until", "score")
    assert (code, did(err)) == (0, ["score"])
    assert "rows in       41" in out


def test_from_and_until(codeact, config):
    code, _, err = codeact("run", config, "--from", "select")
    assert (code, "step score is not done" in err) == (2, True)
    code, _, err = codeact("run", config, "--until", "embed")
    assert (code, did(err)) == (0, ["score", "embed"])
    assert not Path("run/selected.jsonl").exists()
    change(config, score={"max_length": 99})  # does not matter: from select on, scores are taken as they are
    code, _, err = codeact("run", config, "--from", "select")
    assert (code, did(err)) == (0, ["select", "report"])
    for flags, message in (
        (
            ("--from", "train"),
            "the settings have no section train; there are score, embed, select, report",
        ),
        (("--until", "selct"), "--until 'selct' is unknown; choose one of: select"),
        (("--from", "select", "--until", "embed"), "--from select comes after --until embed"),
    ):
        code, _, err = codeact("run", config, *flags)
        assert code == 2
        assert message in err


def test_a_result_that_somebody_changed_is_not_overwritten(codeact, config):
    assert codeact("run", config)[0] == 0
    selected = Path("run/selected.jsonl")
    mine = selected.read_bytes().replace(b"def", b"fed")
    selected.write_bytes(mine)
    code, _, err = codeact("run", config)
    assert code == 2
    assert "selected.jsonl was changed after step select made it" in err
    assert selected.read_bytes() == mine
    selected.unlink()
    code, _, err = codeact("run", config)
    assert (code, did(err)) == (0, ["select"])


@pytest.mark.parametrize(
    ("sections", "key", "message"),
    [
        (
            {"train": {"lora": True, "learning_rat": 1}},
            "learning_rat",
            "train: unknown flag learning_rat; did you mean",
        ),
        ({"train": {"learning_rate": "high"}}, "learning_rate", "train: argument learning_rate"),
        ({"train": {"output_dir": "x"}}, "output_dir", "train: output_dir follows from the other settings"),
        ({"train": {"seed": 1, "eval_strategy": "epoch"}}, "eval_strategy", "train: eval_strategy needs held-out"),
        ({"train": {"bf16": False, "merge": True}}, "merge", "train: merge True merges adapters, and there are none"),
        (
            {"train": {"bf16": False, "report_to": ["x"]}},
            "report_to",
            "train: report_to 'x' is unknown; choose one of",
        ),
        (
            {"train": {"lora": True, "report_to": "swanlab"}},
            "report_to",
            "train: report_to swanlab: swanlab is not inst",
        ),
        ({"train": {}, "generate": {"data": "nowhere.jsonl"}}, "data", "cannot read nowhere.jsonl"),
    ],
)
def test_what_would_stop_a_later_stage_is_said_before_the_first(codeact, config, sections, key, message):
    change(config, **sections)
    lines = [line.strip().partition(":")[0] for line in config.read_text().splitlines()]
    code, _, err = codeact("run", config)
    assert code == 2
    assert f"error: {config}, line {len(lines) - lines[::-1].index(key)}: {message}" in err
    assert did(err) == []
    assert "generate" in sections or message in codeact("run", config, "--dry-run")[2]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"embed": {"model": "./nowhere"}}, "no such folder: ./nowhere"),
        ({"embed": {"dtype": "bfloat61"}}, "dtype 'bfloat61' is unknown; choose one of: bfloat16"),
        ({"embed": {"device": "cuda:7"}}, "device 'cuda:7' is not here"),
        ({"select": {"backend": "cuml"}}, "backend 'cuml' needs an NVIDIA GPU"),
        ({"train": {"max_length": 9999}}, "train: max_length 9999 is more than the 512 positions"),
        ({"train": {"max_length": 1}}, "train: max_length is 1; a sample needs at least 2"),
        ({"train": {"model_type": "llama3"}}, "train: template llama3 needs <|start_header_id|>"),
        ({"train": {"lora": True, "lora_target_modules": "c_fc"}}, "LlamaForCausalLM has no layer named c_fc"),
        ({"train": {"learning_rate": 0}}, "train: learning_rate is 0.0; it must be above 0"),
        ({"train": {"num_train_epochs": 0, "max_steps": -1}}, "train: num_train_epochs is 0.0 and no max_steps"),
        ({"train": {"bf16": True, "fp16": True}}, "train: bf16 and fp16 are two dtypes"),
        ({"train": {"attention": "sdap"}}, "train: attention 'sdap' is unknown; choose one of: "),
        ({"train": {"label_smoothing_factor": 0.1}}, "train: label_smoothing_factor needs all"),
        ({"train": {"eval_path": "nowhere.jsonl", "eval_ratio": 0}}, "train: no such file: nowhere.jsonl"),
        ({"train": {}, "generate": {"dtype": "f8"}}, "dtype 'f8' is unknown"),
        ({"select": {"clusters": 39}}, "clusters 39 is more than the 38 questions in rows.jsonl; lower it"),
        ({"select": {"clusters": 10**6}}, "clusters 1000000 is more than the 40 questions"),
        ({"select": {"clusters": 39, "strategy": "facility_location"}}, "clusters 39 is more than"),
        ({"train": {"resume_from_checkpoint": "nowhere"}}, "resume_from_checkpoint nowhere is no checkpoint folder"),
        ({"train": {"question_column": "q"}}, "train: question_column follows from the other settings"),
        ({"train": {"split": "train"}}, "train: split follows from the other settings"),
        ({"train": {"torch_compile": True}}, "train: torch_compile True cannot compile codeact_varlen; add attention"),
        ({"train": {"torch_compile_backend": "inductor"}}, "train: torch_compile True cannot compile codeact_varlen"),
        ({"train": {"logging_steps": -1}}, "train: logging_steps is -1.0; it must be above 0"),
        (
            {"train": {"logging_steps": 2.5}},
            "train: transformers refuses these flags: logging_steps must be an integer",
        ),
        ({"train": {"warmup_steps": -1}}, "train: transformers refuses these flags: "),
        (
            {
                "train": {
                    "load_best_model_at_end": True,
                    "save_strategy": "steps",
                    "eval_strategy": "steps",
                    "save_steps": 0.3,
                    "eval_steps": 0.2,
                }
            },
            "saving steps to be a multiple of the evaluation steps",
        ),
        (
            {
                "train": {
                    "load_best_model_at_end": True,
                    "save_strategy": "steps",
                    "eval_strategy": "steps",
                    "save_steps": 3,
                    "eval_steps": 2,
                }
            },
            "a round multiple of 2",
        ),
        ({"train": {"adam_beta1": 1.5}}, "a step with these flags fails on a tiny model: ValueError: Invalid beta"),
        ({"train": {"optim_args": "bogus"}}, "a step with these flags fails on a tiny model: ValueError: "),
        ({"train": {"lr_scheduler_kwargs": {"bogus": 1}}}, "fails on a tiny model: TypeError: "),
        ({"train": {"save_strategy": "best"}}, "fails on a tiny model: ValueError: "),
        (
            {
                "train": {
                    "load_best_model_at_end": True,
                    "save_strategy": "epoch",
                    "eval_strategy": "epoch",
                    "metric_for_best_model": "accuracy",
                }
            },
            "fails on a tiny model: KeyError: ",
        ),
        ({"train": {"per_device_train_batch_size": 10**12}}, "batch_size is 1000000000000; more than 1,048,576"),
        ({"train": {}, "generate": {"template": "llama3"}}, "template llama3 needs <|start_header_id|>"),
    ],
)
def test_what_this_machine_or_model_refuses_is_said_before_the_first(codeact, training, sections, message):
    given = yaml.safe_load(training.read_text())
    change(training, **{name: {**given.get(name, {}), **section} for name, section in sections.items()})
    code, _, err = codeact("run", training)
    assert code == 2
    assert re.search(rf"error: {re.escape(str(training))}, line \d+: .*{re.escape(message)}", err)
    assert did(err) == []


def test_a_person_is_told_something_before_libraries_load(config):
    """That takes ten seconds; the line is there before the first of them is asked for."""
    code = (
        "import sys; from codeact import cli\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': print('torch', file=sys.stderr); raise SystemExit(7)\n"
        "sys.meta_path.insert(0, Stop()); sys.argv = ['codeact', *sys.argv[1:]]; cli.main()"
    )
    for more in ([], ["--dry-run"]):
        command = [sys.executable, "-c", code, "run", str(config), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (7, "torch")
        assert "codeact run: checking the settings; libraries load ..." in done.stderr


def test_what_a_stage_says_names_keys(codeact, config, monkeypatch, capsys):
    """Whatever it says and whenever: an error, a missing library, a warning; afterwards flags are flags again."""
    from codeact.base import errors
    from codeact.embedding import stage as embedding

    said = {
        InputError: ("lower --max-length (now 5) or --processes", "lower max_length (now 5) or processes"),
        errors.MissingExtraError: (("peft", "train", "--lora True"), 'lora True needs peft: pip install "codeact[tr'),
    }
    for kind, (words, expected) in said.items():

        def work(self, run, kind=kind, words=words):
            print(errors.addressed("--tokens-per-pack starts lower"))
            raise kind(*([words] if isinstance(words, str) else words))

        monkeypatch.setattr(embedding.Embed, "work", work)
        code, out, err = codeact("run", config)
        assert (code, out.splitlines()[-1]) == (2, "tokens_per_pack starts lower")
        assert f"codeact: error: {expected}" in err
    assert "error: --max-length 1" in codeact("score", "x", "--model", "m", "--output", "o", "--max-length", 1)[2]


def test_a_flag_of_the_command_line_has_no_line(codeact, config):
    code, _, err = codeact("run", config, "--set", "train.learning_rat=1")
    assert code == 2
    assert "error: train: unknown flag learning_rat" in err


def test_a_stage_that_loses_a_row_in_silence_is_found_out(codeact, config, monkeypatch):
    from codeact.selection import choose as selection

    def lossy(path, rows):
        return write_jsonl(path, list(rows)[:-1])

    monkeypatch.setattr(selection, "write_chosen", lossy)
    code, _, err = codeact("run", config, "--until", "select")  # the report may miss the row itself
    assert code == 1, err
    assert "does not balance: select: 38 rows in + 0 added is not 9 out + 28 lost" in err


def entry(stage, before, rows_in, rows_out, **more):
    return Entry(stage=stage, what="rows", after=before, rows_in=rows_in, rows_out=rows_out, **more)


def test_a_ledger_balances_or_says_where_not():
    lost = (Change(reason="empty", rows=2, tokens=5), Change(reason="cut", rows=0, tokens=3))
    first = entry("a", None, 10, 8, tokens_in=100, tokens_out=92, lost=lost)
    assert Ledger(entries=(first, entry("b", "a", 8, 8, tokens_in=92, tokens_out=92))).complaints() == []
    assert Ledger(entries=(first, entry("b", "a", 7, 7))).complaints() == ["b takes in 7 rows, a gave out 8"]
    added = (Change(reason="format", rows=0, tokens=4),)
    assert Ledger(entries=(entry("a", None, 1, 1, tokens_in=1, tokens_out=5, added=added),)).complaints() == []
    (text,) = Ledger(entries=(entry("a", None, 1, 1, tokens_in=1, tokens_out=4, added=added),)).complaints()
    assert text == "a: 1 tokens in + 4 added is not 4 out + 0 lost"


def test_the_audit_names_a_reason_for_every_row(codeact, config):
    assert codeact("run", config, "--until", "select")[0] == 0
    table = pq.read_table("run/selected.rows.parquet")
    assert table.schema.equals(selection_audit.AUDIT_SCHEMA)
    assert Ledger.read(Path("run/ledger.json")) == ledger_of(Path("run"))
    assert table["row"].to_pylist() == list(range(ROWS))
    chosen = [json.loads(line)["id"] for line in Path("run/selected.jsonl").read_text().splitlines()]
    rows = table.to_pylist()
    assert [row["id"] for row in rows if row["chosen"]] == chosen
    assert rows[3]["reason"] == "empty_answer"
    assert rows[5]["reason"] == "unreadable"
    assert rows[5]["cluster"] is None
    scores = pq.read_table("run/scores/scores.parquet").to_pylist()
    for row, score in zip(rows, scores, strict=True):
        assert (row["reason"] is None) == row["chosen"]
        if score["status"] == "ok" and not row["chosen"]:
            assert row["reason"] == ("ifd_at_least_1" if score["ifd"] >= 1 else "below_budget")


class InterruptionError(Exception):
    """Stands for a kill: nothing after it runs."""


@pytest.mark.parametrize("at", range(1, 12))
def test_a_kill_between_any_two_moves_mixes_nothing(tmp_path, monkeypatch, at):
    """Results of two settings are swapped to and fro; whatever was cut off, each comes back whole."""
    folder = tmp_path / "run"
    made = []

    class Step(Stage):
        name = section = "s"
        outputs = products = ("a", "b")

        def __init__(self, text):
            self.text = text

        def inputs(self, run):
            return {}

        def work(self, run):
            made.append(self.text)
            for name in ("a", "b"):
                (folder / name).write_text(self.text)
            return [("made", self.text)]

    for text in ("one", "two"):
        RunFolder(folder).do(Step(text), text, None)
    real, calls = os.replace, 0

    def cut(source, target):
        nonlocal calls
        calls += 1
        if calls == at:
            raise InterruptionError
        real(source, target)

    monkeypatch.setattr(os, "replace", cut)
    with suppress(InterruptionError):
        RunFolder(folder).reusable(Step("one"), "one")
    monkeypatch.setattr(os, "replace", real)
    for text in ("two", "one", "two"):
        state = RunFolder(folder)
        assert state.reusable(Step(text), text)
        assert [(folder / name).read_text() for name in ("a", "b")] == [text, text]
        assert state.lines("s") == [("made", text)]
    assert made == ["one", "two"]


def test_one_process_at_a_time(tmp_path):
    other = RunFolder(tmp_path).locked()
    with RunFolder(tmp_path).locked(), pytest.raises(InputError, match="another codeact run is at work"):
        other.__enter__()


def test_kill_9_and_the_same_command_again(codeact, config):
    """Killed while it scores, with a shard done; the rerun gives what an uninterrupted run gives."""
    command = [sys.executable, "-m", "codeact", "run", str(config), "--until", "select"]
    process = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = Path("run/scores/shards/00000-of-00003.parquet")
    while not first.exists() and process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert first.exists()
    kept = first.stat().st_mtime_ns
    code, _, err = codeact("run", config, "--until", "select")
    assert code == 0, err
    assert first.stat().st_mtime_ns == kept
    interrupted = Path("run/selected.jsonl").read_bytes()
    change(config, output="other")
    assert codeact("run", config, "--until", "select")[0] == 0
    assert Path("other/selected.jsonl").read_bytes() == interrupted


KILLS = {"embed": 1, "train": 2, "evaluate.after": 2}
"""In the work of which stages a run is killed, and at which of the files that they put in place."""

_KILLED = """
import os, signal, sys
from pathlib import Path
from codeact.__main__ import main
from codeact.run import flow
marks, kills = Path(sys.argv[1]), eval(sys.argv[2])
for stage in flow.STAGES:
    def work(run, name=stage.name, plain=stage.work):
        if name in kills and not (marks / name).exists():
            (marks / name).touch()
            count, replace = [0], os.replace
            def counted(*names):
                count[0] += 1
                if count[0] == kills[name]:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(*names)
            os.replace = counted
        return plain(run)
    stage.work = work
sys.argv = ["codeact", "run", sys.argv[3]]
main()
"""


def test_kill_9_in_several_stages_and_the_same_command_again(training, tmp_path):
    """Each time as it puts a file in place; what is done stays, and the end is that of a run that nobody killed."""
    change(training, generate={"before": False})
    (tmp_path / "marks").mkdir()
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "marks"), repr(KILLS), str(training)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done: list[str] = []
    for name in KILLS:
        result = forked.run(command, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert did(result.stderr)[-1] == name
        assert not set(did(result.stderr)) & set(done)
        done += did(result.stderr)[:-1]
    result = forked.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert did(result.stderr) == ["evaluate.after", "report"]
    assert Ledger.read(Path("run/ledger.json")) == ledger_of(Path("run"))
    change(training, output="other")
    whole = [sys.executable, "-m", "codeact", "run", str(training)]  # on as many threads, as training rounds by them
    result = forked.run(whole, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    for name in (
        "selected.jsonl",
        "embeddings.npy",
        "model/adapter_model.safetensors",
        "programs/after/humaneval.jsonl",
    ):
        assert Path("run", name).read_bytes() == Path("other", name).read_bytes(), name
    assert Ledger.read(Path("run/ledger.json")) == Ledger.read(Path("other/ledger.json"))


def test_several_processes_give_the_same_scores(codeact, config):
    assert codeact("run", config, "--until", "score")[0] == 0
    change(config, output="two", processes=2)
    code, _, err = codeact("run", config, "--until", "score")
    assert code == 0, err
    tables = [pq.read_table(f"{name}/scores/scores.parquet") for name in ("run", "two")]
    assert tables[0].equals(tables[1])


def test_several_processes_train_under_torchrun(codeact, config, monkeypatch):
    change(config, train={"max_length": 256, "max_steps": 1, "lora": True}, processes=8)
    flow, commands = open_flow(config), []
    (train,) = (stage for stage in flow.stages if stage.name == "train")

    def launched(command, env, check):
        commands.append(command)
        assert env["OMP_NUM_THREADS"] == "2"
        return subprocess.CompletedProcess(command, 3)

    Path("run").mkdir()
    monkeypatch.setattr(training_stage.subprocess, "run", launched)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")  # what `limit_threads` set, or the user, is for all ranks together
    with pytest.raises(InputError, match="training in 8 processes ended with exit code 3"):
        train.work(flow)
    assert commands[0][1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "8"]
    from codeact.training.flags import parse

    parsed = parse([commands[0][-1]])
    assert parsed.data.data_path == "run/selected.jsonl"
    assert parsed.trainer.output_dir == "run/model"


@pytest.fixture
def demo(codeact, model_path, embedder_path, human_eval_path, tmp_path, monkeypatch):
    """The settings that the demo runs with, and what it prints; the work itself is what `make demo` does."""
    from codeact.run import demo

    def run():
        seen = []
        monkeypatch.setattr(run_flow.Flow, "run", lambda self: seen.append(self.settings))
        monkeypatch.setattr(demo, "write_harvest", lambda *_, limit: f"harvested {limit}")
        code, out, err = codeact("demo", "--rows", 12, "--output", tmp_path / "d")
        assert code == 0, err
        assert "harvested 12" in err
        return seen[0], out, err

    return run


def test_the_demo(demo, model_path, tmp_path):
    settings, out, _ = demo()
    assert settings.model_dump() == open_flow(tmp_path / "d" / "run.yaml").settings.model_dump()
    assert settings.score.model == str(model_path)
    assert len(settings.generate.tasks if settings.generate else ()) in (0, 8)
    assert "report.html" in out


def test_the_demo_goes_on_without_a_sandbox(demo, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    settings, _, err = demo()
    assert "HumanEval is left out: refusing to run generated programs" in err
    assert settings.generate is None


class ToySettings(Settings):
    """How often a row is counted."""

    times: int = setting(1, "Every row so many times.", ge=1)


class Toy(Stage):
    """A stage in one file: all that a run has to know of it."""

    name = section = "toy"
    settings, default = ToySettings, None
    needs = ("select",)
    outputs = products = ("toy.txt",)

    def inputs(self, run):
        return {**run.digest("select"), "times": run.of(ToySettings).times}

    def work(self, run):
        rows = len((run.output / "selected.jsonl").read_text().splitlines())
        (run.output / "toy.txt").write_text(f"{rows} {run.of(ToySettings).times * rows}")
        return [("counted", f"{rows} rows for the toy")]

    def account(self, output):
        if (output / "toy.txt").exists():
            rows, kept = map(int, (output / "toy.txt").read_text().split())
            yield Entry(stage="toy", what="rows", after="select", rows_in=rows, rows_out=kept)


def test_a_stage_of_ones_own_is_run_kept_forecast_counted_and_reported(codeact, config, monkeypatch, capsys):
    from codeact.forecast import forecast

    stages = (*STAGES[:-1], Toy(), STAGES[-1])
    change(config, toy={})
    with pytest.raises(InputError, match="toy: unknown key"):
        open_flow(config)
    monkeypatch.setattr(run_flow, "STAGES", stages)
    plan = {step.name: step.state for step in forecast(open_flow(config, stages)).steps}
    assert (plan["toy"], [*plan][-2:]) == ("to do", ["toy", "report"])
    ledger = open_flow(config, stages).run()
    assert [entry.rows_out for entry in ledger.entries if entry.stage == "toy"] == [10]
    out, err = capsys.readouterr()
    assert did(err) == ["score", "embed", "select", "toy", "report"]
    assert "10 rows for the toy" in out
    assert "10 rows for the toy" in Path("run/report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert forecast(open_flow(config, stages)).steps[-2].state == "done already"
    open_flow(config, stages).run()
    assert did(capsys.readouterr().err) == []
    change(config, toy={"times": 0})
    with pytest.raises(InputError, match=r"toy\.times: input should be greater than or equal to 1"):
        open_flow(config, stages)
    change(config, toy={"times": 2})
    with pytest.raises(run_flow.LedgerError, match="toy: 10 rows in"):
        open_flow(config, stages).run(first="toy", last="toy")
    change(config, select={"ratio": 0.5})
    ledger = open_flow(config, stages).run(last="select")
    assert ledger.stale == ("toy",)


def test_stale_stages_are_named_and_not_counted(codeact, config):
    """A changed ratio and --until select: what was trained before says nothing about the rows that are chosen now."""
    assert codeact("run", config)[0] == 0
    Path("run/model").mkdir()
    Path("run/model/training.json").write_text("{}")  # of the old choice; its counts cannot balance
    content = json.loads(Path("run/run.json").read_text())
    took = {"select": {"selected.jsonl": "another"}}
    content["stages"]["train"] = {"stage": "train", "key": "k", "seconds": 1, "products": {}, "lines": [], "took": took}
    Path("run/run.json").write_text(json.dumps(content))
    change(config, select={"ratio": 0.5})
    code, out, err = codeact("run", config, "--until", "select")
    assert code == 0, err
    assert "stale, made from other results, and not counted: train\n" in out


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {}, "generate": {"samples": 3}}, "line 21: generate: 3 greedy samples would all be the same"),
        ({"train": {}, "generate": {"max_new_tokens": 0}}, "generate.max_new_tokens: input should be greater than"),
        ({"score": {"protocol": "ours"}}, "score.protocol: protocol 'ours' is unknown; choose one of"),
    ],
)
def test_what_a_command_refuses_the_file_refuses_too(codeact, config, sections, message):
    change(config, **sections)
    code, _, err = codeact("run", config)
    assert (code, did(err)) == (2, [])
    assert message.partition(": ")[2] in err
