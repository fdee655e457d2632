"""The flags of ``codeact train``: what is filled in, and what is refused before there is data or a model."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from codeact.base.errors import InputError, in_arguments
from codeact.ops.flops import Memory, ModelFacts, ModelShape
from codeact.training import room
from codeact.training.flags import check_flags, parse


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_loads_neither_pytorch_nor_transformers(argument):
    code = (
        "import sys; from codeact.training.flags import parse; print(parse([sys.argv[1]])); "
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for word in ("--lora_r", "Rank of the adapters. (default: 8)", "--save_total_limit", "main_classes/trainer"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("flags", "train", "evaluate"),
    [
        ({}, 1, 1),
        ({"per_device_train_batch_size": 4}, 4, 4),
        ({"pack_scope": "batch"}, 8, 1),
        ({"pad_mode": "dynamic_pad"}, 8, 8),
        ({"pad_mode": "max_length", "per_device_eval_batch_size": 3}, 8, 3),
    ],
)
def test_a_forward_pass_has_one_pack_unless_more_are_asked_for(tmp_path, flags, train, evaluate):
    checked = check_flags(flags, "train")
    assert (checked.per_device_train_batch_size, checked.per_device_eval_batch_size) == (train, evaluate)
    given = {"model_name_or_path": "m", "data_path": "d", "output_dir": str(tmp_path), **flags}
    settings = parse([word for name, value in given.items() for word in (f"--{name}", str(value))])
    arguments = settings.trainer
    assert (arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size) == (train, evaluate)
    assert (arguments.train_batch_size, arguments.save_total_limit) == (train, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"report_to": "tensorbord"}, "report_to 'tensorbord' is unknown; choose one of: tensorboard"),
        ({"report_to": "wandb"}, "report_to wandb: wandb is not installed; pip install wandb"),
        ({"report_to": "mlflow"}, "mlflow is not installed"),
        ({"report_to": ["wandb", "mlflow"]}, "report_to takes one value, not 2"),
        ({"eval_strategy": "epoch"}, "eval_strategy needs held-out conversations: add eval_ratio"),
        ({"eval_on_start": True}, "eval_on_start needs held-out conversations"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs held-out"),
        ({"load_best_model_at_end": True, "eval_ratio": 0.1}, "needs an eval_strategy that is the save_strategy"),
        ({"quantize": "nf4"}, "add lora True"),
        ({"eval_ratio": 0.1, "eval_path": "x"}, "give one of the two"),
        ({"use_liger_kernel": True}, "use_liger_kernel True needs liger_kernel: pip install liger-kernel"),
        ({"lora": True}, "lora True needs peft"),
        ({"optim": "adamw_bnb_8bit"}, "optim adamw_bnb_8bit needs bitsandbytes"),
        ({"deepspeed": "zero2"}, "deepspeed needs deepspeed"),
        ({"output_dir": "x"}, "output_dir follows from the other settings"),
    ],
)
def test_what_would_stop_a_run_late_stops_it_at_once(monkeypatch, flags, message):
    from transformers.integrations import integration_utils

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: [])
    with pytest.raises(InputError, match=message) as caught:
        check_flags(flags, "train", taken=("output_dir",))
    assert str(caught.value).startswith("train: ")
    assert "\n" not in str(caught.value)


def test_libraries_of_another_machine_are_not_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_flags({"report_to": "wandb", "lora": True, "deepspeed": "zero2"}, "train", here=False)


@pytest.fixture
def small_disk(monkeypatch):
    """100 GiB free, wherever one looks."""
    usage = type("Usage", (), {"free": 100 << 30})
    monkeypatch.setattr(room.shutil, "disk_usage", lambda place: usage)
    monkeypatch.setattr("codeact.training.flags.free_memory", lambda device: 1 << 40)


@pytest.fixture
def big_model(tmp_path):
    """A folder whose weights say that they are 2e9 parameters; there is nothing behind the header but zeros."""
    import json
    import struct

    folder = tmp_path / "big"
    folder.mkdir()
    header = json.dumps(
        {"w": {"dtype": "BF16", "shape": [2000, 1_000_000], "data_offsets": [0, 4_000_000_000]}}
    ).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4_000_000_000)  # a hole: takes no room
    return folder


def test_other_names_of_a_flag(tmp_path):
    files = ("--bf16", "False", "--report_to", "none", "--use_cpu", "True")
    ours = parse(
        ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", str(tmp_path), "--max_length", "9", *files]
    )
    for words in ("--model=m --dataset_name d --output".split(), "--model m --dataset-name=d --output-dir".split()):
        for length in ("--max_seq_len", "--max-seq-length", "--capacity", "--max-length"):
            theirs = parse([*words, str(tmp_path), length, "9", *files])
            assert (theirs.model, theirs.data, theirs.packs) == (ours.model, ours.data, ours.packs)
            assert theirs.trainer.output_dir == str(tmp_path)
    assert check_flags({"max_seq_len": 77}, "train", here=False).max_length == 77
    with pytest.raises(InputError, match="train: model_name_or_path follows from the other settings"):
        check_flags({"model": "m"}, "train", taken=("model_name_or_path",))


@pytest.mark.parametrize(
    ("flags", "fits"),
    [
        ({}, True),  # one checkpoint for certain: 22 GiB, and the model
        ({"save_strategy": "epoch"}, True),  # three
        ({"save_strategy": "epoch", "num_train_epochs": 9, "save_total_limit": 8}, False),
        ({"max_steps": 3000, "save_total_limit": 5}, False),
        ({"max_steps": 3000, "save_total_limit": 5, "save_only_model": True}, True),
        ({"max_steps": 3000, "save_total_limit": 5, "save_strategy": "no"}, True),
        ({"max_steps": 3000, "save_total_limit": 5, "lora": True}, True),
    ],
)
def test_checkpoints_are_compared_with_the_disk(tmp_path, small_disk, big_model, flags, fits):
    taken = {"model_name_or_path": str(big_model), "output_dir": str(tmp_path / "run" / "model")}
    if fits:
        check_flags(flags, "train", taken=taken)
        return
    message = r"train: \d checkpoints of about 22.35 GiB and the model need .* GiB, and .* has 100.00 GiB left: lower"
    with pytest.raises(InputError, match=message):
        check_flags(flags, "train", taken=taken)


@pytest.mark.parametrize(
    ("flags", "held", "remedy"),
    [
        ({}, 16, "--lora True, or --optim adafactor"),
        ({"optim": "sgd"}, 8, "--lora True"),
        ({"lora": True}, 4, "--quantize nf4"),
        ({"lora": True, "bf16": True}, 2, "--quantize nf4"),
        ({"deepspeed": "zero3"}, 0, ""),  # every process holds a part
    ],
)
def test_what_training_holds_whatever_its_batch_is_refused_first(big_model, flags, held, remedy):
    known = check_flags({"bf16": False, **flags}, "train", {"model_name_or_path": str(big_model)}, here=False)
    room.check_held(known, held * 2e9, "this machine")
    if held:
        with pytest.raises(InputError, match=r"weights.* take .* GiB, and .* GiB are left on cuda:0: ") as caught:
            room.check_held(known, held * 2e9 - 1, "cuda:0")
        assert in_arguments(remedy) in str(caught.value)


def test_steps_that_are_known_count_exactly(tmp_path, small_disk):
    flags = check_flags({"save_total_limit": 9}, "train", taken={"output_dir": str(tmp_path)})
    room.check_room(flags, 2_000_000_000, 500)
    room.check_room(flags, 2_000_000_000, 1500)
    with pytest.raises(InputError, match="5 checkpoints"):
        room.check_room(flags, 2_000_000_000, 2001)


@pytest.mark.parametrize(
    ("needs", "remedy"),
    [
        ({"activations": 3e9, "logits": 1e9}, "lower per_device_train_batch_size or max_length"),
        ({"activations": 1e9, "logits": 3e9}, "fused_loss True"),
        ({"activations": 1e9, "gradients": 1.3e9, "optimizer": 1.7e9}, "lora True"),
    ],
)
def test_a_step_that_does_not_fit_says_what_to_lower(needs, remedy):
    room.check_memory(Memory(needs), 5e9, 2048, "this machine")
    with pytest.raises(InputError, match=r"2,048 tokens needs about 3.7 GiB .* 2.8 GiB are left on cuda:0") as caught:
        room.check_memory(Memory(needs), 3e9, 2048, "cuda:0")
    assert remedy in str(caught.value)


def test_an_evaluation_that_does_not_fit_says_what_to_lower():
    """Its batches may be larger than those of training, and nothing else bounds them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    facts = ModelFacts.of(LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4)), "here")
    planned = room.PlannedTraining(check_flags({"bf16": False}, "train", here=False))
    evaluation, step = (make(facts, 10**6) for make in (planned.evaluation_memory, planned.step_memory))
    assert evaluation.total < step.total / 2  # a layer is kept at a time, and no gradients
    room.check_memory(evaluation, evaluation.total + 1, 10**6, "this machine")
    with pytest.raises(
        InputError, match=r"most of it for activations of an evaluation; .* lower per_device_eval_batch"
    ):
        room.check_memory(evaluation, evaluation.total - 1, 10**6, "this machine")


@pytest.mark.parametrize("flags", [{}, {"lora": True, "lora_r": 4}])
def test_a_model_that_is_here_is_counted_as_it_is_trained(flags):
    """Before its adapters are there: what of it will have gradients, as they have them then."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from codeact.models.adapters import add_lora

    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    facts = ModelFacts.of(model, "here")
    assert facts.parameters == model.num_parameters()
    known = check_flags({"lora_dropout": 0.0, **flags}, "train", here=False)
    if known.lora:
        model = add_lora(model, known.lora_r, known.lora_alpha, 0.0, known.lora_target_modules)
    needs = room.PlannedTraining(known).step_memory(facts, 256).parts
    assert needs["gradients"] == 4 * room.trained_parameters(model)
    assert needs["optimizer"] == 8 * room.trained_parameters(model)


def test_the_estimate_of_a_pass_is_near_what_pytorch_keeps():
    """Saved tensors of a plain Llama, counted by autograd."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    model, tokens = LlamaForCausalLM(config), 256
    weights = {weight.data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.model(torch.randint(64, (1, tokens)), use_cache=False).last_hidden_state
    estimate = room.pass_memory(ModelShape.from_config(config), tokens, element_bytes=4)["activations"]
    assert hidden.requires_grad
    assert 0.6 < estimate / sum(kept.values()) < 1.6


def test_a_pipe_for_weights_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    flags = check_flags({}, "train", taken={"model_name_or_path": str(tmp_path), "output_dir": str(tmp_path / "out")})
    room.check_room(flags)


@pytest.mark.parametrize(
    "flags",
    [
        {"learning_rate": "nan"},
        {"weight_decay": "inf"},
        {"gradient_accumulation_steps": 0},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_numbers_that_cannot_be_are_refused_before_the_first_stage(flags):
    with pytest.raises(InputError, match=rf"train: {next(iter(flags))} "):
        check_flags(flags, "train", here=False)
