"""Which of the processes on a card is this process, and how many bytes it holds there.

NVML gives the host's process numbers, and inside a container nothing translates them: a number
equal to ours may be another process. So our number counts only where this process lives in the
host's own namespace. Elsewhere, a single process on the card is this process, since it has a
context there; among several it is the process whose bytes rise and fall with a block that is held
for a moment. Where that does not decide either, the answer is N/A. Sources: NVIDIA/nvidia-docker
issues 179 and 1483.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

PROBE_BYTES = 256 << 20
HOST_NAMESPACE = 0xEFFFFFFC
"""Number of the first pid namespace of every Linux kernel: PROC_PID_INIT_INO,
include/linux/proc_ns.h."""


@dataclass(frozen=True)
class Own:
    """This process among those on the card: how it was recognized (`method`), or why it was not
    (`reason`)."""

    processes: Callable[[], Mapping[int, int | None]]
    pid: int = 0
    method: str = ""
    reason: str = ""

    def used_bytes(self) -> int | None:
        """Its bytes on the card, context included; None when it is no longer listed."""
        return self.processes().get(self.pid)


def own(nvml, handle, device: str) -> Own:
    """This process on the card of `handle`, on which it has a context. NVML's errors become the
    `reason`."""
    processes = functools.partial(_processes, nvml, handle)
    try:
        listed = processes()
        if listed and set(listed.values()) == {None}:
            reason = "the driver does not tell a process's bytes (Windows WDDM and WSL2 do not)"
            return Own(processes, reason=reason)
        pid, method = _recognize(listed, processes, device)
    except nvml.NVMLError as error:
        return Own(processes, reason=str(error))
    if not pid:
        return Own(processes, reason=f"{method}; used_bytes are everyone's on the card")
    return Own(processes, pid, method)


def _recognize(
    listed: Mapping[int, int | None], processes: Callable, device: str
) -> tuple[int, str]:
    """(pid, how it was recognized), or (0, why it was not)."""
    host, pid = in_host_namespace(), os.getpid()
    if host and pid in listed:
        return pid, "listed under its own number"
    if not listed:
        return 0, "the driver lists no process on the card, as in many containers"
    if len(listed) == 1 and not host:
        return next(iter(listed)), "the only process on the card"
    return _probe(processes, lambda: block(device))


def _probe(
    processes: Callable, probe_block: Callable[[], AbstractContextManager]
) -> tuple[int, str]:
    before = processes()
    try:
        with probe_block():
            during = processes()
    except RuntimeError as error:  # out of memory above all
        cause = f"no block could be held to tell {len(before)} processes on the card apart"
        return 0, f"{cause}: {type(error).__name__}"
    after = processes()
    moved = [
        pid
        for pid, size in during.items()
        if size is not None
        and size - (before.get(pid) or 0) >= PROBE_BYTES
        and size - (after.get(pid) or 0) >= PROBE_BYTES
    ]
    if len(moved) != 1:
        count = len(moved) or "none"
        cause = f"of {len(during)} processes on the card, {count} rose and fell"
        return 0, f"{cause} with a block of 256 MiB"
    return moved[0], "its bytes rose and fell with a block of 256 MiB"


@contextmanager
def block(device: str):
    """`PROBE_BYTES` of the card, taken from the driver and returned to it."""
    torch.cuda.empty_cache()  # else a cached block may serve
    tensor = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    try:
        yield
    finally:
        del tensor
        torch.cuda.empty_cache()


def in_host_namespace() -> bool:
    """Whether process numbers seen here are the host's."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino == HOST_NAMESPACE
    except OSError:
        return os.name == "nt"


def _processes(nvml, handle) -> dict[int, int | None]:
    """Bytes by process number, of those that compute; None where the driver does not tell."""
    # by version: on a driver before 510 the call without a version raises what is no NVMLError
    missing = nvml.NVML_ERROR_FUNCTION_NOT_FOUND
    try:
        rows = nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
    except (nvml.NVMLError, AttributeError) as error:
        if getattr(error, "value", missing) != missing:
            raise
        rows = nvml.nvmlDeviceGetComputeRunningProcesses_v2(handle)
    return {row.pid: row.usedGpuMemory for row in rows}
