"""What the NVIDIA driver says of one card: a reader that only ever reads.

The card is found by the UUID that torch gives it, so `CUDA_VISIBLE_DEVICES` and the order of
enumeration do not matter; where the card is cut by MIG, the reader is the instance's. Every
quantity is asked for once at the start: one that this driver or card does not know is N/A (None)
from then on and `said` gives the reason. A card that is lost in mid-run turns every quantity to N/A
and raises nothing.

Not exact. A sample is a moment: a peak of a millisecond falls between two, so the largest
`used_bytes` bounds the peak from below. Utilization is over the driver's last 1/6 to 1 s and is no
occupancy. Power is a mean over 1 s on most cards since Ampere, and the sensor of A100 and H100
looks at a quarter of the time (arXiv:2312.02741). Under MPS a client's bytes are not told from the
server's. Not yet run on a GPU.

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
    """One card. This one, the null object, is of no card: it reads N/A and says why."""

    card = driver = process_method = ""
    total_bytes: int | None = None
    lost = ""
    """Why nothing more can be read, once the card has gone."""

    def __init__(self, reason: str = ""):
        self.said: list[str] = [reason] if reason else []

    def sample(self) -> dict:
        """The `COLUMNS` now, None for what is not known. Bytes; watts; joules since the driver was
        loaded; utilization from 0 to 1; MHz; degrees Celsius. `used_bytes` is everyone's, without
        what the driver `reserved_bytes` for itself where that is known; `process_bytes` are this
        process's, context included. Never raises."""
        return dict.fromkeys(COLUMNS)


class CardReader(Reader):
    """A card or a MIG instance, by its NVML handle. `own` is how this process is found among those
    on it."""

    def __init__(self, nvml, handle, own: nvml_process.Own, shared: bool = False):
        super().__init__()
        self._nvml, self._handle, self._own = nvml, handle, own
        self.process_method = own.method
        self._whole = _card_of(nvml, handle) if shared else handle
        self.card, self.driver = (
            _text(nvml.nvmlDeviceGetName(handle)),
            _text(nvml.nvmlSystemGetDriverVersion()),
        )
        self._version = self._memory_version()
        self._ways = self._all_ways()
        if own.reason:
            self._give_up("process_bytes", own.reason)
        if shared:
            for name in ("power_w", "energy_j", "utilization"):
                self._give_up(
                    name, "the card is cut by MIG and the driver tells it of the whole card only"
                )
        self.sample()  # what this card does not know is found out now, not in a timed step

    def sample(self) -> dict:
        row: dict = dict.fromkeys(COLUMNS)
        for name, way in list(self._ways.items()) if not self.lost else ():
            try:
                value = way()
                row.update(value if isinstance(value, dict) else {name: value})
            except (
                self._nvml.NVMLError,
                AttributeError,
            ) as error:  # the second: a module older than the call
                self._failed(name, error)
            if self.lost:
                break
        return row

    def _all_ways(self) -> dict[str, Callable]:
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
        return {
            "used_bytes": now.used,
            **({"reserved_bytes": now.reserved} if self._version else {}),
        }

    def _memory_version(self) -> dict:
        """The second structure tells the driver's own bytes apart; older drivers do not have it."""
        nvml = self._nvml
        with contextlib.suppress(nvml.NVMLError, AttributeError):
            self.total_bytes = nvml.nvmlDeviceGetMemoryInfo(
                self._handle, version=nvml.nvmlMemory_v2
            ).total
            return {"version": nvml.nvmlMemory_v2}
        with contextlib.suppress(nvml.NVMLError):  # then used_bytes will fail too, and say so
            self.total_bytes = nvml.nvmlDeviceGetMemoryInfo(self._handle).total
            self.said.append(
                "reserved_bytes: N/A: this driver has version 1 of the memory call only, whose"
                " used_bytes hold them"
            )
        return {}

    def _failed(self, name: str, error: Exception) -> None:
        if self._is(
            error,
            "GPU_IS_LOST",
            "RESET_REQUIRED",
            "DRIVER_NOT_LOADED",
            "UNINITIALIZED",
            "GPU_NOT_FOUND",
        ):
            self.lost = f"the card was lost: {error}"
            self.said.append(self.lost)
        elif self._is(
            error, "NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "NO_PERMISSION", "INVALID_ARGUMENT"
        ):
            self._give_up(name, str(error))
        elif (words := f"{name}: missing in some samples: {error}") not in self.said:
            self.said.append(words)

    def _give_up(self, name: str, reason: str) -> None:
        self._ways.pop(name, None)
        self.said.append(f"{name}: N/A: {reason}")

    def _is(self, error, *names: str) -> bool:
        value = getattr(error, "value", self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return value in {getattr(self._nvml, f"NVML_ERROR_{name}", None) for name in names}


def find(device: str) -> Reader:
    """The reader of torch's `device`, for example "cuda:0"; the null object, with the reason, where
    there is none.

    Makes the CUDA context if there is none. In a container it may hold and free 256 MiB for a
    moment, to know its own process again (see `nvml_process`): call it before anything is measured,
    and reset torch's peak statistics after. Never raises.
    """
    if not device.startswith("cuda"):
        return Reader(f"NVML: N/A: it reads NVIDIA cards, and the device is {device}")
    if not torch.cuda.is_available():
        return Reader("NVML: N/A: torch finds no CUDA device")
    try:
        nvml = library()
        torch.cuda.synchronize(device)  # from here on this process is on the card
        handle, is_instance = _handle(nvml, device)
        return CardReader(nvml, handle, nvml_process.own(nvml, handle, device), shared=is_instance)
    except Exception as error:  # whatever a driver may think of: a run goes on without it
        return Reader(f"NVML: N/A: {type(error).__name__}: {error}")


def _handle(nvml, device: str) -> tuple:
    """(handle, whether it is a MIG instance's) of the card that torch calls `device`.

    Raises: LookupError, when NVML does not know it or cannot tell which instance it is.
    """
    found = torch.device(device)
    index = torch.cuda.current_device() if found.index is None else found.index
    uuid = str(torch.cuda.get_device_properties(index).uuid).removeprefix("GPU-")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    asked = (
        [visible[index].strip()]
        if index < len(visible) and visible[index].strip().startswith("MIG-")
        else []
    )
    for name in (*asked, f"MIG-{uuid}", f"GPU-{uuid}"):
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
    """MIG instances of a card; none where it is whole or knows no MIG."""
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
    """The whole card's handle, which has the clocks; the instance's own, which knows none, where
    that is not allowed."""
    with contextlib.suppress(nvml.NVMLError):
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance)
    return instance
