"""What this machine can measure, what it cannot, why, and what would help: `vramlab doctor`.

It changes no setting and identifies nothing. For a moment it may hold 256 MiB of a card, see
`capture.nvml_process`, and it resets the high-water mark of its own process.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass

import torch
from torch import distributed

from .. import machine
from ..capture import nvml
from ..capture.peak_rss import peak_method
from ..forecast.virtual_gpu import virtual_gpu

GIB = 2**30
SUPPORTED_TORCH = "torch 2.11 to 2.13"
Answer = tuple[bool, str, str]
"""Whether the machine can do it; what it has, or why it cannot; what would help."""


@dataclass(frozen=True)
class Finding:
    """One topic, with its `Answer`."""

    topic: str
    can: bool
    detail: str
    way_out: str = ""


def examine() -> list[Finding]:
    """Every topic. A topic whose examination itself fails is one that this machine cannot do, with
    the error as the reason."""
    reader = nvml.find("cuda")
    topics = {
        "torch": _torch,
        "forecast": _forecast,
        "cuda": _cuda,
        "bf16": _bf16,
        "allocator history": _history,
        "nvml": lambda: _nvml(reader),
        "process memory on the card": lambda: _process_memory(reader),
        "energy": lambda: _energy(reader),
        "host memory": _memory,
        "process peak": _process_peak,
        "ranks": _ranks,
        "browser tests": _browser,
        "disk": _disk,
    }
    findings = []
    for topic, ask in topics.items():
        try:
            findings.append(Finding(topic, *ask()))
        except Exception as error:
            findings.append(Finding(topic, False, f"{type(error).__name__}: {error}"))
    return findings


def to_text(findings: list[Finding]) -> str:
    """One line for each topic; what would help stands below a topic that the machine cannot do."""
    lines = []
    for finding in findings:
        lines.append(f"{'yes' if finding.can else 'no':<4}{finding.topic:<27}{finding.detail}")
        if finding.way_out and not finding.can:
            lines.append(f"{'':<31}-> {finding.way_out}")
    return "\n".join(lines)


def to_json(findings: list[Finding]) -> dict:
    return {
        "findings": [
            {"topic": each.topic, "can": each.can, "found": each.detail, "way_out": each.way_out}
            for each in findings
        ]
    }


def _torch() -> Answer:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return (
        (2, 11) <= version < (2, 14),
        f"{torch.__version__} ({build}), Python {platform.python_version()}, transformers"
        f" {machine.version('transformers')}",
        f"{SUPPORTED_TORCH} is what this was tested with",
    )


def _forecast() -> Answer:
    with virtual_gpu() as gpu:
        size_bytes = torch.empty(3, 5, device=gpu.device).untyped_storage().nbytes()
        return size_bytes == 60, f"on a {gpu.label}: `vramlab predict`", ""


def _cuda() -> Answer:
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(
            f"{card.name} ({card.total_memory / GIB:.1f} GiB, {card.major}.{card.minor})"
            for card in cards
        )
        return True, f"CUDA {torch.version.cuda}: {names}", ""
    if not torch.version.cuda:
        return (
            False,
            "this torch is built for the CPU only",
            "install torch from PyTorch's index of CUDA wheels",
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False, "CUDA_VISIBLE_DEVICES hides every card", "unset it, or name a card"
    return (
        False,
        "torch finds no card",
        "a driver as new as this torch's CUDA; in a container, --gpus all",
    )


def _bf16() -> Answer:
    if torch.cuda.is_available():
        can = torch.cuda.is_bf16_supported(including_emulation=False)
        return (
            can,
            "the card's own" if can else "the card emulates it",
            "compute capability 8.0; or fp32 rows",
        )
    return (
        not machine.needs_fp32_products()[0],
        machine.bf16_products(),
        "the same numerics; speeds of bf16 rows are not bf16's",
    )


def _history() -> Answer:
    if not torch.cuda.is_available():
        return False, "it is CUDA's; on a CPU the event meter sees every storage", "a GPU"
    missing = [
        name
        for name in ("_record_memory_history", "_snapshot", "_set_memory_metadata")
        if not hasattr(torch.cuda.memory, name)
    ]
    return (
        not missing,
        f"torch lacks {', '.join(missing)}" if missing else "with phases",
        SUPPORTED_TORCH,
    )


def _nvml(reader: nvml.Reader) -> Answer:
    if reader.card:
        missing = [text for text in reader.notes if not text.startswith(("process_b", "energy_j"))]
        return True, "; ".join([f"{reader.card}, driver {reader.driver}", *missing]), ""
    try:
        count = nvml.library().nvmlDeviceGetCount()
    except Exception as error:
        return (
            False,
            f"{type(error).__name__}: {error}",
            "NVIDIA's driver; in a container, its `utility` part",
        )
    return (
        False,
        f"cards that the driver has: {count}; {'; '.join(reader.notes)}",
        "a torch that sees the card",
    )


def _process_memory(reader: nvml.Reader) -> Answer:
    missing = [text for text in reader.notes if text.startswith("process_bytes")]
    missing += [] if reader.card else ["no card is read"]
    return (
        not missing,
        missing[0] if missing else reader.process_method,
        "run outside a container, or with --pid host; the card's total is read either way",
    )


def _energy(reader: nvml.Reader) -> Answer:
    sample = reader.sample()
    if sample["energy_j"] is not None:
        return True, "the card's counter, for windows of 2 s and more", ""
    if sample["power_w"] is not None:
        return True, "power, integrated; this card has no counter", ""
    missing = [text for text in reader.notes if text.startswith(("energy_j", "power_w"))]
    return False, "; ".join(missing) or "no card is read", "a card since Volta, whole"


def _memory() -> Answer:
    total, free, limit = machine.host_memory()
    share = f", of which this container may use {limit / GIB:.1f}" if limit < total else ""
    return (
        True,
        f"{total / GIB:.1f} GiB{share}, {free / GIB:.1f} available, {os.cpu_count()} cores",
        "",
    )


def _process_peak() -> Answer:
    glibc = platform.libc_ver()[0] == "glibc"
    other = "; this is not glibc, whose settings make freed memory return: peaks read high"
    return glibc, peak_method() + ("" if glibc else other), "Linux with glibc"


def _ranks() -> Answer:
    if not distributed.is_available():
        return (
            False,
            "torch.distributed is not in this torch",
            "a torch with it; forecasts need none",
        )
    backends = [name for name in ("gloo", "nccl") if getattr(distributed, f"is_{name}_available")()]
    launcher = shutil.which("torchrun") or importlib.util.find_spec("torch.distributed.run")
    return (
        bool(launcher and backends),
        f"python -m torch.distributed.run, with {', '.join(backends)}",
        "",
    )


def _browser() -> Answer:
    programs = {"Chromium": browser(), "playwright": importlib.util.find_spec("playwright")}
    missing = [f"no {name}" for name, program in programs.items() if not program]
    return (
        not missing,
        " and ".join(missing) or "Chromium, driven by playwright",
        "the package chromium, and `pip install playwright`; only tests of the report need them",
    )


def _disk() -> Answer:
    free = shutil.disk_usage(".").free
    return free > GIB, f"{free / GIB:.1f} GiB free here", "a sweep's run folders take a few MB each"


def browser() -> str | None:
    """The path of Chromium, under any of its names."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)
