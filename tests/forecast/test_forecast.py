import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from codeact import cli
from codeact import forecast as forecasting
from codeact.base.devices import GPUS, find_gpu
from codeact.base.errors import InputError
from codeact.forecast.data import Sampled, data_facts
from codeact.forecast.models import model_facts
from codeact.ops.flops import ModelFacts, ModelShape, ParameterCounts, decoding_seconds, inference_memory
from codeact.run.flow import STAGES, Flow, open_flow
from codeact.run.settings import RunSettings, settings_class, shipped_configs
from codeact.training.flags import check_flags
from codeact.training.room import PlannedTraining, pass_memory

# Two layers of width 8: attention 4 * 64, gated MLP 3 * 8 * 16; 10 words.
SHAPE = ModelShape(layers=2, hidden=8, intermediate=16, query_width=8, key_width=8, vocabulary=10)
LAYERS = (("0.q_proj", 8, 8), ("0.down_proj", 16, 8), ("1.q_proj", 8, 8), ("1.down_proj", 16, 8))
TINY = ModelFacts(shape=SHAPE, trunk=1000, head=80, lookup=80, layers=LAYERS, source="")
LORA = {"lora": True, "lora_r": 2, "lora_target_modules": "q_proj"}
SEVEN = "a model of 7e9 parameters that is not here"


def training(processes: int = 1, **flags: object) -> PlannedTraining:
    return PlannedTraining(check_flags({"lora_dropout": 0.0, **flags}, "train", here=False), processes)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"instruction": f"write function number {n}", "output": "def f():\n    return 1\n" * n} for n in range(1, 31)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def local(tmp_path: Path, data: Path, tiny_model_path: Path, embedder_path: Path) -> RunSettings:
    return settings_class(STAGES).model_validate(
        {
            "output": tmp_path / "run",
            "data": {"source": str(data)},
            "score": {"model": str(tiny_model_path), "max_length": 256},
            "embed": {"model": str(embedder_path)},
            "train": {"lora": True, "max_length": 256, "per_device_train_batch_size": 1},
        }
    )


@pytest.fixture
def elsewhere(tmp_path: Path) -> RunSettings:
    """Nothing of this is here."""
    return settings_class(STAGES).model_validate(
        {
            "output": tmp_path / "run",
            "data": {"source": "nobody/has-this"},
            "score": {"model": "nobody/has-this-7b"},
            "embed": {"model": "nobody/has-this-embedder"},
            "train": {"bf16": True, "activation_checkpointing": True, "deepspeed": "zero3"},
            "processes": 8,
            "forecast": {
                "rows": 10_000, "question_tokens": 100, "answer_tokens": 300, "parameters": 6.7e9,
                "devices": 8, "device": "A100-80GB",
            },
        }
    )  # fmt: skip


def forecast(settings: RunSettings, first: str | None = None, last: str | None = None) -> forecasting.Forecast:
    return forecasting.forecast(Flow(settings), first, last)


def changed(settings: RunSettings, **sections: object) -> RunSettings:
    return settings_class(STAGES).model_validate({**settings.model_dump(exclude_unset=True), **sections})


# ----------------------------------------------------------------------------------------------------------- arithmetic


def test_flops_of_a_forward_pass_by_hand():
    # 3 tokens: 2 * 1000 * 3; the head for one: 2 * 80; causal attention 2 * layers * width * (2^2 + 1^2).
    assert TINY.forward_flops(3, 5, 1) == 6000 + 160 + 2 * 2 * 8 * 5


def test_flops_of_training_by_hand():
    attention = 6 * 2 * 8 * 5
    full = training()
    assert full.flops(TINY, 3, 1, 5) == 6 * 1000 * 3 + 6 * 80 + attention
    # What is computed again: one forward pass of the layers.
    assert training(activation_checkpointing=True).flops(TINY, 3, 1, 5) == 18_480 + 2 * 1000 * 3 + attention * 4 // 3
    adapters = 2 * 2 * (8 + 8)  # rank 2, on q_proj of two layers
    assert TINY.adapter_parameters(2, "q_proj") == adapters
    assert TINY.adapter_parameters(2, "all-linear") == adapters + 2 * 2 * (16 + 8)
    lora = training(**LORA)
    assert lora.flops(TINY, 3, 1, 5) == (6 * adapters + 4 * 1000) * 3 + 4 * 80 + attention


def test_memory_of_training_by_hand():
    alone = training().memory(TINY, 10, base=7.0)
    assert alone.parts["the process"] == 7
    assert (alone.parts["weights"], alone.parts["gradients"], alone.parts["optimizer"]) == (4640, 4640, 9280)
    # Per token and layer 4 * 8 + 2 * 8 + 2 * 8 + 4 * 16 elements of 4 bytes.
    assert alone.parts["activations"] == 10 * 2 * 128 * 4
    assert alone.parts["blocks of the loss"] == 10 * 10 * 8
    assert training(fused_loss=False).memory(TINY, 10, base=7.0).parts["logits"] == 10 * 10 * 8
    assert alone.total == sum(alone.parts.values())
    lora = training(**LORA, bf16=True).memory(TINY, 10, base=0.0)
    assert lora.parts["weights"] == 1160 * 2 + 64 * 4
    assert lora.parts["optimizer"] == 64 * 8
    assert lora.parts["adapters' inputs"] == 10 * 16 * 8
    half = training(4, bf16=True, deepspeed="zero2").memory(TINY, 10, base=0.0)
    assert half.parts["weights"] == 1160 * 2
    assert half.parts["gradients"] == 1160 * 2 / 4
    assert half.parts["optimizer"] == 1160 * 12 / 4


def test_memory_of_inference_and_decoding_by_hand():
    memory = inference_memory(TINY, 2.0, tokens=10, base=5.0, cache_tokens=20)
    assert memory.parts == {
        "the process": 5.0, "weights": 2320.0, "activations": 10 * 128 * 2, "keys and values": 2 * 2 * 8 * 20 * 2.0
    }  # fmt: skip
    # Reading 2320 bytes of weights and 2 * 2 * 8 * 4 * 3 * 2 of cache, or computing 2 * 1080 * 3.
    assert decoding_seconds(TINY, 2.0, 5, 3, 4.0, flops=1e12, bandwidth=1.0) == 5 * (2320 + 768)
    assert decoding_seconds(TINY, 2.0, 5, 3, 4.0, flops=1.0, bandwidth=1e12) == 5 * 6480


def test_checkpointing_keeps_a_layers_input_and_one_layers_rest():
    some, all_of_it = (pass_memory(SHAPE, 10, element_bytes=2, checkpointing=on)["activations"] for on in (True, False))
    assert some == 10 * 2 * 8 * 2 + 10 * 128 * 2 < all_of_it


def test_more_sharding_is_less_memory():
    model = model_facts(SEVEN, 7e9)
    kinds = ({}, {"deepspeed": "zero1"}, {"deepspeed": "zero2"}, {"deepspeed": "zero3"})
    sizes = [training(8, bf16=True, **kind).memory(model, 4096, 0.0).total for kind in kinds]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_counts_of_a_configuration_are_those_of_the_model(tiny_model_path, tiny_model):
    facts = model_facts(str(tiny_model_path), None)
    counts = ParameterCounts.of(tiny_model)
    assert (facts.trunk, facts.head) == (counts.trained, counts.head_trained)
    assert facts.parameters == tiny_model.num_parameters()
    assert len(facts.layers) == 2 * 7


def test_assumed_shape_has_about_the_parameters():
    for wanted in (1.3e9, 6.7e9, 13e9, 70e9):
        assert model_facts(SEVEN, wanted).parameters == pytest.approx(wanted, rel=0.1)


def test_a_sample_says_how_sure_it_is():
    few = Sampled([1, 3], 10)
    assert few.total == 20
    assert few.squares == 50
    assert few.error == pytest.approx(2**0.5 / 2**0.5 * 10 * (1 - 2 / 10) ** 0.5)
    assert Sampled([1, 3], 2).error == 0
    assert Sampled([1, 3], 10, counted=False).error == 0


def test_gpus_are_found_by_their_drivers_names():
    assert find_gpu("NVIDIA A100-SXM4-40GB").memory == 40e9
    assert find_gpu("A100-80GB").memory == 80e9
    assert find_gpu("NVIDIA H100 PCIe").flops == 756e12
    assert find_gpu("Riva TNT2") is None
    assert all(gpu.flops > gpu.bandwidth > gpu.memory for gpu in GPUS)


# ------------------------------------------------------------------------------------------------------------- the data


def test_tokens_are_those_that_the_stages_take(local, tokenizer):
    from codeact.scoring.tokens import tokenize
    from codeact.text.conversations import encode_conversations
    from codeact.text.templates import PromptBuilder

    flags = check_flags(local.train, "train")
    facts = data_facts(local, flags, local.embed.model, 256)
    rows = list(local.data.open())
    items = tokenize(rows, tokenizer, PromptBuilder(tokenizer, "qa"), 256)
    assert facts.rows == 30
    assert facts.conditional.total == sum(len(item.conditional) for item in items)
    assert facts.unconditional.total == sum(len(item.unconditional) for item in items)
    samples = encode_conversations(rows, tokenizer, "chat", 256)
    assert facts.conversations.total == pytest.approx(0.4 * sum(len(sample.input_ids) for sample in samples))
    assert facts.conversations.error == 0


@pytest.mark.parametrize("turns", ["all", "last"])
def test_tokens_of_conversations_are_those_that_scoring_takes(local, tmp_path, tiny_model, tokenizer, turns):
    from codeact.scoring.ifd import IfdScorer

    path = tmp_path / "talks.jsonl"
    turn = [{"role": "user", "content": "why so?"}, {"role": "assistant", "content": "since it is so\n" * 9}]
    path.write_text("".join(json.dumps({"messages": turn * n}) + "\n" for n in range(1, 9)))
    settings = changed(local, data={"source": str(path)}, score={**local.score.model_dump(), "turns": turns})
    facts = data_facts(settings, None, "", 256)
    scorer = IfdScorer(tiny_model, tokenizer, max_length=256, turns=turns)
    _, cost = scorer.score(list(settings.data.open()))
    assert facts.conditional.total + facts.unconditional.total == pytest.approx(cost.tokens + cost.shared_tokens)
    assert max(facts.conditional.values) == 256


def test_a_large_data_set_is_sampled_the_same_every_time(local, tmp_path):
    path = tmp_path / "many.jsonl"
    lines = ({"instruction": f"question {n}", "output": "x = 1\n" * (1 + n % 50)} for n in range(3000))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = changed(local, data={"source": str(path)})
    one, other = (data_facts(settings, None, "", 256) for _ in range(2))
    assert "3,000 rows, 400 of them tokenized" in one.source
    assert one.conditional.total == other.conditional.total
    whole = sum(len(tokenized) for tokenized in _conditionals(settings))
    assert 0 < one.conditional.error < 0.1 * whole
    assert abs(one.conditional.total - whole) < 4 * one.conditional.error


def _conditionals(settings):
    from codeact.models.loading import load_tokenizer
    from codeact.scoring.tokens import tokenize
    from codeact.text.templates import PromptBuilder

    tokenizer = load_tokenizer(settings.score.model)
    rows = list(settings.data.open())
    return [item.conditional for item in tokenize(rows, tokenizer, PromptBuilder(tokenizer, "qa"), 256)]


# ------------------------------------------------------------------------------------------------------------- the plan


def test_a_local_model_is_tried_and_nothing_is_written(local, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    plan = forecast(local)
    assert sorted(tmp_path.rglob("*")) == before
    assert [step.name for step in plan.steps] == ["score", "embed", "select", "padding", "train", "report"]
    assert {step.state for step in plan.steps} == {"to do"}
    sources = "\n".join(plan.sources)
    assert "30 rows, all of them tokenized" in sources
    for stage in ("score", "train", "embed"):
        assert f"{stage}: " in sources
    assert sources.count("measured here") == 3
    train = next(step for step in plan.steps if step.name == "train")
    assert train.rows == 12
    assert train.seconds > 0
    assert plan.seconds == sum(step.seconds or 0 for step in plan.steps)
    assert json.loads(plan.json())["steps"][0]["memory"]["parts"]["weights"] > 0


def test_full_training_under_a_padding_mode_is_tried_too(local):
    flags = {"max_length": 128, "pad_mode": "dynamic_pad", "activation_checkpointing": True}
    plan = forecast(changed(local, train=flags), first=None, last="train")
    assert any("train: " in line and "measured here" in line for line in plan.sources)


def test_what_is_elsewhere_is_assumed(elsewhere, tmp_path):
    plan = forecast(elsewhere)
    assert not (tmp_path / "run").exists()
    text = plan.table()
    assert "section forecast says" in text
    assert "not measured" in text
    assert "8 x A100-80GB" in text
    assert "±" not in text  # nothing was counted
    assert not plan.warnings
    score = plan.steps[0]
    # 10,000 rows of (100 + 20 + 300) + 300 tokens, 2 operations a parameter, 8 devices at 40 % of 312 TFLOP/s.
    assert score.tokens == pytest.approx(10_000 * 720, rel=0.01)
    assert pytest.approx(score.seconds - 43.4, rel=0.1) == 2 * 6.7e9 * 7.2e6 / (8 * 0.4 * 312e12)


def test_more_rows_take_longer(elsewhere):
    one, ten = (
        forecast(changed(elsewhere, forecast={**elsewhere.forecast.model_dump(), "rows": rows}))
        for rows in (10_000, 100_000)
    )
    for few, many in zip(one.steps[:-1], ten.steps[:-1], strict=True):
        assert (many.seconds or 1) > (few.seconds or 0)
        assert (many.disk or 0) >= (few.disk or 0)


def test_slower_devices_take_longer_and_too_small_ones_are_named(elsewhere):
    fast = forecast(elsewhere)
    assumed = {**elsewhere.forecast.model_dump(), "device": "L4"}
    slow = forecast(changed(elsewhere, forecast=assumed, train={**elsewhere.train, "deepspeed": "zero1"}))
    assert slow.seconds > fast.seconds
    (warning,) = [line for line in slow.warnings if line.startswith("train")]
    assert "most for" in warning
    assert "deepspeed: zero3" in warning
    idle = forecast(changed(elsewhere, processes=2))
    assert any("6 of 8 devices stand idle" in line for line in idle.warnings)


def test_checkpoints_count_as_codeact_train_counts_them(elsewhere):
    """Every epoch one of 12 bytes a parameter, two kept and one being written; of weights alone a third."""
    kinds = ({"save_strategy": "no"}, {"save_strategy": "epoch", "num_train_epochs": 5})
    kinds = (*kinds, {**kinds[1], "save_total_limit": 1}, {**kinds[1], "save_only_model": True})
    settings = (changed(elsewhere, train={**elsewhere.train, "save_total_limit": 2, **kind}) for kind in kinds)
    none, three, two, light = (forecast(each, last="train").steps[-1].disk for each in settings)
    assert three - none == pytest.approx(3 * 12 * 6.7e9, rel=0.1)
    assert (two - none) / (three - none) == pytest.approx(2 / 3)
    assert (light - none) / (three - none) == pytest.approx(1 / 3)


@pytest.mark.parametrize("missing", ["rows", "answer_tokens", "parameters"])
def test_what_cannot_be_known_is_one_line_that_says_what_to_add(elsewhere, missing):
    assumed = {key: value for key, value in elsewhere.forecast.model_dump().items() if key != missing}
    with pytest.raises(InputError, match=rf"forecast: {{.*{missing}: ") as caught:
        forecast(changed(elsewhere, forecast=assumed))
    assert "\n" not in str(caught.value)


def test_an_unknown_device_and_a_wrong_flag_are_refused(elsewhere):
    with pytest.raises(InputError, match="A100"):
        forecast(changed(elsewhere, forecast={**elsewhere.forecast.model_dump(), "device": "A1000"}))
    with pytest.raises(InputError, match="did you mean learning_rate"):
        forecast(changed(elsewhere, train={"learning_rat": 1e-4}))


def test_stages_can_be_left_out(elsewhere):
    plan = forecast(elsewhere, last="embed")
    assert [step.name for step in plan.steps] == ["score", "embed"]
    late = forecast(elsewhere, first="train")
    assert [step.state for step in late.steps] == ["not done", "not done", "not done", "to do", "to do", "to do"]
    assert sum("will stop: step" in line for line in late.warnings) == 3


def test_what_would_stop_a_run_later_is_a_line_of_the_plan(elsewhere, monkeypatch, tmp_path):
    monkeypatch.setenv("CODEACT_EVAL_DATA", str(tmp_path))
    plan = forecast(changed(elsewhere, generate={}, evaluate={}))
    assert any("will stop: CODEACT_EVAL_DATA" in line for line in plan.warnings)
    assert [step.rows for step in plan.steps if step.name.startswith("generate")] == [164, 164]


def test_done_steps_are_named(local, monkeypatch):
    """A score step as a run leaves it, unfinished and finished, and of other settings."""
    flow = Flow(local)
    (stage,) = (stage for stage in flow.stages if stage.name == "score")

    def make(_: Flow) -> list[tuple[str, str]]:
        (local.output / "scores").mkdir()
        (local.output / "scores" / "scores.parquet").write_bytes(b"table")
        return []

    monkeypatch.setattr(type(stage), "work", lambda _, run: make(run))
    with flow.folder.locked():
        flow.folder.do(stage, flow.key(stage), flow)
    before = {path: path.read_bytes() for path in local.output.rglob("*") if path.is_file()}

    def state(settings: RunSettings) -> str:
        return forecast(settings, last="embed").steps[0].state

    assert state(local) == "done already"
    assert forecast(local, last="score").sources == []  # nothing is to do, so nothing is looked at
    assert state(changed(local, score={**local.score.model_dump(), "max_length": 128})) == "to do"
    assert {path: path.read_bytes() for path in local.output.rglob("*") if path.is_file()} == before
    content = json.loads((local.output / "run.json").read_text())
    del content["stages"]["score"]["seconds"]
    (local.output / "run.json").write_text(json.dumps(content))
    assert state(local) == "goes on"
    # Large weights are not hashed; settings alone decide.
    monkeypatch.setattr("codeact.forecast.HASHED_BYTES", 0)
    monkeypatch.setattr(Flow, "identity", lambda _, name: pytest.fail("was hashed"))
    plan = forecast(local, last="score")
    assert any("not hashed" in line for line in plan.warnings)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_config_that_is_shipped_has_a_plan(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODEACT_EVAL_DATA", str(tmp_path))  # no look for a download
    monkeypatch.setattr(
        "codeact.forecast.calibration.local_weights", lambda name: None
    )  # nor a measurement of the demo's
    result = CliRunner().invoke(cli.app, ["run", name, "--dry-run"])
    assert result.exit_code == 0, result.exception
    assert "in all" in result.stdout
    assert not list(tmp_path.iterdir())
    settings = open_flow(name).settings
    if name == "demo":
        return
    assert settings.processes == settings.forecast.devices == 8
    assert "8 x A100-80GB" in result.stdout
    assert not [line for line in forecast(settings).warnings if "will stop" not in line]  # it fits


def test_the_recipes_are_the_papers():
    recipes = [open_flow(name).settings for name in shipped_configs() if name != "demo"]
    assert len(recipes) == 4
    for settings in recipes:
        flags = check_flags(settings.train, "train")
        cost = PlannedTraining(flags, settings.processes)
        assert flags.per_device_train_batch_size * flags.gradient_accumulation_steps * settings.processes == 512
        assert (flags.max_length, flags.num_train_epochs, cost.checkpointing, cost.sharding) == (
            2048,
            3,
            True,
            "zero3",
        )
        assert (settings.select.ratio, settings.select.clusters) == (0.4, 10)


def test_tasks_of_ones_own_are_counted(elsewhere, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"task_id": "a", "tests": "assert f() == 1"}\n{"task_id": "b", "tests": "assert f() == 2"}\n')
    made = forecast(changed(elsewhere, generate={"dataset": "own", "data": path}, evaluate={}))
    rows = {step.name: step.rows for step in made.steps if step.name.startswith(("generate", "evaluate"))}
    assert set(rows.values()) == {2}
    asked = {"dataset": "own", "data": path, "server": "http://localhost:1/v1"}
    plan = forecast(changed(elsewhere, generate=asked, evaluate={}))
    (step,) = (step for step in plan.steps if step.name == "generate.before")
    assert (step.rows, step.seconds) == (2, 0.0)
    assert "generation by a server: its time is not counted" in plan.table()
