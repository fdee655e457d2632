"""What "auto" means, and what devices compute."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from codeact.base import devices
from codeact.base.devices import default_tokens_per_pack, find_gpu, resolve_device, resolve_dtype, resolve_peak
from codeact.base.errors import InputError, in_command

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD Instinct MI300X", 1307e12),
    ],
)
def test_gpus_are_known_by_the_names_of_their_drivers(name, flops):
    gpu = find_gpu(name)
    assert (gpu and gpu.flops) == flops


def test_a_peak_is_given_known_measured_or_unknown(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert resolve_peak(3e12, CPU, torch.float32) == (3e12, "given")
    assert resolve_peak(None, CUDA, torch.bfloat16) == (None, "unknown")
    assert resolve_peak("auto", CPU, torch.bfloat16) == (None, "unknown")
    assert resolve_peak("auto", CUDA, torch.bfloat16) == (312e12, "data sheet")
    assert resolve_peak("auto", CUDA, torch.float32) == (None, "unknown"), "the table is for 16 bits"
    peak, source = resolve_peak("measure", CPU, torch.float32)
    assert peak > 1e9
    assert source == "measured: a float32 matrix multiplication"


@pytest.mark.parametrize(
    ("device", "parameters", "tokens"),
    [(CPU, 7e9, 2048), ("cpu", 135e6, 2048), (CUDA, 70e9, 8192), ("cuda", 0.5e9, 25000), (CUDA, 135e6, 65536)],
)
def test_the_tokens_of_a_pack_follow_device_and_model(device, parameters, tokens):
    assert default_tokens_per_pack(device, parameters) == tokens


def test_names_that_are_none():
    with pytest.raises(InputError, match="'gpu' is unknown; say auto, cpu, cuda"):
        resolve_device("gpu")
    with pytest.raises(InputError, match="dtype"):
        resolve_dtype("float8", CPU)
    assert resolve_dtype("float16", CPU) == torch.float16


def test_a_dtype_that_the_cpu_has_no_instructions_for_is_told_once(monkeypatch, caplog):
    devices._warn_of_slow.cache_clear()
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: False)
    with caplog.at_level("WARNING", "codeact"), in_command():
        for name in ("float32", "auto", "bfloat16", "bfloat16"):
            resolve_dtype(name, CPU)
    (record,) = caplog.records
    assert record.getMessage().startswith("dtype bfloat16: this CPU has no instructions for it, and float32 is many")
    assert record.getMessage().endswith("leave out --dtype")
    devices._warn_of_slow.cache_clear()


@pytest.mark.parametrize("module", ["machine", "devices"])
def test_importing_it_imports_no_torch(module):
    code = f"import sys, codeact.base.{module}; sys.exit(bool({{'torch', 'numpy', 'transformers'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
