"""The NVIDIA driver's figures of a card: a reader that never changes a setting.

The card is found by the UUID that torch gives it, so `CUDA_VISIBLE_DEVICES` and the order of
enumeration do not matter; where the card is partitioned by MIG, the reader is the instance's. Every
quantity is read once at the start: a quantity that this driver or card does not support is N/A
(None) from then on, and `notes` gives the reason. When a card is lost during a run, every quantity
becomes N/A and nothing is raised.

Not exact. A sample is a moment: a peak of a millisecond falls between two samples, so the largest
`used_bytes` bounds the peak from below. Utilization is over the driver's last 1/6 to 1 s and is no
occupancy. Power is a mean over 1 s on most cards since Ampere, and the sensor of A100 and H100
measures during a quarter of the time (arXiv:2312.02741). Under MPS a client's bytes cannot be
separated from the server's. Not yet run on a GPU.

Source: NVML API reference, nvidia-ml-py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import torch

from ..machine import _text, library
from . import nvml_process

COLUMNS = (
    "used_bytes",
    "reserved_bytes",
    "process_bytes",
    "power_w",
    "energy_j",
    "utilization",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "temperature_c",
)


class Reader:
    """Reads a card. This class is the null object, of no card: it reads N/A, and `notes` has the
    reason."""

    card = driver = process_method = ""
    total_bytes: int | None = None
    lost = ""
    """Why nothing more can be read, once the card has gone."""

    def __init__(self, reason: str = ""):
        self.notes: list[str] = [reason] if reason else []

    def sample(self) -> dict:
        """The `COLUMNS` now, None for an unknown value. Bytes; watts; joules since the driver was
        loaded; utilization from 0 to 1; MHz; degrees Celsius. `used_bytes` is of all processes,
        without the driver's own `reserved_bytes` where these are known; `process_bytes` is of this
        process, context included. Never raises."""
        return dict.fromkeys(COLUMNS)


class CardReader(Reader):
    """Reads a card or a MIG instance, by its NVML handle. `own`: this process among those on the
    card."""

    def __init__(self, nvml, handle, own: nvml_process.Own, shared: bool = False):
        super().__init__()
        self._nvml, self._handle, self._own = nvml, handle, own
        self._whole = _card_of(nvml, handle) if shared else handle
        self.process_method = own.method
        self.card = _text(nvml.nvmlDeviceGetName(handle))
        self.driver = _text(nvml.nvmlSystemGetDriverVersion())
        self._version = self._memory_version()
        self._quantities = self._all_quantities()
        if own.reason:
            self._give_up("process_bytes", own.reason)
        for name in ("power_w", "energy_j", "utilization") if shared else ():
            self._give_up(
                name, "the card is cut by MIG and the driver tells it of the whole card only"
            )
        self.sample()  # finds out now, and not in a timed step, what this card does not support

    def sample(self) -> dict:
        row: dict = dict.fromkeys(COLUMNS)
        for name, read in list(self._quantities.items()) if not self.lost else ():
            try:
                value = read()
            # an AttributeError: the module is older than the call
            except (self._nvml.NVMLError, AttributeError) as error:
                self._failed(name, error)
                if self.lost:
                    break
            else:
                row.update(value if isinstance(value, dict) else {name: value})
        return row

    def _all_quantities(self) -> dict[str, Callable]:
        nvml, clock = self._nvml, self._nvml.nvmlDeviceGetClockInfo
        return {
            "used_bytes": self._memory,
            "process_bytes": self._own.used_bytes,
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(self._whole) / 1e3,
            "energy_j": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(self._whole) / 1e3,
            "utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(self._whole).gpu / 100,
            "sm_clock_mhz": lambda: clock(self._whole, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: clock(self._whole, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                self._whole, nvml.NVML_TEMPERATURE_GPU
            ),
        }

    def _memory(self) -> dict:
        now = self._nvml.nvmlDeviceGetMemoryInfo(self._handle, **self._version)
        own = {"reserved_bytes": now.reserved} if self._version else {}
        return {"used_bytes": now.used, **own}

    def _memory_version(self) -> dict:
        """The second structure has the driver's own bytes apart; older drivers do not support
        it."""
        nvml = self._nvml
        with contextlib.suppress(nvml.NVMLError, AttributeError):
            version = {"version": nvml.nvmlMemory_v2}
            self.total_bytes = nvml.nvmlDeviceGetMemoryInfo(self._handle, **version).total
            return version
        with contextlib.suppress(nvml.NVMLError):  # used_bytes will fail too, and has a note then
            self.total_bytes = nvml.nvmlDeviceGetMemoryInfo(self._handle).total
            self.notes.append(
                "reserved_bytes: N/A: this driver has version 1 of the memory call only, whose"
                " used_bytes hold them"
            )
        return {}

    def _failed(self, name: str, error: Exception) -> None:
        kind = _kind(self._nvml, error)
        if kind in _LOST:
            self.lost = f"the card was lost: {error}"
            self.notes.append(self.lost)
        elif kind in _UNSUPPORTED:
            self._give_up(name, str(error))
        elif (note := f"{name}: missing in some samples: {error}") not in self.notes:
            self.notes.append(note)

    def _give_up(self, name: str, reason: str) -> None:
        self._quantities.pop(name, None)
        self.notes.append(f"{name}: N/A: {reason}")


_LOST = (
    "GPU_IS_LOST",
    "RESET_REQUIRED",
    "DRIVER_NOT_LOADED",
    "UNINITIALIZED",
    "GPU_NOT_FOUND",
)
_UNSUPPORTED = ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "NO_PERMISSION", "INVALID_ARGUMENT")


def _kind(nvml, error: Exception) -> str:
    """Which of the known errors this is; a module older than the call counts as a function that is
    not found."""
    value = getattr(error, "value", nvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    kinds = (*_LOST, *_UNSUPPORTED)
    return next((kind for kind in kinds if getattr(nvml, f"NVML_ERROR_{kind}", None) == value), "")


def find(device: str) -> Reader:
    """The reader of torch's `device`, for example "cuda:0"; the null object, with the reason, where
    the device cannot be read.

    Creates the CUDA context if necessary. In a container it may hold and free 256 MiB for a moment,
    to recognize its own process (see `nvml_process`): call it before anything is measured, and
    reset torch's peak statistics afterwards. Never raises."""
    if not device.startswith("cuda"):
        return Reader(f"NVML: N/A: it reads NVIDIA cards, and the device is {device}")
    if not torch.cuda.is_available():
        return Reader("NVML: N/A: torch finds no CUDA device")
    try:
        nvml = library()
        torch.cuda.synchronize(device)  # from here on this process is on the card
        handle, is_instance = _handle(nvml, device)
        return CardReader(nvml, handle, nvml_process.own(nvml, handle, device), shared=is_instance)
    except Exception as error:  # whatever a driver raises, the run goes on without its figures
        return Reader(f"NVML: N/A: {type(error).__name__}: {error}")


def _handle(nvml, device: str) -> tuple:
    """(handle, whether it is a MIG instance's) of the card that torch calls `device`. Raises:
    LookupError, when NVML does not know the card or cannot tell which instance it is."""
    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    uuid = str(torch.cuda.get_device_properties(index).uuid).removeprefix("GPU-")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[index : index + 1]
    chosen = [name.strip() for name in visible if name.strip().startswith("MIG-")]
    for name in (*chosen, f"MIG-{uuid}", f"GPU-{uuid}"):
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError:
            continue
        if name.startswith("MIG-"):
            return handle, True
        instances = _instances(nvml, handle)
        if not instances:
            return handle, False
        if len(instances) > 1:
            raise LookupError(
                f"the card is cut into {len(instances)} MIG instances and torch does not tell which"
                f" is {device}: set CUDA_VISIBLE_DEVICES to the one's UUID, as `nvidia-smi -L`"
                " shows it"
            )
        return instances[0], True
    raise LookupError(f"NVML does not know the card that torch calls {device}")


def _instances(nvml, handle) -> list:
    """The MIG instances of a card; empty where it is whole or does not support MIG."""
    try:
        if not nvml.nvmlDeviceGetMigMode(handle)[0]:
            return []
        slots = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except nvml.NVMLError:
        return []
    instances = []
    for slot in range(slots):
        with contextlib.suppress(nvml.NVMLError):  # an empty slot
            instances.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot))
    return instances


def _card_of(nvml, instance):
    """The handle of the whole card, which has the clocks; where that is not permitted, the
    instance's own, which has none."""
    with contextlib.suppress(nvml.NVMLError):
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance)
    return instance
