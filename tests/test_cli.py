"""The commands as a person types them: whole flow, one-line errors, exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from codeact.data.records import write_jsonl
from codeact.scoring import stage as scoring_stage
from tests.conftest import make_records

ROWS = 40


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"q": record.question, "a": record.answer, "tag": record.row} for record in make_records(ROWS)]
    rows[3]["a"] = ""
    write_jsonl(path, rows)
    return path


COLUMNS = ("--question-column", "q", "--answer-column", "a")


def test_the_whole_flow(codeact, data, tiny_model_path, embedder_path, tmp_path):
    options = ("--model", tiny_model_path, "--max-length", 256, "--output", tmp_path / "scores", *COLUMNS)
    code, out, err = codeact("score", data, *options)
    assert code == 0, err
    assert "rows refused" in out
    assert "rows.jsonl row 3 (line 4)" in out
    code, _, err = codeact("embed", data, "--model", embedder_path, "--output", tmp_path / "e.npy", *COLUMNS)
    assert code == 0, err
    assert "embedded 39 questions" in err
    selecting = ("--scores", tmp_path / "scores", "--embeddings", tmp_path / "e.npy", "--clusters", 3)
    code, out, err = codeact("select", *selecting, "--output", tmp_path / "chosen.jsonl")
    assert code == 0, err
    chosen = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    assert f"{len(chosen)} conversations" in out
    assert 0 < len(chosen) <= 16
    original = [json.loads(line) for line in data.read_text().splitlines()]
    for line in chosen:
        source = original[int(line["id"])]
        assert line["messages"] == [
            {"role": "user", "content": source["q"]},
            {"role": "assistant", "content": source["a"]},
        ]
        assert line["extra"] == {"tag": source["tag"]}
        assert 0 < line["ifd"] < 1
        assert line["cluster"] in (0, 1, 2)
    code, out, err = codeact("merge", tmp_path / "scores", "--paper-json", tmp_path / "paper.json")
    assert code == 0, err
    assert codeact("merge", tmp_path / "scores", "--seed-json", tmp_path / "old.json")[0] == 0  # its old name
    assert (tmp_path / "old.json").read_bytes() == (tmp_path / "paper.json").read_bytes()
    assert "39 rows in" in out


def test_carried_columns_of_any_type_survive(codeact, tiny_model_path, tmp_path):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = make_records(10)
    when = datetime.datetime(2024, 8, 5, 12)
    carried = {"when": [when] * 10, "raw": [b"\xff"] * 10, "weight": [float("nan")] * 10, "tags": [["a"]] * 10}
    columns = {"instruction": [r.question for r in rows], "output": [r.answer for r in rows], **carried}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    options = ("--model", tiny_model_path, "--max-length", 256, "--output", tmp_path / "s")
    assert codeact("score", tmp_path / "rows.parquet", *options)[0] == 0
    selecting = ("--scores", tmp_path / "s", "--strategy", "random", "--output", tmp_path / "o.jsonl")
    code, _, err = codeact("select", *selecting)
    assert code == 0, err
    line = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])
    assert line["extra"] == {"when": "2024-08-05T12:00:00", "raw": "/w==", "weight": None, "tags": ["a"]}


def test_embeddings_of_other_data_are_refused(codeact, data, tiny_model_path, embedder_path, tmp_path):
    codeact("score", data, "--model", tiny_model_path, "--max-length", 256, "--output", tmp_path / "s", *COLUMNS)
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"\n".join(data.read_bytes().splitlines()[1:]))
    codeact("embed", other, "--model", embedder_path, "--output", tmp_path / "e.npy", *COLUMNS)
    selecting = ("--scores", tmp_path / "s", "--embeddings", tmp_path / "e.npy", "--output", tmp_path / "o.jsonl")
    code, _, err = codeact("select", *selecting)
    assert code == 2
    assert "different data" in err
    assert not (tmp_path / "o.jsonl").exists()


def test_changed_data_is_refused_and_moved_data_is_found(codeact, data, tiny_model_path, tmp_path):
    codeact("score", data, "--model", tiny_model_path, "--max-length", 256, "--output", tmp_path / "s", *COLUMNS)
    moved = data.rename(tmp_path / "moved.jsonl")
    selecting = ("select", "--scores", tmp_path / "s", "--strategy", "random", "--output", tmp_path / "o.jsonl")
    code, _, err = codeact(*selecting)
    assert code == 2
    assert "if the data has moved, say where with --data" in err
    code, _, err = codeact(*selecting, "--data", moved)
    assert code == 0, err
    moved.write_bytes(moved.read_bytes().replace(b"def", b"fed"))
    code, _, err = codeact(*selecting, "--data", moved)
    assert code == 2
    assert "is not the data that was scored" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("score", "nowhere.jsonl", "--model", "M", "--output", "O"), "no such file: nowhere.jsonl"),
        (("score", "DATA", "--model", "./nowhere", "--output", "O"), "no column 'instruction'"),
        (("score", "DATA", "--model", "./nowhere", "--output", "O", *COLUMNS), "no such folder: ./nowhere"),
        (("score", "DATA", "--model", "MODEL", "--output", "O", "--protocol", "sed", *COLUMNS), "--protocol 'sed'"),
        (("score", "DATA", "--model", "MODEL", "--output", "O", "--max-length", "1", *COLUMNS), "--max-length 1"),
        (("score", "DATA", "--model", "MODEL", "--output", "O", "--device", "tpu", *COLUMNS), "device 'tpu'"),
        (("score", "DATA", "--model", "MODEL", "--output", "O", "--device", "cuda:9", *COLUMNS), "use --device cpu"),
        (
            ("score", "DATA", "--model", "MODEL", "--output", "O", "--dtype", "bf16", *COLUMNS),
            "choose one of: bfloat16",
        ),
        (
            (
                "score",
                "DATA",
                "--model",
                "MODEL",
                "--output",
                "O",
                "--template",
                "chta",
                "--max-length",
                "99",
                *COLUMNS,
            ),
            "choose one of: chat",
        ),
        (("score", "DATA", "--model", "./nowhere", "--output", "DATA"), "is a file, and what is written is a folder"),
        (("generate", "--model", "./nowhere", "--output", "."), "is a folder, and what is written is a file"),
        (("select", "--scores", "nowhere", "--output", "."), "is a folder, and what is written is a file"),
        (("train", "--model", "MODEL", "--data", "DATA"), "--data_path FILE"),
        (("train", "--model", "MODEL", "--lr", "1e-4"), "--learning_rate"),
        (("merge", "nowhere"), "holds no scores"),
        (("embed", "DATA", "--output", "vectors.txt", *COLUMNS), "must end in .npy"),
        (("select", "--scores", "nowhere", "--output", "o.jsonl"), "holds no scores"),
        (("select", "--scores", "nowhere", "--output", "o.jsonl", "--ratio", "0"), "--ratio 0"),
        (("select", "--scores", "nowhere", "--output", "o.jsonl", "--strategy", "best"), "--strategy 'best'"),
        (("run", "nowhere.yaml"), "cannot read nowhere.yaml"),
        (("run", "dmeo"), "no such file: dmeo; codeact brings demo"),
        (("harvest", "no_such_package", "--output", "o.jsonl"), "no_such_package"),
    ],
)
def test_one_clear_line(codeact, data, tiny_model_path, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    places = {"DATA": data, "MODEL": tiny_model_path}
    code, out, err = codeact(*(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("codeact: error: ")]
    assert message in line
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("score", "PIPE", "--model", "MODEL", "--output", "O"),
        ("embed", "PIPE", "--output", "o.npy"),
        ("ppl", "PIPE", "--model", "MODEL"),
        ("ppl", "PIPE.txt", "--model", "MODEL"),
        ("pack-stats", "PIPE.jsonl", "--tokenizer", "MODEL", "--max-length", "9"),
        ("train", "--model", "MODEL", "--data_path", "PIPE", "--output_dir", "o", "--bf16", "False"),
        ("run", "PIPE"),
        ("train", "PIPE.yaml"),
        ("sanitize", "PIPE"),
        ("evaluate", "--dataset", "humaneval", "--samples", "PIPE", "--data", "PROBLEMS"),
        ("evaluate", "--dataset", "humaneval", "--samples", "PIPE", "--data", "PIPE"),
        ("evaluate", "--dataset", "humaneval", "--samples", "folder", "--data", "PROBLEMS"),
    ],
)
def test_a_pipe_is_refused_with_the_remedy(codeact, tiny_model_path, tmp_path, monkeypatch, arguments):
    """As of ``--samples <(zcat samples.jsonl.gz)``: it cannot be read twice, and nothing lies beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "HumanEval_0").mkdir(parents=True)
    for name in ("PIPE", "PIPE.txt", "PIPE.jsonl", "PIPE.yaml", "folder/HumanEval_0/0.py"):
        os.mkfifo(tmp_path / name)
    task = {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": " return x",
            "base_input": [[1]], "plus_input": [], "atol": 0}  # fmt: skip
    (tmp_path / "PROBLEMS").write_text(json.dumps(task))
    places = {"MODEL": tiny_model_path}
    code, out, err = codeact(*(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("codeact: error: ")]
    assert "is a pipe or a device, not a file: save what it gives" in line


@pytest.mark.parametrize("blank", [" ", "\t\n", "\u00a0", "\u3000 ", ""])
def test_a_blank_question_is_counted_and_named_by_every_command(codeact, tiny_model_path, tmp_path, monkeypatch, blank):
    """It is no question: nothing is measured against it or learnt from it, and none of that is silent."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": record.question, "output": record.answer} for record in make_records(6)]
    rows[2]["instruction"] = blank
    write_jsonl(Path("d.jsonl"), rows)
    code, out, err = codeact("score", "d.jsonl", "--model", tiny_model_path, "--output", "s")
    assert code == 0, err
    assert "1 (1 empty_question)" in out
    assert "d.jsonl row 2 (line 3): the question is blank" in out
    code, out, err = codeact("pack-stats", "d.jsonl", "--tokenizer", tiny_model_path, "--max-length", 256)
    assert "5 samples of 6 rows (0 truncated; refused: 1 empty_question)" in out
    code, out, err = codeact("clean", "d.jsonl", "--output", "c.jsonl")
    assert code == 0, err
    assert "1 hold no record" in out


def test_unknown_option_names_the_closest(codeact):
    code, _, err = codeact("score", "DATA", "--model", "M", "--output", "O", "--max-lenght", 5)
    assert code == 2
    assert "--max-length" in err


def test_names_of_transformers_and_trl_are_taken(codeact, data, tiny_model_path, tmp_path):
    files = []
    for number, (model, length, output, column) in enumerate(
        [
            ("--model", "--max-length", "--output", "--question-column"),
            ("--model_name_or_path", "--max_seq_len", "--output_dir", "--question_column"),
            ("--model-name-or-path", "--max-seq-length", "--output-dir", "--question-column"),
            ("--model", "--capacity", "--output", "--question_column"),
        ]
    ):
        folder = tmp_path / str(number)
        names = (model, tiny_model_path, length, 256, output, folder, column, "q", "--answer_column", "a")
        code, _, err = codeact("score", data, *names)
        assert code == 0, err
        files.append((folder / "scores.parquet").read_bytes())
        options = ("--tokenizer_name_or_path", tiny_model_path, length, 256, "--json", folder / "p.json", *COLUMNS)
        assert codeact("pack-stats", data, *options)[0] == 0
        files[-1] += (folder / "p.json").read_bytes()
    assert len(set(files)) == 1


def test_perplexity_of_files(codeact, tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "def add(a, b):\n    return a + b\n" * 20
    Path("t.txt").write_text(text)
    write_jsonl("t.jsonl", [{"text": text, "n": 1}, {"text": "", "n": 2}])
    Path("bad.jsonl").write_text('{"text": "a b"}\n{"text": 5}\n')
    Path("bad.txt").write_bytes(b"ab\xff")
    options = ("--model", tiny_model_path, "--max-length", 64, "--stride", 32)
    code, out, err = codeact("ppl", "t.txt", *options)
    assert code == 0, err
    assert codeact("ppl", "t.jsonl", *options)[1] == out.replace("1 texts", "2 texts")
    for name, message in [
        ("bad.jsonl", "bad.jsonl row 1 (line 2): column 'text' is a number, not text"),
        ("bad.txt", "bad.txt is no UTF-8 text: byte 2"),
        ("no.txt", "cannot read no.txt: No such file"),
        ("no.jsonl", "no such file: no.jsonl"),
        ("t.jsonl --text-column txt", "t.jsonl row 0 (line 1): no column 'txt'; name one of those there: text, n"),
    ]:
        code, _, err = codeact("ppl", *name.split(), *options)
        assert code == 2
        assert message in err


def test_pack_stats(codeact, data, tiny_model_path, tmp_path):
    options = ("--tokenizer", tiny_model_path, "--capacity", 256, "--json", tmp_path / "p.json", *COLUMNS)
    code, out, err = codeact("pack-stats", data, *options, "--plot", tmp_path / "p.png")
    assert code == 0, err
    assert "dynamic_pack" in out
    assert json.loads((tmp_path / "p.json").read_text())
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_help_reads_like_the_flow(codeact):
    code, out, _ = codeact("--help")
    assert code == 0
    names = ["harvest", "score", "merge", "embed", "select", "train", "pack-stats", "run", "demo"]
    commands = out[out.index("Commands:") :]
    positions = [commands.index(f"\n  {name} ") for name in names]
    assert positions == sorted(positions)


def test_version(codeact):
    assert codeact("--version")[1].startswith("codeact 0.")


def test_padding_of_batches_is_counted():
    import pyarrow as pa

    lengths = [5, 1, 1, 9, 2]
    table = pa.table({"status": ["ok"] * 4 + ["unreadable"], "prompt_tokens": lengths, "answer_tokens": [0] * 5})
    # batches of 2: (5, 1) and (1, 9) become 10 and 18 tokens; the last row was not scored
    assert scoring_stage._batch_padding(table, 2) == pytest.approx(1 - np.array([5, 1, 1, 9]).sum() / 28)


RAW = "\x1b[31m\x9b1m\u202e\u2066\x07"


@pytest.mark.parametrize(
    "arguments",
    [
        ("score", f"{RAW}.jsonl", "--model", "M", "--output", "O"),
        ("score", "DATA", f"--{RAW}", "x"),
        ("train", f"--{RAW}", "x"),
        ("run", "YAML"),
        ("run", "demo", "--set", f"{RAW}.a=1"),
        ("sanitize", "SAMPLES"),
        ("evaluate", "--dataset", "humaneval", "--samples", "SAMPLES"),
        ("select", "--scores", RAW, "--output", "o.jsonl"),
        ("harvest", RAW, "--output", "o.jsonl"),
        ("report", RAW),
        ("merge", RAW),
    ],
)
def test_what_an_error_quotes_is_escaped(codeact, data, tmp_path, arguments):
    (tmp_path / "y.yaml").write_text(json.dumps({"output": "o", RAW: 1, "data": {"source": RAW}}))
    (tmp_path / "s.jsonl").write_text(json.dumps({"task_id": RAW, "solution": 5}) + "\n")
    places = {"DATA": data, "YAML": tmp_path / "y.yaml", "SAMPLES": tmp_path / "s.jsonl"}
    code, out, err = codeact(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert not set(RAW.replace("[31m", "").replace("1m", "")) & set(out + err)


def test_names_of_files_are_escaped_wherever_they_are_told(codeact, data, tiny_model_path, tmp_path):
    named = tmp_path / f"{RAW}.jsonl"
    data.rename(named)
    options = ("--model", tiny_model_path, "--max-length", 256, "--output", tmp_path / RAW, *COLUMNS)
    code, out, err = codeact("score", named, *options)
    assert code == 0, err
    assert "⟨U+001B⟩[31m" in out
    assert not {"\x1b", "\u202e", "\x9b"} & set(out + err)


def test_a_name_that_is_no_text_is_refused_at_once(codeact, data, tmp_path):
    code, _, err = codeact("score", data, "--model", "M", "--output", f"{tmp_path}/\udc80")
    assert code == 2
    assert "is no UTF-8 text" in err
    (tmp_path / "y.yaml").write_text('{"output": "o", "data": {"source": "\\udc80"}, "score": {"model": "M"}}')
    code, _, err = codeact("run", tmp_path / "y.yaml")
    assert code == 2
    assert "line 1: data.source: the text holds half of a surrogate pair" in err


def test_chosen_rows_and_their_audit_get_their_names_under_one_lock(
    codeact, data, tiny_model_path, tmp_path, named_under_lock
):
    codeact("score", data, "--model", tiny_model_path, "--max-length", 256, "--output", tmp_path / "s", *COLUMNS)
    named = named_under_lock(tmp_path)
    code, _, err = codeact(
        "select", "--scores", tmp_path / "s", "--strategy", "random", "--output", tmp_path / "o.jsonl"
    )
    assert code == 0, err
    assert named == ["o.jsonl", "o.rows.parquet", "README.md"]


@pytest.fixture
def all_refused(tmp_path) -> Path:
    path = tmp_path / "refused.jsonl"
    write_jsonl(path, [{"q": "question", "a": ""}, {"q": "", "a": "answer"}, {"q": "question", "a": 5}])
    return path


def test_all_rows_refused_is_an_exit_code(codeact, all_refused, tiny_model_path, tmp_path):
    options = ("--model", tiny_model_path, "--output", tmp_path / "s", "--max-length", 256, *COLUMNS)
    code, out, err = codeact("score", all_refused, *options)
    assert (code, "rows refused" in out) == (2, True)
    assert "none of 3 rows has a score (1 empty_answer, 1 empty_question, 1 wrong_type)" in err
    assert codeact("merge", tmp_path / "s")[0] == 2
    code, _, err = codeact(
        "select", "--scores", tmp_path / "s", "--strategy", "random", "--output", tmp_path / "o.jsonl"
    )
    assert code == 2
    assert "can be chosen by strategy random (1 empty_answer, 1 empty_question" in err
    assert not (tmp_path / "o.jsonl").exists()


def test_no_question_to_embed_is_an_exit_code(codeact, embedder_path, tmp_path):
    path = tmp_path / "refused.jsonl"
    write_jsonl(path, [{"q": "", "a": "a"}, {"q": 5, "a": "a"}])
    for _ in range(2):
        code, _, err = codeact("embed", path, "--model", embedder_path, "--output", tmp_path / "e.npy", *COLUMNS)
        assert code == 2
        assert "none of 2 rows holds a question" in err
