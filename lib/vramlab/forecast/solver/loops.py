"""Loops over chunks in a traced step, read from what the meter recorded of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Loop:
    """A loop over the chunks that `cut` makes of `tokens` tokens."""

    cut: Any
    """A `regimes.head.chunks.Cut`: `cut.spans(tokens)` are the chunks for any number of tokens."""
    tokens: int
    edges: list[int]
    """The number of events before each turn, and before what follows the last one."""


def read_loops(chunk_turns: Iterable[tuple[int, Any, int, int]]) -> tuple[Loop, ...]:
    """The loops of `Meter.chunk_turns`, in their order."""
    loops: list[Loop] = []
    for event, cut, tokens, turn in chunk_turns:
        if turn == 0:
            loops.append(Loop(cut, tokens, []))
        loops[-1].edges.append(event)
    return tuple(loops)
