"""The operating system's own figure of a process's peak, made trustworthy.

glibc keeps freed memory, so a resident set overstates a step by about 30 %. With
`processes.MALLOC_ENV` a block of 64 KiB or more is mapped by itself and returned when it is freed,
and the high-water mark of the resident set is exact to a thousandth. These variables must be set
before Python starts, and they slow it down: so never on a timed run.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.005
HIGH_WATER = "VmHWM, reset at the start"
SAMPLED = f"resident bytes sampled every {SAMPLE_S * 1000:.0f} ms"


@dataclass
class Peak:
    """Resident bytes before the window and at their highest inside it; filled in when the window
    closes."""

    baseline_bytes: int
    method: str
    peak_bytes: int = 0

    @property
    def delta_bytes(self) -> int:
        return max(0, self.peak_bytes - self.baseline_bytes)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        # some kernels accept the write and reset nothing
        return _status("VmHWM") - _status("VmRSS") < 1 << 20
    except OSError:
        return False


def peak_method() -> str:
    """How a peak is found on this machine. Resets this process's high-water mark. Raises: OSError,
    where there is no /proc."""
    if _reset_high_water():
        return HIGH_WATER
    _status("VmRSS")
    return SAMPLED


def _return_free_memory() -> None:
    """Return the free memory inside the heap to the system (glibc; elsewhere nothing): a later
    allocation in it would raise no peak. Imports leave megabytes of it, and more where they find no
    bytecode."""
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def peak_window() -> Iterator[Peak]:
    """The peak of this process's resident bytes while the window is open.

    By the kernel's high-water mark where it can be reset, else by sampling every 5 ms, which reads
    up to 0.3 % low; the method is in the result. Raises: OSError, where there is no /proc.
    """
    _return_free_memory()
    if _reset_high_water():
        peak = Peak(_status("VmRSS"), HIGH_WATER)
        yield peak
        peak.peak_bytes = _status("VmHWM")
        return
    peak, done = Peak(_status("VmRSS"), SAMPLED), threading.Event()
    sampler = threading.Thread(target=_sample, args=(peak, done), daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()


def _sample(peak: Peak, done: threading.Event) -> None:
    while not done.is_set():
        peak.peak_bytes = max(peak.peak_bytes, _status("VmRSS"))
        time.sleep(SAMPLE_S)
