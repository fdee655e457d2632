"""``codeact doctor``: what is here and works, and what to install for the rest.

It imports nothing that may be broken: libraries are tried in other processes (`codeact.doctor.probes`).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from codeact import __version__
from codeact.base import machine

SECONDS = 120.0  # fresh from a slow disk, the libraries take over a minute; from memory, five seconds
_OLDEST_PYTHON = (3, 11)
# Two processes, as most of the time is that of one core; what imports the same libraries is in the same one.
_GROUPS = (
    ("native", "torch", "gpu", "triton", "flash-attn", "cuml", "vllm", "bitsandbytes", "deepspeed", "evalplus"),
    ("required", "transformers", "sentence-transformers", "accelerate", "peft", "matplotlib", "gguf"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line. ``state``: "yes", "no", "idle" (installed, of no use here), "broken" (``detail`` says why), "unknown".

    ``vital``: codeact cannot run where this is broken. Where a stage's libraries are not installed, it packs.
    """

    name: str
    state: str
    purpose: str
    detail: str = ""
    command: str = ""
    vital: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Library:
    name: str
    probe: str
    purpose: str
    command: str
    gpu: bool = False  # of use on a GPU only
    vital: bool = False


def _extra(name: str) -> str:
    return f'pip install "codeact[{name}]"'


_REINSTALL = "pip install --force-reinstall --no-deps codeact"
_LIBRARIES = {
    library.probe: library
    for library in (
        _Library(
            name="native module", probe="native", purpose="packing, NLL on the CPU", command=_REINSTALL, vital=True
        ),
        _Library(
            name="libraries", probe="required", purpose="the command line", command="pip install codeact", vital=True
        ),
        _Library(name="PyTorch", probe="torch", purpose="all stages", command=_extra("score"), vital=True),
        _Library(name="transformers", probe="transformers", purpose="all stages", command=_extra("score"), vital=True),
        _Library(
            name="sentence-transformers",
            probe="sentence-transformers",
            purpose="embed, select",
            command=_extra("select"),
        ),
        _Library(
            name="GPU",
            probe="gpu",
            purpose="speed",
            command="reinstall torch as https://pytorch.org/get-started/locally says for your driver",
        ),
        _Library(name="triton", probe="triton", purpose="NLL on the GPU", command=_extra("gpu"), gpu=True),
        _Library(
            name="flash-attn",
            probe="flash-attn",
            purpose="attention on the GPU",
            command="pip install flash-attn --no-build-isolation",
            gpu=True,
        ),
        _Library(name="cuml, cupy", probe="cuml", purpose="clustering on the GPU", command=_extra("gpu"), gpu=True),
        _Library(name="accelerate", probe="accelerate", purpose="train", command=_extra("train")),
        _Library(name="peft", probe="peft", purpose="LoRA", command=_extra("train")),
        _Library(name="bitsandbytes", probe="bitsandbytes", purpose="QLoRA (--quantize)", command=_extra("train")),
        _Library(name="deepspeed", probe="deepspeed", purpose="train --deepspeed", command=_extra("deepspeed")),
        _Library(name="vllm", probe="vllm", purpose="generate --backend vllm", command=_extra("vllm"), gpu=True),
        _Library(name="evalplus", probe="evalplus", purpose="verdicts side by side", command=_extra("evalplus")),
        _Library(name="matplotlib", probe="matplotlib", purpose="pictures", command=_extra("report")),
        _Library(name="gguf", probe="gguf", purpose="demo", command=_extra("demo")),
    )
}


def examine(seconds: float = SECONDS) -> list[Finding]:
    """Look at everything; no library that crashes or hangs (for longer than ``seconds``) ends it."""
    with ThreadPoolExecutor(len(_GROUPS)) as pool:
        running = [pool.submit(_run_probes, group, seconds) for group in _GROUPS]
        own = {
            finding.name: finding
            for finding in (_python(), _problems(), _sandbox(), _memory(), _load(), _disk(), _hub())
        }
        results = {name: result for future in running for name, result in future.result().items()}
    has_gpu = results["gpu"]["state"] == "yes"
    found = {probe: _finding(library, results[probe], has_gpu) for probe, library in _LIBRARIES.items()}
    last = [own[name] for name in ("problems", "sandbox", "memory", "load", "disk", "model hub")]
    after = list(found)[list(found).index("matplotlib") :]
    before = [finding for probe, finding in found.items() if probe not in after]
    return [own["Python"], *before, *last[:2], *(found[probe] for probe in after), *last[2:]]


def _finding(library: _Library, result: dict[str, str], has_gpu: bool) -> Finding:
    state, detail = result["state"], result["detail"]
    if library.probe == "native" and state == "no":
        state, detail = "broken", "not installed"
    command = library.command if state in ("no", "broken") else ""
    if state == "no" and not has_gpu:
        if library.probe == "gpu":
            detail, command = "none; everything runs on the CPU", ""
        elif library.gpu:
            detail = "of use with a GPU only"
    return Finding(
        name=library.name, state=state, purpose=library.purpose, detail=detail, command=command, vital=library.vital
    )


def _run_probes(names: tuple[str, ...], seconds: float) -> dict[str, dict[str, str]]:
    """Run probes in a process; where one kills it, go on behind that one in a new process."""
    results: dict[str, dict[str, str]] = {}
    left = list(names)
    until = time.monotonic() + seconds
    while left:
        lines, ended = _run_process(left, until - time.monotonic())
        begun = None
        for line in lines:
            if "begin" in line:
                begun = line["begin"]
            else:
                results[line["probe"]] = line
        left = [name for name in left if name not in results]
        if left:
            crashed = begun if begun in left else left[0]
            # Slow is not broken: the first import after an installation, from a busy disk, may take minutes.
            late = time.monotonic() >= until
            results[crashed] = {"probe": crashed, "state": "unknown" if late else "broken", "detail": ended}
            left.remove(crashed)
    return results


def _run_process(names: list[str], seconds: float) -> tuple[list[dict[str, str]], str]:
    """Return the lines that a process of probes wrote, and how it ended."""
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    if seconds <= 0:
        return [], "not tried, as what came before took too long; try again"
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "codeact.doctor.probes", *names],  # -P: not what lies in the current folder
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **_where_codeact_is(), **quiet},
            start_new_session=True,
        )
    except OSError as error:
        return [], f"cannot start Python: {error}"
    late = False
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
        process.kill()
        out, err = process.communicate()
    lines = []
    for line in out.splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    if late:
        how = f"no answer in {seconds:.0f} s; try again"
    elif process.returncode < 0:
        how = f"crashed with signal {-process.returncode}"
    else:
        how = (err.strip().splitlines() or [f"ended Python with exit code {process.returncode}"])[-1][:200]
    return lines, how


def _where_codeact_is() -> dict[str, str]:
    """Let the other process find this codeact, however this one found it."""
    home = str(Path(__file__).resolve().parents[2])
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([home, others] if others else [home])}


def _python() -> Finding:
    good = sys.version_info >= _OLDEST_PYTHON
    detail = f"{platform.python_version()}, {sys.executable}, {platform.system()} {platform.machine()}"
    return Finding(
        name="Python",
        state="yes" if good else "broken",
        purpose="all stages",
        detail=detail,
        command="" if good else "install Python 3.11 or newer",
        vital=True,
    )


def _problems() -> Finding:
    from codeact.evaluation.problems import DATASETS, downloaded_file, find_in_folder

    purpose, command = "generate, evaluate", "downloaded at the first use; or set CODEACT_EVAL_DATA=FOLDER"
    folder = os.environ.get("CODEACT_EVAL_DATA")
    if folder:
        found = {dataset: find_in_folder(dataset, folder) for dataset in DATASETS}
        here = [path.name for path in found.values() if path]
        if not here:
            detail = f"CODEACT_EVAL_DATA={folder} holds none"
            return Finding(name="problems", state="broken", purpose=purpose, detail=detail, command=command)
        missing = [f"no {dataset}" for dataset, path in found.items() if not path]
        return Finding(name="problems", state="yes", purpose=purpose, detail=", ".join([*here, *missing]))
    here = [path.name for path in map(downloaded_file, DATASETS) if path.is_file()]
    if here:
        return Finding(name="problems", state="yes", purpose=purpose, detail=", ".join(here))
    return Finding(name="problems", state="no", purpose=purpose, command=command)


def _sandbox() -> Finding:
    purpose = "evaluate"
    command = "apt-get install bubblewrap" if shutil.which("apt-get") else "install bubblewrap"
    code = "from codeact.evaluation.sandbox.sandbox import Limits, Sandbox\n"
    code += "print(Sandbox(Limits(), unsafe=True).why_not or '')"
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **_where_codeact_is()},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name="sandbox", state="broken", purpose=purpose, detail=str(error)[:200], command=command)
    reason = result.stdout.strip() if result.returncode == 0 else (result.stderr.strip().splitlines() or ["?"])[-1]
    if not reason:
        return Finding(name="sandbox", state="yes", purpose=purpose, detail="bubblewrap isolates here (tried)")
    if shutil.which("bwrap") is None:
        if sys.platform != "linux":
            command = "none on this system: evaluate on Linux"
        return Finding(name="sandbox", state="no", purpose=purpose, command=command)
    command = "allow user namespaces, or evaluate on another machine (README, Evaluate)"
    return Finding(name="sandbox", state="broken", purpose=purpose, detail=reason[:200], command=command)


def _memory() -> Finding:
    details = [f"{machine.free_memory() / 2**30:.1f} of {machine.total_memory() / 2**30:.1f} GiB free"]
    if (limit := machine.memory_limit()) is not None:
        details.append(f"a control group limits it to {limit / 2**30:.1f} GiB")
    details.append(f"{machine.usable_cpus()} of {os.cpu_count()} cores may be used")
    return Finding(name="memory", state="yes", purpose="and cores", detail="; ".join(details))


def _load() -> Finding:
    load, cores = machine.load(), machine.usable_cpus()
    detail = f"{load:.1f} on {cores} cores"
    if load > cores:
        detail += ": above them, so threads wait for each other; end other jobs, or set OMP_NUM_THREADS=1"
    return Finding(name="load", state="yes", purpose="now", detail=detail)


def _disk() -> Finding:
    details = []
    for what, path in (("here", Path.cwd()), ("hub cache", _hub_cache()), ("temporary", Path(_temporary()))):
        place = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
        with suppress(OSError):
            details.append(f"{shutil.disk_usage(place).free / 2**30:.0f} GiB {what}")
    return Finding(name="disk", state="yes", purpose="free", detail=", ".join(details))


def _temporary() -> str:
    return os.environ.get("TMPDIR") or "/tmp"


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")  # pathlib raises where there is none
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _hub() -> Finding:
    cache = _hub_cache()
    count = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    mode = "HF_HUB_OFFLINE is set: only what is cached" if offline else "online (not tried)"
    return Finding(name="model hub", state="yes", purpose="by name", detail=f"{mode}; {count} models in {cache}")


def table(findings: list[Finding]) -> str:
    """The findings, a line each: state, name, purpose, and what was found or the command that mends it."""
    names, purposes = (max(len(getattr(f, field)) for f in findings) for field in ("name", "purpose"))
    lines = [f"codeact {__version__}, {Path(__file__).resolve().parents[1]}", ""]
    for finding in findings:
        told = finding.detail
        if finding.command:
            told = f"{told}: {finding.command}" if told else finding.command
        lines.append(f"{finding.state:7}  {finding.name:{names}}  {finding.purpose:{purposes}}  {told}".rstrip())
    lines += ["", conclusion(findings)]
    return "\n".join(lines)


def conclusion(findings: list[Finding]) -> str:
    """One sentence over all."""
    if vital := [finding.name for finding in findings if finding.vital and finding.state == "broken"]:
        return f"codeact cannot run: mend {', '.join(vital)}"
    broken = [finding.name for finding in findings if finding.state == "broken"]
    works = "codeact works here; yes: works, idle: installed, but of no use on this machine"
    return f"{works}; broken: {', '.join(broken)}" if broken else works


def run(as_json: bool = False) -> int:
    """Print what is found; returns the exit code: 1 where codeact itself cannot run, else 0."""
    findings = examine()
    healthy = all(finding.state != "broken" for finding in findings if finding.vital)
    if as_json:
        where = str(Path(__file__).resolve().parents[1])
        report = {"codeact": __version__, "folder": where, "works": healthy, "findings": [*map(asdict, findings)]}
        print(json.dumps(report, indent=1))
    else:
        print(table(findings))
    return 0 if healthy else 1
