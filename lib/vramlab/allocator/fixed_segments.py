"""How an allocator's pools grow and shrink when each segment is one `cudaMalloc`: PyTorch's
default.

`ExpandableSegments` has the same methods. `grow` returns a block that is in no list, or None where
the device has no room; `shrink`, `release_oversize` and `collect` return memory to the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from .blocks import Block, Device, Pool
from .settings import Settings


class FixedSegments:
    """Each request to the driver is a segment of its own. A segment is returned whole, and only
    when none of its blocks is in use."""

    def __init__(self, device: Device, settings: Settings):
        self.device = device
        self.heads: set[Block] = set()  # the first block of each segment
        self._max_split = settings.max_split_bytes

    def grow(self, pool: Pool, size: int, segment_bytes: int) -> Block | None:
        if not self.device.reserve(segment_bytes):
            return None
        block = self._segment(pool, self.device.place(segment_bytes), segment_bytes)
        self.device.on_change("segment_alloc", block.address, segment_bytes, pool.stream)
        return block

    def _segment(self, pool: Pool, address: int, size: int) -> Block:
        block = Block(pool, address, address, size)
        self.heads.add(block)
        return block

    def adopt(self, pool: Pool, ranges: list[tuple[int, int]], lowest: int | None) -> list[Block]:
        """Segments that exist already, as (address, bytes): each becomes one free block in no list.
        `lowest` has no meaning here."""
        blocks = []
        for address, size in ranges:
            self.device.reserve(size)
            self.device.occupy(address, size)
            blocks.append(self._segment(pool, address, size))
        return blocks

    def _release(self, block: Block) -> None:
        block.pool.remove(block)
        self.heads.remove(block)
        self.device.release(block.bytes, block.address)
        self.device.on_change("segment_free", block.address, block.bytes, block.pool.stream)

    def shrink(self, pool: Pool) -> None:
        """Return every whole segment of the pool. C++: `release_blocks`."""
        for block in pool.blocks():
            if not block.split:
                self._release(block)

    def release_oversize(self, pool: Pool, size: int) -> bool:
        """Return the smallest oversize block that makes room for `size`, else the largest blocks
        until together they make room. True when they do. C++:
        `release_available_cached_blocks`."""
        if self._max_split == float("inf"):
            return False
        target, released = max(size, self._max_split), 0
        at = bisect_left(pool.free, (target,))
        if at < len(pool.free):
            self._release(pool.free[at][2])
            return True
        while pool.free and released < target and pool.free[-1][0] >= self._max_split:
            released += pool.free[-1][0]
            self._release(pool.free[-1][2])
        return released >= target

    def collect(self, pools: Iterable[Pool], excess_bytes: int) -> None:
        """Return whole segments of large pools that have been free for at least the mean time,
        until `excess_bytes` are returned. Time is counted in searches. C++:
        `garbage_collect_cached_blocks`."""
        waiting = [
            block for pool in pools if not pool.small for block in pool.blocks() if not block.split
        ]
        while excess_bytes > 0 and waiting:
            ages = {block: block.pool.searches[0] - block.born for block in waiting}
            mean = sum(ages.values()) / len(ages)
            due = [block for block in waiting if ages[block] >= mean]
            waiting = [block for block in waiting if ages[block] < mean]
            excess_bytes -= sum(block.bytes for block in due)
            for block in due:
                self._release(block)
