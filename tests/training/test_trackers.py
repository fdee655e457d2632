"""``--report_to``: what a tracker gets of a training, in TensorBoard's own files and in a stand-in for any other."""

from __future__ import annotations

import json

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

FEW = ("--max_length", 256, "--max_steps", 3, "--logging_steps", 1, "--save_strategy", "no", "--disable_tqdm", "True")
HELD_OUT = ("--eval_ratio", 0.2, "--eval_on_start", "True", "--eval_strategy", "epoch")
SERIES = ("loss", "learning_rate", "grad_norm", "cost/tokens_per_second", "cost/padding_share")


def test_tensorboard_has_the_losses_and_costs_of_every_step(train, selected, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    options = ("--report_to", "tensorboard", *FEW, *HELD_OUT)
    code, _, err = train("--data_path", selected, "--output_dir", tmp_path / "out", *options)
    assert code == 0, err
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    log = json.loads((tmp_path / "out" / "training.json").read_text())["log"]
    losses = [(e.step, pytest.approx(e.value)) for e in events.Scalars("train/loss")]
    assert losses == [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    for name in SERIES:
        assert [event.step for event in events.Scalars(f"train/{name}")] == [1, 2, 3]
    assert events.Scalars("eval/loss")[0].step == 0


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_others_are_handed_the_same(train, selected, tmp_path, monkeypatch, name):
    logged: list[tuple[int, dict[str, float]]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            logged.append((state.global_step, dict(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, Tracker)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: [name])
    options = ("--report_to", name, *FEW, *HELD_OUT)
    code, _, err = train("--data_path", selected, "--output_dir", tmp_path, *options)
    assert code == 0, err
    log = json.loads((tmp_path / "training.json").read_text())["log"]
    for key in ("loss", "eval_loss"):
        told = [(step, logs[key]) for step, logs in logged if key in logs]
        assert told == [(entry["step"], entry[key]) for entry in log if key in entry]
        assert told
    steps = [logs for _, logs in logged if "loss" in logs]
    assert all(set(SERIES) <= set(logs) for logs in steps)
