"""The allocator simulator against a recorded snapshot: the same allocations and frees, event by event.

From the trace the simulator is fed allocations and frees, and the moments at which cached memory was returned to the
device, because no trace says who asked for it (the program, or the driver by refusing); an allocation for which the device
was asked right then is taken to the device. Everything else, most of all when a new segment is needed and how large it is,
it has to find by itself; the recorded segment events are the truth it is held against.

Not exact: what was there before recording began (`beginning`). Which of several equally large free blocks is used depends
on addresses, which the driver chose. CUDA graphs' pools are kept apart but returned like others. An expandable segment
never runs out of addresses. Garbage collection is not replayed: its trigger is in no snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .allocator import Allocator
from .beginning import adopt_beginning, stream_of
from .settings import Settings
from .snapshot import GROWS, MAX_BYTES, SHRINKS, Event, Snapshot, read_snapshot


@dataclass(frozen=True)
class Divergence:
    """The first event after which reserved bytes differ. `event`: its place in the trace, from 0."""

    event: int
    action: str
    recorded_bytes: int
    simulated_bytes: int


@dataclass(frozen=True)
class Replay:
    """What a replay found. `max_error`: the largest difference of reserved bytes after any event, as a share of what was
    recorded there (1.0 where nothing was). A segment event is held against the simulator after the allocation it serves."""

    device: int
    events: int
    recorded_peak_bytes: int
    simulated_peak_bytes: int
    max_error: float
    first_divergence: Divergence | None

    def as_dict(self) -> dict:
        found = self.first_divergence
        return {"device": self.device, "events": self.events,
                "reserved_peak_bytes": {"recorded": self.recorded_peak_bytes, "simulated": self.simulated_peak_bytes},
                "max_error": self.max_error, "first_divergence": None if found is None else asdict(found)}


def replay_file(path: Path | str, device: int | None = None, max_bytes: int = MAX_BYTES) -> Replay:
    """Read a snapshot and replay it. Raises: FileNotFoundError; ValueError, naming the file, the cause and the way out."""
    snapshot = read_snapshot(path, device, max_bytes)
    try:
        return replay(snapshot)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def replay(snapshot: Snapshot) -> Replay:
    """Raises: ValueError, for settings that are not simulated."""
    allocator = Allocator(_settings(snapshot))
    adopt_beginning(allocator, snapshot)
    recorded_peak = simulated_peak = allocator.reserved_bytes
    max_error, first = 0.0, None
    for event, recorded, simulated in _levels(allocator, snapshot.events):
        recorded_peak, simulated_peak = max(recorded_peak, recorded), max(simulated_peak, simulated)
        if recorded != simulated:
            max_error = max(max_error, abs(simulated - recorded) / recorded if recorded > 0 else 1.0)
            first = first or Divergence(event.number, event.action, recorded, simulated)
    return Replay(snapshot.device, len(snapshot.events), recorded_peak, simulated_peak, max_error, first)


def allocated_bytes(snapshot: Snapshot) -> dict[int, int]:
    """Number of each event -> bytes the allocator has handed out after it, blocks as large as it made them: no trace has this,
    the simulator finds it. Events in the middle of a growth or a run of returns are left out. Raises: as `replay`."""
    allocator = Allocator(_settings(snapshot))
    adopt_beginning(allocator, snapshot)
    return {event.number: allocator.allocated_bytes for event, *_ in _levels(allocator, snapshot.events)}


def _settings(snapshot: Snapshot) -> Settings:
    """As told, but segments are the kind that they are: some platforms ignore the setting, and old snapshots do not say."""
    expandable = (any(segment.expandable for segment in snapshot.segments)
                  or any(event.action in ("segment_map", "segment_unmap") for event in snapshot.events))
    return replace(Settings.parse(snapshot.settings), expandable_segments=expandable)


def _levels(allocator: Allocator, events: tuple[Event, ...]) -> Iterator[tuple[Event, int, int]]:
    """Reserved bytes, recorded and simulated, after each event whose consequences are complete: growth is, when the
    allocation it serves has been made; a run of returns, with its last."""
    recorded, alive = allocator.reserved_bytes, allocator.alive()
    for index, event in enumerate(events):
        if event.action in GROWS:
            recorded += event.bytes
            continue
        if event.action in SHRINKS:
            recorded -= event.bytes
            if index + 1 < len(events) and events[index + 1].action in SHRINKS:
                continue
            _shrink(allocator, recorded, _served(events, index))
        else:
            _feed(allocator, event, alive, cached=not _retried(events, index))
        yield event, recorded, allocator.reserved_bytes


def _retried(events: tuple[Event, ...], index: int) -> bool:
    """Whether cached memory was returned and the device asked just before: the retry does so, and does not look at what is
    cached again."""
    for actions in (GROWS, SHRINKS):
        before = index
        while index and events[index - 1].action in actions:
            index -= 1
        if index == before:
            return False
    return True


def _served(events: tuple[Event, ...], index: int) -> Event | None:
    """The allocation for which memory was returned at `index`: the device was asked for more, or returned more, until it."""
    for event in events[index + 1 :]:
        if event.action not in (*GROWS, *SHRINKS, "free_completed"):
            return event if event.action in ("alloc", "oom") else None
    return None


def _shrink(allocator: Allocator, recorded: int, served: Event | None) -> None:
    """A full device makes an allocation return oversize blocks first; if that is not what was recorded, then everything."""
    if allocator.settings.max_split_size_mb and served is not None:
        allocator.release_oversize(served.bytes, stream_of(served))
    if allocator.reserved_bytes != recorded:
        allocator.empty_cache()


def _feed(allocator: Allocator, event: Event, alive: set[int], cached: bool) -> None:
    """Addresses are the keys. A free of something never seen is passed over; an address that is handed out again was freed,
    whether or not the trace kept that."""
    address = event.address
    if event.action == "alloc":
        if address in alive:
            allocator.free_requested(address)
        allocator.free_completed(address)
        allocator.malloc(address, event.bytes, stream_of(event), cached)
        alive.add(address)
    elif event.action in ("free_requested", "free_completed"):
        if address in alive:
            allocator.free_requested(address)
            alive.remove(address)
        if event.action == "free_completed":
            allocator.free_completed(address)
