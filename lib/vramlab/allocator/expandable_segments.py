"""How an allocator's pools grow and shrink under `expandable_segments`: pages are mapped into a
range of addresses.

It follows `find_expandable_block`, `map_block` and `unmap_block` of CUDACachingAllocator.cpp and
has the methods of `FixedSegments`. Not verified on a GPU. Not exact: a range has 9/8 of the
capacity, and in PyTorch 9/8 of the whole device. Not simulated: segments of both kinds in one run,
which PyTorch has when the setting is changed midway.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from itertools import accumulate, takewhile
from typing import cast

from .blocks import Block, Device, Pool
from .settings import SMALL_SEGMENT_BYTES, Settings

ADDRESS_SPACE_BYTES = 1 << 44
"""Of a segment where no capacity is given: more than any device has."""


class ExpandableSegments:
    """Each pool has a range of addresses, larger than the device, and maps pages into its lowest
    gap as it needs them."""

    def __init__(self, device: Device, settings: Settings):
        self.device = device
        self.heads: set[Block] = set()
        self._large_page_bytes = settings.large_segment_bytes

    def _page_bytes(self, pool: Pool) -> int:
        return SMALL_SEGMENT_BYTES if pool.small else self._large_page_bytes

    def grow(self, pool: Pool, size: int, segment_bytes: int) -> Block | None:
        """A block of at least `size` bytes. Pages that were mapped before the device ran out stay
        mapped and free, as in PyTorch."""
        block = self._lowest_room(pool, size)
        if not block.mapped and not self._map(block, size):
            return None
        while block.bytes < size:  # what follows is unmapped, and becomes a part of this block
            if not self._map(cast(Block, block.next), size - block.bytes):
                return None
        pool.remove(block)
        return block

    def _lowest_room(self, pool: Pool, size: int) -> Block:
        """The lowest block from which on `size` bytes are free or unmapped."""
        for _, block in pool.unmapped:
            before = block.prev
            start = before if before is not None and not before.active else block
            vacant = takewhile(lambda part: not part.active, start.chain())
            if any(room >= size for room in accumulate(part.bytes for part in vacant)):
                return start
        return self._reserve(pool)

    def _reserve(self, pool: Pool) -> Block:
        """A new range of addresses, of which nothing is mapped."""
        capacity, page = self.device.capacity_bytes, self._page_bytes(pool)
        wanted = ADDRESS_SPACE_BYTES if capacity is None else capacity + capacity // 8
        size = -(-wanted // page) * page
        address = self.device.place(size)
        block = Block(pool, address, address, size)
        self.heads.add(block)
        self._leave_unmapped(block)
        return block

    def _leave_unmapped(self, block: Block) -> None:
        block.mapped = False
        insort(block.pool.unmapped, (block.address, block))

    def _map(self, block: Block, size: int) -> bool:
        """Back the first pages of an unmapped block, at most all of it, and merge them with free
        neighbours."""
        page, pool = self._page_bytes(block.pool), block.pool
        mapped = min(-(-size // page) * page, block.bytes)
        if not self.device.reserve(mapped):
            return False
        pool.unmapped.remove((block.address, block))
        if mapped < block.bytes:
            self._leave_unmapped(block.cut(mapped))
        block.mapped = True
        self.device.on_change("segment_map", block.address, mapped, pool.stream)
        pool.add_merged(block)
        return True

    def adopt(self, pool: Pool, ranges: list[tuple[int, int]], lowest: int | None) -> list[Block]:
        """Mapped ranges that exist already, by address and apart: they become one segment, which
        begins at `lowest`."""
        start = ranges[0][0] if lowest is None else lowest
        end = sum(ranges[-1]) + ADDRESS_SPACE_BYTES
        rest, blocks = Block(pool, start, start, end - start), []
        self.heads.add(rest)
        for address, size in ranges:
            if rest.address < address:
                gap, rest = rest, rest.cut(address - rest.address)
                self._leave_unmapped(gap)
            self.device.reserve(size)
            block, rest = rest, rest.cut(size)
            blocks.append(block)
        self._leave_unmapped(rest)
        self.device.occupy(start, end - start)
        return blocks

    def shrink(self, pool: Pool) -> None:
        for block in pool.blocks():
            self._unmap(block)

    def _unmap(self, block: Block) -> None:
        """Return the whole pages inside a free block; the bytes before and after them stay free."""
        page, pool = self._page_bytes(block.pool), block.pool
        offset = block.address - block.origin
        first, last = -(-offset // page) * page, (offset + block.bytes) // page * page
        if first >= last:
            return
        pool.remove(block)
        if first > offset:
            before, block = block, block.cut(first - offset)
            pool.add(before)
        if block.bytes > last - first:
            pool.add(block.cut(last - first))
        self.device.release(block.bytes)
        self.device.on_change("segment_unmap", block.address, block.bytes, pool.stream)
        self._join_unmapped(block)

    def _join_unmapped(self, block: Block) -> None:
        after, before = block.next, block.prev
        if after is not None and not after.mapped:
            block.pool.unmapped.remove((after.address, after))
            block.absorb(after)
        if before is not None and not before.mapped:
            block.pool.unmapped.remove((before.address, before))
            before.absorb(block)
            block = before
        if block.split:
            self._leave_unmapped(block)
        else:
            self.heads.remove(block)

    def release_oversize(self, pool: Pool, size: int) -> bool:
        """Expandable blocks are not returned one by one."""
        return False

    def collect(self, pools: Iterable[Pool], excess_bytes: int) -> None:
        """Expandable blocks are not collected."""
