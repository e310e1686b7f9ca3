"""What this machine can measure, what it cannot, why, and what would help. It changes no setting
and identifies nothing; for a moment it may hold 256 MiB of a card, see `capture.nvml_process`, and
it resets its own process's high-water mark.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import distributed

from .. import machine as environment
from ..capture import nvml
from ..capture.peak_rss import peak_method

GIB = 2**30
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Finding:
    """`can`: whether it can be had here; `found`: what there is, or why not; `way_out`: what would
    help."""

    topic: str
    can: bool
    found: str
    way_out: str = ""


def examine() -> list[Finding]:
    """Every topic. A topic whose examination itself breaks is one that this machine cannot do, with
    the error as the reason."""
    reader = nvml.find("cuda")
    topics: dict[str, Callable[[], Finding]] = {
        "torch": _torch,
        "forecast": _forecast,
        "cuda": _cuda,
        "bf16": _bf16,
        "allocator history": _history,
        "nvml": lambda: _nvml(reader),
        "process memory on the card": lambda: _of_reader(reader, "process_bytes"),
        "energy": lambda: _energy(reader),
        "host memory": _memory,
        "process peak": _process_peak,
        "ranks": _ranks,
        "browser tests": _browser,
        "disk": _disk,
    }
    return [_asked(topic, ask) for topic, ask in topics.items()]


def words(findings: list[Finding]) -> str:
    """One line a topic; the way out below those that cannot be had."""
    lines = []
    for finding in findings:
        lines.append(f"{'yes' if finding.can else 'no':<4}{finding.topic:<27}{finding.found}")
        if finding.way_out and not finding.can:
            lines.append(f"{'':<31}-> {finding.way_out}")
    return "\n".join(lines)


def to_json(findings: list[Finding]) -> dict:
    return {"findings": [asdict(finding) for finding in findings]}


def _asked(topic: str, ask: Callable[[], Finding]) -> Finding:
    try:
        return ask()
    except Exception as error:
        return Finding(topic, False, f"{type(error).__name__}: {error}")


def _torch() -> Finding:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = (
        f"{torch.__version__} ({build}), Python {platform.python_version()}, transformers"
        f" {environment.version('transformers')}"
    )
    return Finding(
        "torch",
        (2, 11) <= version < (2, 14),
        found,
        "torch 2.11 to 2.13 is what this was tested with",
    )


def _forecast() -> Finding:
    from ..forecast.virtual_gpu import virtual_gpu

    with virtual_gpu() as gpu:
        held = torch.empty(3, 5, device=gpu.device)
        return Finding(
            "forecast",
            held.untyped_storage().nbytes() == 60,
            f"on a {gpu.label}: `vramlab predict`",
        )


def _cuda() -> Finding:
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        told = ", ".join(
            f"{card.name} ({card.total_memory / GIB:.1f} GiB, {card.major}.{card.minor})"
            for card in cards
        )
        return Finding("cuda", True, f"CUDA {torch.version.cuda}: {told}")
    if not torch.version.cuda:
        return Finding(
            "cuda",
            False,
            "this torch is built for the CPU only",
            "install torch from PyTorch's index of CUDA wheels",
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return Finding(
            "cuda", False, "CUDA_VISIBLE_DEVICES hides every card", "unset it, or name a card"
        )
    return Finding(
        "cuda",
        False,
        "torch finds no card",
        "a driver as new as this torch's CUDA; in a container, --gpus all",
    )


def _bf16() -> Finding:
    if torch.cuda.is_available():
        can = torch.cuda.is_bf16_supported(including_emulation=False)
        return Finding(
            "bf16",
            can,
            "the card's own" if can else "the card emulates it",
            "compute capability 8.0; or fp32 rows",
        )
    needed, why = environment.needed()
    return Finding(
        "bf16",
        not needed,
        f"formed in fp32 and rounded: {why}" if needed else f"native: {why}",
        "the same numerics; speeds of bf16 rows are not bf16's",
    )


def _history() -> Finding:
    missing = [
        name
        for name in ("_record_memory_history", "_snapshot", "_set_memory_metadata")
        if not hasattr(torch.cuda.memory, name)
    ]
    if not torch.cuda.is_available():
        return Finding(
            "allocator history",
            False,
            "it is CUDA's; on a CPU the event meter sees every storage",
            "a GPU",
        )
    return Finding(
        "allocator history",
        not missing,
        f"torch lacks {', '.join(missing)}" if missing else "with phases",
        "torch 2.11 to 2.13",
    )


def _nvml(reader: nvml.Reader) -> Finding:
    if reader.card:
        lacks = [
            said for said in reader.notes if not said.startswith(("process_bytes", "energy_j"))
        ]
        return Finding("nvml", True, "; ".join([f"{reader.card}, driver {reader.driver}", *lacks]))
    try:
        count = nvml.library().nvmlDeviceGetCount()
    except Exception as error:
        return Finding(
            "nvml",
            False,
            f"{type(error).__name__}: {error}",
            "NVIDIA's driver; in a container, its `utility` part",
        )
    return Finding(
        "nvml",
        False,
        f"cards that the driver has: {count}; {'; '.join(reader.notes)}",
        "a torch that sees the card",
    )


def _of_reader(reader: nvml.Reader, name: str) -> Finding:
    said = next((said for said in reader.notes if said.startswith(name)), "") or (
        "" if reader.card else "no card is read"
    )
    return Finding(
        "process memory on the card",
        not said,
        said or reader.process_method,
        "run outside a container, or with --pid host; what all processes hold is told either way",
    )


def _energy(reader: nvml.Reader) -> Finding:
    now = reader.sample()
    if now["energy_j"] is not None:
        return Finding("energy", True, "the card's counter, for windows of 2 s and more")
    if now["power_w"] is not None:
        return Finding("energy", True, "power, integrated; this card has no counter")
    said = [said for said in reader.notes if said.startswith(("energy_j", "power_w"))]
    return Finding(
        "energy", False, "; ".join(said) or "no card is read", "a card since Volta, whole"
    )


def _memory() -> Finding:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limits = [
        int(text)
        for path in CGROUP_LIMITS
        if Path(path).exists() and (text := Path(path).read_text().strip()).isdigit()
    ]
    capped = [limit for limit in limits if limit < total]
    told = f", of which this container may use {capped[0] / GIB:.1f}" if capped else ""
    return Finding(
        "host memory",
        True,
        f"{total / GIB:.1f} GiB{told}, {free / GIB:.1f} available, {os.cpu_count()} cores",
    )


def _process_peak() -> Finding:
    glibc = platform.libc_ver()[0] == "glibc"
    allocator = (
        ""
        if glibc
        else "; this is not glibc, whose settings make freed memory return: peaks read high"
    )
    return Finding("process peak", glibc, peak_method() + allocator, "Linux with glibc")


def _ranks() -> Finding:
    if not distributed.is_available():
        return Finding(
            "ranks",
            False,
            "torch.distributed is not in this torch",
            "a torch with it; forecasts need none",
        )
    backends = [name for name in ("gloo", "nccl") if getattr(distributed, f"is_{name}_available")()]
    launcher = shutil.which("torchrun") or importlib.util.find_spec("torch.distributed.run")
    return Finding(
        "ranks",
        bool(launcher and backends),
        f"python -m torch.distributed.run, with {', '.join(backends)}",
    )


def _browser() -> Finding:
    chromium = browser()
    lacks = [
        name
        for name, there in (
            ("Chromium", chromium),
            ("playwright", importlib.util.find_spec("playwright")),
        )
        if not there
    ]
    return Finding(
        "browser tests",
        not lacks,
        f"no {' and no '.join(lacks)}" if lacks else "Chromium, driven by playwright",
        "the package chromium, and `pip install playwright`; only tests of the report need them",
    )


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    return Finding(
        "disk",
        free > GIB,
        f"{free / GIB:.1f} GiB free here",
        "a sweep's run folders take a few MB each",
    )


def browser() -> str | None:
    """Chromium's path, by whichever name it is here."""
    return next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
