"""A pack trains like its samples alone, whatever the accumulation, the ranks or an interruption."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    TrainerCallback,
    TrainingArguments,
)

from codeact.base.errors import InputError
from codeact.training.dataset import EpochSampler, PackDataset
from codeact.training.options import PackOptions
from codeact.training.trainer import PackTrainer, _stand_in, train
from tests.helpers import forked
from tests.helpers.checkpointing import CHECKPOINTING
from tests.helpers.zoo import SWITCH, nll_alone
from tests.helpers.zoo import make_model as make_model_of_zoo

os.environ.setdefault("HF_HUB_OFFLINE", "1")
VOCABULARY = 97


@dataclass(frozen=True, slots=True)
class Sample:
    input_ids: np.ndarray
    labels: np.ndarray


def make_samples(count, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    samples = []
    for length in rng.integers(2, longest + 1, count):
        ids = rng.integers(0, VOCABULARY, length).astype(np.int32)
        samples.append(Sample(ids, np.where(np.arange(length) < rng.integers(1, length), -100, ids).astype(np.int32)))
    return samples


def make_model(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # far from uniform, so that a leak between samples shows
        **changes,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def make_arguments(folder, **changes):
    defaults = {
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **changes})


PACK = PackOptions(max_length=64)
# Every route by which the loss of a pack is computed.
ROUTES = {
    "default": PACK,
    "all rows": PackOptions(max_length=64, supervised_only=False),
    "logits": PackOptions(max_length=64, fused_loss=False),
    "all logits": PackOptions(max_length=64, fused_loss=False, supervised_only=False),
}


@pytest.mark.parametrize("where", ["input_ids", "labels", "held out"])
def test_a_token_beyond_the_model_is_named(tmp_path, where):
    """An embedding would end in a traceback, and on a GPU the whole process."""
    samples = make_samples(3)
    array = samples[1].input_ids if where != "labels" else samples[1].labels
    array[-1] = 10**6
    given = (samples[:1], samples) if where == "held out" else (samples, None)
    with pytest.raises(InputError, match=r"sample [12]: token 1000000 is beyond the \d+ of the model"):
        PackTrainer(make_model(), given[0], make_arguments(tmp_path), PACK, eval_samples=given[1])


def loss_sum(model, sample):
    """The definition: a sample alone, all its logits, the usual shift; float64."""
    logits = model(torch.as_tensor(sample.input_ids, dtype=torch.int64)[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits.double(), torch.as_tensor(sample.labels[1:], dtype=torch.int64), reduction="sum")


def targets(sample):
    return int((sample.labels[1:] != -100).sum())


def token_mean(model, samples):
    with torch.no_grad():
        return float(sum(loss_sum(model, s) for s in samples)) / sum(targets(s) for s in samples)


def step_losses(model, items, items_per_step):
    """What each step must report while the weights stand still."""
    steps = [items[first : first + items_per_step] for first in range(0, len(items), items_per_step)]
    return [token_mean(model, [sample for item in step for sample in item]) for step in steps]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("options", "checkpointing"),
    [*((options, False) for options in ROUTES.values()), (PACK, True)],
    ids=[*ROUTES, "checkpointing"],
)
def test_loss_and_gradients_of_each_sample_in_a_pack_are_those_alone(tmp_path, options, checkpointing):
    samples = make_samples(5, longest=12)
    trainer = PackTrainer(make_model(), samples, make_arguments(tmp_path), options)
    model, reference = trainer.model.train(), make_model()
    if checkpointing:
        getattr(model, f"{CHECKPOINTING}_enable")()
    for number, sample in enumerate(samples):
        # Only this one has labels; the others are there to be seen, or not.
        pack = [Sample(s.input_ids, s.labels if i == number else s.labels * 0 - 100) for i, s in enumerate(samples)]
        model.zero_grad()
        batch = trainer.data_collator([pack])
        loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(targets(sample)))
        loss.backward()
        reference.zero_grad()
        alone = loss_sum(reference, sample) / targets(sample)
        alone.backward()
        assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5 * float(other.grad.abs().max()), rtol=1e-5)


def test_one_step_on_packs_is_one_step_on_the_same_samples_padded(tmp_path):
    samples = make_samples(20)
    packs = len(PackDataset(samples, 64))
    assert packs > 2
    routes = [
        (PACK, {"gradient_accumulation_steps": packs}),
        (PACK, {"per_device_train_batch_size": packs}),
        (PackOptions(max_length=64, pack_scope="batch"), {"per_device_train_batch_size": 20}),
        (PackOptions(max_length=64, attention="sdpa"), {"per_device_train_batch_size": packs}),
        (PackOptions(max_length=64, pad_mode="max_length"), {"per_device_train_batch_size": 20}),
        (PackOptions(max_length=64, pad_mode="dynamic_pad"), {"gradient_accumulation_steps": 20}),
    ]
    plain = PackOptions(max_length=64, pad_mode="dynamic_pad", fused_loss=False)
    expected = train(make_model(), samples, make_arguments(tmp_path, per_device_train_batch_size=20), plain)
    moved = (weights(expected.model) - weights(make_model())).abs().max()
    assert moved > 1e-2
    for options, changes in routes:
        trainer = train(make_model(), samples, make_arguments(tmp_path, **changes), options)
        assert trainer.state.global_step == 1
        assert losses(trainer) == pytest.approx(losses(expected), rel=1e-6)
        torch.testing.assert_close(weights(trainer.model), weights(expected.model), atol=1e-5 * float(moved), rtol=1e-6)


@pytest.mark.parametrize("options", ROUTES.values(), ids=ROUTES.keys())
def test_loss_is_the_token_mean_of_the_step_under_accumulation(tmp_path, options):
    samples = make_samples(30, seed=1)
    arguments = make_arguments(tmp_path, gradient_accumulation_steps=3, learning_rate=0.0, num_train_epochs=2)
    trainer = train(make_model(), samples, arguments, options)
    dataset, model = trainer.train_dataset, make_model()
    expected = []
    for epoch in (0, 1):
        items = [dataset[epoch, number] for number in range(len(dataset))]
        assert len(items) % 3  # the last step of an epoch has fewer packs
        expected += step_losses(model, items, 3)
    assert losses(trainer) == pytest.approx(expected, rel=1e-6)


def test_layers_fused_on_a_gpu_learn_what_the_model_by_itself_does(tmp_path, monkeypatch):
    """By Triton's interpreter, over two steps, so that the second shows the gradients of the first."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from codeact.ops import layers
    from codeact.training import trainer as module

    runs = {}
    for name in ("plain", "fused"):
        if name == "fused":
            assert not module._fuses_layers(make_arguments(tmp_path))  # on the CPU
            monkeypatch.setattr(layers, "_on_gpu", lambda tensor: True)
            monkeypatch.setattr(module, "_fuses_layers", lambda arguments: True)
        model = make_model()
        trainer = train(model, make_samples(4), make_arguments(tmp_path, max_steps=2), PACK)
        runs[name] = (losses(trainer), weights(model))
        assert not any("forward" in part.__dict__ for part in model.model.modules())
    assert runs["fused"][0] == pytest.approx(runs["plain"][0], rel=1e-5)
    torch.testing.assert_close(runs["fused"][1], runs["plain"][1], rtol=0, atol=1e-5)
    assert not torch.equal(runs["fused"][1], runs["plain"][1]), "that was the model by itself"


def test_epochs_are_packed_anew_and_the_seed_decides(tmp_path):
    samples = make_samples(40, seed=2)

    def run(seed):
        return losses(train(make_model(), samples, make_arguments(tmp_path, num_train_epochs=2, data_seed=seed), PACK))

    first = run(0)
    assert run(0) == first
    assert run(1) != first
    # With a learning rate the two epochs' losses differ anyway; that packs do is test_pack_dataset's.
    assert len(first) == 2 * len(PackDataset(samples, 64))


@pytest.mark.parametrize("interrupted", [2, 5])  # in the middle of an epoch, and in the second one
@pytest.mark.parametrize("options", [PACK, PackOptions(max_length=64, pad_mode="dynamic_pad")], ids=["pack", "pad"])
def test_resuming_is_bit_identical_to_no_interruption(tmp_path, interrupted, options):
    samples = make_samples(60, seed=3)
    batch = 2 if options.packs else 8

    def arguments(folder, **changes):
        return make_arguments(
            folder,
            optim="adamw_torch_fused",
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            num_train_epochs=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=2,
            **changes,
        )

    whole = train(make_model(attention_dropout=0.1), samples, arguments(tmp_path / "whole"), options)
    assert whole.state.global_step > interrupted + 1

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_save = control.should_training_stop = state.global_step == interrupted

    folder = tmp_path / "parts"
    train(make_model(attention_dropout=0.1), samples, arguments(folder), options, callbacks=[Stop()])
    resumed = train(make_model(attention_dropout=0.1), samples, arguments(folder), options, resume_from_checkpoint=True)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize("mode", ["dynamic_pack", "dynamic_pad"])
@pytest.mark.parametrize("fused", [True, False])
def test_evaluation_loss_is_the_mean_over_tokens(tmp_path, mode, fused):
    samples, held_out = make_samples(4), make_samples(25, seed=4)
    options = PackOptions(max_length=64, pad_mode=mode, fused_loss=fused)
    arguments = make_arguments(tmp_path, per_device_eval_batch_size=3)
    trainer = PackTrainer(make_model(), samples, arguments, options, eval_samples=held_out)
    expected = token_mean(make_model(), held_out)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    of_batches = [token_mean(make_model(), held_out[first : first + 3]) for first in range(0, 25, 3)]
    assert np.mean(of_batches) != pytest.approx(expected, rel=1e-4)  # what Trainer would report


@pytest.mark.parametrize(("mode", "fused"), [("dynamic_pack", True), ("dynamic_pack", False), ("dynamic_pad", True)])
def test_token_accuracy_is_that_of_every_sample_alone(tmp_path, mode, fused):
    """Of two steps of two passes each, and of held-out samples; the weights stand still."""
    samples, model = make_samples(20), make_model()

    def likeliest(sample):
        ids = torch.as_tensor(sample.input_ids, dtype=torch.int64)[None]
        with torch.no_grad():
            return model(ids, use_cache=False).logits[0, :-1].argmax(-1).numpy()

    for sample in samples:  # else next to nothing would be a hit
        every_other = (sample.labels[1:] != -100) & (np.arange(1, len(sample.labels)) % 2 == 0)
        sample.labels[1:][every_other] = likeliest(sample)[every_other]
    options = PackOptions(max_length=64, pad_mode=mode, fused_loss=fused, token_accuracy=True)
    arguments = make_arguments(tmp_path, learning_rate=0.0, gradient_accumulation_steps=2, logging_steps=2)
    trainer = PackTrainer(model, samples, arguments, options, eval_samples=samples)
    items = [trainer.train_dataset[place] for place in EpochSampler(trainer.train_dataset)]

    def accuracy(some):
        return sum(int((likeliest(s) == s.labels[1:]).sum()) for s in some) / sum(map(targets, some))

    trainer.train()
    logged = [entry["mean_token_accuracy"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [accuracy([s for item in items[at : at + 4] for s in item]) for at in range(0, len(items), 4)]
    assert logged == expected[: len(logged)]
    assert logged
    assert all(0.2 < value < 0.8 for value in logged)
    assert trainer.evaluate()["eval_mean_token_accuracy"] == pytest.approx(accuracy(samples), rel=1e-12)
    silent = PackTrainer(model, samples, arguments, PackOptions(max_length=64), eval_samples=samples)
    assert "eval_mean_token_accuracy" not in silent.evaluate()


def test_bf16_autocast_stays_near(tmp_path):
    samples = make_samples(20)
    arguments = {"per_device_train_batch_size": 20}
    exact = losses(train(make_model(), samples, make_arguments(tmp_path, **arguments), PACK))
    model = make_model()
    trainer = train(model, samples, make_arguments(tmp_path, bf16=True, **arguments), PACK)
    assert losses(trainer) == pytest.approx(exact, rel=2e-2)
    assert losses(trainer) != exact
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class TestFusedLoss:
    def test_no_logits_are_made_in_training_and_all_afterwards(self, tmp_path, monkeypatch):
        made = []
        real = F.linear
        monkeypatch.setattr(F, "linear", lambda x, w, b=None: made.append(w.shape[0]) or real(x, w, b))
        trainer = PackTrainer(make_model(), make_samples(9), make_arguments(tmp_path), PACK)
        assert VOCABULARY in made  # the proof that packs are safe
        made.clear()
        trainer.train()
        assert made
        assert VOCABULARY not in made
        ids = torch.tensor([[1, 2, 3]])
        assert trainer.model(ids, labels=ids).logits.shape == (1, 3, VOCABULARY)
        assert trainer.model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)
        again = train(trainer.model, make_samples(9), make_arguments(tmp_path), ROUTES["logits"])
        assert VOCABULARY in made
        assert len(losses(again)) == len(losses(trainer))

    def test_softcap_and_tied_embeddings(self, tmp_path):
        config = AutoConfig.for_model(
            "gemma2", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0,
            initializer_range=0.2, tie_word_embeddings=True,
        )  # fmt: skip

        def run(options):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            return train(model, make_samples(20), make_arguments(tmp_path), options)

        fused, plain = run(PACK), run(ROUTES["logits"])
        assert losses(fused) == pytest.approx(losses(plain), rel=1e-5)
        torch.testing.assert_close(weights(fused.model), weights(plain.model), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
    def test_lora(self, tmp_path, modules):
        peft = pytest.importorskip("peft")

        def run(options):
            torch.manual_seed(1)
            lora = peft.LoraConfig(r=4, target_modules=modules, init_lora_weights="gaussian")
            model = peft.get_peft_model(make_model(), lora)
            before = weights(model)
            arguments = make_arguments(tmp_path, **{CHECKPOINTING: True})
            trainer = train(model, make_samples(20), arguments, options)
            assert not torch.equal(weights(model), before)
            return trainer

        fused, plain = run(PACK), run(ROUTES["logits"])
        assert fused.fused == ("lm_head" not in modules)  # a LoRA there is more than a weight
        assert losses(fused) == pytest.approx(losses(plain), rel=1e-5)
        torch.testing.assert_close(weights(fused.model), weights(plain.model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("attention", "device", "expected"),
    [
        ("codeact_varlen", "cpu", "codeact_varlen"),
        ("codeact_varlen", "cuda", "sdpa"),  # the kernel runs on no model that is still on the CPU
        ("flash_attention_2", "cuda", "sdpa"),
        ("eager", "cuda", "eager"),
    ],
)
def test_what_a_model_is_proved_under_before_it_is_on_its_device(attention, device, expected):
    assert _stand_in(attention, torch.device(device), torch.empty(1)) == expected


class TestRefusals:
    @pytest.fixture
    def leaky(self):
        """Causal attention that knows nothing of packs, without a mask function: transformers then makes no mask."""

        def attend(module, query, key, value, attention_mask, scaling=None, **_):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
            return out.transpose(1, 2), None

        AttentionInterface.register("leaky", attend)
        yield "leaky"
        del AttentionInterface._global_mapping["leaky"]

    def test_an_attention_that_cannot_isolate(self, tmp_path, leaky):
        with pytest.raises(InputError, match="LlamaForCausalLM cannot be packed with leaky: ") as caught:
            train(make_model(), make_samples(4), make_arguments(tmp_path), PackOptions(max_length=64, attention=leaky))
        for word in ("samples of 5/9/7 tokens", "attention sdpa"):
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)
        padded = PackOptions(max_length=64, attention=leaky, pad_mode="dynamic_pad")
        train(make_model(), make_samples(4), make_arguments(tmp_path, max_steps=1), padded)

    def test_a_model_with_a_state_that_runs_on(self, tmp_path):
        config = AutoConfig.for_model(
            "mamba", vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1, initializer_range=0.5
        )
        with pytest.raises(InputError, match=r"MambaForCausalLM cannot be packed with .*; say pad_mode dynamic_pad"):
            train(AutoModelForCausalLM.from_config(config), make_samples(4), make_arguments(tmp_path), PACK)

    def test_an_unknown_attention(self, tmp_path):
        options = PackOptions(max_length=64, attention="flash_attention_9")
        with pytest.raises(InputError, match="attention 'flash_attention_9' does not work with LlamaForCausalLM"):
            train(make_model(), make_samples(4), make_arguments(tmp_path), options)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
            ({"auto_find_batch_size": True}, "auto_find_batch_size"),
            ({"train_sampling_strategy": "group_by_length"}, "with dynamic_pack 'group_by_length' is unknown"),
        ],
    )
    def test_arguments(self, tmp_path, change, message):
        with pytest.raises(InputError, match=message):
            train(make_model(), make_samples(4), make_arguments(tmp_path, **change), PACK)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"pad_mode": "dynamic"}, "pad_mode 'dynamic' is unknown; choose one of: dynamic_"),
            ({"pack_scope": "step"}, "pack_scope 'step' is unknown"),
            ({"max_length": 0}, "max_length is 0"),
        ],
    )
    def test_options(self, change, message):
        with pytest.raises(InputError, match=message):
            PackOptions(**change)

    def test_samples(self, tmp_path):
        with pytest.raises(InputError, match="longer than the 8 tokens"):
            train(make_model(), make_samples(4), make_arguments(tmp_path), PackOptions(max_length=8))
        with pytest.raises(InputError, match="there is no sample"):
            train(make_model(), [], make_arguments(tmp_path), PACK)


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic", "llama4_text", "gpt_neo", "granite"])
def test_a_pass_holds_what_may_share_one(tmp_path, name):
    """Short samples beside long ones: the loss of training and of evaluation is that of each sample by itself."""
    model = make_model_of_zoo(name)
    rng = np.random.default_rng(0)
    samples = []
    for length in (5, 60, 9, SWITCH, SWITCH + 1, 3, 20, 90):
        ids = rng.integers(0, VOCABULARY, length).astype(np.int32)
        samples.append(Sample(ids, ids))
    expected = sum(nll_alone(model, s.input_ids.tolist(), 1) for s in samples) / sum(map(targets, samples))
    arguments = make_arguments(
        tmp_path, gradient_accumulation_steps=len(samples), per_device_eval_batch_size=1, learning_rate=0.0
    )
    trainer = train(model, samples, arguments, PackOptions(max_length=200), eval_samples=samples)
    assert trainer.mean_loss() == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["dynamic_pack", "dynamic_pad"])
@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_a_batch_that_would_mix_them_is_refused(tmp_path, name, mode):
    ids = np.arange(60, dtype=np.int32)
    samples = [Sample(ids[:length], ids[:length]) for length in (5, 60)]
    arguments = make_arguments(tmp_path, per_device_train_batch_size=2)
    with pytest.raises(InputError, match=rf"above {SWITCH} tokens. Set per_device_train_batch_size"):
        PackTrainer(make_model_of_zoo(name), samples, arguments, PackOptions(max_length=64, pad_mode=mode))
    PackTrainer(make_model_of_zoo(name), samples[:1], arguments, PackOptions(max_length=64, pad_mode=mode))


def test_length_sorted_padding_is_trainers_own_option(tmp_path):
    arguments = make_arguments(tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=5)
    trainer = PackTrainer(make_model(), make_samples(60), arguments, PackOptions(max_length=64, pad_mode="dynamic_pad"))
    shapes = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    assert sum(int(mask.sum()) for mask in shapes) / sum(mask.numel() for mask in shapes) > 0.85


RANK_SAMPLES = make_samples(25, seed=5)


def run_ranks(folder, packs_a_step):
    """One process does in a step what several do together: the same packs, and none of them twice."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = make_arguments(folder, gradient_accumulation_steps=packs_a_step // world, per_device_eval_batch_size=2)
    trainer = train(make_model(), RANK_SAMPLES, arguments, PACK, eval_samples=make_samples(11, seed=6))
    still = make_arguments(folder, gradient_accumulation_steps=2, learning_rate=0.0)
    steps = train(make_model(), RANK_SAMPLES, still, PACK)
    items = [steps.train_dataset[0, number] for number in range(len(steps.train_dataset))]
    return {
        "packs": len(trainer.train_dataset),
        "losses": losses(trainer),
        "eval_loss": trainer.evaluate()["eval_loss"],
        "weights": weights(trainer.model).tolist(),
        "step_losses": losses(steps),
        "expected_step_losses": step_losses(make_model(), items, 2 * world),
    }


def test_two_ranks_with_an_odd_number_of_packs_equal_one_process(tmp_path):
    packs = len(PackDataset(RANK_SAMPLES, 64))
    assert packs % 2 == 1
    done = forked.ranks(tmp_path, packs + 1, module="tests.training.test_trainer", cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    ours = json.loads((tmp_path / "ranks.json").read_text())
    assert ours["packs"] == packs + 1  # one of them a dummy
    assert len(ours["step_losses"]) == 2
    assert ours["step_losses"] == pytest.approx(ours["expected_step_losses"], rel=1e-6)
    expected = run_ranks(tmp_path, packs + 1)
    assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert ours["losses"] == pytest.approx([token_mean(make_model(), RANK_SAMPLES)], rel=1e-5)
    assert ours["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    torch.testing.assert_close(torch.tensor(ours["weights"]), torch.tensor(expected["weights"]), atol=1e-6, rtol=1e-5)


if __name__ == "__main__":  # one rank of the test above
    torch.set_num_threads(1)
    result = run_ranks(sys.argv[1], int(sys.argv[2]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[1], "ranks.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
