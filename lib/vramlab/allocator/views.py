"""The allocator's memory as plain data: segments and the blocks that tile them, for drawing and for
checking."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator
from dataclasses import dataclass

from .blocks import Block


@dataclass(frozen=True)
class BlockView:
    """One block as it is now. `state` is "allocated", "awaiting" (freed, another stream may still
    use it) or "free"."""

    address: int
    bytes: int
    state: str
    key: Hashable


@dataclass(frozen=True)
class SegmentView:
    """One stretch of reserved memory and the blocks that tile it, by address."""

    address: int
    bytes: int
    stream: Hashable
    small: bool
    blocks: tuple[BlockView, ...]


def segment_views(heads: Iterable[Block], awaiting: Container[Hashable]) -> list[SegmentView]:
    """By address: a whole segment, or a contiguous mapped part of an expandable one, as PyTorch's
    own snapshots have it."""
    return [
        _view(part, awaiting)
        for head in sorted(heads, key=lambda head: head.address)
        for part in _mapped_parts(head)
    ]


def _mapped_parts(head: Block) -> Iterator[list[Block]]:
    part: list[Block] = []
    for block in head.chain():
        if block.mapped:
            part.append(block)
        elif part:
            yield part
            part = []
    if part:
        yield part


def _view(blocks: list[Block], awaiting: Container[Hashable]) -> SegmentView:
    first = blocks[0]
    return SegmentView(
        first.address,
        sum(block.bytes for block in blocks),
        first.pool.stream,
        first.pool.small,
        tuple(
            BlockView(block.address, block.bytes, _state(block, awaiting), block.key)
            for block in blocks
        ),
    )


def _state(block: Block, awaiting: Container[Hashable]) -> str:
    if not block.active:
        return "free"
    return "awaiting" if block.key in awaiting else "allocated"
