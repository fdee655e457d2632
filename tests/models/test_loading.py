"""Weights that are not there are refused by one function, wherever a model or an adapter is loaded."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from codeact.base.errors import InputError
from codeact.data.settings import DataSettings
from codeact.models import adapters, loading
from codeact.models.adapters import apply_adapter, merge_adapters
from codeact.models.loading import check_weights, load_causal_lm, model_and_tokenizer
from codeact.models.weight_files import loaded_bytes
from codeact.scoring.stage import ScoreSettings, score_data
from tests.helpers.zoo import logits_alone, make_model, random_ids

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy; what does not change is linked."""
    for path in saved.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def rewrite(folder: Path, **more) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**config, **more}))


@pytest.mark.parametrize("depth", [-1, 0, 10**9, "2"])
def test_layers_that_are_not_there(folder, depth):
    rewrite(folder, num_hidden_layers=depth)
    with pytest.raises(InputError, match=r"num_hidden_layers|cannot load model") as error:
        load_causal_lm(str(folder), CPU, torch.float32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_hidden_layers": 3}, r"lacks 9 weights of a LlamaForCausalLM, such as model\.layers\.2"),
        (
            {"num_hidden_layers": 1},
            r"holds 9 weights that a LlamaForCausalLM has no place for, such as model\.layers\.1",
        ),
        ({"intermediate_size": 40}, r"cannot load model .*mismatch|lacks .* weights"),
    ],
)
def test_a_configuration_of_another_model(folder, more, message):
    rewrite(folder, **more)
    with pytest.raises(InputError, match=message):
        load_causal_lm(str(folder), CPU, torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_weights_that_are_no_numbers(saved, name, value):
    model = make_model("llama")
    check_weights("model x", model)
    model.get_parameter(name).data.view(-1)[-1] = value
    with pytest.raises(InputError, match=rf"model x holds NaN or infinity in 1 of \d+ weights, such as {name}"):
        check_weights("model x", model)


def test_they_are_looked_for_in_files_and_in_half_precision(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = 1e38  # too large for float16 only
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load_causal_lm(str(folder), CPU, torch.float32)
    with pytest.raises(InputError, match=r"holds NaN or infinity in 1 .* such as model\.norm\.weight"):
        load_causal_lm(str(folder), CPU, torch.float16)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rms_norm_eps": math.nan}, r"rms_norm_eps in config\.json is nan, which cannot be"),
        ({"rms_norm_eps": math.inf}, r"rms_norm_eps in config\.json is inf"),
        ({"rms_norm_eps": -1.0}, r"rms_norm_eps in config\.json is -1\.0"),
        ({"rms_norm_eps": 1e30}, r"rms_norm_eps in config\.json is 1e\+30"),
        ({"initializer_range": math.nan}, "initializer_range.*nan"),
        ({"rope_parameters": {"rope_type": "linear", "factor": math.nan, "rope_theta": 1e4}}, "factor .* is nan"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
            r"makes NaN or infinity in model\.rotary_emb\.inv_freq: a number",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}},
            "makes NaN or infinity in model.rotary",
        ),
        ({"attention_bias": True}, "lacks"),
        ({"hidden_act": "bogus"}, "cannot load model|does not run"),
    ],
)
def test_numbers_of_a_configuration_that_cannot_be(folder, more, message):
    """Generation would write words by chance, and say nothing."""
    rewrite(folder, **more)
    with pytest.raises(InputError, match=message) as error:
        load_causal_lm(str(folder), CPU, torch.float32)
    assert "\n" not in str(error.value)


def test_numbers_too_large_for_a_dtype(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.gate_proj.weight"] *= 3e3
    weights["model.layers.0.mlp.up_proj.weight"] *= 3e3
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load_causal_lm(str(folder), CPU, torch.bfloat16)
    with pytest.raises(InputError, match=r"too large for torch\.float16: say dtype float32"):
        load_causal_lm(str(folder), CPU, torch.float16)


@pytest.mark.parametrize("name", ["mamba", "bloom", "gpt_neo", "gpt_oss", "xlstm"])
def test_limits_that_are_infinite_and_other_families_load(name, tokenizer, tmp_path):
    make_model(name).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rewrite(tmp_path, time_step_limit=[0.0, math.inf])
    load_causal_lm(str(tmp_path), CPU, torch.float32)


@pytest.mark.parametrize(
    ("model", "tokenizer", "message"),
    [
        (
            [{"instruction": "q", "output": "a"}],
            None,
            r"the first argument of f.* must be a causal model of transformers, or a name, not li",
        ),
        (None, None, "not NoneType"),
        (7, None, "not int"),
        (torch.nn.Linear(2, 2), None, "not Linear"),
        (
            "llama",
            [{"instruction": "q", "output": "a"}],
            "second argument of f.* must be a tokenizer of transformers, not list",
        ),
        ("llama", "a name", "not str"),
        ("llama", None, "a loaded model needs its tokenizer: f"),
    ],
)
def test_what_is_no_model_or_no_tokenizer(model, tokenizer, message):
    model = make_model(model) if isinstance(model, str) else model
    with pytest.raises(InputError, match=message):
        model_and_tokenizer(model, tokenizer, "auto", "cpu", "f(model, tokenizer)")


class TestAdapters:
    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        import peft

        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        peft.get_peft_model(make_model("llama"), config).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_one_that_fits_is_added(self, adapter):
        import peft

        ids = random_ids(12, 0)
        unmerged = peft.PeftModel.from_pretrained(make_model("llama"), str(adapter)).eval()
        with torch.inference_mode():
            expected = unmerged(torch.tensor([ids])).logits[0].double()
        adapted = logits_alone(apply_adapter(make_model("llama"), adapter), ids)
        torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(adapted, logits_alone(make_model("llama"), ids), atol=1e-2)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda name, tensor: {name.replace("layers.", "blocks."): tensor}, "lacks 8 weights"),
            (lambda name, tensor: {name.replace("layers.1", "layers.7"): tensor}, "lacks 4 weights"),
            (lambda name, tensor: {name: tensor, name.replace("layers.1", "layers.7"): tensor}, "has no place for"),
            (lambda name, tensor: {} if "up_proj.lora_B" in name else {name: tensor}, "lacks 2 weights .*up_proj"),
            (lambda name, tensor: {name: tensor * math.nan if "layers.0.mlp" in name else tensor}, "holds NaN"),
            (lambda name, tensor: {name: tensor[:, :-1].contiguous()}, "does not fit the model"),
        ],
    )
    def test_one_that_does_not_fit(self, adapter, change, message):
        path = adapter / "adapter_model.safetensors"
        changed = {}
        for name, tensor in load_file(path).items():
            changed.update({key: value.clone() for key, value in change(name, tensor).items()})
        save_file(changed, path)
        with pytest.raises(InputError, match=message) as error:
            apply_adapter(make_model("llama"), adapter)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "more",
        [
            {"target_modules": ["nothing"]},
            {"r": 3},
            {"layers_to_transform": [9]},
            {"r": "x"},
            {"lora_alpha": math.nan},
            {"lora_alpha": math.inf},
        ],
    )
    def test_a_configuration_that_does_not_fit(self, adapter, more):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
        with pytest.raises(InputError, match=r"does not fit the model|lacks|no place"):
            apply_adapter(make_model("llama"), adapter)

    def test_a_merge_refuses_what_generate_refuses(self, saved, adapter, tmp_path):
        weights = load_file(adapter / "adapter_model.safetensors")
        save_file({f"x.{name}": tensor for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
        with pytest.raises(InputError, match="lacks 8 weights"):
            merge_adapters(str(saved), adapter, tmp_path / "merged", torch.float32)
        assert not (tmp_path / "merged").exists()

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda path: path.write_bytes(path.read_bytes()[:200]),
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(b"\xff" * 5000),
            lambda path: (path.unlink(), os.mkfifo(path)),
            lambda path: (path.unlink(), path.mkdir()),
        ],
    )
    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_what_is_no_file_of_an_adapter(self, adapter, name, spoil):
        spoil(adapter / name)
        with pytest.raises(InputError, match=r"does not fit the model|is no file") as error:
            apply_adapter(make_model("llama"), adapter)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("pattern", ["(.*.*.*.*)*b", "((a|.)*)*!", r"(\w+\.?)+ "])
    def test_a_pattern_without_end(self, adapter, pattern, monkeypatch):
        monkeypatch.setattr(adapters, "PATTERN_SECONDS", 0.3)
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": pattern}))
        with pytest.raises(InputError, match=r"does not end within 0\.3 s"):
            apply_adapter(make_model("llama"), adapter)


@pytest.fixture
def huge(folder: Path) -> Path:
    """2e10 numbers; behind the header is a hole, which takes no room on the disk."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [20000, 10**6], "data_offsets": [0, 80 * 10**9]}}).encode()
    path = folder / "model.safetensors"
    path.unlink()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 80 * 10**9)
    return folder


class TestMemory:
    """The system kills whoever takes more than there is, without a word."""

    @pytest.mark.parametrize(
        ("dtype", "quantization", "needed"),
        [
            (torch.float32, None, 4),
            (torch.bfloat16, None, 2),
            (torch.bfloat16, SimpleNamespace(load_in_4bit=True), 0.5),
            (torch.bfloat16, SimpleNamespace(load_in_4bit=False), 1),
        ],
    )
    def test_weights_that_do_not_fit(self, huge, monkeypatch, dtype, quantization, needed):
        monkeypatch.setattr(loading, "free_memory", lambda *_: int(needed * 2e10) - 1)
        with pytest.raises(InputError, match=r"the weights of model .* take .* GiB, and .* left on this machine") as no:
            load_causal_lm(str(huge), CPU, dtype, quantization)
        assert ("dtype bfloat16" in str(no.value)) == (dtype == torch.float32)
        monkeypatch.setattr(loading, "free_memory", lambda *_: int(needed * 2e10))
        loading._check_room("model x", str(huge), dtype, CPU, quantization)

    def test_a_device_that_is_smaller_than_the_machine(self, huge, monkeypatch):
        monkeypatch.setattr(loading, "free_memory", lambda device=None: 10**9 if device else 10**12)
        with pytest.raises(InputError, match="954 MiB are left on cuda:1"):
            loading._check_room("model x", str(huge), torch.bfloat16, torch.device("cuda:1"), None)

    def test_as_many_processes_as_there_is_memory_for(self, huge, monkeypatch, tmp_path):
        monkeypatch.setattr("codeact.base.machine.free_memory", lambda: 10**11)
        settings = ScoreSettings(model=str(huge))
        with pytest.raises(InputError, match=r"the weights of 3 processes take 111.76 GiB.*; lower workers"):
            score_data(DataSettings(source="rows.jsonl"), settings, tmp_path / "scores", workers=3)

    def test_what_is_not_counted(self, huge, tmp_path):
        """A model that lies there whole and in parts counts once, bytes stay bytes, what is elsewhere is not known."""
        (huge / "model-00001-of-00001.safetensors").symlink_to(huge / "model.safetensors")
        assert loaded_bytes(str(huge), 2) == 4e10
        save_file({"w": torch.zeros(5, dtype=torch.uint8), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
        assert loaded_bytes(str(tmp_path), 2) == 5 + 3 * 2
        assert loaded_bytes("nobody/nothing", 2) == loaded_bytes(str(tmp_path / "none"), 2) == 0
