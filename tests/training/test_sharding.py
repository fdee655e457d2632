"""Models sharded over two processes: DeepSpeed as the command runs it, FSDP2 as far as a machine without GPUs can."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from codeact.base.errors import InputError
from codeact.data.records import write_jsonl
from codeact.training import train as training
from codeact.training.flags import parse, parse_mapping
from codeact.training.trainer import check_sharded
from tests.conftest import make_records
from tests.helpers import forked

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "codeact" / "configs"


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer) -> Path:
    """A folder with a small model, 9 conversations and the flags of a run: two steps, each of all packs."""
    folder = tmp_path_factory.mktemp("sharding")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_jsonl(folder / "rows.jsonl", [{"instruction": r.question, "output": r.answer} for r in make_records(9)])
    flags = {
        "model_name_or_path": str(folder / "model"),
        "data_path": str(folder / "rows.jsonl"),
        "max_length": 256,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "eval_path": str(folder / "rows.jsonl"),
    }
    (folder / "flags.yaml").write_text(yaml.safe_dump(flags))
    return folder


@pytest.fixture(scope="module")
def alone(work):
    """What one process makes of it: losses and weights."""
    with torch.random.fork_rng():
        settings = parse([str(work / "flags.yaml"), "--output_dir", str(work / "alone")])
        assert not isinstance(settings, str)
        result = training.train_from_settings(settings)
    assert result.steps == 2
    return result, load(work / "alone")


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# DeepSpeed would compile its shared-memory operations first, for the better part of a minute.
CODEACT = """if True:
    import deepspeed.ops, runpy
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    runpy.run_module("codeact", run_name="__main__", alter_sys=True)
"""


FSDP = """if True:
    import sys, torch
    from pathlib import Path
    from tests.training.test_sharding import run_fsdp_rank
    torch.set_num_threads(1)
    run_fsdp_rank(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
"""


def two_ranks(*arguments, code=CODEACT, **environment):
    return forked.ranks(*arguments, code=code, env={**os.environ, "DS_ACCELERATOR": "cpu", **environment})


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed(work, alone, stage):
    pytest.importorskip("deepspeed", reason="DS_BUILD_OPS=0 pip install -c constraints.txt deepspeed")
    output = work / stage
    done = two_ranks("train", work / "flags.yaml", "--deepspeed", stage, "--output_dir", output)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, weights = alone
    result = json.loads((output / "training.json").read_text())["result"]
    assert result["steps"] == 2
    assert result["train_loss"] == pytest.approx(expected.train_loss, rel=1e-5)
    assert result["held_out_loss_after"] == pytest.approx(expected.held_out_loss_after, rel=1e-4)
    torch.testing.assert_close(load(output), weights, atol=1e-4, rtol=1e-3)
    # Only the first rank prints.
    assert done.stdout.count("training loss") == 1
    costs = json.loads((output / "cost.json").read_text())
    assert costs["devices"] == 2
    assert costs["samples"] == 18


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_configurations_are_of_their_stage(stage):
    content = json.loads((CONFIGS / f"zero{stage}.json").read_text())
    assert content["zero_optimization"]["stage"] == stage
    assert content["train_micro_batch_size_per_gpu"] == "auto"
    # Without it ZeRO-3 saves no weights.
    assert content["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", False) == (stage == 3)


def launch_environment():
    """The environment that ``accelerate launch --config_file codeact/configs/fsdp.yaml`` gives to every process."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(
        ["--config_file", str(CONFIGS / "fsdp.yaml"), "-m", "codeact", "train"]
    )
    arguments, _, _ = _validate_launch_command(arguments)
    return prepare_multi_gpu_env(arguments)


def test_the_fsdp_configuration_is_what_accelerate_reads(monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin

    made = {key: value for key, value in launch_environment().items() if "FSDP" in key}
    assert made["ACCELERATE_USE_FSDP"] == "true"
    for key, value in made.items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading
    assert "SHARDED" in str(plugin.state_dict_type)


def test_fsdp2_on_a_gloo_mesh(work, alone):
    made = {key: value for key, value in launch_environment().items() if "FSDP" in key}
    # Ranks other than the first would load no weights, for which accelerate needs GPUs.
    made["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    done = two_ranks(work, code=FSDP, **made)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, weights = alone
    got = json.loads((work / "fsdp" / "ranks.json").read_text())
    assert "FSDP was asked for, but the model is not sharded" in got["without_gpu"]
    assert got["sharded"] > 10
    assert got["local_share"] == pytest.approx(0.5, abs=0.01)
    assert got["train_loss"] == pytest.approx(expected.train_loss, rel=1e-5)
    assert got["eval_loss"] == pytest.approx(expected.held_out_loss_after, rel=1e-4)
    torch.testing.assert_close(load(work / "fsdp"), weights, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("flags", "wanted"), [({"fsdp": True, "deepspeed": None}, "FSDP"), ({"fsdp": None, "deepspeed": "x"}, "DeepSpeed")]
)
def test_a_silent_fall_back_is_an_error(flags, wanted):
    arguments = SimpleNamespace(**flags, device=torch.device("cpu"))
    with pytest.raises(InputError, match=f"{wanted} was asked for, but the model is not sharded"):
        check_sharded(arguments, torch.nn.Linear(2, 2))
    check_sharded(SimpleNamespace(fsdp=None, deepspeed=None, device=torch.device("cpu")), torch.nn.Linear(2, 2))


def run_fsdp_rank(work: Path) -> None:
    """One rank of the test above: accelerate's own FSDP2 path, which it takes on GPUs only, on the CPU."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.tensor import DTensor

    flags = {**yaml.safe_load((work / "flags.yaml").read_text()), "output_dir": str(work / "fsdp")}
    settings = parse_mapping(flags, "flags")
    try:
        training.train_from_settings(settings)
        refusal = "none"
    except InputError as error:
        refusal = str(error)

    seen = {}

    class Sharded(training.CardTrainer):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            plugin = FullyShardedDataParallelPlugin()
            for state in (AcceleratorState._shared_state, PartialState._shared_state):
                state["distributed_type"] = DistributedType.FSDP
            AcceleratorState._shared_state["fsdp_plugin"] = plugin
            self.is_fsdp_enabled = True

        def training_step(self, model, *arguments, **more):
            loss = super().training_step(model, *arguments, **more)
            parameters = list(model.parameters())
            seen["sharded"] = sum(isinstance(parameter, DTensor) for parameter in parameters)
            local = sum(parameter.to_local().numel() for parameter in parameters)
            seen["local_share"] = local / sum(parameter.numel() for parameter in parameters)
            return loss

    training.CardTrainer = Sharded  # type: ignore[misc]
    AcceleratorState._reset_state()
    result = training.train_from_settings(settings)
    if os.environ["RANK"] == "0":
        content = {
            **seen,
            "without_gpu": refusal,
            "train_loss": result.train_loss,
            "eval_loss": result.held_out_loss_after,
        }
        (work / "fsdp" / "ranks.json").write_text(json.dumps(content))
