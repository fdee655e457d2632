"""What this machine, or the part of it that a container or a scheduler gives this process, has: memory, CPUs, versions.

The one place that asks. Importing it imports the standard library only.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "transformers", "datasets", "sentence-transformers", "scikit-learn", "pyarrow", "numpy", "peft")
"""Those that decide results."""
GIB = 2.0**30

_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 50  # control groups of version 1 write "no limit" as a huge number


# ------------------------------------------------------------------------------------------------------------- memory


def total_memory(device: torch.device | None = None) -> int:
    """Bytes that this process can get at most: the machine's, or what its control groups allow; or a CUDA device's."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[1])
    return min(_physical_memory(), memory_limit() or _NO_LIMIT)


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that this process can still take: the smaller of what the machine has and what its control groups leave.

    Of a CUDA device, what its driver says is free. Where a system does not say, half of the memory there is.
    """
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free = min(_meminfo("MemAvailable") or _physical_memory() // 2, *_left_by_groups(), _NO_LIMIT)
    return max(free, 0)


def memory_limit() -> int | None:
    """The bytes that the control groups of this process, of version 1 or 2 and nested, allow; None: all."""
    least = min((limit for _, limit in _memory_groups()), default=_NO_LIMIT)
    return None if least >= _NO_LIMIT else least


def _physical_memory() -> int:
    with suppress(ValueError, OSError, AttributeError):  # Windows has no sysconf
        return _meminfo("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8 << 30


def _meminfo(name: str) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in (_PROC / "meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def _memory_groups() -> Iterator[tuple[Path, int]]:
    """Folders of the control groups that limit memory, and their limits in bytes."""
    for folder in group_folders("memory"):
        for file in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # "max" is no number
                yield folder, int((folder / file).read_text())


def _left_by_groups() -> Iterator[int]:
    for folder, limit in _memory_groups():
        for used, reclaimable in (
            ("memory.current", "inactive_file"),
            ("memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):
                taken = int((folder / used).read_text())
                with suppress(OSError, ValueError):  # files that were read are dropped for whoever asks for memory
                    lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    taken -= next((int(value) for name, value in lines if name == reclaimable), 0)
                yield limit - max(taken, 0)
                break
        else:
            yield limit


def group_folders(controller: str) -> Iterator[Path]:
    """Folders of this process's control groups that may limit what ``controller`` counts, innermost first.

    Inside a container the path may be one of the host's, of which only the mounted end is there: every folder from the
    path's up to the mount is tried.
    """
    with suppress(OSError, ValueError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            for mounted in {_GROUPS / controller, _GROUPS / controllers} if controllers else {_GROUPS}:
                folder = mounted / group.lstrip("/")
                yield folder
                for parent in folder.parents:
                    if parent == mounted.parent:
                        break
                    yield parent


def reset_peaks(device: torch.device | None = None) -> str:
    """Forget peaks of memory from before; returns since when the resident set's peak counts."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to the present resident set
        # Some sandboxes take the write and do nothing. The kernel's counters are 16 MiB inexact at worst.
        if _status("VmHWM") <= _status("VmRSS") + 2**24:
            return "start of training"
    return "start of the process"


def peak_memory(device: torch.device | None = None) -> list[int]:
    """Bytes: peak resident set of this process, peak allocated and reserved on the device (0 where it is no GPU)."""
    if device is not None and device.type == "cuda":
        import torch

        return [_peak_resident(), torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]
    return [_peak_resident(), 0, 0]


def _peak_resident() -> int:
    with suppress(OSError):
        return _status("VmHWM")
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int:
    """A line of Linux's account of this process, in bytes; an OSError elsewhere."""
    with open("/proc/self/status", "rb") as lines:
        for line in lines:
            if line.startswith(f"{name}:".encode()):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


# --------------------------------------------------------------------------------------------------------------- CPUs


def usable_cpus() -> int:
    """How many CPUs this process may keep busy: those it may run on, or fewer where a control group gives less time."""
    # macOS and Windows have no affinity.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota / period) for quota, period in _cpu_quotas())]))


def _cpu_quotas() -> Iterator[tuple[int, int]]:
    """Microseconds of CPU time that control groups give in a period, and that period."""
    for folder in group_folders("cpu"):
        with suppress(OSError, ValueError):  # "max 100000" is no limit
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            yield quota, period
        with suppress(OSError, ValueError):
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:
                yield quota, period


def load() -> float:
    """How many threads of the whole machine ran or waited for a CPU, on average over the last minute; 0: not known."""
    with suppress(OSError, AttributeError):  # Windows has none
        return os.getloadavg()[0]
    return 0.0


def limit_threads() -> int:
    """Let numeric libraries take no more threads than there are usable CPUs; returns that number.

    OpenMP counts the machine's CPUs, not a control group's share, and threads that wait for each other on too few CPUs
    are many times slower than one. And it lets threads wait by spinning, for milliseconds: on CPUs that others use as
    well they keep from work those that they wait for. A thousand turns, some microseconds, cost nothing on CPUs of
    one's own (2 threads, products of 0.4 ms: 0.22 s either way), and beside 4 busy processes 1.0 s instead of 4. What
    a user sets in ``OMP_NUM_THREADS``, ``OMP_WAIT_POLICY`` or ``GOMP_SPINCOUNT`` stands. To be called before NumPy and
    PyTorch are imported; a PyTorch that is loaded already is told the number.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    count = usable_cpus()
    if "OMP_NUM_THREADS" not in os.environ and count < (os.cpu_count() or 1):
        os.environ["OMP_NUM_THREADS"] = str(count)
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(min(count, torch.get_num_threads()))
    return count


def name_user() -> None:
    """Call a user whom the system has no name for by the number: some releases of PyTorch ask as they are imported."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container may run as any number
        os.environ.setdefault("LOGNAME", str(os.getuid()))


def cpu_name() -> str:
    """What the processor calls itself."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


# -------------------------------------------------------------------------------------------------- what a result says


def versions() -> dict[str, str]:
    """Of Python and of those of ``LIBRARIES`` that are installed."""
    installed = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def machine_facts() -> dict[str, Any]:
    """System, processor, usable CPUs, bytes of memory and names of the GPUs, for the record of a run. Imports torch."""
    import torch

    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpus": usable_cpus(),
        "memory": total_memory(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
