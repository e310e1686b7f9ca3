"""A list of allocations and frees through the allocator, and its bytes after each of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .allocator import Allocator, OutOfMemory, Shortage
from .settings import Settings

STRIDES = (-1, 618_033, 414_213, 259_921, 732_051)
"""Orders in which a forecast's segments may land instead of each above the last (`blocks.Device`):
each below the last, then scattered by odd numbers whose multiples spread over all slots."""
KINDS = ("alloc", "free", "free_requested", "free_completed", "empty_cache")


@dataclass(frozen=True, eq=False)
class Simulated:
    """Bytes after every event; where the device ran out, the arrays end before the event that could
    not be served."""

    allocated_bytes: np.ndarray  # (events,) int64
    reserved_bytes: np.ndarray  # (events,) int64
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    num_alloc_retries: int
    label: str
    """Whether the settings' rules were verified on a GPU."""
    oom: Shortage | None
    """Why event number `len(allocated_bytes)` could not be served."""


def simulate(
    events,
    settings: Settings = Settings(),
    capacity_bytes: int | None = None,
    device_bytes: int | None = None,
    stride: int = 1,
) -> Simulated:
    """Run events through a new allocator.

    The allocator has `capacity_bytes` of a device of `device_bytes`, whose segments land as
    `stride` says (`blocks.Device`). `events`: (kind, key, bytes, stream) each, with a kind of
    `KINDS`, or columns `event`, `storage`, `bytes` and, if there are several streams, `stream`, as
    a frame of `Meter` or a mapping of arrays; rows of host storages must be left out. Bytes are
    requests, not rounded; those of a free are not read.

    Raises: ValueError, with the number of the event, for one that is impossible.
    """
    allocator = Allocator(settings, capacity_bytes, device_bytes)
    device, allocated, reserved, oom = allocator.device, [], [], None
    device.stride, by_kind = stride, operations(allocator)
    try:
        for kind, key, size, stream in rows(events):
            by_kind[kind](key, size, stream)
            allocated.append(allocator.allocated_bytes)
            reserved.append(device.reserved_bytes)
    except OutOfMemory as error:
        oom = error.shortage
    except KeyError as error:
        raise ValueError(
            f"event {len(allocated)} is {error}: it must be one of {', '.join(KINDS)}"
        ) from None
    except ValueError as error:
        raise ValueError(f"event {len(allocated)}: {error}") from None
    return Simulated(
        np.array(allocated, np.int64),
        np.array(reserved, np.int64),
        max(allocated, default=0),
        max(reserved, default=0),
        allocator.num_alloc_retries,
        settings.label(),
        oom,
    )


def operations(allocator: Allocator) -> dict[str, Callable]:
    """A kind of `KINDS` -> the allocator's method for it, called with (key, bytes, stream)."""
    return {
        "alloc": allocator.malloc,
        "free": lambda key, size, stream: allocator.free(key),
        "free_requested": lambda key, size, stream: allocator.free_requested(key),
        "free_completed": lambda key, size, stream: allocator.free_completed(key),
        "empty_cache": lambda key, size, stream: allocator.empty_cache(),
    }


def rows(events) -> Iterable[tuple[str, Hashable, int, Hashable]]:
    """(kind, key, bytes, stream) of each event, of rows or of columns."""
    if not isinstance(events, Mapping | pd.DataFrame):
        return events
    columns = [np.asarray(events[name]).tolist() for name in ("event", "storage", "bytes")]
    streams = np.asarray(events["stream"]).tolist() if "stream" in events else [0] * len(columns[0])
    return zip(*columns, streams, strict=True)
