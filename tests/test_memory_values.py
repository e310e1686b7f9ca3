"""The sampler's rows, a recording's readings, a trace's beginning, a floor and the driver's list,
by value and by hand."""

from __future__ import annotations

from types import SimpleNamespace as Its

import pytest
import torch

from vramlab.allocator import initial_state as beginning
from vramlab.allocator.initial_state import _insert, _KnownPools, _Range, _subtract
from vramlab.allocator.settings import Settings
from vramlab.allocator.snapshot import Event, Piece, Segment, Snapshot
from vramlab.capture import cuda_recorder as recorder
from vramlab.capture import nvml_process, oom
from vramlab.capture import peak_rss as process
from vramlab.capture.cuda_recorder import Recorder
from vramlab.capture.nvml import Reader
from vramlab.capture.nvml_sampler import Sampler
from vramlab.capture.recording import Declared, Mark, Recording, _number
from vramlab.capture.work import Floor, roofline

MIB = 1 << 20


def test_of_two_rows_the_one_with_more_bytes_stays_and_samples_come_half_as_often():
    beside = Sampler(Reader(), period_s=0.5, most_rows=4)
    for at, used in enumerate([5, 9, None, 3]):
        assert beside._period_s == 0.5 and len(beside._rows) == at
        beside._keep((float(at), used))
    assert beside._rows == [(1.0, 9), (3.0, 3)] and beside._period_s == 1.0
    beside._keep((4.0, 0))
    beside._keep((5.0, None))
    assert beside._rows == [(1.0, 9), (4.0, 0)] and beside._period_s == 2.0


# a recording --------------------------------------------------------------------------------------


def recording(events, marks=("init", "forward", "backward"), declared=(), segments=(), **said):
    trace = tuple(
        Event(at, action, address, size, stream, (0, 0), at, f"vramlab:{mark}")
        for at, (action, address, size, stream, mark) in enumerate(events)
    )
    marks = tuple(Mark(at, phase, f"m{at}", at, 0) for at, phase in enumerate(marks))
    return Recording(Snapshot(0, trace, tuple(segments), ""), marks, tuple(declared), (), **said)


def test_a_declaration_means_the_last_that_was_made_there_and_not_what_had_died():
    events = [("alloc", 512, 10, 0, 0), ("free_requested", 512, 10, 0, 1), ("alloc", 512, 20, 0, 1)]
    events.insert(0, ("alloc", 1024, 30, 0, 0))
    said = [
        Declared(1, 512, "gradients", "a"),
        Declared(0, 1024, "weights", "w"),
        Declared(2, 1024, "gradients", "no more"),
        Declared(0, 4096, "weights", "nobody"),
    ]
    frame = recording(events, declared=said).frame()
    assert frame["category"].iloc[0] == "weights" and frame["category"].iloc[3] == "gradients"
    assert frame["module"].tolist() == ["w", "m0", "m0", "a"] and "gradients" not in set(
        frame["category"][1:3]
    )
    first = recording(events[1:3], declared=[Declared(1, 512, "gradients", "a")]).frame()
    assert (
        first["category"].tolist() == ["gradients"] * 2
    )  # it died at the mark itself, and not before it
    late = recording(events[1:3], declared=[Declared(2, 512, "gradients", "a")]).frame()
    assert "gradients" not in set(late["category"])


def test_a_numbers_mark():
    assert [
        _number(text) for text in ("vramlab:0", "vramlab:12", "12", "vramlab:-1", "vramlab:", "")
    ] == [0, 12, -1, -1, -1, -1]


def test_what_was_reserved_before_is_what_is_there_less_what_grew():
    segments = [
        Segment(
            2 * MIB, 2 * MIB, 0, True, False, (0, 0), (Piece(2 * MIB, 2 * MIB, "active_allocated"),)
        )
    ]
    events = [
        ("segment_alloc", 8 * MIB, 6 * MIB, 0, 0),
        ("segment_free", 8 * MIB, 6 * MIB, 0, 0),
        ("segment_free", 32 * MIB, 20 * MIB, 0, 1),
        ("alloc", 3 * MIB, 512, 0, 1),
    ]
    found = recording(events, segments=segments)
    assert found.reserved_before_bytes == 22 * MIB
    assert found._reserved().tolist() == [28 * MIB, 22 * MIB, 2 * MIB, 2 * MIB]
    assert found.before == 1  # the piece that nobody freed
    frame = found.frame()
    assert frame["bytes"].tolist() == [2 * MIB, 512] and frame["step"].tolist() == [0, 1]
    assert frame["phase"].tolist() == ["init", "forward"] and frame["live_bytes"].tolist() == [
        2 * MIB,
        2 * MIB + 512,
    ]
    assert recording([], segments=segments).before == 0


def test_a_workspace_is_of_that_size_and_never_freed():
    events = [
        ("alloc", 512, 8, 0, 1),
        ("free_requested", 512, 8, 0, 1),
        ("alloc", 1024, 8, 0, 1),
        ("alloc", 2048, 9, 0, 1),
    ]
    categories = recording(events, workspace_bytes=8).frame()["category"].tolist()
    assert [category == "workspace" for category in categories] == [False, False, True, False]


# the recorder -------------------------------------------------------------------------------------


class History:
    device_type, device, workspace_bytes = "cpu", 0, 0

    def __init__(self, keeps_metadata=True):
        self.keeps_metadata, self.told, self.asked = keeps_metadata, [], 0

    def mark(self, text):
        self.told.append(text)

    def address(self, storage):
        return storage.nbytes()

    def peaks(self):
        self.asked += 1
        return {"allocated_peak_bytes": [3, 9, 4][self.asked - 1], "num_ooms": self.asked}


def test_marks_are_numbered_and_a_declaration_is_made_at_the_one_before(monkeypatch):
    monkeypatch.setattr(recorder.time, "time_ns", lambda: 5_999)
    kept = History()
    one = Recorder(history=kept)
    one._mark()
    with one.phase("backward"):
        one._modules._stack[:] = ["block", "head"]
        monkeypatch.setattr(recorder, "recomputing", True)
        one._mark()
        monkeypatch.setattr(recorder, "recomputing", False)
        one.own(
            "weights",
            [
                ("w", torch.zeros(4)),
                ("there", torch.zeros(4, device="meta")),
                ("empty", torch.zeros(0)),
            ],
        )
        one._modules._stack.clear()
        assert one._modules.backward is True
    assert one._modules.backward is False
    assert one._marks == [
        (0, "init", "", 0, 5),
        (0, "backward", "", 1, 5),
        (0, "recompute", "head", 1, 5),
        (0, "backward", "head", 1, 5),
        (0, "init", "", 2, 5),
    ]
    assert one._declared == [(2, 16, "weights", "w")] and kept.told == [
        f"vramlab:{at}" for at in range(5)
    ]
    Recorder(history=(silent := History(keeps_metadata=False)))._mark()
    assert silent.told == []


def test_gathered_weights_are_the_same_at_another_size_and_an_emptied_one_is_nothing():
    one = Recorder(history=History())
    tensor, other = torch.zeros(4), torch.zeros(4)
    one.own("collectives", [("w", tensor)])
    one.own("weights", [("v", other)])
    for storage, size in (
        (tensor.untyped_storage(), 0),
        (tensor.untyped_storage(), 32),
        (other.untyped_storage(), 32),
    ):
        storage.resize_(size)
        one._resized(storage)
    assert one._declared == [
        (-1, 16, "collectives", "w"),
        (0, 16, "weights", "v"),
        (1, 32, "collectives", "w"),
    ]
    assert len(one._marks) == 3


def test_peaks_are_one_a_step_and_one_before_the_first(monkeypatch):
    one = Recorder(history=History())
    monkeypatch.setattr(
        recorder, "time", Its(perf_counter=iter([1.0, 2.0] * 2).__next__, time_ns=lambda: 7_000)
    )
    one.begin_step(0)
    one.end_step()
    one.begin_step(1)
    one.end_step()
    assert one.peaks == [
        {"step": step, "allocated_peak_bytes": peak, "num_ooms": at}
        for step, peak, at in ((-1, 3, 1), (0, 9, 2), (1, 4, 3))
    ]
    assert (
        one.result() == {"allocated_peak_bytes": 9, "num_ooms": 3} and one._clock == [(7, 1.5)] * 2
    )


@pytest.mark.parametrize(("events", "before", "said"), [(4, 0, 0), (5, 0, 1), (1, 2, 1)])
def test_a_history_that_is_full_or_began_late_is_said(events, before, said):
    one = Recorder(history=History(), max_entries=5)
    one.recording = Its(snapshot=Its(events=[None] * events), before=before)
    one._look_back()
    assert len(one.notes) == said


# the beginning of a trace -------------------------------------------------------------------------


def spans(ranges):
    return [(part.start, part.end) for part in ranges]


def test_ranges_are_put_in_and_taken_out_by_their_ends():
    ranges = [_Range(10, 20, 0, None), _Range(30, 40, 0, None)]
    _insert(ranges, _Range(20, 30, 0, None))
    assert spans(ranges) == [(10, 20), (20, 30), (30, 40)]
    for start, end, at in ((19, 20, 19), (10, 11, 10), (39, 45, 39), (5, 11, 10)):
        with pytest.raises(ValueError, match=f"the memory at {at:#x} belongs to two"):
            _insert(list(ranges), _Range(start, end, 0, None))
    for start, end, left in (
        (10, 20, [(20, 30), (30, 40)]),
        (15, 35, [(10, 15), (35, 40)]),
        (22, 25, [(10, 20), (20, 22), (25, 30), (30, 40)]),
        (40, 50, spans(ranges)),
        (0, 10, spans(ranges)),
        (0, 50, []),
    ):
        _subtract(rest := list(ranges), start, end)
        assert spans(rest) == left


def test_a_side_is_by_size_or_else_by_the_nearest_that_is_known():
    sides = _KnownPools({0: [(100, True), (200, False)]}, 20)
    assert [sides.is_small(0, start, 40) for start in (90, 100, 140, 150, 151, 260)] == [
        True,
        True,
        True,
        True,
        False,
        False,
    ]
    assert sides.is_small(0, 260, 41) is True and sides.is_small(7, 100, 40) is False
    events = [
        Event(0, "alloc", 7, MIB, 0, None, 0, ""),
        Event(1, "alloc", 5, MIB + 1, 0, None, 0, ""),
        Event(2, "segment_map", 6, 2 * MIB, 0, None, 0, ""),
    ]
    known = beginning._known_pools(
        [_Range(9, 10, 0, True), _Range(8, 9, 0, None)], events, Settings()
    ).addresses
    assert known == {0: [(5, False), (7, True), (9, True)]}


def test_ranges_of_one_pool_that_touch_are_one():
    sides = _KnownPools({}, 20)
    joined = beginning._merged(
        [
            _Range(0, 20, 0, None),
            _Range(20, 40, 0, None),
            _Range(40, 41, 0, None),
            _Range(41, 61, 1, None),
            _Range(62, 82, 1, None),
        ],
        sides,
    )
    assert [(*each, part.small) for each, part in zip(spans(joined), joined, strict=True)] == [
        (0, 40, False),
        (40, 41, True),
        (41, 61, False),
        (62, 82, False),
    ]


def test_streams_of_their_own_pool_are_their_own():
    named = [beginning.stream_of(Its(stream=3, pool_id=pool)) for pool in (None, (0, 0), (0, 1))]
    assert named == [3, 3, "3 in pool (0, 1)"]


# floors, processes, owners ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "memory", "device", "bus", "s", "binds"),
    [
        (3, 2, 4, 5, 5, "bus"),
        (3, 2, 4, 4, 4, "compute"),
        (2, 2, 4, 1, 4, "compute"),
        (1, 2, 4, 1, 4, "memory"),
    ],
)
def test_what_binds(compute, memory, device, bus, s, binds):
    floor = Floor(compute, memory, device, bus)
    assert (floor.s, floor.binds) == (s, binds)


def test_a_floor_by_hand():
    work = {
        "forward": {
            "flops": {"bfloat16": 4e12, "float64": 1e12},
            "compulsory_bytes": 1e9,
            "bus_bytes": {"up": 3e9},
        },
        "backward": {
            "flops": {"float32": 1e12, "float16": 2e12},
            "compulsory_bytes": 9e9,
            "bus_bytes": {"down": 2e9, "up": 1e9},
        },
        "update": {"flops": {}, "compulsory_bytes": 2e9},
    }
    assert roofline(work, 2.0, 1.0, 2.0, 1.0) == Floor(5.0, 6.0, 3.0 + 4.5 + 1.0, 4.0)


@pytest.mark.parametrize(
    ("host", "found", "told"),
    [
        (True, {7: 1, 8: 2}, (7, "listed under its own number")),
        (False, {}, (0, "the driver lists no process on the card, as in many containers")),
        (False, {8: 2}, (8, "the only process on the card")),
        (True, {8: 2}, "probed"),
        (False, {7: 1, 8: 2}, "probed"),
    ],
)
def test_whose_process_it_is(monkeypatch, host, found, told):
    monkeypatch.setattr(nvml_process, "in_host_namespace", lambda: host)
    monkeypatch.setattr(nvml_process.os, "getpid", lambda: 7)
    monkeypatch.setattr(nvml_process, "_probe", lambda processes, held: "probed")
    assert nvml_process._recognize(found, None, "cuda") == told


def test_a_peak_is_over_the_baseline_and_never_under_it():
    assert process.Peak(10, "", 25).delta_bytes == 15 and process.Peak(10, "", 9).delta_bytes == 0


@pytest.mark.parametrize(
    ("high", "reset"), [(10 * MIB, True), (11 * MIB - 1, True), (11 * MIB, False)]
)
def test_a_mark_that_did_not_come_down_was_not_reset(monkeypatch, high, reset):
    monkeypatch.setattr(process, "Path", lambda path: Its(write_text=lambda text: None))
    monkeypatch.setattr(process, "_status", lambda field: {"VmHWM": high, "VmRSS": 10 * MIB}[field])
    assert process._reset_high_water() is reset
    assert process.peak_method() == (process.HIGH_WATER if reset else process.SAMPLED)


def test_figures_of_a_snapshot_are_of_that_device_and_its_latest_request():
    def segment(**its):
        return {
            "allocated_size": 3,
            "total_size": 10,
            "blocks": [
                {"size": 4, "state": "inactive"},
                {"size": 9, "state": "active_allocated"},
                {"size": 5, "state": "inactive"},
            ],
            **its,
        }

    raw = {
        "segments": [segment(), segment(device=1), segment(device=0, total_size=20)],
        "device_traces": [
            [
                {"action": "oom", "size": 6},
                {"action": "oom", "size": 7},
                {"action": "alloc", "size": 8},
            ]
        ],
    }
    assert oom.of_snapshot(raw, 0, 1, 2, 99) == {
        "free_bytes": 2,
        "capacity_bytes": 99,
        "asked_bytes": 7,
        "allocated_bytes": 6,
        "reserved_bytes": 30,
        "largest_free_block_bytes": 5,
    }
    found = oom.of_snapshot(raw, 1, 1, 2, 99)
    assert (found["asked_bytes"], found["reserved_bytes"]) == (1, 20)
