"""What `codeact doctor` tries, in processes of their own, as a library may crash: ``-m codeact.doctor.probes NAME...``.

Each probe returns what it found in a few words ("": it is not here), or raises. A line of JSON says how it ended: the
first that has none ended the process. This module imports the standard library only.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeact.base.console import size

_OFFLINE = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")  # before main() sets it


def library(*names: str) -> Callable[[], str]:
    """A probe that imports them all and tells their versions."""

    def probe() -> str:
        for name in names:
            importlib.import_module(name)
        tops = [sys.modules[name.partition(".")[0]] for name in names]
        versions = [getattr(top, "__version__", None) or _installed(top.__name__) for top in tops]
        return ", ".join(map(" ".join, zip(names, versions, strict=True))) if len(names) > 1 else versions[0]

    return probe


def python() -> str:
    """Version and place."""
    return f"{platform.python_version()}, {sys.executable}, {platform.system()} {platform.machine()}"


def native() -> str:
    """Load the compiled module and pack with it."""
    from codeact import _native, pack

    if len(pack([3, 2, 1], 4)) != 2:
        raise RuntimeError("it packs wrongly")
    compiled, here = _native.compiled_instruction_sets(), _native.instruction_sets()
    if not compiled:
        return "packing; no instruction sets in this build, so PyTorch computes NLL and attention"
    if not here:
        return f"packing; compiled for {', '.join(compiled)}, of which this CPU has none: PyTorch computes the rest"
    asked = os.environ.get("CODEACT_NATIVE_ISA")
    if asked and asked not in here:
        raise RuntimeError(f"CODEACT_NATIVE_ISA={asked} is not of this CPU, which has {', '.join(here)}")
    has = "all" if here == compiled else ", ".join(here)
    return f"{asked or here[0]} (compiled: {', '.join(compiled)}; of these this CPU has {has})"


def torch() -> str:
    """PyTorch, and for what it was built."""
    torch: Any = importlib.import_module("torch")
    cuda, hip = torch.version.cuda, torch.version.hip
    built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "built for the CPU only"
    return f"{torch.__version__}, {built}, {torch.get_num_threads()} threads"


def gpu() -> str:
    """The devices, one after another."""
    torch: Any = importlib.import_module("torch")
    driver = _nvidia_driver()
    if not _has_gpu():
        if not driver:
            return ""
        build = f"(CUDA {torch.version.cuda}) sees no device"
        why = build if torch.version.cuda else f"{torch.__version__} was not built for CUDA"
        raise RuntimeError(f"NVIDIA driver {driver} is here; PyTorch {why}")
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        devices.append(f"{index}: {device.name}, {device.total_memory / 2**30:.0f} GiB, {capability}")
    return "; ".join(devices) + (f"; driver {driver}" if driver else "")


def triton() -> str:
    """It finds the device, and a C compiler for what launches its kernels."""
    triton: Any = importlib.import_module("triton")
    target = triton.runtime.driver.active.get_current_target()
    from codeact.ops.nll import triton_lacks  # what scoring goes by

    if lacks := triton_lacks():
        raise RuntimeError(f"it {lacks}")
    return f"{triton.__version__}, for {target.backend} {target.arch}"


def bitsandbytes() -> str:
    """Quantise a few numbers: it can be imported where its compiled part is missing."""
    torch: Any = importlib.import_module("torch")
    library: Any = importlib.import_module("bitsandbytes")
    library.functional.quantize_4bit(torch.zeros(64, 64, device="cuda" if _has_gpu() else "cpu"), quant_type="nf4")
    return str(library.__version__)


def vllm() -> str:
    """Only looked for: importing it takes longer than all the rest."""
    return f"{_installed('vllm')}, not tried"


def problems() -> str:
    """Files of the problems, where they are looked for."""
    from codeact.evaluation.problems import DATASETS, downloaded_file, find_in_folder

    folder = os.environ.get("CODEACT_EVAL_DATA")
    if not folder:
        return ", ".join(path.name for path in map(downloaded_file, DATASETS) if path.is_file())
    found = {dataset: find_in_folder(dataset, folder) for dataset in DATASETS}
    if not any(found.values()):
        raise RuntimeError(f"CODEACT_EVAL_DATA={folder} holds none")
    return ", ".join(path.name if path else f"no {dataset}" for dataset, path in found.items())


def sandbox() -> str:
    """Isolate a process."""
    from codeact.evaluation.sandbox.sandbox import Limits, Sandbox

    reason = Sandbox(Limits(), unsafe=True).why_not
    if reason and not reason.endswith("is not installed"):
        raise RuntimeError(reason)
    return "" if reason else "bubblewrap isolates here (tried)"


def memory() -> str:
    """And cores: what this process may use."""
    from codeact.base import machine

    told, cores = f"{size(machine.free_memory())} of {size(machine.total_memory())} free", machine.usable_cpus()
    if limit := machine.memory_limit():
        told += f"; a control group limits it to {size(limit)}"
    told += f"; {cores} of {os.cpu_count()} cores may be used"
    if (load := machine.load()) > cores:
        # Threads of OpenMP that wait for each other then take many times longer.
        told += f", the load {load:.1f} is above them: set OMP_NUM_THREADS=1"
    return told


def disk() -> str:
    """What is free where files go."""
    found = []
    for what, path in (("here", Path.cwd()), ("hub cache", _hub_cache()), ("temporary", Path(tempfile.gettempdir()))):
        with suppress(OSError):
            place = next(folder for folder in (path, *path.parents, Path("/")) if folder.exists())
            found.append(f"{size(shutil.disk_usage(place).free)} {what}")
    return ", ".join(found)


def hub() -> str:
    """Models that are here, and whether others may be fetched."""
    cache = _hub_cache()
    mode = "HF_HUB_OFFLINE is set: only what is cached" if _OFFLINE else "online (not tried)"
    return f"{mode}; {len(list(cache.glob('models--*')))} models in {cache}"


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")  # pathlib raises where there is none
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


@dataclass(frozen=True, slots=True)
class Item:
    """What codeact can use: how it is tried, what for, and what to type where it is missing.

    ``mend``: what to do where it is here and does not work; by default the command again. ``gpu``: the distributions
    that it may come with, where it is of use, and tried, on a GPU only. ``vital``: codeact cannot run without.
    """

    name: str
    probe: Callable[[], str]
    purpose: str
    command: str
    mend: str = ""
    gpu: tuple[str, ...] = ()
    vital: bool = False


def _extra(name: str) -> str:
    return f'pip install "codeact[{name}]"'


_TORCH = "reinstall torch as https://pytorch.org/get-started/locally says for your driver"
_PROBLEMS = "downloaded at the first use; or set CODEACT_EVAL_DATA=FOLDER"
_NAMESPACES = "allow user namespaces, or evaluate on another machine (README, Evaluate)"
_INSTALL = "apt-get install bubblewrap" if shutil.which("apt-get") else "install bubblewrap"
_BUBBLEWRAP = _INSTALL if sys.platform == "linux" else "none on this system: evaluate on Linux"
_REINSTALL = "pip install --force-reinstall --no-deps codeact"
_FLASH = "pip install flash-attn --no-build-isolation"
_BASE = library("numpy", "pydantic", "typer", "yaml", "tqdm")
_SCORE = library("transformers", "datasets", "pyarrow", "safetensors")
_CUML = library("cuml.cluster", "cupy")
_EMBED = library("sentence_transformers", "sklearn")

ITEMS = {
    "python": Item("Python", python, "all stages", "install Python 3.11 or newer", vital=True),
    "native": Item("native module", native, "packing, NLL on the CPU", _REINSTALL, vital=True),
    "required": Item("libraries", _BASE, "the command line", "pip install codeact", vital=True),
    "torch": Item("PyTorch", torch, "all stages", _extra("score"), vital=True),
    "transformers": Item("transformers", _SCORE, "all stages", _extra("score"), vital=True),
    "sentence-transformers": Item("sentence-transformers", _EMBED, "embed, select", _extra("select")),
    "gpu": Item("GPU", gpu, "speed; all runs without", "", mend=_TORCH),
    "triton": Item("triton", triton, "NLL on the GPU", _extra("gpu"), gpu=("triton",)),
    "flash-attn": Item("flash-attn", library("flash_attn"), "attention on the GPU", _FLASH, gpu=("flash-attn",)),
    "cuml": Item("cuml, cupy", _CUML, "clustering on the GPU", _extra("gpu"), gpu=("cuml-cu13", "cuml-cu12", "cuml")),
    "accelerate": Item("accelerate", library("accelerate"), "train", _extra("train")),
    "peft": Item("peft", library("peft"), "LoRA", _extra("train")),
    "bitsandbytes": Item("bitsandbytes", bitsandbytes, "QLoRA (--quantize)", _extra("train")),
    "deepspeed": Item("deepspeed", library("deepspeed"), "train --deepspeed", _extra("deepspeed")),
    "vllm": Item("vllm", vllm, "generate --backend vllm", _extra("vllm"), gpu=("vllm",)),
    "evalplus": Item("evalplus", library("evalplus.data"), "verdicts side by side", _extra("evalplus")),
    "problems": Item("problems", problems, "generate, evaluate", _PROBLEMS),
    "sandbox": Item("sandbox", sandbox, "evaluate", _BUBBLEWRAP, mend=_NAMESPACES),
    "matplotlib": Item("matplotlib", library("matplotlib"), "pictures", _extra("report")),
    "gguf": Item("gguf", library("gguf"), "demo", _extra("demo")),
    "memory": Item("memory", memory, "and cores", ""),
    "disk": Item("disk", disk, "free", ""),
    "hub": Item("model hub", hub, "by name", ""),
}
"""By the names that probes have on the command line."""


def run_probe(name: str) -> dict[str, str]:
    """Run one probe; whatever it raises is its result."""
    item, detail = ITEMS[name], ""
    try:
        if item.gpu and not _has_gpu():
            detail = "of use with a GPU only"
            state, detail = "idle", f"{_installed(*item.gpu)}; no device"
        else:
            detail = item.probe()
            state = "yes" if detail else "no"
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError) as error:
        missing = str(error.name or "")
        absent = missing.partition(".")[0] in {name, name.replace("-", "_"), "torch"}  # which has a line of its own
        state, detail = ("no", detail) if absent else ("broken", f"it needs {missing}, which is not installed")
    except BaseException as error:  # a library may well raise SystemExit, and the next one is to be looked at
        text = " ".join(str(error).split())
        state, detail = "broken", f"{type(error).__name__}: {text}"[:200].rstrip(": ")
    return {"probe": name, "state": state, "detail": detail}


def _installed(*names: str) -> str:
    """The version of the first distribution of these that is here."""
    for name in names[:-1]:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return importlib.metadata.version(names[-1])


def _has_gpu() -> bool:
    return bool(importlib.import_module("torch").cuda.is_available())


def _nvidia_driver() -> str | None:
    with suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text().split("\n")[0].split()
        return next((word for word in words if word[:1].isdigit()), "of unknown version")
    return None


def main() -> None:
    """Run the probes that the arguments name. What libraries print is thrown away."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    report = os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    for name in sys.argv[1:]:
        report.write(json.dumps(run_probe(name)) + "\n")
    os._exit(0)  # a library's own clean-up may hang or crash


if __name__ == "__main__":
    main()
