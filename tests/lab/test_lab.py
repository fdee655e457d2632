"""The lab: differences against plain arithmetic, what it says of them, and a whole one that is stopped and goes on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from codeact.data.records import write_jsonl
from codeact.lab import stage
from codeact.lab.compare import Trial, compare
from codeact.lab.differences import Difference, differences
from codeact.lab.settings import Arm, LabSettings
from tests.conftest import make_records

TRACKER = "tensorboard" if importlib.util.find_spec("tensorboard") else None


def test_a_constant_difference_is_exact_and_noise_is_noise():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 200, 300)
    other = rng.gamma(2, 0.5, (3, 300)) * tokens
    token, row = differences(other + 0.25 * tokens, other, tokens)
    assert token.mean == pytest.approx(0.25)
    assert row.mean == pytest.approx(0.25)
    alone = differences(other[:1] + 0.25 * tokens, other[:1], tokens)  # one seed: rows in pairs, so nothing varies
    for difference in alone:
        assert (difference.low, difference.high) == pytest.approx((0.25, 0.25))
        assert difference.beyond_noise
    again = rng.gamma(2, 0.5, (3, 300)) * tokens
    assert not any(difference.beyond_noise for difference in differences(again, other, tokens))


def test_the_two_means_are_by_token_and_by_row_and_the_interval_is_the_bootstraps():
    tokens = np.array([1, 100] * 50)
    shift = np.array([0.5, -0.1] * 50)  # short answers become worse, long ones better
    base = np.random.default_rng(0).normal(2, 0.1, 100)
    token, row = differences((base + shift)[None] * tokens, base[None] * tokens, tokens)
    assert token.mean == pytest.approx((0.5 - 10) / 101)
    assert row.mean == pytest.approx(0.2)
    rng = np.random.default_rng(1)
    draws = rng.integers(0, 100, (4_000, 100))
    low, high = np.quantile(shift[draws].mean(axis=1), [0.025, 0.975])
    assert (row.low, row.high) == pytest.approx((low, high), abs=0.01)


def test_seeds_that_differ_widen_the_interval():
    tokens = np.full(400, 10)
    other = np.full((3, 400), 20.0)
    arm = other - np.array([[6.0], [-4.0], [-3.0]])  # the mean is lower by 0.03 a token, one seed of three is not
    token, _ = differences(arm, other, tokens)
    assert token.mean == pytest.approx(0.0333, abs=1e-3)
    assert not token.beyond_noise
    assert str(Difference(0.0333, -0.1, 0.5)) == "+0.033 [-0.100, +0.500]"


def losses(values, tokens):
    return {"rows": 5, "tokens": 90, "trained_on_tokens": 99, "steps": 4, "losses": values, "loss_tokens": tokens}


def test_the_sentence_names_what_is_beyond_noise_and_rows_that_do_not_fit_are_left_out():
    rng = np.random.default_rng(0)
    tokens = [0, *rng.integers(5, 50, 199).tolist()]
    base = np.array(tokens) * rng.gamma(4, 0.25, 200)
    arms = {"random": 0.0, "longest": 0.2, "cdas": -0.2, "top_ifd-loss": 0.0}
    settings = LabSettings(
        budgets=(100, 200), seeds=(0,), strategies=({}, {"strategy": "top_ifd", "difficulty": "loss"})
    )
    results = {
        Trial(arm=name, budget=100, seed=0): losses((base + shift * np.array(tokens)).tolist(), tokens)
        for name, shift in arms.items()
    }
    results[Trial(arm="untrained", budget=0, seed=0)] = {"losses": (3 * base).tolist(), "loss_tokens": tokens}
    found = compare(settings, results, np.arange(200, dtype=np.int32) % 2)
    assert found.held_out == 199
    assert list(found.tables) == [100]  # nothing of the other budget is done
    (sentence,) = found.sentences
    assert sentence == (
        "At 100 tokens: better than random rows by token and by row, by more than noise: cdas; worse by both: longest; "
        "no difference beyond noise: top_ifd-loss."
    )
    kept = np.array(tokens[1:])
    shortest = np.argsort(kept, kind="stable")[:67]  # 199 rows in thirds: the first has one more
    row = dict(zip(found.tables[100][0], found.tables[100][1], strict=True))
    assert row["short"] == f"{base[1:][shortest].sum() / kept[shortest].sum():.3f}"
    head, *lines = found.clusters[100]
    assert head == ["arm", "0 (99 rows)", "1 (100 rows)"]
    assert lines[0][2] == f"{base[1::2].sum() / np.array(tokens)[1::2].sum():.3f}"
    page = found.page("2 of 9 trainings are left after 3 minutes")
    assert "**Not finished: 2 of 9 trainings are left after 3 minutes.**" in page
    assert "| cdas" in page
    assert "-0.200 [-0.200, -0.200]" in page


def test_tasks_have_columns_of_their_own():
    sizes = [10, 0, 30]  # the second does not fit
    results = {
        Trial(arm=arm, budget=budget, seed=0): {
            **losses([9.0, 9.5], [10, 10]),
            "solution_losses": [loss, 0.0, 2 * loss],
            "solution_tokens": sizes,
            "passed": passed,
        }
        for arm, budget, loss, passed in (
            ("random", 100, 10.0, [True, False, False]),
            ("longest", 100, 12.0, [True, True, False]),
            ("untrained", 0, 20.0, [False, False, False]),
        )
    }
    head, *rows = compare(LabSettings(budgets=(100,)), results, np.zeros(2, np.int32)).tables[100]
    assert head[-4:] == ["solutions, a token", "to random", "passed", "to random"]
    cells = {row[0]: row[-4:] for row in rows}
    assert cells["random"] == ["0.750", "", "0.333", ""]
    assert cells["longest"][0::2] == ["0.900", "0.667"]
    assert cells["longest"][1].startswith("+0.150 [")
    assert cells["untrained"][3].startswith("-0.333 [")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": [5], "max_new_tokens": 8}, "say which tasks"),
        ({"budgets": [100, 100]}, "budgets needs whole numbers, each once"),
        ({"budgets": []}, "budgets needs whole numbers"),
        ({"budgets": [0]}, "budgets needs whole numbers"),
        ({"budgets": [5], "seeds": []}, "seeds needs whole numbers"),
        (
            {"budgets": [5], "strategies": [{"strategy": "random", "easiest": True}]},
            "easiest is about the difficulty",
        ),
        ({"budgets": [5], "strategies": [{"strategy": "randm"}]}, "strategy"),
        ({}, "budgets"),
    ],
)
def test_settings_that_compare_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LabSettings.model_validate(settings)


def test_the_baselines_are_always_there_once():
    arms = LabSettings(budgets=(5,), strategies=(Arm(strategy="longest"), Arm(), Arm(sampling="proportional"))).arms()
    assert [arm.name for arm in arms] == ["random", "longest", "cdas", "cdas-proportional"]


# ------------------------------------------------------------------------------------------ a whole one


@pytest.fixture
def config(tmp_path, tiny_model_path, embedder_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": record.question, "output": record.answer} for record in make_records(60)]
    rows[7] = dict(rows[8], output="another answer to the same question")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    train = {"max_length": 256, "bf16": False, "lora": True, "disable_tqdm": True, "learning_rate": 1e-3}
    content = {
        "output": "run",
        "data": {"source": "rows.jsonl"},
        "score": {"model": str(tiny_model_path), "max_length": 256},
        "embed": {"model": str(embedder_path)},
        "select": {"clusters": 3},
        "lab": {"budgets": [600], "seeds": [0, 1], "held_out": 12, "train": train},
    }
    path = tmp_path / "lab.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def change(config, **values):
    content = yaml.safe_load(config.read_text())
    content["lab"] |= values
    config.write_text(yaml.safe_dump(content))


def test_a_lab_that_is_stopped_goes_on_and_shares_what_it_did(config, codeact, monkeypatch):
    real, tried = stage._try, []

    def stops(run, settings, trial, pool):
        if len(tried) == 3:
            raise KeyboardInterrupt
        tried.append((trial.name, pool))
        return real(run, settings, trial, pool)

    monkeypatch.setattr(stage, "_try", stops)
    code, _, err = codeact("lab", config)
    assert code == 130, err
    done = {path: path.read_bytes() for path in Path("run/lab-trials").glob("*.json")}
    assert [name for name, _ in tried] == ["untrained-0", "random-600-0", "longest-600-0"]
    assert len(done) == 3

    monkeypatch.setattr(stage, "_try", real)
    told = []
    monkeypatch.setattr(stage, "report_figures", lambda *arguments: told.append(arguments))
    change(config, report_to=TRACKER)
    code, out, err = codeact("lab", config)
    assert code == 0, err
    assert "score: done already" in err
    assert "(1 of 6)" in err
    assert "At 600 tokens: " in out
    trials = {
        path.name.rpartition("-")[0]: json.loads(path.read_text()) for path in Path("run/lab-trials").glob("*.json")
    }
    assert all(path.read_bytes() == content for path, content in done.items())
    assert set(trials) == {
        "untrained-0",
        *(f"{arm}-600-{seed}" for arm in ("random", "longest", "cdas") for seed in (0, 1)),
        *(f"all-{seed}" for seed in (0, 1)),
    }
    ((*where, _, figures),) = told
    assert where == [TRACKER, "lab", Path("run/lab")]
    assert figures == {f"{n}/held_out_loss": sum(t["losses"]) / sum(t["loss_tokens"]) for n, t in trials.items()}
    assert not any(Path("run/lab-trials/work").iterdir())  # what was trained is gone
    for name, trial in trials.items():
        assert trial["loss_tokens"] == trials["untrained-0"]["loss_tokens"]
        assert len(trial["losses"]) == 12
        if "600" in name:
            assert 300 < trial["tokens"] <= 600
        if name != "untrained-0":
            assert trial["losses"] != trials["untrained-0"]["losses"]
    assert trials["random-600-0"]["losses"] != trials["random-600-1"]["losses"]
    pool = tried[0][1]
    chosen_from = set(pool.table["row"].to_pylist())
    held = {record.row for record in pool.held_out}
    assert not held & chosen_from
    if held & {7, 8}:
        assert not chosen_from & {7, 8}  # no other answer to a held-out question
    assert trials["all-0"]["rows"] == len(chosen_from)
    # the loss of an untrained model is the one that scoring knows, but for the format of the chat
    page = Path("run/lab/lab.md").read_text()
    for name in ("untrained", "all", "random", "longest", "cdas"):
        assert f"\n| {name} " in page
    table = pq.read_table("run/scores/scores.parquet")
    assert table.num_rows == 60

    # another budget of time, another seed: what is there is shared
    change(config, seeds=[0, 1, 2], minutes=1e-9)
    code, _, err = codeact("lab", config)
    assert code == 2
    assert "lab: 4 of 13 trainings are left after 1e-09 minutes; run/lab/lab.md compares those that are done" in err
    assert "**Not finished" in Path("run/lab/lab.md").read_text()


def test_tasks_are_tried_by_their_solutions_and_by_programs(config, codeact, isolated, monkeypatch, tmp_path):
    monkeypatch.setenv("CODEACT_EVAL_DATA", str(tmp_path))
    row = {"entry_point": "f", "base_input": [[1]], "plus_input": [[2]], "atol": 0}
    rows = [
        {**row, "task_id": f"HumanEval/{n}", "prompt": "def f(x):\n", "canonical_solution": f"    return x + {n}\n"}
        for n in range(3)
    ]
    write_jsonl(tmp_path / "HumanEvalPlus.jsonl", rows)
    change(config, seeds=[0], tasks=["HumanEval/0", "HumanEval/2"], max_new_tokens=8)
    code, _, err = codeact("lab", config)
    assert code == 0, err
    trials = [json.loads(path.read_text()) for path in Path("run/lab-trials").glob("*.json")]
    assert len(trials) == 5
    for trial in trials:
        assert trial["passed"] == [False, False]  # of a tiny model
        assert trial["solution_tokens"] == trials[0]["solution_tokens"]
    assert "| solutions, a token |" in Path("run/lab/lab.md").read_text()


def test_what_a_lab_cannot_do_is_said_before_it_trains(config, codeact):
    for values, message in (
        ({"train": {"seed": 3}}, "seed"),
        ({"tasks": ["HumanEval/999"]}, "HumanEval"),
        ({"train": {"lorra": True}}, "lorra"),
        ({"train": {"max_length": 9999}}, "lab.train: max_length 9999 is more than the 512 positions"),
        ({"train": {"model_type": "llama3"}}, "lab.train: template llama3 needs <|start_header_id|>"),
        ({"train": {"max_length": 8}}, "no held-out row fits into max_length 8; raise it in lab.train"),
        ({"budgets": [10**7]}, "fewer than the budget of 10,000,000; lower budgets or held_out"),
        ({"strategies": [{"strategy": "cdas", "difficulty": "s_ifd"}]}, "s_ifd needs score: keep_token_nll: true"),
    ):
        before = config.read_text()
        change(config, **values)
        code, _, err = codeact("lab", config)
        assert code == 2
        assert message in err.splitlines()[-1]
        assert not list(Path("run").glob("lab-trials/*.json"))
        config.write_text(before)
    content = yaml.safe_load(config.read_text())
    del content["lab"]
    config.write_text(yaml.safe_dump(content))
    code, _, err = codeact("lab", config)
    assert (code, err) == (2, f"codeact: error: {config} has no section lab; add one, with budgets: [TOKENS, ...]\n")
