"""A memory limit without a GPU: the event meter in front of the simulated allocator, which can
refuse a request.

The step really runs; each storage that it makes is requested from an `Allocator` of
`capacity_bytes`. A request that it cannot serve, even after flushing its cache, ends the step where
a GPU of that size would have ended it: a `RanOut` with the evidence goes up through backward, hooks
and recomputation as torch's own error does. On the CPU bytes are those of the CPU's kernels.
"""

from __future__ import annotations

from dataclasses import asdict

from ..allocator.allocator import Allocator, OutOfMemory
from ..allocator.settings import Settings
from .meter import Meter
from .oom import RanOut, record


class Ceiling(Meter):
    """A meter of a device that has `capacity_bytes` for its allocator. `meter`: the meter's own
    arguments."""

    def __init__(self, capacity_bytes: int, *meter, settings: Settings = Settings()):  # noqa: B008, frozen
        super().__init__(*meter)
        self.allocator = Allocator(settings, capacity_bytes)

    def _event(self, event: str, record, change: int) -> None:
        super()._event(event, record, change)
        if record.host:
            return
        if event == "free":
            if record.serial in self.allocator:  # else it was refused
                self.allocator.free(record.serial)
            return
        try:
            self.allocator.malloc(record.serial, change, record.stream)
        except OutOfMemory as error:
            self._events.pop()
            raise RanOut(error.shortage, self._evidence(error)) from None

    def _evidence(self, error: OutOfMemory) -> dict:
        capacity_bytes = self.allocator.device.capacity_bytes
        figures = {**asdict(error.shortage), "capacity_bytes": capacity_bytes}
        evidence = record("the simulated allocator", figures, self.frame())
        return {**evidence, "phase": self._now_in(), "step": self._step}
