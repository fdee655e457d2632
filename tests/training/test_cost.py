"""Costs are counted where batches are computed, and every number is what plain Python makes of the same batches."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, Trainer, TrainerCallback, TrainingArguments

from codeact.ops.flops import ModelShape, ParameterCounts
from codeact.training.cost import BatchCost, CostMonitor, batch_cost
from tests.helpers import forked
from tests.helpers.checkpointing import CHECKPOINTING

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS, VOCABULARY = 2, 32, 64, 4, 2, 61


def make_model(tied=True, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **changes,
    )
    return LlamaForCausalLM(config)


def sample(length, prompt):
    """Ids and labels: the first ``prompt`` tokens carry none."""
    ids = [1 + (length * 7 + i) % (VOCABULARY - 1) for i in range(length)]
    return ids, [-100] * prompt + ids[prompt:]


def padded(samples, width=None):
    width = width or max(len(ids) for ids, _ in samples)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in samples]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in samples]),
        "labels": torch.tensor([labels + [-100] * (width - len(ids)) for ids, labels in samples]),
    }


def packed(samples, tail=0):
    bounds = [0]
    for ids, _ in samples:
        bounds.append(bounds[-1] + len(ids))
    return {
        "input_ids": torch.tensor([[i for ids, _ in samples for i in ids] + [0] * tail]),
        "labels": torch.tensor([[i for _, labels in samples for i in [-100, *labels[1:]]] + [-100] * tail]),
        "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32),
    }


def supervised_rows(batch):
    """The batch of a collator that gives the head supervised rows only."""
    shift = torch.nn.functional.pad(batch["labels"][0], (0, 1), value=-100)[1:]
    return {**batch, "labels": shift[shift != -100], "shift_labels": shift[shift != -100]}


def expected(samples, computed):
    tokens = sum(len(ids) for ids, _ in samples)
    return BatchCost(
        tokens=tokens,
        padding=computed - tokens,
        supervised=sum(label != -100 for _, labels in samples for label in labels[1:]),
        samples=len(samples),
        squared_lengths=sum(len(ids) ** 2 for ids, _ in samples),
    )


# ------------------------------------------------------------------------------------------------------------- batches


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(2, 40), st.integers(0, 40)), min_size=1, max_size=6), st.integers(0, 9))
def test_every_pad_mode_counts_the_same_samples(shapes, spare):
    samples = [sample(length, min(prompt, length - 1)) for length, prompt in shapes]
    tokens = sum(length for length, _ in shapes)
    longest = max(length for length, _ in shapes)
    assert batch_cost(padded(samples)) == expected(samples, len(samples) * longest)
    assert batch_cost(padded(samples, longest + spare)) == expected(samples, len(samples) * (longest + spare))
    assert batch_cost(packed(samples)) == expected(samples, tokens)
    assert batch_cost(packed(samples, spare)) == expected(samples, tokens + spare)
    assert batch_cost(supervised_rows(packed(samples))) == expected(samples, tokens)


def test_the_collators_of_training_are_understood():
    np = pytest.importorskip("numpy")
    collators = pytest.importorskip("codeact.training.dataset")
    samples = [sample(length, prompt) for length, prompt in ((9, 4), (3, 1), (14, 13))]
    items = [
        [SimpleNamespace(input_ids=np.array(ids, np.int32), labels=np.array(labels, np.int32))]
        for ids, labels in samples
    ]
    for supervised_only in (True, False):
        batch = collators.PackCollator(supervised_only=supervised_only)(items)
        assert batch_cost(batch) == expected(samples, 26)
    assert batch_cost(collators.PadCollator()(items)) == expected(samples, 42)
    assert batch_cost(collators.PadCollator(length=20)(items)) == expected(samples, 60)


def test_a_batch_without_a_label_is_all_padding():
    assert batch_cost(packed([sample(7, 7)])) == BatchCost(padding=7)


def test_an_empty_row_is_no_sample():
    batch = padded([sample(4, 1)], width=6)
    batch = {
        name: torch.cat([tensor, torch.full_like(tensor, -100 if name == "labels" else 0)])
        for name, tensor in batch.items()
    }
    assert batch_cost(batch) == BatchCost(tokens=4, padding=8, supervised=3, samples=1, squared_lengths=16)


def test_squares_of_long_packs_do_not_overflow():
    batch = packed([([1] * 70_000, [1] * 70_000)])
    assert batch_cost(batch).squared_lengths == 70_000**2 > 2**32


@pytest.mark.parametrize("missing", ["labels", "attention_mask"])
def test_a_batch_that_cannot_be_counted_names_what_it_lacks(missing):
    batch = padded([sample(4, 1)])
    del batch[missing]
    with pytest.raises(ValueError, match=f"needs {missing}.*has: input_ids"):
        batch_cost(batch)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def matrices():
    """Weights of the layers' matrices."""
    head = HIDDEN // HEADS
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY_HEADS * head
    return LAYERS * (attention + 3 * HIDDEN * INTERMEDIATE)


NORMS = (2 * LAYERS + 1) * HIDDEN


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_leave_the_lookup_table_out_and_the_head_apart(tied):
    counts = ParameterCounts.of(make_model(tied))
    assert counts == ParameterCounts(
        trained=matrices() + NORMS, frozen=0, head_trained=VOCABULARY * HIDDEN, head_frozen=0
    )
    trunk = matrices() + NORMS
    assert counts.flops(10, 10) == 6 * (trunk + VOCABULARY * HIDDEN) * 10
    assert counts.flops(10, 3) == 6 * trunk * 10 + 6 * VOCABULARY * HIDDEN * 3
    assert counts.recomputed_flops(10) == 6 * trunk * 10 / 3


def test_frozen_weights_need_no_weight_gradient():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    counts = ParameterCounts.of(model)
    key_width = KEY_HEADS * HIDDEN // HEADS
    adapters = LAYERS * (4 * (HIDDEN + HIDDEN) + 4 * (HIDDEN + key_width))
    assert counts == ParameterCounts(
        trained=adapters, frozen=matrices() + NORMS, head_trained=0, head_frozen=VOCABULARY * HIDDEN
    )
    assert counts.flops(5, 2) == (6 * adapters + 4 * (matrices() + NORMS)) * 5 + 4 * VOCABULARY * HIDDEN * 2


def test_flops_are_those_that_pytorch_counts():
    """PyTorch sees neither causality (so attention twice) nor norms."""
    model, length = make_model(tied=False, attn_implementation="eager"), 24
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(length)[None], labels=torch.arange(length)[None], use_cache=False).loss.backward()
    shape = ModelShape.from_config(model.config)
    ours = ParameterCounts.of(model).flops(length, length) - 6 * NORMS * length + 2 * shape.attention_flops(length**2)
    rotary = 2 * (HIDDEN // HEADS // 2) * length  # a matrix product without a gradient, once
    assert counter.get_total_flops() - ours in (0, rotary)


def test_shape_of_a_configuration():
    shape = ModelShape.from_config(make_model().config)
    assert shape == ModelShape(
        layers=LAYERS,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        query_width=HIDDEN,
        key_width=KEY_HEADS * HIDDEN // HEADS,
        vocabulary=VOCABULARY,
    )
    assert shape.attention_flops(100) == 6 * LAYERS * HIDDEN * 100
    assert shape.activation_bytes(3) == 3 * LAYERS * (4 * 32 + 2 * 32 + 2 * 16 + 4 * 64) * 2
    assert shape.logit_bytes(3) == 3 * VOCABULARY * 8
    assert ModelShape.from_config(MixtralConfig()) is None, "the tokens of a mixture do not visit all its parameters"


# -------------------------------------------------------------------------------------------------------------- a run


class CountingTrainer(Trainer):
    """What any trainer must do, and a diary of the batches."""

    monitor: CostMonitor

    def training_step(self, model, inputs, *args, **kwargs):
        self.monitor.count(inputs)
        self.diary.append((self.state.global_step, inputs))
        return super().training_step(model, inputs, *args, **kwargs)


class Logger(TrainerCallback):
    """Stands where TensorBoard's callback would."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def make_trainer(folder, model, samples, batch_size, peak_flops=None, callbacks=(), **changes):
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=batch_size,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        **{"save_strategy": "no", "logging_steps": 2, **changes},
    )
    trainer = CountingTrainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        eval_dataset=samples[:2],
        data_collator=padded,
        callbacks=list(callbacks),
    )
    trainer.monitor, trainer.diary = CostMonitor(model, folder, peak_flops=peak_flops), []
    trainer.monitor.attach(trainer)
    return trainer


SAMPLES = [sample(3 + 5 * i % 17, 1 + i % 3) for i in range(22)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Accumulation over three batches, a worker that prefetches, an evaluation and a checkpoint in between."""
    folder = tmp_path_factory.mktemp("run")
    logger = Logger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("caches are not to be emptied"))
        trainer = make_trainer(
            folder,
            make_model(),
            SAMPLES,
            batch_size=2,
            peak_flops=1e12,
            callbacks=[logger],
            gradient_accumulation_steps=3,
            num_train_epochs=2,
            dataloader_num_workers=1,
            dataloader_prefetch_factor=4,
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=4,
            **{CHECKPOINTING: True},
        )
        trainer.train()
    return SimpleNamespace(trainer=trainer, logger=logger, report=trainer.monitor.report, folder=folder)


def unpad(batch):
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True)
    return [(ids[: sum(mask)], labels[: sum(mask)]) for ids, labels, mask in rows]


def test_steps_hold_the_batches_that_they_computed(run):
    steps = run.trainer.state.global_step
    assert steps == 8  # 11 batches an epoch, three a step
    for step in range(steps):
        batches = [batch for at, batch in run.trainer.diary if at == step]
        costs = [expected(unpad(batch), batch["input_ids"].numel()) for batch in batches]
        for name in ("tokens", "padding", "supervised", "samples", "squared_lengths"):
            assert run.report.steps[name][step] == sum(getattr(cost, name) for cost in costs), (step, name)
    assert run.report.samples == 2 * len(SAMPLES)
    assert run.report.tokens == 2 * sum(len(ids) for ids, _ in SAMPLES)
    assert run.report.supervised == 2 * sum(label != -100 for _, labels in SAMPLES for label in labels[1:])
    assert run.report.squared_lengths == 2 * sum(len(ids) ** 2 for ids, _ in SAMPLES)


def test_rates_and_utilisation_follow_from_the_counts(run):
    report = run.report
    assert report.seconds == pytest.approx(sum(report.steps["seconds"]))
    assert report.tokens_per_second == pytest.approx(report.tokens / report.seconds)
    assert report.samples_per_second == pytest.approx(report.samples / report.seconds)
    assert report.padding_share == pytest.approx(report.padding / (report.tokens + report.padding))
    trunk, head = matrices() + NORMS, VOCABULARY * HIDDEN
    attention = 6 * LAYERS * HIDDEN * report.squared_lengths
    assert report.model_flops == 6 * trunk * report.tokens + 6 * head * report.supervised + attention
    assert report.hardware_flops == report.model_flops + 2 * trunk * report.tokens + attention // 3
    assert report.model_utilisation == pytest.approx(report.model_flops / report.seconds / 1e12)
    assert report.hardware_utilisation == pytest.approx(report.hardware_flops / report.seconds / 1e12)
    assert report.peak_resident_bytes == max(report.steps["peak_resident_bytes"]) > 2**26
    assert report.peak_cuda_allocated_bytes is None


def test_cost_json_holds_the_report(run):
    content = json.loads((run.folder / "cost.json").read_text())
    assert content["tokens"] == run.report.tokens
    assert content["steps"]["padding"] == run.report.steps["padding"]
    assert content["model_utilisation"] == run.report.model_utilisation
    assert content["peak_flops_source"] == "given"
    assert content["peak_cuda_allocated_bytes"] is None


def test_loggers_and_the_history_get_the_keys(run):
    logs = [logs for logs in run.logger.logs if "loss" in logs]
    assert len(logs) == 4
    totals = [sum(run.report.steps["tokens"][: 2 * n]) for n in (1, 2, 3, 4)]
    assert [entry["cost/total_tokens"] for entry in logs] == totals
    for n, entry in enumerate(logs):
        window = slice(2 * n, 2 * n + 2)
        seconds = sum(run.report.steps["seconds"][window])
        assert entry["cost/tokens_per_second"] == pytest.approx(sum(run.report.steps["tokens"][window]) / seconds)
    history = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert [entry["cost/total_tokens"] for entry in history] == totals
    assert not any(key.startswith("cost/") for entry in run.logger.logs if "loss" not in entry for key in entry)


def test_the_summary_says_what_is_known(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), SAMPLES[:4], batch_size=2, num_train_epochs=1)
    trainer.train()
    lines = dict(trainer.monitor.report.lines())
    assert lines["real tokens"].startswith(f"{sum(len(ids) for ids, _ in SAMPLES[:4]):,}, ")
    assert "model FLOPs utilisation" not in lines, "without a peak there is none"


def test_time_of_evaluation_is_left_out(tmp_path, monkeypatch):
    trainer = make_trainer(
        tmp_path, make_model(), SAMPLES[:4], batch_size=1, num_train_epochs=1, eval_strategy="steps", eval_steps=2
    )
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("codeact.training.cost.time.perf_counter", lambda: clock.now)
    step, evaluate = trainer.training_step, trainer.evaluate

    def take(seconds, function):
        def slow(*args, **kwargs):
            clock.now += seconds
            return function(*args, **kwargs)

        return slow

    trainer.training_step, trainer.evaluate = take(2.0, step), take(100.0, evaluate)
    trainer.train()
    assert trainer.monitor.report.steps["seconds"] == [2.0] * 4


def test_a_trainer_that_never_counts_is_told(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, make_model(), SAMPLES[:2], batch_size=2, max_steps=1)
    monkeypatch.setattr(trainer.monitor, "count", lambda inputs: None)
    with pytest.warns(UserWarning, match=r"must call CostMonitor\.count"):
        trainer.train()
    assert not (tmp_path / "cost.json").exists()


def test_recomputation_of_every_nth_layer():
    from codeact.training.cost import _recomputed_share

    assert _recomputed_share(SimpleNamespace(gradient_checkpointing=False)) == 0
    assert _recomputed_share(SimpleNamespace(gradient_checkpointing=True)) == 1
    options = {"every_n_layers": 2}
    arguments = SimpleNamespace(activation_checkpointing=True, activation_checkpointing_kwargs=options)
    assert _recomputed_share(arguments) == 0.5


RANK = """
import json, sys
from types import SimpleNamespace as Of
import torch, torch.distributed as dist
from codeact.training.cost import CostMonitor

model = torch.nn.Linear(2, 2)
model.config = Of(get_text_config=Of)
model.dtype = torch.float32
dist.init_process_group("gloo")
rank = dist.get_rank()
monitor = CostMonitor(model, sys.argv[1], peak_flops=1e9)
state = Of(global_step=0, is_world_process_zero=rank == 0, log_history=[])
arguments = Of(device=torch.device("cpu"), n_gpu=0, world_size=2, bf16=False, fp16=False)
monitor.on_train_begin(arguments, state, None)
for lengths, labels in ([[5], 2], [[7], 3]) if rank else ([[4, 6], 3], [[3], 0]):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    targets = torch.ones(labels)
    monitor.count({"input_ids": torch.ones(1, sum(lengths)), "shift_labels": targets, "cu_seq_lens_q": bounds})
    monitor.on_step_end(arguments, state, None)
logs = {"loss": 1.0}
monitor.on_log(arguments, state, None, logs=logs)
assert logs["cost/total_tokens"] == 22, logs
monitor.on_train_end(arguments, state, None)
assert monitor.report.tokens == 22
dist.barrier()
dist.destroy_process_group()
"""


def test_counts_are_summed_over_two_ranks(tmp_path):
    done = forked.ranks(tmp_path, code=RANK)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "cost.json").read_text())
    # The second step of the first rank is a dummy pack of three tokens.
    assert content["steps"]["tokens"] == [15, 7]
    assert content["steps"]["padding"] == [0, 3]
    assert content["supervised"] == 3 + 2 + 3
    assert content["samples"] == 4
    assert content["squared_lengths"] == 16 + 36 + 25 + 49
    assert content["peak_flops_per_second"] == 2e9
    assert content["model_flops"] is None, "the configuration has no sizes"
    assert "model_utilisation" not in content
