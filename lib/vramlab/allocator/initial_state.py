"""What was allocated and reserved when a recording began, found by undoing its trace from the end.

A snapshot has the segments and blocks at the end only. Undone in reverse, a segment that was
allocated was not there before, and one that was returned was; and so for blocks.

Not exact: of a block that was in use at the beginning and freed later only the requested size is
recorded. Its rounded size is computed, and a rest too small to have been split off is added: all of
a small gap, and of a large one the part before the first block that was allocated in it, if there
is one. Expandable ranges of a pool are taken for a single segment, which begins at the lowest
address that the trace has of it. Whether a returned range belonged to the small pool is inferred
from its size, or where the size does not decide from the nearest known address of its stream.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from .allocator import Allocator
from .safe_pickle import DUMP
from .settings import BLOCK_BYTES, SMALL_BYTES, SMALL_SEGMENT_BYTES, Settings
from .snapshot import GROWS, SHRINKS, Event, Segment, Snapshot

LEAST_S, EVENT_S = 10.0, 0.2e-3
"""CPU seconds that any replay may take, and how many more for each event: over ten times what
recorded programs need."""


def limit_time(items: Sequence) -> Iterator:
    """The items one by one. What PyTorch records costs the simulator some microseconds an entry;
    but a file can claim a million free blocks, or gaps, and make each entry walk through all of
    them. Raises: ValueError, once the work takes longer than so many entries may."""
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
    """Reserved memory from `start` to `end`. `small`: whether it belongs to the small pool; None
    where nothing says."""

    start: int
    end: int
    stream: object
    small: bool | None


@dataclass
class _Used:
    """A block that is in use. `exact`: `bytes` is the block's size, else the requested size."""

    bytes: int
    exact: bool
    completed: int = 0
    """The number of the event that frees it, where one does."""


def stream_of(item: Event | Segment) -> object:
    """The simulator's stream: each stream and each private pool has free blocks of its own. The
    name of both together is a string, because a file can choose pairs of numbers whose hashes are
    all equal."""
    private = item.pool_id not in (None, (0, 0))
    return f"{item.stream} in pool {item.pool_id}" if private else item.stream


def adopt_initial_state(allocator: Allocator, snapshot: Snapshot) -> None:
    """Put a new allocator into the state in which the trace begins. Its keys are addresses."""
    ranges, lowest = _ranges(snapshot), {}
    if allocator.settings.expandable_segments:
        known = _known_pools(ranges, snapshot.events, allocator.settings)
        ranges = _merged(ranges, known)
        lowest = _lowest(ranges, snapshot.events, known)
    used = _used_by_range(ranges, snapshot, allocator.settings)
    pools: dict[tuple, tuple[list, list]] = defaultdict(lambda: ([], []))
    for part in ranges:
        places, blocks = pools[part.stream, part.small]
        places.append((part.start, part.end - part.start))
        blocks.extend(used.get(part.start, ()))
    for (stream, small), (places, blocks) in pools.items():
        allocator.adopt(stream, small, places, blocks, lowest.get((stream, small)))


# reserved memory ----------------------------------------------------------------------------------


def _ranges(snapshot: Snapshot) -> list[_Range]:
    """What was reserved, sorted by address. Raises: ValueError, where two ranges overlap."""
    # old traces do not name private pools: then the segments' pools are left out too
    names_pools = any(event.pool_id is not None for event in snapshot.events)
    ranges: list[_Range] = []
    for segment in limit_time(snapshot.segments):
        stream = stream_of(segment) if names_pools else segment.stream
        end = segment.address + segment.bytes
        _insert(ranges, _Range(segment.address, end, stream, segment.small))
    for event in limit_time(snapshot.events[::-1]):
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


def _subtract(ranges: list[_Range], start: int, end: int) -> None:
    first = max(bisect_right(ranges, start, key=lambda part: part.start) - 1, 0)
    last = bisect_left(ranges, end, key=lambda part: part.start)
    pieces = [
        piece
        for part in ranges[first:last]
        for piece in (
            replace(part, end=min(part.end, start)),
            replace(part, start=max(part.start, end)),
        )
    ]
    ranges[first:last] = [piece for piece in pieces if piece.start < piece.end]


# expandable ranges and their pools ----------------------------------------------------------------


@dataclass(frozen=True)
class _KnownPools:
    """For each stream the addresses, sorted, of which it is known whether they are in the small
    pool's expandable segment or in the large pool's."""

    addresses: dict[object, list[tuple[int, bool]]]
    large_page_bytes: int

    def is_small(self, stream: object, start: int, size: int) -> bool:
        """Whether the range at `start` is in the small pool's segment."""
        if size % self.large_page_bytes:
            return True
        known = self.addresses.get(stream, [])
        at = bisect_left(known, (start,))
        neighbours = known[max(at - 1, 0) : at + 1]
        nearest = min(neighbours, key=lambda known: abs(known[0] - start), default=(0, False))
        return nearest[1]


def _known_pools(
    ranges: Iterable[_Range], events: Iterable[Event], settings: Settings
) -> _KnownPools:
    known = defaultdict(list)
    for part in ranges:
        if part.small is not None:
            known[part.stream].append((part.start, part.small))
    for event in events:
        if event.action in ("alloc", "free_requested", "free_completed"):
            small = settings.round_bytes(event.bytes) <= SMALL_BYTES
            known[stream_of(event)].append((event.address, small))
    addresses = {stream: sorted(places) for stream, places in known.items()}
    return _KnownPools(addresses, settings.large_segment_bytes)


def _merged(ranges: list[_Range], known: _KnownPools) -> list[_Range]:
    """Expandable ranges with their pools; adjacent ranges of the same pool are merged."""
    merged: list[_Range] = []
    for part in ranges:
        if part.small is None:
            size = part.end - part.start
            part = replace(part, small=known.is_small(part.stream, part.start, size))
        if merged and merged[-1] == replace(part, start=merged[-1].start, end=part.start):
            part = replace(merged.pop(), end=part.end)
        merged.append(part)
    return merged


def _lowest(ranges: list[_Range], events: Iterable[Event], known: _KnownPools) -> dict[tuple, int]:
    """(stream, whether small) -> the lowest address of each pool that has a range."""
    lowest: dict[tuple, int] = {}
    for part in ranges:
        lowest.setdefault((part.stream, part.small), part.start)
    for event in events:
        if event.action == "segment_map":
            stream = stream_of(event)
            pool = stream, known.is_small(stream, event.address, event.bytes)
            page = SMALL_SEGMENT_BYTES if pool[1] else known.large_page_bytes
            # at another distance the address is of a segment that was reserved later
            if pool in lowest and (lowest[pool] - event.address) % page == 0:
                lowest[pool] = min(event.address, lowest[pool])
    return lowest


# blocks in use ------------------------------------------------------------------------------------


def _used(snapshot: Snapshot) -> dict[int, _Used]:
    """Blocks in use at the beginning, by address; those that another stream still awaits count as
    in use."""
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


def _used_by_range(
    ranges: list[_Range], snapshot: Snapshot, settings: Settings
) -> dict[int, list[tuple]]:
    """The start of each range -> its blocks in use, as `Allocator.adopt` takes them. A block
    outside of every range is dropped: it was not the allocator's."""
    used, placed = _used(snapshot), defaultdict(list)
    first_allocated: dict[int, int] = {}
    for index, event in enumerate(snapshot.events):
        if event.action == "alloc":
            first_allocated.setdefault(event.address, index)
    later, addresses = sorted(first_allocated), sorted(used)
    starts = [part.start for part in ranges]
    for address, following in zip(addresses, [*addresses, 1 << 64][1:], strict=True):
        at = bisect_right(starts, address) - 1
        if at < 0 or address >= ranges[at].end:
            continue
        block, room = used[address], min(following, ranges[at].end) - address
        size = block.bytes if block.exact else settings.round_bytes(block.bytes)
        rest = 0 if block.exact else settings.least_rest_bytes(size)
        if room - size < rest:
            size = room
        elif not block.exact:
            # blocks are cut from the front of a free one: the earliest shows where that began
            end = bisect_right(later, address + size)
            near = later[end : end + int(rest) // BLOCK_BYTES + 1]
            fronts = (
                front - address
                for front in near
                if front < address + size + rest and first_allocated[front] < block.completed
            )
            size = next(fronts, size)
        placed[starts[at]].append((address, min(size, room), address))
    return placed
