"""The recorder reads from an allocator's history the timeline that the meter sees from inside. The
history is our own simulator's, live under a training CPU: none of this was run on a GPU."""

from __future__ import annotations

import inspect
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

from simulated_history import SimulatedHistory, recorded
from vramlab.allocator.replay import replay
from vramlab.allocator.settings import Settings
from vramlab.allocator.simulate import simulate
from vramlab.allocator.snapshot import Event, Snapshot
from vramlab.capture.cuda_recorder import Recorder, watching
from vramlab.capture.recording import COLUMNS, PREFIX, Mark, Recording, read_recording
from vramlab.capture.simulated_recording import HistoryAllocator
from vramlab.regimes.regime import read_regimes

REGIMES = read_regimes()
SAME = ["step", "event", "bytes", "live_bytes", "category", "phase"]


def _device(frame):
    return frame[(frame["category"] != "host") & (frame["bytes"] > 0)].reset_index(drop=True)


@pytest.mark.parametrize("name", REGIMES)
def test_the_history_says_what_the_meter_saw(name):
    metered, recorder, _ = recorded(REGIMES[name])
    frame, wanted = recorder.frame(), _device(metered)
    assert tuple(frame.columns) == COLUMNS and frame["t_s"].is_monotonic_increasing
    different = (frame[SAME] != wanted[SAME]).any(axis=1)
    assert not different.any(), (
        frame[different].head(),
        wanted[different].head(),
        different.sum(),
        len(frame),
    )
    born = frame[frame["event"] == "alloc"].set_index("storage")["phase"]
    named = ~frame["storage"].map(born).isin(
        ("backward", "recompute")
    )  # whose modules no history knows
    assert (frame["module"] == wanted["module"])[named].all()
    assert recorder.notes == []


@pytest.mark.parametrize("name", ["full", "checkpoint", "lomo", "lora"])
def test_without_metadata_entries_are_placed_by_time(name):
    metered, recorder, _ = recorded(REGIMES[name], keeps_metadata=False)
    frame, wanted = recorder.frame(), _device(metered)
    assert not any(event.metadata for event in recorder.recording.snapshot.events)
    # of the two edges that lie within a microsecond of an entry, a few go to the other side
    assert (frame[SAME] == wanted[SAME]).all(axis=1).mean() > 0.97
    assert any("no metadata" in said for said in recorder.notes)


@pytest.mark.parametrize(
    "kept",
    [lambda own, born: "", lambda own, born: born, lambda own, born: "vllm"],
    ids=["none", "its allocation's", "somebody else's"],
)
def test_releases_that_have_no_mark_of_their_own_lie_where_their_time_says(kept):
    metered, recorder, _ = recorded(REGIMES["checkpoint"])
    born, events = {}, []
    for event in recorder.recording.snapshot.events:
        born |= {event.address: event.metadata} if event.action == "alloc" else {}
        free = event.action in ("free_requested", "free_completed")
        events.append(
            replace(event, metadata=kept(event.metadata, born[event.address])) if free else event
        )
    recording = replace(
        recorder.recording, snapshot=replace(recorder.recording.snapshot, events=tuple(events))
    )
    frame, wanted = recording.frame(), _device(metered)
    made = frame["event"] == "alloc"
    assert (
        frame[made][["step", "phase", "bytes"]] == wanted[made][["step", "phase", "bytes"]]
    ).all(axis=None)
    assert (frame[SAME] == wanted[SAME]).all(axis=1).mean() > 0.97


@pytest.mark.parametrize("expandable", [False, True])
def test_reserved_and_allocated_are_the_simulators_own(expandable):
    settings = Settings(expandable_segments=expandable)
    metered, recorder, _ = recorded(REGIMES["full"], settings=settings)
    wanted, frame = simulate(_device(metered), settings), recorder.frame()
    assert (frame["reserved_bytes"] == wanted.reserved_bytes).all() and (
        frame["allocated_bytes"] == wanted.allocated_bytes
    ).all()
    assert recorder.result()["reserved_peak_bytes"] == wanted.peak_reserved_bytes
    assert [peak["step"] for peak in recorder.peaks] == [-1, 0, 1, 2]
    assert (
        recorder.peak()["peak_bytes"]
        == metered["live_bytes"].max()
        == sum(recorder.peak(1)["categories"].values())
    )


def test_a_bounded_history_keeps_its_end_and_says_so():
    metered, recorder, trainer = recorded(REGIMES["full"], max_entries=1500)
    frame, wanted = recorder.frame(), _device(metered)
    assert len(recorder.recording.snapshot.events) == 1500 and "1,500 entries" in recorder.notes[0]
    # blocks that were never freed are known only as the allocator made them
    gap = frame["live_bytes"].iloc[-1] - wanted["live_bytes"].iloc[-1]
    assert 0 <= gap <= 512 * (frame.query("event == 'alloc'")["t_s"] == frame["t_s"].iloc[0]).sum()
    end, seen = (
        table[["event", "bytes", "phase"]].tail(500).to_numpy()
        for table in (frame[frame["step"] == 2], wanted)
    )
    assert (end == seen).all()


def test_a_recording_on_disk_is_the_recording(tmp_path):
    _, recorder, _ = recorded(REGIMES["checkpoint"], steps=2)
    recorder.write(tmp_path)
    again = read_recording(tmp_path)
    pd.testing.assert_frame_equal(again.frame(), recorder.frame())
    assert replay(again.snapshot).max_error == 0.0


def test_the_clock_is_the_processes_own():
    before = time.perf_counter()
    _, recorder, _ = recorded(REGIMES["full"], steps=1)
    t_s = recorder.frame()["t_s"]
    assert (
        before < t_s.iloc[0]
        and t_s.iloc[-1] < time.perf_counter()
        and t_s.iloc[-1] - t_s.iloc[0] > 1e-3
    )


def test_clocks_that_drift_apart_are_joined_between_their_readings():
    events = tuple(
        Event(at, "alloc", 512 * (at + 1), 512, 0, (0, 0), 1_000_000 + 500_000 * at, "vramlab:0")
        for at in range(5)
    )
    marks = (Mark(0, "init", "", 0, 0),)
    recording = Recording(
        Snapshot(0, events, (), ""), marks, (), ((1_000_000, 7.0), (3_000_000, 9.2))
    )
    assert recording.frame()["t_s"].tolist() == pytest.approx([7.0, 7.55, 8.1, 8.65, 9.2])
    assert replace(recording, clock=()).frame()["t_s"].isna().all()


def test_a_number_or_a_prefix_that_is_somebody_elses_is_no_mark():
    marks = tuple(
        Mark(0, phase, "", at, 10 * at) for at, phase in enumerate(("init", "forward", "backward"))
    )
    events = tuple(
        Event(at, "alloc", 512 * (at + 1), 512, 0, (0, 0), time_us, metadata)
        for at, (time_us, metadata) in enumerate(
            [(1, "2"), (11, f"{PREFIX}x"), (12, PREFIX), (13, f"{PREFIX}2")]
        )
    )
    frame = Recording(Snapshot(0, events, (), ""), marks, (), ()).frame()
    assert frame["phase"].tolist() == ["init", "forward", "forward", "backward"]


def test_an_error_leaves_what_was_recorded():
    kept = SimulatedHistory()
    recorder = Recorder(history=kept)
    with pytest.raises(MemoryError), recorder, recorder.phase("forward"):
        held = torch.ones(1000)
        raise MemoryError("no room")
    assert recorder.frame()["bytes"].tolist() == [held.nbytes] and recorder.frame()[
        "phase"
    ].tolist() == ["forward"]


def test_what_a_library_took_for_good_is_a_workspace_and_what_nobody_declared_has_a_lifetime():
    events = [
        ("alloc", 512, 8 << 20, 1),
        ("alloc", 1024, 100, 1),
        ("alloc", 2048, 60, 1),
        ("free_requested", 2048, 60, 1),
        ("free_requested", 1024, 100, 2),
    ]
    marks = tuple(
        Mark(0, phase, "m", at, 0) for at, phase in enumerate(("init", "forward", "backward"))
    )
    trace = tuple(
        Event(at, action, address, size, 0, (0, 0), at, f"{PREFIX}{mark}")
        for at, (action, address, size, mark) in enumerate(events)
    )
    frame = Recording(Snapshot(0, trace, (), ""), marks, (), (), workspace_bytes=8 << 20).frame()
    assert frame["category"].tolist() == [
        "workspace",
        "activations",
        "temporaries",
        "temporaries",
        "activations",
    ]


def test_without_cuda_it_says_what_to_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="the recorder needs CUDA.*use vramlab.capture.meter.Meter"
    ):
        Recorder()
    assert type(watching("cpu")).__name__ == "Meter"


def test_torch_has_what_the_recorder_asks_of_it():
    """Names and parameters of torch's own module, which exist on a CPU build too."""
    taken = inspect.signature(torch.cuda.memory._record_memory_history).parameters
    assert {"enabled", "context", "stacks", "max_entries", "clear_history"} <= set(taken)
    assert list(inspect.signature(torch.cuda.memory._set_memory_metadata).parameters) == [
        "metadata"
    ]
    assert "device" in inspect.signature(torch.cuda.memory._snapshot).parameters


class _Torch:
    """What of `torch.cuda` the recorder calls, and what was called."""

    def __init__(self, kept):
        figures = (
            "allocated_bytes.all.peak",
            "reserved_bytes.all.peak",
            "num_alloc_retries",
            "num_ooms",
        )
        self.answers, self.called = (
            {
                "_snapshot": kept.snapshot,
                "memory_stats": lambda: dict.fromkeys(figures, 3),
            },
            [],
        )

    def __getattr__(self, name):
        def call(*given, **options):
            self.called.append((name, given, options))
            return self.answers.get(name, lambda: None)()

        return call


def test_cuda_is_asked_to_record_without_stacks_before_anything_else_and_to_stop(monkeypatch):
    kept = HistoryAllocator()
    asked = _Torch(kept)
    for name in ("init", "reset_peak_memory_stats", "memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(asked, name))
    for name in ("_record_memory_history", "_snapshot"):
        monkeypatch.setattr(torch.cuda.memory, name, getattr(asked, name))
    monkeypatch.setattr(
        torch.cuda.memory, "_set_memory_metadata", lambda text: setattr(kept, "metadata", text)
    )
    monkeypatch.setattr(torch._C, "_cuda_setMemoryMetadata", None, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with Recorder(max_entries=50) as recorder:
        recorder.begin_step(0)
        with recorder.phase("forward"):
            kept.apply("alloc", "a", 1000)
        recorder.end_step()
    row = recorder.frame().iloc[0]
    assert (row["phase"], row["step"], row["bytes"], row["reserved_bytes"]) == (
        "forward",
        0,
        1000,
        2 << 20,
    )
    began = next(call for call in asked.called if call[0] == "_record_memory_history")
    assert began[1:] == (
        ("all",),
        {"context": None, "stacks": "python", "max_entries": 50, "clear_history": True},
    )
    assert [call[0] for call in asked.called][-2:] == [
        "_snapshot",
        "_record_memory_history",
    ] and kept.metadata == ""
    inside = [name for name, *_ in asked.called[:-3]]
    assert "synchronize" not in inside and recorder.peaks[-1]["allocated_peak_bytes"] == 3
