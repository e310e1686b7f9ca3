"""The clocks of a step: the host's, and the device's, which never makes the host wait inside a
step."""

from __future__ import annotations

import time

import pytest

import micro
from vramlab.training.clock import Clock, EventClock, clock

ROW = {"weights": "fp32"}


class Device:
    """A queue that works behind the host: each mark takes its place, and time passes as work is put
    in between."""

    def __init__(self, work_ms):
        self.work_ms, self.now_ms, self.passed, self.waited, self.marks = (
            iter(work_ms),
            0.0,
            0,
            0,
            [],
        )

    def mark(self):
        self.marks.append(Mark(self, len(self.marks), self.now_ms))
        self.now_ms += next(self.work_ms, 0.0)
        return self.marks[-1]


class Mark:
    def __init__(self, device, number, at_ms):
        self.device, self.number, self.at_ms = device, number, at_ms

    def query(self) -> bool:
        return self.number < self.device.passed

    def synchronize(self) -> None:
        self.device.waited += 1
        self.device.passed = max(self.device.passed, self.number + 1)

    def elapsed_time(self, end: Mark) -> float:
        assert self.query() and end.query(), "a mark was read that the device has not passed"
        return end.at_ms - self.at_ms


def steps(watch, count: int) -> None:
    for step in range(count):
        watch.begin_step(step)
        for name in ("forward", "backward", "forward", "backward", "update"):
            with watch.phase(name):
                pass
        watch.end_step()


def test_phases_are_the_devices_time_and_no_step_waits_for_it():
    device = Device([1, 10, 0, 20, 0, 11, 0, 21, 0, 5, 2, 0] * 3)
    watch = EventClock(mark=device.mark)
    steps(watch, 3)
    assert device.waited == 0
    assert [row["step"] for row in watch.rows] == [0, 1, 2] and device.waited == 3
    for row in watch.rows:
        told = {name: row[f"{name}_s"] for name in ("forward", "backward", "update", "step")}
        assert told == pytest.approx(
            {"forward": 0.021, "backward": 0.041, "update": 0.005, "step": 0.07}
        )


def test_steps_that_the_device_has_done_are_read_without_waiting():
    device = Device([1.0] * 1000)
    watch = EventClock(mark=device.mark)
    for _ in range(4):
        steps(watch, 1)
        device.passed = len(device.marks)
    steps(watch, 1)
    assert len(watch._due) == 1 and device.waited == 0


def test_both_clocks_give_the_same_rows_and_the_trainer_knows_neither():
    device = Device([1.0] * 1000)
    ours, theirs = Clock(), EventClock(mark=device.mark)
    began = time.perf_counter()
    losses = [micro.train(ROW, observer=watch)[0] for watch in (ours, theirs)]
    assert losses[0] == losses[1] and device.waited == 0
    assert [list(row) for row in ours.rows] == [list(row) for row in theirs.rows]
    for row in (*ours.rows, *theirs.rows):
        inside = row["forward_s"] + row["backward_s"] + row["update_s"]
        assert 0 < inside <= row["step_s"] and began < row["t_s"] < time.perf_counter()
    assert isinstance(clock("cuda:1"), EventClock) and isinstance(clock("cpu"), Clock)


def test_a_phase_outside_a_step_is_nobodys():
    device = Device([1.0] * 10)
    watch = EventClock(mark=device.mark)
    with watch.phase("init"):
        pass
    assert watch.rows == []
