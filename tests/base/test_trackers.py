"""``--report-to`` of scoring and evaluation: TensorBoard's own files read back, and a stand-in for any other."""

from __future__ import annotations

import json
import re

import pytest

from codeact.evaluation import stage as evaluation
from codeact.evaluation.problems import load_problems
from codeact.evaluation.results import Results
from codeact.evaluation.settings import EvaluateSettings
from tests.conftest import make_records

tracking = pytest.importorskip("accelerate.tracking", reason="accelerate is not installed")


def test_tensorboard_has_the_figures_of_scores(codeact, tiny_model_path, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [{"q": record.question, "a": record.answer} for record in make_records(4)] + [{"q": "?", "a": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--question-column", "q", "--answer-column", "a", "--model", tiny_model_path, "--device", "cpu")
    options = ("--output", tmp_path / "scores", "--report_to", "tensorboard")
    code, _, err = codeact("score", tmp_path / "rows.jsonl", *columns, *options)
    assert code == 0, err
    events = EventAccumulator(str(tmp_path / "scores" / "runs" / "score"))
    events.Reload()
    found = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert (found["score/rows"], found["score/rows_scored"], found["score/refused/empty_answer"]) == (5, 4, 1)
    assert found["score/ifd_lower_quartile"] <= found["score/ifd_median"] <= found["score/ifd_upper_quartile"]
    assert found["score/tokens_per_second"] > 0
    again = codeact("score", tmp_path / "rows.jsonl", *columns, "--output", tmp_path / "scores")
    assert again[0] == 0, again[2]  # neither the tracker's files nor the setting are of the scores


def test_another_is_handed_the_figures_of_an_evaluation(monkeypatch, human_eval_path, tmp_path):
    said = []

    class Tracker:
        requires_logging_directory = False

        def __init__(self, project):
            said.append(project)

        def start(self):
            said.append("start")

        def store_init_configuration(self, values):
            said.append(values)

        def log(self, values, step):
            said.append((step, values))

        def finish(self):
            said.append("finish")

    class Judged:
        class verdict:  # noqa: N801 - of a stand-in
            base, plus = "pass", ""

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    problems = load_problems("humaneval", human_eval_path, 2)
    results = Results(
        problems=problems,
        samples={problem.task_id: [Judged] * count for problem, count in zip(problems.problems, (1, 1), strict=True)},
        isolated=True, plus=False, reused=0,
    )  # fmt: skip
    settings = EvaluateSettings(report_to="wandb", k="1")
    evaluation.report_figures(settings.report_to, "evaluate", tmp_path, settings, results.figures())
    project, start, configuration, (step, figures), finish = said
    assert (project, start, step, finish) == ("mine", "start", 0, "finish")
    assert configuration["k"] == "1"
    assert figures == {"evaluate/humaneval/base/pass_at_1": 1.0, "evaluate/humaneval/outcome/pass": 2}
    assert all(re.fullmatch(r"[\w/]+", name) for name in figures)  # mlflow takes no other
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [("tensorbord", "choose one of: tensorboard"), ("aim", "--report-to aim: aim is not installed; pip install aim")],
)
def test_what_is_not_there_is_said_before_the_work(names, message, codeact, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    for command in (
        ("score", "none.jsonl", "--model", "./none", "--output", "o"),
        ("evaluate", "--dataset", "humaneval", "--samples", "none.jsonl"),
    ):
        code, _, err = codeact(*command, "--report-to", names)
        assert code == 2
        assert message in err
