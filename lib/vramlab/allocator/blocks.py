"""Blocks, the pools that keep free blocks sorted, and the device that they are cut from.

A block never moves: when it is split, or absorbs the block that follows, it remains the block in
front. So the first block of a segment stays the same object, and stands for the segment.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from itertools import groupby

from .settings import SEGMENT_STEP_BYTES
from .snapshot import Piece, Segment

SLOTS, SLOT_BYTES = 1 << 20, 1 << 45
"""More segments than a device can have, each smaller than a slot."""


class Block:
    """A stretch of a segment. `active`: handed out, or freed and still awaited by another stream.
    `origin`: the address from which its segment's pages are counted. `mapped`: backed by memory;
    only expandable segments have blocks that are not. `born`: when it became free, in searches.
    """

    __slots__ = (
        "pool",
        "origin",
        "address",
        "bytes",
        "prev",
        "next",
        "active",
        "mapped",
        "key",
        "born",
    )

    def __init__(self, pool: Pool, origin: int, address: int, size: int):
        self.pool, self.origin, self.address, self.bytes = pool, origin, address, size
        self.prev: Block | None = None
        self.next: Block | None = None
        self.active, self.mapped, self.born = False, True, 0
        self.key: Hashable = None

    @property
    def split(self) -> bool:
        return self.prev is not None or self.next is not None

    def cut(self, size: int) -> Block:
        """Keep the first `size` bytes; the rest is a new block after this one, in no list."""
        rest = Block(self.pool, self.origin, self.address + size, self.bytes - size)
        self.bytes = size
        rest.prev, rest.next, self.next = self, self.next, rest
        if rest.next is not None:
            rest.next.prev = rest
        return rest

    def absorb(self, after: Block) -> None:
        """Take over the bytes of the next block, which must be in no list and is then gone."""
        self.bytes += after.bytes
        self.next = after.next
        if self.next is not None:
            self.next.prev = self

    def chain(self) -> Iterator[Block]:
        """This block and all blocks behind it in its segment."""
        block: Block | None = self
        while block is not None:
            yield block
            block = block.next


class Pool:
    """The free blocks of a stream and size class, ordered by (size, address) as `std::set`
    orders them. `searches` is shared by the pools of a class: it counts the searches, the clock of
    garbage collection."""

    __slots__ = ("stream", "small", "free", "unmapped", "searches")

    def __init__(self, stream, small: bool, searches: list[int]):
        self.stream, self.small, self.searches = stream, small, searches
        self.free: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []

    def add(self, block: Block) -> None:
        block.born = self.searches[0]
        insort(self.free, (block.bytes, block.address, block))

    def add_merged(self, block: Block) -> None:
        """Merge a block with free neighbours of its segment, and add it."""
        before, after = block.prev, block.next
        if after is not None and not after.active and after.mapped:
            self.remove(after)
            block.absorb(after)
        if before is not None and not before.active and before.mapped:
            self.remove(before)
            before.absorb(block)
            block = before
        self.add(block)

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.bytes, block.address))]

    def blocks(self) -> list[Block]:
        return [block for *_, block in self.free]


class Device:
    """What the driver has handed out. Units: bytes.

    `recorded`: segments of a trace that come next, as (address, bytes); a new segment of that size
    gets that address. Where nothing is recorded addresses are made up, because a real driver
    chooses them and reuses freed ones. They matter where two free blocks are equally large: the
    allocator takes the one at the lower address. `stride`: with 1 each new segment lies above all
    others; with another odd number the n-th segment lies in slot n * stride modulo `SLOTS`, another
    order of addresses. Not exact: the allocator can use all of the capacity, and loses nothing of
    it to fragmentation of the driver's memory.
    """

    def __init__(self, capacity_bytes: int | None = None):
        self.capacity_bytes, self.reserved_bytes = capacity_bytes, 0
        self.on_change: Callable[[str, int, int, Hashable], object] = lambda *segment: None
        """Called for every segment that comes or goes, with (action as in torch's history, address,
        bytes, stream)."""
        self.recorded: list[tuple[int, int]] = []
        self.stride = 1
        self._occupied: list[tuple[int, int]] = []  # (start, end), sorted and apart
        self._next_address, self._segments_placed = SEGMENT_STEP_BYTES, 0

    def reserve(self, size: int) -> bool:
        """Reserve `size` bytes. False where there is no room for them."""
        reserved = self.reserved_bytes + size
        if self.capacity_bytes is not None and reserved > self.capacity_bytes:
            return False
        self.reserved_bytes = reserved
        return True

    def release(self, size: int, segment: int | None = None) -> None:
        """Take `size` bytes back. `segment`: the address of a segment that ends with it."""
        self.reserved_bytes -= size
        if segment is not None:
            del self._occupied[bisect_left(self._occupied, (segment,))]

    def place(self, size: int) -> int:
        """Choose the address of a new segment: as recorded where that is vacant, else made up."""
        address = next(
            (
                start
                for start, length in self.recorded
                if length == size and self._vacant(start, size)
            ),
            None,
        )
        if address is None:
            self._segments_placed += 1
            scattered = self._segments_placed * self.stride % SLOTS * SLOT_BYTES
            address = self._next_address if self.stride == 1 else scattered
        self.occupy(address, size)
        return address

    def _vacant(self, start: int, size: int) -> bool:
        at = bisect_left(self._occupied, (start + size,))
        return at == 0 or self._occupied[at - 1][1] <= start

    def occupy(self, address: int, size: int) -> None:
        """Mark these addresses as a segment's."""
        insort(self._occupied, (address, address + size))
        above = -(-(address + size) // SEGMENT_STEP_BYTES) * SEGMENT_STEP_BYTES
        self._next_address = max(self._next_address, above)


def segment_views(
    heads: Iterable[Block], awaiting: Container[Hashable], expandable: bool
) -> list[Segment]:
    """Segments by address: each a whole segment, or a contiguous mapped part of an expandable one,
    as in PyTorch's own snapshots. `heads`: the first block of each segment; `awaiting`: keys of
    freed blocks that another stream may still use."""
    parts = [
        list(blocks)
        for head in sorted(heads, key=lambda head: head.address)
        for mapped, blocks in groupby(head.chain(), key=lambda block: block.mapped)
        if mapped
    ]
    return [_segment(blocks, awaiting, expandable) for blocks in parts]


def _segment(blocks: list[Block], awaiting: Container[Hashable], expandable: bool) -> Segment:
    pool, size = blocks[0].pool, sum(block.bytes for block in blocks)
    pieces = tuple(Piece(block.address, block.bytes, _state(block, awaiting)) for block in blocks)
    return Segment(blocks[0].address, size, pool.stream, pool.small, expandable, (0, 0), pieces)


def _state(block: Block, awaiting: Container[Hashable]) -> str:
    if not block.active:
        return "inactive"
    return "active_awaiting_free" if block.key in awaiting else "active_allocated"
