"""PyTorch's CUDA caching allocator, without CUDA: which block serves a request, and what is split,
merged, kept and returned to the driver.

It follows `DeviceCachingAllocator` of c10/cuda/CUDACachingAllocator.cpp (torch 2.11 to 2.13), so
reserved bytes can be forecast from a list of allocations. In short: a request is rounded up; the
smallest free block of its stream and size class that holds it is taken, and split when enough is
left over; else the driver is asked for a segment; a freed block merges with free neighbours of its
segment and stays cached. When the device is full, oversize blocks are returned, then every cached
segment that nothing uses, and the request is tried once more.

Units: bytes, integers. Not simulated: CUDA graphs' private pools, memory shared between processes,
the `cudaMallocAsync` backend. Not exact: the addresses of new segments, see `Device`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, cast

from .blocks import Block, Device, Pool, segment_views
from .expandable_segments import ExpandableSegments
from .fixed_segments import FixedSegments
from .settings import SMALL_BYTES, Settings
from .snapshot import Segment


@dataclass(frozen=True)
class Shortage:
    """Why a request could not be served, after everything that could be returned was returned.
    Units: bytes."""

    asked_bytes: int
    segment_bytes: int
    """The segment that the driver was asked for."""
    free_bytes: int
    """What the device had left."""
    allocated_bytes: int
    reserved_bytes: int
    largest_free_block_bytes: int
    """Of all streams; a larger request cannot be served from what is cached."""


class OutOfMemory(MemoryError):
    """The device is full. `shortage` has the figures."""

    def __init__(self, shortage: Shortage):
        self.shortage = shortage
        super().__init__(
            f"asked for {shortage.asked_bytes} bytes, a segment of {shortage.segment_bytes}: the"
            f" device has {shortage.free_bytes} left; {shortage.reserved_bytes} are reserved, of"
            f" which {shortage.allocated_bytes} allocated; the largest free block is"
            f" {shortage.largest_free_block_bytes}"
        )


class Allocator:
    """One device's allocator.

    `capacity_bytes`: how much the allocator may take of the device; None: without limit.
    `device_bytes`: the device's whole memory, of which settings take shares; by default the
    capacity. Keys name allocations; a key cannot be used again while its allocation is alive.
    `allocated_bytes` is what is handed out, `num_alloc_retries` counts the requests for which
    cached memory had to be returned to the driver.
    """

    def __init__(
        self,
        settings: Settings = Settings(),
        capacity_bytes: int | None = None,
        device_bytes: int | None = None,
    ):
        whole = None if capacity_bytes is None else device_bytes or capacity_bytes
        self.settings, self.device = settings, Device(capacity_bytes)
        self.allocated_bytes = self.num_alloc_retries = 0
        self._expandable, self._max_split = settings.expandable_segments, settings.max_split_bytes
        self._allowed = settings.allowed_bytes(whole)
        self._collects_above = settings.collects_above_bytes(whole)
        segments = ExpandableSegments if self._expandable else FixedSegments
        self._segments = segments(self.device, settings)
        self._pools: dict[tuple[Hashable, bool], Pool] = {}
        self._searches = {True: [0], False: [0]}
        self._live: dict[Hashable, Block | None] = {}
        self._awaiting: dict[Hashable, Block | None] = {}
        self._plans: dict[int, tuple[int, bool, int, float]] = {}

    @property
    def reserved_bytes(self) -> int:
        return self.device.reserved_bytes

    def __contains__(self, key: Hashable) -> bool:
        """Whether `key` is allocated; what another stream still awaits is not."""
        return key in self._live

    # a request ------------------------------------------------------------------------------------

    def malloc(self, key: Hashable, size: int, stream: Hashable = 0, cached: bool = True) -> None:
        """Serve a request of `size` bytes on a stream; 0 bytes take no memory. `cached=False`: from
        the driver, without a search among cached blocks. Raises: OutOfMemory; ValueError, for a key
        that is alive or a negative size."""
        if key in self._live or key in self._awaiting:
            raise ValueError(f"{key!r} is allocated already: free it first, or use another key")
        if size <= 0:
            if size < 0:
                raise ValueError(f"{key!r} asks for {size} bytes: sizes begin at 0")
            self._live[key] = None
            return
        rounded, small, segment_bytes, least_rest = self._plans.get(size) or self._plan(size)
        pool = self._pools.get((stream, small)) or self.pool(stream, small)
        block = (cached and self._fit(pool, rounded)) or self._grow(
            pool, rounded, segment_bytes, size
        )
        if block.bytes - rounded >= least_rest:
            pool.add(block.cut(rounded))
        self._hand_out(block, key)

    def _plan(self, size: int) -> tuple[int, bool, int, float]:
        """What depends on the size alone: (rounded size, whether the small pool serves it, segment
        size, the least rest that is worth a split)."""
        rounded = self.settings.round_bytes(size)
        segment_bytes = self.settings.segment_bytes(rounded)
        least_rest = self.settings.least_rest_bytes(rounded)
        self._plans[size] = rounded, rounded <= SMALL_BYTES, segment_bytes, least_rest
        return self._plans[size]

    def pool(self, stream: Hashable, small: bool) -> Pool:
        """The free blocks of a stream and size class."""
        return self._pools.setdefault((stream, small), Pool(stream, small, self._searches[small]))

    def _fit(self, pool: Pool, size: int) -> Block | None:
        """Best fit. C++: `get_free_block`."""
        free = pool.free
        pool.searches[0] += 1
        at = bisect_left(free, (size,))
        if at == len(free):
            return None
        if self._expandable:
            at = _least_expandable(free, at)
        block = free[at][2]
        if size < self._max_split:
            if block.bytes >= self._max_split:
                return None
        elif block.bytes >= size + self.settings.non_split_rounding_bytes:
            return None
        del free[at]
        return block

    def _hand_out(self, block: Block, key: Hashable) -> None:
        block.active, block.key = True, key
        self._live[key] = block
        self.allocated_bytes += block.bytes

    def _grow(self, pool: Pool, size: int, segment_bytes: int, asked_bytes: int) -> Block:
        """Ask the driver; when it refuses, return cached memory and ask again. C++: `malloc`, from
        `alloc_block` on."""
        if self._collects_above is not None and self.reserved_bytes > self._collects_above:
            self._segments.collect(self._pools.values(), self.reserved_bytes - self._collects_above)
        block = self._ask_driver(pool, size, segment_bytes)
        if block is None and self._segments.release_oversize(pool, size):
            block = self._ask_driver(pool, size, segment_bytes)
        if block is None:
            self.empty_cache()
            self.num_alloc_retries += 1
            block = self._ask_driver(pool, size, segment_bytes)
        if block is None:
            raise OutOfMemory(self._shortage(asked_bytes, segment_bytes))
        return block

    def _ask_driver(self, pool: Pool, size: int, segment_bytes: int) -> Block | None:
        """A new block; None where the driver, or the share that may be reserved, has no room. C++:
        `alloc_block`."""
        if self._allowed is not None and self.reserved_bytes + segment_bytes > self._allowed:
            return None
        return self._segments.grow(pool, size, segment_bytes)

    def _shortage(self, asked_bytes: int, segment_bytes: int) -> Shortage:
        return Shortage(
            asked_bytes,
            segment_bytes,
            cast(int, self.device.capacity_bytes) - self.reserved_bytes,
            self.allocated_bytes,
            self.reserved_bytes,
            max((pool.free[-1][0] for pool in self._pools.values() if pool.free), default=0),
        )

    # a free ---------------------------------------------------------------------------------------

    def free(self, key: Hashable) -> None:
        """Give a block back to its pool at once. Raises: ValueError, for a key that is not
        allocated."""
        block = self._remove(key)
        if block is not None:
            self._give_back(block)

    def free_requested(self, key: Hashable) -> None:
        """The program gives the block up, but another stream may still use it: it is not used again
        before `free_completed`. Raises: as `free`."""
        self._awaiting[key] = self._remove(key)

    def _remove(self, key: Hashable) -> Block | None:
        if key not in self._live:
            raise ValueError(
                f"{key!r} is not allocated: it was freed already, or its allocation is missing"
            )
        block = self._live.pop(key)
        if block is not None:
            self.allocated_bytes -= block.bytes
        return block

    def free_completed(self, key: Hashable) -> None:
        """No stream awaits the block any more. A second call is no error: `empty_cache` completes
        all blocks that are awaited."""
        block = self._awaiting.pop(key, None)
        if block is not None:
            self._give_back(block)

    def _give_back(self, block: Block) -> None:
        block.active, block.key = False, None
        block.pool.add_merged(block)

    # returning memory to the device ---------------------------------------------------------------

    def empty_cache(self) -> None:
        """Return every cached segment of which nothing is in use. C++: `release_cached_blocks`."""
        for key in list(self._awaiting):
            self.free_completed(key)
        for pool in self._pools.values():
            self._segments.shrink(pool)

    def release_oversize(self, size: int, stream: Hashable = 0) -> bool:
        """Return oversize blocks only, as a request of `size` does first when the device is full.
        False: not enough were returned."""
        rounded, small, *_ = self._plan(size)
        return self._segments.release_oversize(self.pool(stream, small), rounded)

    # the state of the memory ----------------------------------------------------------------------

    def adopt(
        self,
        stream: Hashable,
        small: bool,
        ranges: list[tuple[int, int]],
        used: list[tuple[int, int, Hashable]],
        lowest: int | None = None,
    ) -> None:
        """Begin with memory that is reserved already: `ranges` of (address, bytes), and in them the
        allocated blocks in `used`, of (address, bytes, key). Both are sorted by address; blocks lie
        inside a range and do not overlap. `lowest`: where an expandable segment begins, by default
        at its first range."""
        pool, used, free = self.pool(stream, small), used[::-1], []
        for block in self._segments.adopt(pool, ranges, lowest):
            end = block.address + block.bytes
            while used and used[-1][0] < end:
                address, size, key = used.pop()
                if address > block.address:
                    before, block = block, block.cut(address - block.address)
                    free.append(before)
                rest: Any = block.cut(size) if block.bytes > size else None
                self._hand_out(block, key)
                block = rest
            if block is not None:
                free.append(block)
        # in this order each block is the pool's last when it is added
        for block in sorted(free, key=lambda block: (block.bytes, block.address)):
            pool.add(block)

    def address(self, key: Hashable) -> int | None:
        """The address of an allocation, or of a block that is awaited; None for one of 0 bytes."""
        block = self._live[key] if key in self._live else self._awaiting[key]
        return None if block is None else block.address

    def segments(self) -> list[Segment]:
        """All reserved memory, by address."""
        return segment_views(self._segments.heads, self._awaiting, self._expandable)


def _least_expandable(free: list[tuple[int, int, Block]], at: int) -> int:
    """A block that could grow into unmapped pages counts as large as it could get, so a later one
    may fit better."""

    def reach(index: int) -> int:
        block = free[index][2]
        after = block.next
        return block.bytes + (after.bytes if after is not None and not after.mapped else 0)

    while at + 1 < len(free) and reach(at + 1) < reach(at):
        at += 1
    return at
