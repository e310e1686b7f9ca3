"""What was allocated and reserved when a recording began, found by running its trace backwards from
the end.

A snapshot has the segments and blocks at the end only. Undone in reverse, a segment that was asked
for was not there before, one that was returned was; and so for blocks.

Not exact: a block that was there at the beginning and freed later left only its requested size.
What that was rounded up to is computed, and a rest too small to have been split off is given to it:
all of a small gap, and of a large one what lies before the first block that was allocated in it, if
one was. Expandable ranges of one pool are taken for one segment that begins at the lowest address
the trace has of it; which pool a returned range was of, small or large, is taken from its size, or
where that says nothing from the nearest address of its stream that is known.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from .allocator import Allocator
from .settings import BLOCK_BYTES, SMALL_BYTES, SMALL_SEGMENT_BYTES, Settings
from .snapshot import DUMP, GROWS, SHRINKS, Event, Segment, Snapshot

LEAST_S, EVENT_S = 10.0, 0.2e-3
"""CPU seconds that any replay may take, and how many more an event: over ten times what recorded
programs need."""


def in_time(items: Sequence) -> Iterator:
    """The items one by one. What PyTorch records costs the simulator some microseconds an entry;
    but a file can claim a million free blocks, or gaps, and that each entry walks through all.
    Raises: ValueError, once the work takes longer than so many entries may."""
    began, allowed_s = time.process_time(), LEAST_S + EVENT_S * len(items)
    for number, item in enumerate(items):
        if time.process_time() - began > allowed_s:
            raise ValueError(
                f"replaying {number} of {len(items)} entries took over {allowed_s:.0f} s of CPU,"
                " many times what a recorded program needs: record fewer entries (max_entries), or"
                " check where the file is from"
            )
        yield item


@dataclass(frozen=True)
class _Range:
    """Reserved memory from `start` to `end`. `small`: its pool, None where nothing says."""

    start: int
    end: int
    stream: object
    small: bool | None


@dataclass
class _Used:
    """A block that is in use. `exact`: its size is what the allocator gave it, else what was
    requested."""

    bytes: int
    exact: bool
    completed: int = 0
    """The event after which it is free, where it was freed."""


def stream_of(item: Event | Segment) -> object:
    """Streams and private pools have free blocks of their own; both names together are a stream of
    the simulator. They are a string, because a file can choose pairs of numbers whose hashes are
    all the same."""
    return (
        item.stream if item.pool_id in (None, (0, 0)) else f"{item.stream} in pool {item.pool_id}"
    )


def adopt_beginning(allocator: Allocator, snapshot: Snapshot) -> None:
    """Put a new allocator into the state in which the trace begins. Its keys are addresses."""
    ranges, lowest = _ranges(snapshot), {}
    if allocator.settings.expandable_segments:
        sides = _Sides.of(ranges, snapshot.events, allocator.settings)
        ranges = _joined(ranges, sides)
        lowest = _lowest(ranges, snapshot.events, sides)
    used = _fit_into(ranges, snapshot, allocator.settings)
    pools: dict[tuple, tuple[list, list]] = defaultdict(lambda: ([], []))
    for part in ranges:
        places, blocks = pools[part.stream, part.small]
        places.append((part.start, part.end - part.start))
        blocks.extend(used.get(part.start, ()))
    for pool, (places, blocks) in pools.items():
        allocator.adopt(*pool, places, blocks, lowest.get(pool))


def _ranges(snapshot: Snapshot) -> list[_Range]:
    """Sorted by address, and apart. Raises: ValueError."""
    names_pools = any(
        event.pool_id is not None for event in snapshot.events
    )  # old traces do not: then no one does
    ranges: list[_Range] = []
    for s in in_time(snapshot.segments):
        _insert(
            ranges,
            _Range(
                s.address, s.address + s.bytes, stream_of(s) if names_pools else s.stream, s.small
            ),
        )
    for event in in_time(snapshot.events[::-1]):
        end = event.address + event.bytes
        if event.action in GROWS:
            _subtract(ranges, event.address, end)
        elif event.action in SHRINKS:
            small = event.bytes == SMALL_SEGMENT_BYTES if event.action == "segment_free" else None
            _insert(ranges, _Range(event.address, end, stream_of(event), small))
    return ranges


def _insert(ranges: list[_Range], part: _Range) -> None:
    at = bisect_left(ranges, part.start, key=lambda other: other.start)
    for other in ranges[max(at - 1, 0) : at + 1]:
        if other.start < part.end and part.start < other.end:
            raise ValueError(
                f"the memory at {max(part.start, other.start):#x} belongs to two segments at once:"
                f" the trace lacks segment_alloc entries; record it again with {DUMP}, without"
                " skip_actions"
            )
    ranges.insert(at, part)


@dataclass(frozen=True)
class _Sides:
    """Which of two expandable segments of a stream, the small pool's or the large one's, an address
    belongs to."""

    known: dict[object, list[tuple[int, bool]]]
    large_page_bytes: int

    @classmethod
    def of(cls, ranges: Iterable[_Range], events: Iterable[Event], settings: Settings) -> _Sides:
        known = defaultdict(list)
        for part in ranges:
            if part.small is not None:
                known[part.stream].append((part.start, part.small))
        for event in events:
            if event.action in ("alloc", "free_requested", "free_completed"):
                known[stream_of(event)].append(
                    (event.address, settings.round_bytes(event.bytes) <= SMALL_BYTES)
                )
        return cls(
            {stream: sorted(addresses) for stream, addresses in known.items()},
            settings.large_segment_bytes,
        )

    def small(self, stream: object, start: int, size: int) -> bool:
        if size % self.large_page_bytes:
            return True
        known = self.known.get(stream, [])
        at = bisect_left(known, (start,))
        return min(
            known[max(at - 1, 0) : at + 1],
            key=lambda other: abs(other[0] - start),
            default=(0, False),
        )[1]


def _joined(ranges: list[_Range], sides: _Sides) -> list[_Range]:
    """Expandable ranges with their pools; those of one pool that touch are one."""
    joined: list[_Range] = []
    for part in ranges:
        small = (
            sides.small(part.stream, part.start, part.end - part.start)
            if part.small is None
            else part.small
        )
        part = replace(part, small=small)
        if joined and joined[-1] == replace(part, start=joined[-1].start, end=part.start):
            part = replace(joined.pop(), end=part.end)
        joined.append(part)
    return joined


def _lowest(ranges: list[_Range], events: Iterable[Event], sides: _Sides) -> dict[tuple, int]:
    """The lowest address of each pool that has a range."""
    lowest: dict[tuple, int] = {}
    for part in ranges:
        lowest.setdefault((part.stream, part.small), part.start)
    for event in events:
        if event.action == "segment_map":
            stream = stream_of(event)
            pool = stream, sides.small(stream, event.address, event.bytes)
            page = SMALL_SEGMENT_BYTES if pool[1] else sides.large_page_bytes
            if (
                pool in lowest and (lowest[pool] - event.address) % page == 0
            ):  # else of a segment reserved later
                lowest[pool] = min(event.address, lowest[pool])
    return lowest


def _subtract(ranges: list[_Range], start: int, end: int) -> None:
    first = max(bisect_right(ranges, start, key=lambda part: part.start) - 1, 0)
    last = bisect_left(ranges, end, key=lambda part: part.start)
    kept = [
        piece
        for part in ranges[first:last]
        for piece in (
            replace(part, end=min(part.end, start)),
            replace(part, start=max(part.start, end)),
        )
        if piece.start < piece.end
    ]
    ranges[first:last] = kept


def _used(snapshot: Snapshot) -> dict[int, _Used]:
    """Blocks in use at the beginning, by address; those that another stream still awaits are in use
    too."""
    used = {
        piece.address: _Used(piece.bytes, True)
        for segment in snapshot.segments
        for piece in segment.pieces
        if piece.state != "inactive"
    }
    for index, event in reversed(list(enumerate(snapshot.events))):
        if event.action == "alloc":
            used.pop(event.address, None)
        elif event.action in ("free_requested", "free_completed"):
            used.setdefault(event.address, _Used(event.bytes, False, index))
    return used


def _fit_into(
    ranges: list[_Range], snapshot: Snapshot, settings: Settings
) -> dict[int, list[tuple]]:
    """Blocks in use by the start of their range, as `Allocator.adopt` wants them. What lies in no
    range is dropped: it was not the allocator's."""
    used, placed = _used(snapshot), defaultdict(list)
    first_allocated: dict[int, int] = {}
    for index, event in enumerate(snapshot.events):
        if event.action == "alloc":
            first_allocated.setdefault(event.address, index)
    later, addresses, starts = (
        sorted(first_allocated),
        sorted(used),
        [part.start for part in ranges],
    )
    for address, following in zip(addresses, [*addresses, 1 << 64][1:], strict=True):
        at = bisect_right(starts, address) - 1
        if at < 0 or address >= ranges[at].end:
            continue
        block, room, size = (
            used[address],
            min(following, ranges[at].end) - address,
            used[address].bytes,
        )
        if not block.exact:
            size = settings.round_bytes(size)
            rest = settings.least_rest_bytes(size)
            if room - size < rest:
                size = room
            else:
                # blocks are cut from the front of a free one: the earliest shows where it began
                near = later[
                    (first := bisect_right(later, address + size)) : first
                    + int(rest) // BLOCK_BYTES
                    + 1
                ]
                size = next(
                    (
                        front - address
                        for front in near
                        if front < address + size + rest
                        and first_allocated[front] < block.completed
                    ),
                    size,
                )
        placed[starts[at]].append((address, min(size, room), address))
    return placed
