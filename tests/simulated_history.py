"""A history of the same format as torch's, kept live while a CPU trains: every storage the meter
sees goes through the simulated allocator, whose addresses stand for the device's. The recorder
cannot tell the difference; the meter beside it is the truth.
"""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch

import micro
from vramlab.allocator.settings import Settings
from vramlab.allocator.simulate import simulate
from vramlab.capture.cuda_recorder import MAX_ENTRIES, Recorder
from vramlab.capture.meter import Meter
from vramlab.capture.simulated_recording import HistoryAllocator
from vramlab.observer import Observer
from vramlab.training.trainer import Schedule, Trainer


class SimulatedHistory(Meter):
    device_type, device, source = "cpu", 0, "simulated"
    workspace_bytes = 0

    def __init__(self, settings: Settings = Settings(), keeps_metadata: bool = True):  # noqa: B008, frozen
        super().__init__()
        self.keeps_metadata = keeps_metadata
        self.kept = HistoryAllocator(settings, now_us=lambda: time.time_ns() // 1000)
        self.asked = []

    def start(self, max_entries):
        self.max_entries = max_entries
        self.__enter__()

    def mark(self, text):
        assert self.keeps_metadata
        self.kept.metadata = text

    def address(self, storage):
        record = self._alive.get(storage._cdata)
        return None if record is None or record.host else self.kept.address(record.serial)

    def _event(self, event, record, change):
        super()._event(event, record, change)
        if record.host:
            return
        self.kept.apply(event, record.serial, abs(change), record.stream)
        self.asked.append((event, record.serial, abs(change), record.stream))

    def peaks(self):
        found = simulate(self.asked, self.kept.settings)
        return {
            "allocated_peak_bytes": found.peak_allocated_bytes,
            "reserved_peak_bytes": found.peak_reserved_bytes,
            "num_alloc_retries": found.num_alloc_retries,
            "num_ooms": 0,
        }

    def look(self):
        return self.kept.snapshot(max(0, len(self.kept.trace) - self.max_entries))

    def stop(self):
        self.__exit__()
        return self.look()


class Pair(Observer):
    """Tells both the same things, and the meter first: it must know a storage by the time the
    recorder asks where it lies."""

    def __init__(self, meter, recorder):
        self.both = meter, recorder

    def begin_step(self, step):
        [one.begin_step(step) for one in self.both]

    def end_step(self):
        [one.end_step() for one in self.both]

    def own(self, category, named_tensors):
        named = list(named_tensors)
        [one.own(category, named) for one in self.both]

    def trains(self, named_leaves):
        named = list(named_leaves)
        [one.trains(named) for one in self.both]

    @contextmanager
    def phase(self, name):
        with self.both[0].phase(name), self.both[1].phase(name):
            yield

    @contextmanager
    def region(self, place):
        with self.both[0].region(place), self.both[1].region(place):
            yield


def recorded(regime, steps=3, max_entries=MAX_ENTRIES, **history):
    """(what the meter saw, the recorder, the trainer) of the same steps of the micro model, from
    before it existed."""
    kept = SimulatedHistory(**history)
    recorder = Recorder(history=kept, max_entries=max_entries)
    torch.manual_seed(0)
    with micro.ranks(regime), recorder:
        trainer = Trainer(
            micro.model(), regime, Schedule(1e-2, steps), observer=Pair(kept, recorder)
        )
        for step in range(steps):
            trainer.step([micro.batch(10 * step + at) for at in range(regime.accumulate)])
    return kept.frame(), recorder, trainer
