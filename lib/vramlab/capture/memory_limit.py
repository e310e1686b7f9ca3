"""A device with an end, where there is none: the event meter in front of the simulated allocator,
which can say no.

The step really runs; every storage it makes is asked of an `Allocator` of `capacity_bytes` first.
What that cannot serve, after flushing its cache, ends the step where a GPU of that size would have
ended it: a `RanOut` with the evidence goes up through backward, hooks and recomputation as torch's
own error does. On the CPU bytes are those of the CPU's kernels.
"""

from __future__ import annotations

from ..allocator.allocator import Allocator, OutOfMemory
from ..allocator.settings import Settings
from .meter import Meter
from .oom import RanOut, record


class Ceiling(Meter):
    """A meter of a device that has `capacity_bytes` for its allocator. The rest are the meter's
    arguments."""

    def __init__(self, capacity_bytes: int, *meter, settings: Settings = Settings()):  # noqa: B008, frozen
        super().__init__(*meter)
        self.allocator = Allocator(settings, capacity_bytes)
        self._held: set[int] = set()

    def _event(self, event: str, record, change: int) -> None:
        super()._event(event, record, change)
        if record.host:
            return
        if event == "free":
            if record.serial in self._held:  # what was refused was never held
                self._held.remove(record.serial)
                self.allocator.free(record.serial)
            return
        try:
            self.allocator.malloc(record.serial, change, record.stream)
        except OutOfMemory as error:
            self._events.pop()
            raise RanOut(error.shortage, self._evidence(error)) from None
        self._held.add(record.serial)

    def _evidence(self, error: OutOfMemory) -> dict:
        short, told = (
            error.shortage,
            (
                "asked_bytes",
                "free_bytes",
                "allocated_bytes",
                "reserved_bytes",
                "largest_free_block_bytes",
            ),
        )
        figures = {name: getattr(short, name) for name in told}
        figures["capacity_bytes"] = self.allocator.device.capacity_bytes
        frame = self.frame()
        found = record("the simulated allocator", figures, frame)
        return {**found, "phase": self._now_in(), "step": self._step}
