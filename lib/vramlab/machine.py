"""What a run was made with: enough to say whether two runs may be compared, nothing that identifies the machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from .capture.nvml import driver
from .paths import ROOT
from .regimes.place.place import local
from .regimes.weights import bf16_on_cpu as rounding

PACKAGES = ("torch", "transformers", "peft", "pandas", "plotly", "papermill", "sentencepiece", "nvidia-ml-py")


def record(device: str = "cpu") -> dict:
    """The environment as plain data, the contents of a run's env.json."""
    needed, why = rounding.needed()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": f"formed in fp32 and rounded: {why}" if needed else f"native: {why}",
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": _device(device),
        "versions": {name: version(name) for name in PACKAGES},
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF", "") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        **_commit(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _device(device: str) -> dict:
    if device.startswith("cuda") and not torch.cuda.is_available():
        return {"kind": "cuda", "name": "none that torch sees"}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return {"kind": "cuda", "name": properties.name, "memory_bytes": properties.total_memory,
                "compute_capability": [properties.major, properties.minor], "cuda": torch.version.cuda, "driver": driver()}
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
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": None}


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of every parameter's and buffer's bytes, by name: equal for equal weights, to the bit. Of shards, this rank's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(local(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
