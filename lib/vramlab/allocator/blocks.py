"""Blocks, the pools that keep the free ones sorted, and the device they are cut from.

A block is never moved: the one in front keeps its identity when it is split or absorbs what
follows, so the first block of a segment stays the same object and stands for the segment.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterator

from .settings import SEGMENT_STEP_BYTES

SLOTS, SLOT_BYTES = (
    1 << 20,
    1 << 45,
)  # more segments than a device can have, each smaller than a slot


class Block:
    """A stretch of one segment. `active`: handed out, or freed and still awaited by another stream.
    `origin`: address from which its segment's pages count. `mapped`: backed by memory; only
    expandable segments have blocks that are not.
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
        self.active, self.mapped, self.key, self.born = False, True, None, 0

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

    def absorb_next(self) -> None:
        """Take the following block's bytes; that block is gone. It must be in no list."""
        gone = self.next
        self.bytes += gone.bytes
        self.next = gone.next
        if self.next is not None:
            self.next.prev = self

    def chain(self) -> Iterator[Block]:
        """This block and all that follow it in its segment."""
        block: Block | None = self
        while block is not None:
            yield block
            block = block.next


class Pool:
    """The free blocks of one stream and one size class, ordered by (size, address) as `std::set`
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

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.bytes, block.address))]

    def blocks(self) -> list[Block]:
        return [block for *_, block in self.free]


class Device:
    """What the driver has handed out. Units: bytes.

    `recorded`: segments of a trace that come next, as (address, bytes); a new segment of that size
    gets that address. Where nothing is recorded addresses are made up, because a real driver
    chooses them and reuses freed ones. This matters where two free blocks are equally large: the
    allocator takes the one at the lower address. `stride`: with 1 each new segment lies above all
    others; with another odd number the n-th lies in slot n * stride modulo `SLOTS`, another order
    of addresses. Not exact: a capacity is all that is left for the allocator, and none of it is
    lost to fragmentation.
    """

    def __init__(self, capacity_bytes: int | None = None):
        self.capacity_bytes = capacity_bytes
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.tell: Callable[[str, int, int, Hashable], object] = (
            lambda action, address, size, stream: None
        )
        """Hears of every segment: (action as torch's history has it, address, bytes, stream)."""
        self.recorded: list[tuple[int, int]] = []
        self.stride = 1
        self._occupied: list[tuple[int, int]] = []  # (start, end), sorted and apart
        self._next_address, self._segments_placed = SEGMENT_STEP_BYTES, 0

    def take(self, size: int) -> bool:
        """Reserve, or say that there is no room."""
        reserved = self.reserved_bytes + size
        if self.capacity_bytes is not None and reserved > self.capacity_bytes:
            return False
        self.reserved_bytes = reserved
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, reserved)
        return True

    def give_back(self, size: int, segment: int | None = None) -> None:
        """`segment`: the address of a segment that is thereby gone."""
        self.reserved_bytes -= size
        if segment is not None:
            del self._occupied[bisect_left(self._occupied, (segment,))]

    def place(self, size: int) -> int:
        """The address of a new segment: as recorded where that is free, else made up."""
        recorded = (
            start
            for start, length in self.recorded
            if length == size and self._vacant(start, start + length)
        )
        address = next(recorded, None)
        if address is None:
            self._segments_placed += 1
            address = (
                self._next_address
                if self.stride == 1
                else self._segments_placed * self.stride % SLOTS * SLOT_BYTES
            )
        self.occupy(address, size)
        return address

    def _vacant(self, start: int, end: int) -> bool:
        at = bisect_left(self._occupied, (end,))
        return at == 0 or self._occupied[at - 1][1] <= start

    def occupy(self, address: int, size: int) -> None:
        """These addresses are a segment's."""
        insort(self._occupied, (address, address + size))
        self._next_address = max(
            self._next_address, -(-(address + size) // SEGMENT_STEP_BYTES) * SEGMENT_STEP_BYTES
        )
