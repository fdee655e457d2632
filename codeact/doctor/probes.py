"""What `codeact doctor` tries, in processes of their own, as a library may crash: ``-m codeact.doctor.probes NAME...``.

Each probe returns what it found in a few words, or raises; "; no device" at the end: installed, but of no use here.
One line of JSON says that a probe begins, another how it ended, so that a crash tells which one it was.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

BASE = "numpy pydantic yaml typer tqdm".split()
IDLE = "; no device"


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
        _import(name)
    return ", ".join(f"{name} {_version(name)}" for name in ("numpy", "pydantic", "typer"))


def transformers() -> str:
    """Import what all stages share."""
    for name in ("transformers", "pyarrow", "safetensors", "datasets"):
        _import(name)
    return f"{_version('transformers')}, datasets {_version('datasets')}, pyarrow {_version('pyarrow')}"


def sentence_transformers() -> str:
    """Import what embeds and clusters."""
    from sentence_transformers import SentenceTransformer  # noqa: F401

    _import("sklearn")
    return f"{_version('sentence-transformers')}, scikit-learn {_version('scikit-learn')}"


def torch() -> str:
    """PyTorch, and for what it was built."""
    torch = _import("torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    built = build if torch.version.cuda or torch.version.hip else "built for the CPU only"
    return f"{torch.__version__}, {built}, {torch.get_num_threads()} threads"


def gpu() -> str:
    """The devices, one after another."""
    torch = _import("torch")
    driver = _nvidia_driver()
    if not torch.cuda.is_available():
        if driver and not torch.version.cuda:
            raise RuntimeError(f"NVIDIA driver {driver} is here; PyTorch {torch.__version__} was not built for CUDA")
        if driver:
            raise RuntimeError(f"NVIDIA driver {driver} is here; PyTorch (CUDA {torch.version.cuda}) sees no device")
        return ""
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        devices.append(f"{index}: {device.name}, {memory}, compute capability {device.major}.{device.minor}")
    return "; ".join(devices) + (f"; driver {driver}" if driver else "")


def triton() -> str:
    """Kernels need a device, and a C compiler for what launches them."""
    triton = _import("triton")
    if not _has_gpu():
        return f"{triton.__version__}{IDLE}"
    target = triton.runtime.driver.active.get_current_target()
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))):
        raise RuntimeError("it needs a C compiler to launch kernels (Debian, Ubuntu: apt-get install gcc)")
    return f"{triton.__version__}, for {target.backend} {target.arch}"


def flash_attention() -> str:
    """flash-attn: its Python part loads the CUDA part."""
    if not _has_gpu():
        importlib.metadata.version("flash_attn")
        return f"{_version('flash_attn')}{IDLE}"
    from flash_attn import flash_attn_varlen_func  # noqa: F401

    return _version("flash_attn")


def cuml() -> str:
    """What `codeact.selection.clustering` imports."""
    version = next((_version(name) for name in ("cuml-cu12", "cuml-cu13", "cuml") if _installed(name)), None)
    if version is None:
        raise ModuleNotFoundError("cuml", name="cuml")
    if not _has_gpu():
        return f"{version}{IDLE}"
    import cupy
    from cuml.cluster import KMeans  # noqa: F401

    return f"{version}, cupy {cupy.__version__}"


def bitsandbytes() -> str:
    """Quantise a few numbers: it can be imported where its compiled part is missing."""
    torch, library = _import("torch"), _import("bitsandbytes")
    library.functional.quantize_4bit(torch.zeros(64, 64, device="cuda" if _has_gpu() else "cpu"), quant_type="nf4")
    return str(library.__version__)


def vllm() -> str:
    """Only looked for: importing it takes longer than all the rest."""
    return f"{importlib.metadata.version('vllm')}{', not tried' if _has_gpu() else IDLE}"


def evalplus() -> str:
    """The part that knows the data sets' files."""
    _import("evalplus.data")
    return _version("evalplus")


def module(name: str) -> Callable[[], str]:
    """A probe that imports a module."""

    def probe() -> str:
        _import(name)
        return _version(name)

    return probe


PROBES: dict[str, Callable[[], str]] = {
    "native": native,
    "required": required,
    "transformers": transformers,
    "sentence-transformers": sentence_transformers,
    "torch": torch,
    "gpu": gpu,
    "triton": triton,
    "flash-attn": flash_attention,
    "cuml": cuml,
    "bitsandbytes": bitsandbytes,
    "vllm": vllm,
    "evalplus": evalplus,
    **{name: module(name) for name in ("accelerate", "peft", "deepspeed", "matplotlib", "gguf")},
}


def run_probe(name: str) -> dict[str, str]:
    """Run one probe; whatever it raises is its result."""
    try:
        detail = PROBES[name]()
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError) as error:
        own = {name, name.replace("-", "_"), "torch"}  # that has a line of its own
        missing = str(error.name or "")
        if missing.partition(".")[0] in own:
            return {"probe": name, "state": "no", "detail": ""}
        return {"probe": name, "state": "broken", "detail": f"it needs {missing}, which is not installed"}
    except BaseException as error:  # a library may well raise SystemExit, and the next one is to be looked at
        text = " ".join(str(error).split())
        return {"probe": name, "state": "broken", "detail": f"{type(error).__name__}: {text}"[:200].rstrip(": ")}
    if not detail:
        return {"probe": name, "state": "no", "detail": ""}
    if detail.endswith(IDLE):
        return {"probe": name, "state": "idle", "detail": detail}
    return {"probe": name, "state": "yes", "detail": detail}


def _import(name: str) -> Any:
    return importlib.import_module(name)


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _version(name: str) -> str:
    return importlib.metadata.version(name) if _installed(name) else "unknown version"


def _has_gpu() -> bool:
    return bool(_import("torch").cuda.is_available())


def _nvidia_driver() -> str | None:
    try:
        with open("/proc/driver/nvidia/version") as file:
            words = file.readline().split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit()), "of unknown version")


def main() -> None:
    """Run the probes that the arguments name. What libraries print is thrown away."""
    report = os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    for name in sys.argv[1:]:
        report.write(json.dumps({"begin": name}) + "\n")
        report.write(json.dumps(run_probe(name)) + "\n")
    report.flush()
    os._exit(0)  # a library's own clean-up may hang or crash


if __name__ == "__main__":
    main()
