"""What `codeact doctor` tries, in processes of their own, as a library may crash: ``-m codeact.doctor.probes NAME...``.

Each probe returns what it found in a few words ("": it is not here), or raises; "; no device" at the end: installed,
but of no use here. One line of JSON says that a probe begins, another how it ended, so that a crash tells which one it
was. This module imports the standard library only.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeact.base.console import if_known, size

BASE = "numpy pydantic yaml typer tqdm".split()
IDLE = "; no device"
_OFFLINE = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")  # before main() sets it


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


def required() -> str:
    """Import what the command line needs."""
    for name in BASE:
        importlib.import_module(name)
    return ", ".join(f"{name} {_version(name)}" for name in ("numpy", "pydantic", "typer"))


def transformers() -> str:
    """Import what all stages share."""
    for name in ("transformers", "pyarrow", "safetensors", "datasets"):
        importlib.import_module(name)
    return f"{_version('transformers')}, datasets {_version('datasets')}, pyarrow {_version('pyarrow')}"


def sentence_transformers() -> str:
    """Import what embeds and clusters."""
    from sentence_transformers import SentenceTransformer  # noqa: F401

    importlib.import_module("sklearn")
    return f"{_version('sentence-transformers')}, scikit-learn {_version('scikit-learn')}"


def torch() -> str:
    """PyTorch, and for what it was built."""
    torch: Any = importlib.import_module("torch")
    builds = {f"CUDA {torch.version.cuda}": torch.version.cuda, f"ROCm {torch.version.hip}": torch.version.hip}
    built = next((name for name, version in builds.items() if version), "built for the CPU only")
    return f"{torch.__version__}, {built}, {torch.get_num_threads()} threads"


def gpu() -> str:
    """The devices, one after another."""
    torch: Any = importlib.import_module("torch")
    driver = _nvidia_driver()
    if not torch.cuda.is_available():
        build = f"(CUDA {torch.version.cuda}) sees no device"
        why = build if torch.version.cuda else f"{torch.__version__} was not built for CUDA"
        if driver:
            raise RuntimeError(f"NVIDIA driver {driver} is here; PyTorch {why}")
        return ""
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        devices.append(f"{index}: {device.name}, {device.total_memory / 2**30:.0f} GiB, {capability}")
    return "; ".join(devices) + (f"; driver {driver}" if driver else "")


def triton() -> str:
    """Kernels need a device, and a C compiler for what launches them."""
    triton: Any = importlib.import_module("triton")
    if not _has_gpu():
        return f"{triton.__version__}{IDLE}"
    target = triton.runtime.driver.active.get_current_target()
    from codeact.ops.nll import triton_lacks  # what scoring goes by

    if lacks := triton_lacks():
        raise RuntimeError(f"it {lacks}")
    return f"{triton.__version__}, for {target.backend} {target.arch}"


def flash_attention() -> str:
    """flash-attn: its Python part loads the CUDA part."""
    if not _has_gpu():
        return f"{importlib.metadata.version('flash_attn')}{IDLE}"
    from flash_attn import flash_attn_varlen_func  # noqa: F401

    return _version("flash_attn")


def cuml() -> str:
    """What `codeact.selection.clustering` imports."""
    versions = (_version(name, "") for name in ("cuml-cu12", "cuml-cu13", "cuml"))
    version = next(filter(None, versions), "")
    if not version or not _has_gpu():
        return version and f"{version}{IDLE}"
    import cupy
    from cuml.cluster import KMeans  # noqa: F401

    return f"{version}, cupy {cupy.__version__}"


def bitsandbytes() -> str:
    """Quantise a few numbers: it can be imported where its compiled part is missing."""
    torch: Any = importlib.import_module("torch")
    library: Any = importlib.import_module("bitsandbytes")
    library.functional.quantize_4bit(torch.zeros(64, 64, device="cuda" if _has_gpu() else "cpu"), quant_type="nf4")
    return str(library.__version__)


def vllm() -> str:
    """Only looked for: importing it takes longer than all the rest."""
    return f"{importlib.metadata.version('vllm')}{', not tried' if _has_gpu() else IDLE}"


def problems() -> str:
    """Files of the problems, where they are looked for."""
    from codeact.evaluation.problems import DATASETS, downloaded_file, find_in_folder

    if folder := os.environ.get("CODEACT_EVAL_DATA"):
        found = {dataset: find_in_folder(dataset, folder) for dataset in DATASETS}
        if not any(found.values()):
            raise RuntimeError(f"CODEACT_EVAL_DATA={folder} holds none")
        here = [path.name for path in found.values() if path]
        return ", ".join([*here, *(f"no {dataset}" for dataset, path in found.items() if not path)])
    return ", ".join(path.name for path in map(downloaded_file, DATASETS) if path.is_file())


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

    limit = if_known(size, machine.memory_limit())
    limited = f"; a control group limits it to {limit}" if limit else ""
    cores = machine.usable_cpus()
    told = f"{size(machine.free_memory())} of {size(machine.total_memory())} free{limited}; "
    told += f"{cores} of {os.cpu_count()} cores may be used"
    if (load := machine.load()) > cores:
        # Threads of OpenMP that wait for each other then take many times longer.
        told += f", the load {load:.1f} is above them: set OMP_NUM_THREADS=1"
    return told


def disk() -> str:
    """What is free where files go."""
    found = []
    temporary = Path(os.environ.get("TMPDIR") or "/tmp")
    for what, path in (("here", Path.cwd()), ("hub cache", _hub_cache()), ("temporary", temporary)):
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


def module(name: str, imports: str | None = None) -> Callable[[], str]:
    """A probe that imports a module."""

    def probe() -> str:
        importlib.import_module(imports or name)
        return _version(name)

    return probe


@dataclass(frozen=True, slots=True)
class Item:
    """What codeact can use: how it is tried, what for, and what to type where it is missing.

    ``mend``: what to do where it is here and does not work; by default the command again. ``gpu``: of use on a GPU
    only. ``vital``: codeact cannot run without. ``second``: tried in the second of two processes.
    """

    name: str
    probe: Callable[[], str]
    purpose: str
    command: str
    mend: str = ""
    gpu: bool = False
    vital: bool = False
    second: bool = False


def _extra(name: str) -> str:
    return f'pip install "codeact[{name}]"'


_TORCH = "reinstall torch as https://pytorch.org/get-started/locally says for your driver"
_FLASH = "pip install flash-attn --no-build-isolation"
_PROBLEMS = "downloaded at the first use; or set CODEACT_EVAL_DATA=FOLDER"
_NAMESPACES = "allow user namespaces, or evaluate on another machine (README, Evaluate)"
_BUBBLEWRAP = "apt-get install bubblewrap" if shutil.which("apt-get") else "install bubblewrap"
_BUBBLEWRAP = _BUBBLEWRAP if sys.platform == "linux" else "none on this system: evaluate on Linux"
_REINSTALL = "pip install --force-reinstall --no-deps codeact"

ITEMS = {
    "python": Item("Python", python, "all stages", "install Python 3.11 or newer", vital=True),
    "native": Item("native module", native, "packing, NLL on the CPU", _REINSTALL, vital=True),
    "required": Item("libraries", required, "the command line", "pip install codeact", vital=True, second=True),
    "torch": Item("PyTorch", torch, "all stages", _extra("score"), vital=True),
    "transformers": Item("transformers", transformers, "all stages", _extra("score"), vital=True, second=True),
    "sentence-transformers": Item(
        "sentence-transformers", sentence_transformers, "embed, select", _extra("select"), second=True
    ),
    "gpu": Item("GPU", gpu, "speed", _TORCH),
    "triton": Item("triton", triton, "NLL on the GPU", _extra("gpu"), gpu=True),
    "flash-attn": Item("flash-attn", flash_attention, "attention on the GPU", _FLASH, gpu=True),
    "cuml": Item("cuml, cupy", cuml, "clustering on the GPU", _extra("gpu"), gpu=True),
    "rensa": Item("rensa", module("rensa"), "clean", _extra("clean"), second=True),
    "accelerate": Item("accelerate", module("accelerate"), "train", _extra("train"), second=True),
    "peft": Item("peft", module("peft"), "LoRA", _extra("train"), second=True),
    "bitsandbytes": Item("bitsandbytes", bitsandbytes, "QLoRA (--quantize)", _extra("train")),
    "deepspeed": Item("deepspeed", module("deepspeed"), "train --deepspeed", _extra("deepspeed")),
    "vllm": Item("vllm", vllm, "generate --backend vllm", _extra("vllm"), gpu=True),
    "evalplus": Item("evalplus", module("evalplus", "evalplus.data"), "verdicts side by side", _extra("evalplus")),
    "problems": Item("problems", problems, "generate, evaluate", _PROBLEMS),
    "sandbox": Item("sandbox", sandbox, "evaluate", _BUBBLEWRAP, mend=_NAMESPACES),
    "matplotlib": Item("matplotlib", module("matplotlib"), "pictures", _extra("report"), second=True),
    "gguf": Item("gguf", module("gguf"), "demo", _extra("demo"), second=True),
    "memory": Item("memory", memory, "and cores", ""),
    "disk": Item("disk", disk, "free", ""),
    "hub": Item("model hub", hub, "by name", ""),
}
"""By the names that probes have on the command line."""


def run_probe(name: str) -> dict[str, str]:
    """Run one probe; whatever it raises is its result."""
    try:
        detail = ITEMS[name].probe()
        state = "idle" if detail.endswith(IDLE) else "yes" if detail else "no"
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError) as error:
        missing = str(error.name or "")
        absent = missing.partition(".")[0] in {name, name.replace("-", "_"), "torch"}  # which has a line of its own
        state, detail = ("no", "") if absent else ("broken", f"it needs {missing}, which is not installed")
    except BaseException as error:  # a library may well raise SystemExit, and the next one is to be looked at
        text = " ".join(str(error).split())
        state, detail = "broken", f"{type(error).__name__}: {text}"[:200].rstrip(": ")
    return {"probe": name, "state": state, "detail": detail}


def _version(name: str, otherwise: str = "unknown version") -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return otherwise


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
        report.write(json.dumps({"begin": name}) + "\n")
        report.write(json.dumps(run_probe(name)) + "\n")
    os._exit(0)  # a library's own clean-up may hang or crash


if __name__ == "__main__":
    main()
