"""The machine and the software of a run: enough to say whether two runs may be compared, nothing
that identifies the machine."""

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


CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the bytes that this container may use, of version 2 and of version 1."""


def record(device: str = "cpu") -> dict:
    """The environment as plain data, the content of a run's env.json."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": bf16_products(),
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
    names = _lines("/proc/cpuinfo", "model name")
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> dict:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "--short=12", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "-uno")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": None}


@cache
def needs_fp32_products() -> tuple[bool, str]:
    """Whether bf16 products should be formed in fp32 on this CPU, and why."""
    lines = _lines("/proc/cpuinfo", "flags")
    if not lines:
        return True, "the CPU's features are not known"
    units = ", ".join(sorted({"avx512_bf16", "amx_bf16"} & set(lines[0].split())))
    capability = torch.backends.cpu.get_cpu_capability()
    if units and not capability.startswith("AVX512"):
        # torch was built for less, or told to use less; its attention then fails in bf16
        return True, f"the CPU has {units}, but torch uses {capability} only"
    if units:
        return False, f"the CPU has {units}"
    return True, f"the CPU ({capability}) has neither avx512_bf16 nor amx_bf16"


def bf16_products() -> str:
    """How this CPU forms bf16 products, and why."""
    in_fp32, why = needs_fp32_products()
    return f"formed in fp32 and rounded: {why}" if in_fp32 else f"native: {why}"


def _lines(path: str, name: str) -> list[str]:
    """What stands behind the colon in the lines `name: ...` of a file under /proc; none where there
    is no such file."""
    try:
        text = Path(path).read_text()
    except OSError:
        return []
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    return [value.strip() for key, value in pairs if key.strip() == name]


def host_memory() -> tuple[int, int, int]:
    """Bytes of host memory: in all, available now, and the most that this container may use, which
    is all where it has no limit."""
    total, free = (
        int(_lines("/proc/meminfo", name)[0].split()[0]) * 1024
        for name in ("MemTotal", "MemAvailable")
    )
    texts = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).exists()]
    return total, free, min([total, *(int(text) for text in texts if text.isdigit())])


def library():
    """The NVML module, initialised. Raises: ImportError or NVMLError, with the cause."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def driver() -> str:
    """The version of the NVIDIA driver, or why it is not known. Never raises."""
    try:
        return _text(library().nvmlSystemGetDriverVersion())
    except Exception as error:
        return f"N/A: {type(error).__name__}: {error}"


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def describe(call: Mapping) -> dict:
    """The machine as far as the check on a GPU needs it. `call`: `device`."""
    device = call["device"]
    _, free, limit = host_memory()
    description = {
        "device": device,
        "versions": record(device)["versions"],
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "host_bytes": min(free, limit),
        "name": "CPU",
        "total_bytes": None,
        "context_bytes": None,
        "compute_capability": None,
        "driver": None,
        "cuda": torch.version.cuda,
    }
    if device.startswith("cuda"):
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        properties = torch.cuda.get_device_properties(device)
        description |= {
            "name": properties.name,
            "total_bytes": properties.total_memory,
            "driver": driver(),
            "context_bytes": total_bytes - free_bytes - torch.cuda.memory_reserved(device),
            "compute_capability": list(torch.cuda.get_device_capability(device)),
        }
    return description
