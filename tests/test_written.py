"""A snapshot that the simulator writes reads back as what was simulated, and replays without an
error."""

from __future__ import annotations

import contextlib
import pickle
from itertools import accumulate

from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from vramlab.allocator.allocator import OutOfMemory
from vramlab.allocator.replay import allocated_bytes, replay, replay_file
from vramlab.allocator.settings import MIB, Settings
from vramlab.allocator.simulate import simulate
from vramlab.allocator.snapshot import grown_bytes, parse_snapshot, read_snapshot
from vramlab.capture.simulated_recording import HistoryAllocator

SIZES = st.one_of(
    st.integers(1, 3000),
    st.integers(1, 2 * MIB),
    st.integers(MIB, 12 * MIB),
    st.integers(8 * MIB, 60 * MIB),
    st.sampled_from([0, 512, MIB, MIB + 1, 10 * MIB, 20 * MIB]),
)
KINDS = st.sampled_from(
    ["alloc"] * 6 + ["free"] * 3 + ["free_requested", "free_completed", "empty_cache"]
)
ACTS = st.lists(
    st.tuples(KINDS, SIZES, st.integers(0, 1), st.integers(0, 1 << 30)), min_size=1, max_size=120
)
SETTINGS = st.sampled_from(
    [
        Settings(),
        Settings(expandable_segments=True),
        Settings(max_split_size_mb=24),
        Settings(large_segment_size_mb=32),
        Settings(roundup_power2_divisions=(4,) * 16),
    ]
)


def _program(acts):
    """Acts on what is there: events as `HistoryAllocator.apply` takes them."""
    alive, awaited = [], []
    for number, (kind, size, stream, luck) in enumerate(acts):
        if kind == "alloc":
            alive.append(number)
            yield kind, number, size, stream
        elif kind == "empty_cache":
            awaited = []
            yield kind, None, 0, 0
        elif kind == "free_completed" and awaited:
            yield kind, awaited.pop(luck % len(awaited)), 0, 0
        elif kind in ("free", "free_requested") and alive:
            key = alive.pop(luck % len(alive))
            awaited += [key] * (kind == "free_requested")
            yield kind, key, 0, 0


def written(events, settings=Settings(), capacity_bytes=None):  # noqa: B008, frozen
    """The history of `events`, up to the first for which the device has no room."""
    history = HistoryAllocator(settings, capacity_bytes)
    with contextlib.suppress(OutOfMemory):
        for event in events:
            history.apply(*event)
    return history


def write_snapshot(path, history, **snapshot):
    """The file that `torch.cuda.memory._dump_snapshot` would have written."""
    path.write_bytes(pickle.dumps(history.snapshot(**snapshot), protocol=4))
    return path


def _told(history):
    return [
        (entry["action"], entry["addr"], entry["size"], entry["stream"], entry["user_metadata"])
        for entry in history.trace
    ]


@tries(max_examples=600, deadline=None)
@given(ACTS, SETTINGS, st.sampled_from([None, 80 * MIB, 200 * MIB]))
def test_what_is_written_is_read_and_replays_exactly(tmp_path_factory, acts, settings, capacity):
    history = HistoryAllocator(settings, capacity)
    for number, event in enumerate(_program(acts)):
        history.metadata = f"v{number}"
        with contextlib.suppress(
            OutOfMemory, ValueError
        ):  # full; or of what could then not be made
            history.apply(*event)
    if not history.trace:
        return
    path = write_snapshot(tmp_path_factory.mktemp("written") / "snapshot.pickle", history)
    snapshot = read_snapshot(path)
    assert [(e.action, e.address, e.bytes, e.stream, e.metadata) for e in snapshot.events] == _told(
        history
    )
    assert snapshot == parse_snapshot(history.snapshot(), 0)
    assert snapshot.reserved_bytes == history.reserved_bytes
    assert Settings.parse(snapshot.settings) == settings
    found = replay(snapshot)
    assert (found.max_error, found.simulated_peak_bytes) == (0.0, found.recorded_peak_bytes)
    last = snapshot.events[-1]
    assert last.action in ("oom", "segment_free", "segment_unmap") or (
        allocated_bytes(snapshot)[last.number] == history.allocated_bytes
    )


@tries(max_examples=60, deadline=None)
@given(ACTS, SETTINGS)
def test_a_history_is_what_the_simulation_says(acts, settings):
    events = list(_program(acts))
    history, wanted = written(events, settings), simulate(events, settings)
    grown = map(grown_bytes, parse_snapshot(history.snapshot(), 0).events)
    assert max(accumulate(grown), default=0) == wanted.peak_reserved_bytes
    kept = allocated_bytes(parse_snapshot(history.snapshot(), 0))
    assert max(kept.values(), default=0) == wanted.peak_allocated_bytes


def test_running_out_is_the_last_entry_and_has_what_the_driver_had_left(tmp_path):
    history = written(
        [("alloc", 1, 20 * MIB, 0), ("alloc", 2, 50 * MIB, 0), ("free", 1, 0, 0)],
        capacity_bytes=64 * MIB,
    )
    assert history.trace[-1] | {"time_us": 0} == {
        "action": "oom",
        "addr": 0,
        "size": 50 * MIB,
        "stream": 0,
        "frames": [],
        "time_us": 0,
        "user_metadata": "",
        "compile_context": "N/A",
        "device_free": 44 * MIB,
    }
    assert replay_file(write_snapshot(tmp_path / "oom.pickle", history)).max_error == 0.0


def test_a_full_device_completes_what_is_awaited_before_it_returns_it():
    history = HistoryAllocator(capacity_bytes=64 * MIB)
    for event in (("alloc", 1, 40 * MIB), ("free_requested", 1), ("alloc", 2, 50 * MIB)):
        history.apply(*event)
    assert [entry["action"] for entry in history.trace] == [
        "segment_alloc",
        "alloc",
        "free_requested",
        "free_completed",
        "segment_free",
        "segment_alloc",
        "alloc",
    ]
    assert replay(parse_snapshot(history.snapshot(), 0)).max_error == 0.0


def test_a_history_that_began_late_replays(tmp_path):
    history = HistoryAllocator()
    for key, size in enumerate((30 * MIB, 5 * MIB, 30 * MIB, 1000, 12 * MIB)):
        history.apply("alloc", key, size)
    history.apply("free", 2)
    history.apply("alloc", 9, 29 * MIB)
    found = replay_file(write_snapshot(tmp_path / "late.pickle", history, first=6, device=2))
    assert (found.device, found.max_error) == (2, 0.0)


def test_settings_are_written_as_they_are_read():
    told = Settings(
        expandable_segments=True,
        max_split_size_mb=64,
        garbage_collection_threshold=0.8,
        per_process_memory_fraction=0.5,
        roundup_power2_divisions=(0, 0, 4, 8) + (2,) * 12,
    )
    assert Settings.parse(told.text()) == told and Settings().text() == ""
