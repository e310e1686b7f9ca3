"""The allocator simulator checked against a recorded snapshot: the same allocations and frees,
event by event.

The simulator is given the trace's allocations and frees, and the moments at which cached memory was
returned to the device, because no trace says who asked for that (the program, or the driver by
refusing). An allocation for which the trace asks the device at once is not served from cached
blocks, and a new segment gets the address that the trace has for one of its size, because addresses
decide which of several equally large free blocks is used. The simulator must find everything else
by itself, most of all when a new segment is needed and how large it is; the recorded segment events
are the truth that it is compared with.

Not exact: what was reserved before the recording began (`initial_state`). CUDA graphs' pools are
kept apart, but returned like others. An expandable segment never runs out of addresses. Garbage
collection is not replayed: its trigger is in no snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path

from .allocator import Allocator
from .initial_state import adopt_initial_state, limit_time, stream_of
from .safe_pickle import DUMP
from .settings import Settings
from .snapshot import GROWS, MAX_BYTES, SHRINKS, Event, Snapshot, grown_bytes, read_snapshot

TOLERANCE = 0.01
"""Largest relative error of a replay that counts as agreement, unless the caller chooses
another."""
_CAUSES = {  # (memory was returned?, more is simulated than recorded?)
    (
        True,
        True,
    ): "the simulator could return less cached memory to the device than the trace returned",
    (
        True,
        False,
    ): "the simulator could return more cached memory to the device than the trace returned",
    (False, True): (
        "the simulator had no cached block that fits and asked the device for more than the"
        " trace did"
    ),
    (False, False): (
        "the trace asked the device for more, where the simulator used a cached block or a smaller"
        " segment"
    ),
}


@dataclass(frozen=True)
class Divergence:
    """The first event after which reserved bytes differ. `event`: its number in the trace, from
    0."""

    event: int
    action: str
    recorded_bytes: int
    simulated_bytes: int

    @property
    def cause(self) -> str:
        """What the simulator did and the recorded allocator did not, in words."""
        return _CAUSES[self.action in SHRINKS, self.simulated_bytes > self.recorded_bytes]


@dataclass(frozen=True)
class Replay:
    """The outcome of a replay. `max_error`: the largest difference of reserved bytes after any
    event, as a share of the recorded bytes (1.0 where there were none). A segment event is compared
    after the allocation that it serves. Allocated bytes are in no trace; those at its end are the
    sum of the snapshot's blocks in use."""

    device: int
    events: int
    recorded_peak_bytes: int
    simulated_peak_bytes: int
    recorded_allocated_bytes: int
    simulated_allocated_bytes: int
    max_error: float
    first_divergence: Divergence | None
    missing_bytes: int
    """Bytes of the snapshot's segments that the entries of the trace do not account for; negative
    where segments are missing. 0, unless segment entries were not recorded."""
    note: str
    """What the replay could not know, in words; empty where the trace is complete."""

    @property
    def error(self) -> float:
        """The larger relative error of peak reserved bytes and of bytes allocated at the end."""
        return max(
            _relative(self.recorded_peak_bytes, self.simulated_peak_bytes),
            _relative(self.recorded_allocated_bytes, self.simulated_allocated_bytes),
        )

    def agrees(self, tolerance: float = TOLERANCE) -> bool:
        """Whether `error` is at most `tolerance`, and the trace complete enough to say so."""
        return self.error <= tolerance and not self.missing_bytes

    def verdict(self, tolerance: float = TOLERANCE) -> str:
        """One sentence."""
        first, word = self.first_divergence, "within" if self.agrees(tolerance) else "beyond"
        if self.missing_bytes:
            return (
                f"cannot be judged: the segments at the end have {self.missing_bytes:+,} bytes"
                " against what the trace accounts for, so segment entries are missing; record it"
                f" again with {DUMP}, without skip_actions"
            )
        errors = (
            f"{word} {tolerance:.2%}: peak reserved and final allocated bytes are off by at most"
            f" {self.error:.2%}; "
        )
        where = (
            f"recorded and simulated reserved bytes agree after each of {self.events:,} events"
            if first is None
            else (
                f"diverges at event {first.event} ({first.action}), {first.recorded_bytes:,} bytes"
                f" reserved and {first.simulated_bytes:,} simulated, because {first.cause}"
            )
        )
        return (
            ("exact: " if first is None and not self.error else errors)
            + where
            + (self.note and f"; {self.note}")
        )

    def as_dict(self, tolerance: float = TOLERANCE) -> dict:
        """Plain data. Raises: ValueError, for a tolerance that is no share."""
        if not 0 <= tolerance < inf:
            raise ValueError(
                f"tolerance is {tolerance}: it must be a number from 0 on, 0.01 for one per cent"
            )
        return {
            "verdict": self.verdict(tolerance),
            "agrees": self.agrees(tolerance),
            "tolerance": tolerance,
            "error": self.error,
            "device": self.device,
            "events": self.events,
            "reserved_peak_bytes": {
                "recorded": self.recorded_peak_bytes,
                "simulated": self.simulated_peak_bytes,
            },
            "allocated_end_bytes": {
                "recorded": self.recorded_allocated_bytes,
                "simulated": self.simulated_allocated_bytes,
            },
            "max_error": self.max_error,
            "first_divergence": (
                self.first_divergence
                and {**asdict(self.first_divergence), "cause": self.first_divergence.cause}
            ),
        }


def replay_file(path: Path | str, device: int | None = None, max_bytes: int = MAX_BYTES) -> Replay:
    """Read a snapshot and replay it. Raises: FileNotFoundError; ValueError, naming the file, the
    cause and the way out."""
    snapshot = read_snapshot(path, device, max_bytes)
    try:
        return replay(snapshot)
    except ValueError as error:
        raise ValueError(f"{path}: {error!s:.2000}") from None


def replay(snapshot: Snapshot) -> Replay:
    """Replay a snapshot. Raises: ValueError, for settings that are not simulated, and for a trace
    that allocates nothing or contradicts itself."""
    events = snapshot.events
    if not any(event.action == "alloc" and event.bytes for event in events):
        raise ValueError(
            f"none of the {len(events)} entries of device {snapshot.device} allocates memory, so"
            f" there is nothing to replay: record it with {DUMP} around the program's work, without"
            " skip_actions"
        )
    allocator = Allocator(_settings(snapshot))
    adopt_initial_state(allocator, snapshot)
    before = recorded_peak = simulated_peak = allocator.reserved_bytes
    max_error, first = 0.0, None
    for event, recorded, simulated in _levels(allocator, events):
        recorded_peak, simulated_peak = max(recorded_peak, recorded), max(simulated_peak, simulated)
        if recorded != simulated:
            max_error = max(max_error, _relative(recorded, simulated))
            first = first or Divergence(event.number, event.action, recorded, simulated)
    pieces = [piece for segment in snapshot.segments for piece in segment.pieces]
    notes = []
    if before:
        notes.append(
            f"{before:,} bytes were reserved before the recording began, and their blocks are"
            " reconstructed"
        )
    if not any(event.action in GROWS for event in events):
        notes.append(
            "the trace asks the device for nothing (it began late, or skip_actions left"
            " segment_alloc out), so this is about cached memory alone"
        )
    return Replay(
        device=snapshot.device,
        events=len(events),
        recorded_peak_bytes=recorded_peak,
        simulated_peak_bytes=simulated_peak,
        recorded_allocated_bytes=sum(p.bytes for p in pieces if p.state == "active_allocated"),
        simulated_allocated_bytes=allocator.allocated_bytes,
        max_error=max_error,
        first_divergence=first,
        missing_bytes=snapshot.reserved_bytes - before - sum(map(grown_bytes, events)),
        note="; ".join(notes),
    )


def _relative(recorded: int, simulated: int) -> float:
    """The difference as a share of what was recorded; 1.0 where nothing was."""
    return abs(simulated - recorded) / recorded if recorded > 0 else float(simulated != recorded)


def allocated_bytes(snapshot: Snapshot) -> dict[int, int]:
    """Number of each event -> bytes of the blocks that are handed out after it. No trace has this:
    the simulator finds it. Events in the middle of a growth or of a run of returns are left out.
    Raises: as `replay`."""
    allocator = Allocator(_settings(snapshot))
    adopt_initial_state(allocator, snapshot)
    return {
        event.number: allocator.allocated_bytes for event, *_ in _levels(allocator, snapshot.events)
    }


def _settings(snapshot: Snapshot) -> Settings:
    """The snapshot's settings, but with the kind of segments that it really has: some platforms
    ignore the setting, and old snapshots do not name it."""
    expandable = any(segment.expandable for segment in snapshot.segments) or any(
        event.action in ("segment_map", "segment_unmap") for event in snapshot.events
    )
    return replace(Settings.parse(snapshot.settings), expandable_segments=expandable)


def _levels(allocator: Allocator, events: tuple[Event, ...]) -> Iterator[tuple[Event, int, int]]:
    """(event, recorded, simulated reserved bytes) after each event whose consequences are complete:
    those of a growth are, once the allocation that it serves is made; those of a run of returns
    with its last."""
    recorded, served = allocator.reserved_bytes, _served(events)
    # a retry returns cached memory, asks the device and does not look at what is cached again
    returned = retried = False
    for index, event in enumerate(limit_time(events)):
        if event.action in GROWS:
            recorded, retried = recorded + event.bytes, returned
            allocator.device.recorded.append((event.address, event.bytes))
            continue
        if event.action in SHRINKS:
            recorded, returned, retried = recorded - event.bytes, True, False
            if index + 1 < len(events) and events[index + 1].action in SHRINKS:
                continue
            _return_cached(allocator, recorded, served[index])
        else:
            _feed(allocator, event, cached=not retried)
            returned = retried = False
            allocator.device.recorded.clear()
        yield event, recorded, allocator.reserved_bytes


def _served(events: tuple[Event, ...]) -> list[Event | None]:
    """(events,) the allocation for which an event may have returned memory: the next one, with
    nothing but growths and returns before it."""
    served: list[Event | None] = []
    following = None
    for event in reversed(events):
        served.append(following)
        if event.action not in (*GROWS, *SHRINKS, "free_completed"):
            following = event if event.action in ("alloc", "oom") else None
    return served[::-1]


def _return_cached(allocator: Allocator, recorded: int, served: Event | None) -> None:
    """When the device is full, an allocation returns oversize blocks first; where that does not
    give the recorded bytes, everything that is cached was returned."""
    if allocator.settings.max_split_size_mb and served is not None:
        allocator.release_oversize(served.bytes, stream_of(served))
    if allocator.reserved_bytes != recorded:
        allocator.empty_cache()


def _feed(allocator: Allocator, event: Event, cached: bool) -> None:
    """Addresses are the keys. A free of an unknown address is ignored; an address that is handed
    out again was freed, whether or not the trace has the free."""
    address = event.address
    if address in allocator and event.action != "oom":
        allocator.free_requested(address)
    if event.action in ("alloc", "free_completed"):
        allocator.free_completed(address)
    if event.action == "alloc":
        allocator.malloc(address, event.bytes, stream_of(event), cached)
