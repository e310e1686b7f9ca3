"""The operating system's own figure of a process's peak, made trustworthy.

glibc keeps freed memory, so a resident set overstates a step by about 30 %. With the settings below every block of 64 KiB
or more is mapped by itself and returned when freed, and the high-water mark of the resident set is the truth to a part
in a thousand. They have to be in the environment before Python starts, and they slow it: so never on a timed run.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MALLOC_ENV = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0",
              "MALLOC_MMAP_MAX_": "1000000"}
SAMPLE_S = 0.005
HIGH_WATER, SAMPLED = "VmHWM, reset at the start", f"resident bytes sampled every {SAMPLE_S * 1000:.0f} ms"


@dataclass
class Peak:
    """Resident bytes before the window and at their highest inside it; filled in when the window closes."""

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
        # some kernels take the write and reset nothing
        return _status("VmHWM") - _status("VmRSS") < 1 << 20
    except OSError:
        return False


def peak_method() -> str:
    """How a peak is found here. Resets this process's high-water mark. Raises: OSError, where there is no /proc."""
    if _reset_high_water():
        return HIGH_WATER
    _status("VmRSS")
    return SAMPLED


def _return_free_memory() -> None:
    """Give the system back what is free inside the heap (glibc; elsewhere nothing): what is allocated there later would raise no
    peak. Imports leave megabytes of it, the more where they find no bytecode."""
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def peak_window() -> Iterator[Peak]:
    """The peak of this process's resident bytes while the window is open.

    By the kernel's high-water mark where it can be reset, else by sampling every 5 ms, which reads up to 0.3 % low; the
    method is in the result. Raises: OSError, where there is no /proc.
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


def run_in_measured_process(target: str, payload: Mapping, timeout_s: float, threads: int = 0,
                            environment: Mapping[str, str] = MALLOC_ENV) -> dict:
    """Call `module:function` with `payload` in a fresh Python with `environment` set; return its dict. See `MeasuredProcess`."""
    with MeasuredProcess(target, threads, environment) as process:
        return process.call(payload, timeout_s)


class MeasuredProcess:
    """A fresh Python with `environment` set, for one call of `module:function`. It loads the module at once, beside whatever its
    caller does, and then waits for the call. A context: at its end no process is left."""

    def __init__(self, target: str, threads: int = 0, environment: Mapping[str, str] = MALLOC_ENV):
        self.target = target
        self._folder = tempfile.TemporaryDirectory(prefix="vramlab-")
        self._answer, self._loaded = Path(self._folder.name, "answer.json"), Path(self._folder.name, "loaded")
        environment = {**os.environ, **environment, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        command = [sys.executable, "-m", "vramlab.capture.peak_rss", target, str(self._loaded), str(self._answer)]
        self._process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                         stderr=subprocess.PIPE)

    def wait_until_loaded(self) -> None:
        """Return once nothing more is loaded there, or it has died: what is timed from here on is timed alone."""
        while not self._loaded.exists() and self._process.poll() is None:
            time.sleep(0.02)

    def call(self, payload: Mapping, timeout_s: float) -> dict:
        """The function's dict. What goes wrong there is a result, not an exception here: {"outcome": "oom" | "failed", "reason":
        ...}. A process killed by signal 9 is taken for out of memory, which is what the kernel does to it."""
        try:
            _, printed = self._process.communicate(json.dumps(dict(payload)), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {"outcome": "failed", "reason": f"no answer from {self.target} in {timeout_s:.0f} s"}
        if self._answer.exists():
            return json.loads(self._answer.read_text())
        last = (printed.strip().splitlines() or ["no message"])[-1]
        killed = self._process.returncode in (-9, 137)
        return {"outcome": "oom" if killed else "failed", "reason": "killed by the kernel" if killed else last}

    def __enter__(self) -> MeasuredProcess:
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


def _main(target: str, loaded: str, answer: str) -> None:
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    Path(loaded).touch()
    try:
        result = {"outcome": "ok", "reason": "", **function(json.loads(sys.stdin.read()))}
    except MemoryError as error:
        result = {"outcome": "oom", "reason": f"MemoryError: {error}"}
    partial = Path(answer + ".part")
    partial.write_text(json.dumps(result))
    os.replace(partial, answer)


if __name__ == "__main__":
    _main(*sys.argv[1:])
