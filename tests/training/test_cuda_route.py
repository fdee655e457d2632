"""``codeact train`` on the attention of a GPU: stand-ins with the signatures and the dtypes of the real kernels.

No kernel was run on a device. Everything around it is what runs there: autocast, Trainer, peft, bitsandbytes.
"""

from __future__ import annotations

import json

import pytest
import torch

from codeact.base.errors import InputError
from codeact.training import flags as flag_module
from codeact.training import rehearsal
from codeact.training import train as training
from codeact.training.flags import check_flags, parse
from tests.helpers.flash_kernels import KERNELS, Kernels
from tests.training.test_train import stop_at

COMMON = "--max_length 256 --learning_rate 1e-2 --max_steps 5 --disable_tqdm True --logging_steps 2".split()
MODES = {
    "full": "--bf16 True --save_strategy no",
    "full, checkpointing": "--bf16 True --activation_checkpointing True --save_strategy no",
    "lora": "--bf16 True --lora True --save_strategy no",
    "qlora": "--bf16 True --lora True --quantize nf4 --save_strategy no",
    "16-bit weights": "--dtype bfloat16 --save_strategy no",
    "batch scope": "--bf16 True --pack_scope batch --per_device_train_batch_size 4 --save_strategy no",
}


# Each mode on one of the kernels and the plainest on each: they differ in their signatures, which all modes call alike.
MODES_ON = [(kernels, "full") for kernels in KERNELS] + list(zip(KERNELS * 2, list(MODES)[1:], strict=False))
STOPPED_ON = list(zip(KERNELS, ("", "--lora True --lora_dropout 0.2", ""), strict=True))


@pytest.fixture
def kernels(request, monkeypatch) -> Kernels:
    found = Kernels(request.param)
    found.install(monkeypatch)
    return found


@pytest.fixture
def run(selected, even_model_path, tmp_path, monkeypatch):
    """Train with flags, into a folder of that name; returns what training.json holds."""
    # Before it trains, a tiny model in float32 tries the flags: its calls of the kernels are not those of the training.
    monkeypatch.setattr(rehearsal, "_failure", lambda *_, **__: None)
    monkeypatch.setattr(flag_module, "cpu_has_bf16", lambda: True)  # as on a GPU; else it would compute in float32

    def run(flags: str, name: str = "out") -> dict:
        given = ["--model_name_or_path", str(even_model_path), "--data_path", str(selected), *COMMON]
        settings = parse([*given, "--output_dir", str(tmp_path / name), *flags.split()])
        training.train_from_settings(settings)
        return json.loads((tmp_path / name / "training.json").read_text())

    return run


def losses(content: dict) -> list[float]:
    return [entry["loss"] for entry in content["log"] if "loss" in entry]


@pytest.mark.parametrize(("kernels", "mode"), MODES_ON, indirect=["kernels"])
def test_training_runs_to_the_end(kernels, run, capsys, mode, monkeypatch):
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
    content = run(f"{MODES[mode]} --eval_ratio 0.2 --eval_on_start True")
    assert kernels.name in capsys.readouterr().out
    assert {call["dtype"] for call in kernels.calls} == {torch.bfloat16}
    result = content["result"]
    assert result["held_out_loss_after"] < result["held_out_loss_before"]
    # The same losses as with the CPU's own attention.
    monkeypatch.undo()
    assert losses(content) == pytest.approx(losses(run(f"{MODES[mode]} --eval_ratio 0.2", "cpu")), rel=0.02)


@pytest.mark.parametrize(("kernels", "more"), STOPPED_ON, indirect=["kernels"])
def test_a_run_that_was_stopped_ends_where_an_unbroken_one_does(kernels, run, tmp_path, monkeypatch, more):
    flags = f"--bf16 True --save_steps 2 {more}"
    whole = run(flags, "whole")
    go_on = stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(flags, "parts")
    go_on()
    parts = run(flags, "parts")
    name = "adapter_model.safetensors" if more else "model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert parts["result"]["train_loss"] == pytest.approx(whole["result"]["train_loss"], rel=1e-9)


def test_full_determinism_reaches_flash_attn(run, monkeypatch):
    """Its backward adds up in any order unless it is told not to."""
    for name in ("FLASH_ATTENTION_DETERMINISTIC", "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):  # fmt: skip  # noqa: E501
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "0")  # so that it is put back
    kernels = Kernels("flash-attn 2")
    kernels.install(monkeypatch)
    try:
        run("--bf16 True --full_determinism True --max_steps 1 --save_strategy no")
        assert torch.are_deterministic_algorithms_enabled()  # what PyTorch's own varlen goes by
    finally:
        torch.use_deterministic_algorithms(False)
    assert {call["deterministic"] for call in kernels.calls} == {True}


@pytest.mark.parametrize("flags", [{}, {"dtype": "float32"}, {"lora": True}, {"attention": "flash_attention_2"}])
def test_float32_packs_on_a_gpu_are_refused_before_anything_is_loaded(monkeypatch, flags):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=r"train: .* computes in 16 bits on a GPU: add bf16 True"):
        check_flags({"bf16": False, **flags}, "train")


@pytest.mark.parametrize(
    "flags",
    [
        {"bf16": True},
        {"dtype": "bfloat16"},
        {"attention": "sdpa"},
        {"pad_mode": "dynamic_pad"},
        {"use_cpu": True},
    ],
)
def test_what_a_gpu_computes_is_not_refused(monkeypatch, flags):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (70 << 30, 80 << 30))
    check_flags(flags, "train")
