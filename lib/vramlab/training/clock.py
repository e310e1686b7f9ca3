"""Times each phase of each step: by the host's clock, or on CUDA by events of the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..observer import Observer


class Clock(Observer):
    """Wall time of each phase of each step, in seconds, from one monotonic clock.

    `rows` holds one dict for each step: `step`, `t_s` (its beginning by `time.perf_counter`),
    `forward_s`, `backward_s`, `update_s`, `step_s`. Updates inside backward (LOMO) are part of
    `backward_s`, because they have no edge that could be timed. For a device that works while the
    host goes on, use `EventClock`.
    """

    def __init__(self):
        self.rows: list[dict] = []

    def begin_step(self, step: int) -> None:
        self.rows.append(_row(step))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.rows and f"{name}_s" in self.rows[-1]:
            self.rows[-1][f"{name}_s"] += time.perf_counter() - start

    def end_step(self) -> None:
        self.rows[-1]["step_s"] = time.perf_counter() - self.rows[-1]["t_s"]


class EventClock(Observer):
    """The same rows on CUDA, timed by the device, without a synchronization inside a step.

    Each edge of a phase records a CUDA event in the compute stream; side streams count as far as
    that stream waits for them. `t_s` is read on the host: it is when the step began on the device
    only if the caller has read the last loss before. Events that the device has passed are read
    when a later step begins. The property `rows` waits for the device and reads the rest. `mark`
    creates and records an event. Not yet run on a GPU. Source: CUDA runtime API, event management.
    """

    def __init__(self, device: str = "cuda", mark: Callable[[], torch.cuda.Event] | None = None):
        self._mark = mark or (lambda: _cuda_mark(device))
        self._rows: list[dict] = []
        self._due: deque[tuple[dict, list]] = deque()

    def begin_step(self, step: int) -> None:
        self._read(lambda end: not end.query())
        self._rows.append(_row(step))
        self._spans: list = []
        self._began = self._mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        if self._rows and f"{name}_s" in self._rows[-1]:
            self._spans.append((f"{name}_s", start, self._mark()))

    def end_step(self) -> None:
        self._due.append((self._rows[-1], [*self._spans, ("step_s", self._began, self._mark())]))

    @property
    def rows(self) -> list[dict]:
        self._read(lambda end: end.synchronize())
        return self._rows

    def _read(self, stop: Callable) -> None:
        """Turn events into seconds, step by step, until `stop` is true of the last event of a
        step."""
        while self._due and not stop(self._due[0][1][-1][2]):
            row, spans = self._due.popleft()
            for name, start, end in spans:
                row[name] += start.elapsed_time(end) / 1e3


def clock(device: str) -> Clock | EventClock:
    """The clock for a torch device, such as "cuda:0"."""
    return EventClock(device) if device.startswith("cuda") else Clock()


def _row(step: int) -> dict:
    spans = dict.fromkeys(("forward_s", "backward_s", "update_s", "step_s"), 0.0)
    return {"step": step, "t_s": time.perf_counter(), **spans}


def _cuda_mark(device: str) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
