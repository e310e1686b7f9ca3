"""What a run was made with: enough to say whether two runs may be compared, nothing that identifies
the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

from .files import ROOT

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "pandas",
    "plotly",
    "papermill",
    "sentencepiece",
    "nvidia-ml-py",
)


def record(device: str = "cpu") -> dict:
    """The environment as plain data, the contents of a run's env.json."""
    in_fp32, why = needed()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": f"formed in fp32 and rounded: {why}" if in_fp32 else f"native: {why}",
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": _device(device),
        "versions": {name: version(name) for name in PACKAGES},
        "allocator": (
            os.environ.get("PYTORCH_ALLOC_CONF", "")
            or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
        ),
        **_commit(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _device(device: str) -> dict:
    if device.startswith("cuda") and not torch.cuda.is_available():
        return {"kind": "cuda", "name": "none that torch sees"}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return {
            "kind": "cuda",
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": [properties.major, properties.minor],
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
    return {"kind": "cpu", "name": _cpu_name()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def version(package: str) -> str:
    """Of an installed package, or that it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> dict:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "--short=12", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "-uno")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": None}


@cache
def needed() -> tuple[bool, str]:
    """Whether this CPU should form bf16 products in fp32, and why."""
    try:
        flags = set(
            Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
        )
    except (OSError, IndexError):
        return True, "the CPU's features are not known"
    units, used = (
        sorted(flags & {"avx512_bf16", "amx_bf16"}),
        torch.backends.cpu.get_cpu_capability(),
    )
    if units and not used.startswith(
        "AVX512"
    ):  # torch was built or told to use less, and its attention then fails in bf16
        return True, f"the CPU has {', '.join(units)}, but torch uses {used} only"
    if units:
        return False, f"the CPU has {', '.join(units)}"
    return True, f"the CPU ({used}) has neither avx512_bf16 nor amx_bf16"


def library():
    """The NVML module, initialised. Raises: ImportError or NVMLError, which is what there is to
    say."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def driver() -> str:
    """The driver's version, or why there is none to tell. Never raises."""
    try:
        return _text(library().nvmlSystemGetDriverVersion())
    except Exception as error:
        return f"N/A: {type(error).__name__}: {error}"


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def describe(asked: Mapping) -> dict:
    """The machine, as far as figures need it: card, driver, versions."""
    device = asked["device"]
    found = {
        "device": device,
        "versions": record(device)["versions"],
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "host_bytes": _host_bytes(),
        "name": "CPU",
        "total_bytes": None,
        "context_bytes": None,
        "compute_capability": None,
        "driver": None,
        "cuda": torch.version.cuda,
    }
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        told = torch.cuda.get_device_properties(device)
        found |= {
            "name": told.name,
            "total_bytes": told.total_memory,
            "driver": _driver(),
            "context_bytes": total - free - torch.cuda.memory_reserved(device),
            "compute_capability": list(torch.cuda.get_device_capability(device)),
        }
    return found


def _host_bytes() -> int:
    """What a process may take: free host memory, or a container's share of it where that is
    less."""
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(told["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    share = limit.read_text().strip() if limit.exists() else "max"
    return free if share == "max" else min(free, int(share))


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        said = pynvml.nvmlSystemGetDriverVersion()
    except Exception as error:
        return f"N/A ({type(error).__name__})"
    return said if isinstance(said, str) else said.decode()
