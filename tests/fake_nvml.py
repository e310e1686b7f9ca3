"""A stand-in for libnvidia-ml.so: the C functions that nvidia-ml-py calls, for cards as this module
describes them.

The real pynvml runs on top of it, so its wrappers, structures and errors are tested too. What a
driver has not is simply no function here, as in the library. Any setter is refused, loudly.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass, field

import pynvml
import torch

UUID = "0f6bfa6f-1d2c-4b0e-9a53-9a5b3a1c7d11"
OK, NOT_SUPPORTED, LOST = (
    pynvml.NVML_SUCCESS,
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_GPU_IS_LOST,
)
UNKNOWN_BYTES = 2**64 - 1
GIB = 2**30
TICK_S = 0.1
"""How often the energy counter moves."""
OF_NO_CARD = {"nvmlDeviceGetHandleByUUID", "nvmlDeviceGetCount_v2"}
LACKS = {  # what cards and drivers of their time do not answer
    "Pascal": {"nvmlDeviceGetTotalEnergyConsumption"},
    "Volta": set(),
    "Turing": set(),
    "Ampere": set(),
    "Ada": set(),
    "Hopper": set(),
    "Blackwell": set(),
    "Grace Blackwell": {
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetMemoryInfo",
    },  # its memory is the host's
    "laptop": {"nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption"},
}
OLD_DRIVER = {"nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetComputeRunningProcesses_v3"}


@dataclass
class Card:
    """One card, with whatever is on it now. `processes`: bytes by host pid, None where the driver
    does not tell."""

    architecture: str = "Hopper"
    uuid: str = f"GPU-{UUID}"
    total: int = 80 * GIB
    reserved: int = GIB // 2
    processes: dict[int, int | None] = field(default_factory=dict)
    others: int = 0
    watts: float = 300.0
    instances: list[Card] = field(default_factory=list)
    mig: bool = False
    error: int = OK
    """What every question about the card is answered with."""
    calls: int = 0
    fails: dict[str, int] = field(default_factory=dict)
    """An error by function."""

    @property
    def used(self) -> int:
        return self.others + sum(size or 0 for size in self.processes.values())


class Library:
    """`pynvml.nvmlLib`. `missing`: functions that the driver does not have. `lost_after`: calls
    until every card is gone."""

    def __init__(self, *cards: Card, missing=(), lost_after: float = float("inf"), init: int = OK):
        self.cards, self.missing, self.lost_after, self.init = (
            list(cards),
            set(missing),
            lost_after,
            init,
        )
        self.asked: list[str] = []
        self.handles = [
            *self.cards,
            *(instance for card in self.cards for instance in card.instances),
        ]

    def __getattr__(self, name: str):
        if name.startswith("nvmlDeviceSet") or "Reset" in name or "Clear" in name:
            raise AssertionError(f"{name} changes the card: this project only reads")
        if name in self.missing:
            raise AttributeError(name)
        answer = object.__getattribute__(self, f"_{name}")

        def call(*args):
            self.asked.append(name)
            if not name.startswith("nvmlDevice") or name in OF_NO_CARD:
                return answer(*args)
            card = self.handles[ctypes.cast(args[0], ctypes.c_void_p).value - 1]
            card.calls += 1
            if card.calls > self.lost_after:
                card.error = LOST
            lacking = NOT_SUPPORTED if name in LACKS[card.architecture] else OK
            return card.error or card.fails.get(name, OK) or lacking or answer(card, *args[1:])

        return call

    def _nvmlInitWithFlags(self, flags):
        return self.init

    def _nvmlErrorString(self, code):
        return b"an error"

    def _nvmlSystemGetDriverVersion(self, text, size):
        text.value = b"570.00"
        return OK

    def _nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self.cards)
        return OK

    def _nvmlDeviceGetHandleByUUID(self, uuid, handle):
        for number, card in enumerate(self.handles, 1):
            if card.uuid == uuid.value.decode():
                return _point(handle, number)
        return pynvml.NVML_ERROR_NOT_FOUND

    def _nvmlDeviceGetName(self, card, text, size):
        text.value = f"NVIDIA {card.architecture}".encode()
        return OK

    def _nvmlDeviceGetMigMode(self, card, current, pending):
        current._obj.value = card.mig
        return (
            OK
            if card.mig or card.architecture in ("Ampere", "Hopper", "Blackwell")
            else NOT_SUPPORTED
        )

    def _nvmlDeviceGetMaxMigDeviceCount(self, card, count):
        count._obj.value = 7 if card.mig else 0
        return OK

    def _nvmlDeviceGetMigDeviceHandleByIndex(self, card, index, handle):
        if index.value >= len(card.instances):
            return pynvml.NVML_ERROR_NOT_FOUND
        return _point(handle, self.handles.index(card.instances[index.value]) + 1)

    def _nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, instance, handle):
        return _point(
            handle, next(n for n, card in enumerate(self.handles, 1) if instance in card.instances)
        )

    def _nvmlDeviceGetMemoryInfo(self, card, memory):
        found = memory._obj
        found.total, found.used = (
            card.total,
            card.used + card.reserved,
        )  # version 1 folds them together
        return OK

    def _nvmlDeviceGetMemoryInfo_v2(self, card, memory):
        found = memory._obj
        if found.version != pynvml.nvmlMemory_v2:
            return pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH
        found.total, found.used, found.reserved = card.total, card.used, card.reserved
        return OK

    def _nvmlDeviceGetComputeRunningProcesses_v3(self, card, count, rows):
        if rows is None or count._obj.value < len(card.processes):
            count._obj.value = len(card.processes)
            return pynvml.NVML_ERROR_INSUFFICIENT_SIZE if card.processes else OK
        for row, (pid, size) in zip(rows, card.processes.items(), strict=False):
            row.pid, row.usedGpuMemory = pid, UNKNOWN_BYTES if size is None else size
        count._obj.value = len(card.processes)
        return OK

    _nvmlDeviceGetComputeRunningProcesses_v2 = _nvmlDeviceGetComputeRunningProcesses_v3

    def _nvmlDeviceGetPowerUsage(self, card, milliwatts):
        milliwatts._obj.value = round(1e3 * card.watts)
        return OK

    def _nvmlDeviceGetTotalEnergyConsumption(self, card, millijoules):
        tick = time.perf_counter() // TICK_S
        millijoules._obj.value = round(1e3 * TICK_S * tick * card.watts)
        return OK

    def _nvmlDeviceGetUtilizationRates(self, card, rates):
        rates._obj.gpu = 87
        return OK

    def _nvmlDeviceGetClockInfo(self, card, kind, clock):
        clock._obj.value = {pynvml.NVML_CLOCK_SM: 1755, pynvml.NVML_CLOCK_MEM: 2619}[kind.value]
        return OK

    def _nvmlDeviceGetTemperature(self, card, sensor, degrees):
        degrees._obj.value = 41
        return OK


def _point(handle, number: int) -> int:
    ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = number
    return OK


def install(monkeypatch, *cards: Card, uuid: str = UUID, host: bool = True, **driver) -> Library:
    """Put `cards` into this machine, the first being torch's cuda:0 with `uuid`; `host`: not in a
    container."""
    library = Library(*cards, **driver)
    monkeypatch.setattr(pynvml, "nvmlLib", library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    properties = type(
        "Properties",
        (),
        {"uuid": uuid, "name": "a card", "total_memory": 80 * GIB, "major": 9, "minor": 0},
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr("vramlab.capture.nvml_process.in_host_namespace", lambda: host)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return library
