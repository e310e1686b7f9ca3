"""What a cell of `gpu_check` is made of: random weights and tokens of a published shape, and the machine it runs on."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from .. import machine as environment
from . import BaichuanForCausalLM, ModelSpec

DRAWN = 1 << 22
"""Random numbers that weights are made of, over and over: drawing seven billion takes a minute."""


def random_model(spec: ModelSpec) -> BaichuanForCausalLM:
    """The model on the host, in the type it is published in, with weights of the usual spread; norms are ones."""
    with torch.device("meta"):
        model = BaichuanForCausalLM(spec.config)
    model.to(spec.config.dtype or torch.float32)
    model.to_empty(device="cpu")
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    with torch.no_grad():
        for parameter in model.parameters():
            _fill(parameter, drawn.to(parameter.dtype))
    if model.model.rotary_emb is not None:
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.frequencies()
    return model


def _fill(parameter: torch.Tensor, drawn: torch.Tensor) -> None:
    if parameter.dim() < 2:
        parameter.fill_(1.0)
        return
    flat, whole = parameter.view(-1), parameter.numel() // DRAWN * DRAWN
    flat[:whole].view(-1, DRAWN).copy_(drawn)
    flat[whole:].copy_(drawn[: parameter.numel() - whole])


def batches(spec: ModelSpec, seq: int, rows: int, seed: int, count: int = 1) -> list[dict]:
    """`count` micro-batches of full rows on the host, every token labelled; no padding, so no mask, as forecast."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, spec.config.vocab_size, (rows, seq), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "labels": one.clone()} for one in ids]


def describe(asked: Mapping) -> dict:
    """The machine, as far as figures need it: card, driver, versions."""
    device = asked["device"]
    found = {"device": device, "versions": environment.record(device)["versions"], "python": sys.version.split()[0],
             "cores": os.cpu_count(), "host_bytes": _host_bytes(), "name": "CPU", "total_bytes": None, "context_bytes": None,
             "compute_capability": None, "driver": None, "cuda": torch.version.cuda}
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        told = torch.cuda.get_device_properties(device)
        found |= {"name": told.name, "total_bytes": told.total_memory, "driver": _driver(),
                  "context_bytes": total - free - torch.cuda.memory_reserved(device),
                  "compute_capability": list(torch.cuda.get_device_capability(device))}
    return found


def _host_bytes() -> int:
    """What a process may take: free host memory, or a container's share of it where that is less."""
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
