"""How long a replay may take, so that a hostile snapshot cannot run for hours.

What PyTorch records costs the simulator some microseconds an event. Lists of a million free blocks or of gaps, which no program
makes but a file can claim, cost each event a walk through all of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
LEAST_S, EVENT_S = 10.0, 0.2e-3
"""CPU seconds that any replay may take, and how many more an event: over ten times what recorded programs need."""


def in_time(items: Sequence[Item]) -> Iterator[Item]:
    """The items one by one. Raises: ValueError, once the work between them has taken more CPU time than so many items may."""
    began, allowed_s = time.process_time(), LEAST_S + EVENT_S * len(items)
    for number, item in enumerate(items):
        if time.process_time() - began > allowed_s:
            raise ValueError(f"replaying {number} of {len(items)} entries took over {allowed_s:.0f} s of CPU, many times what a "
                             "recorded program needs: record fewer entries (max_entries), or check where the file is from")
        yield item
