"""A list of allocations and frees through the allocator, and what came of it event by event."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
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
    peak_allocated_event: int
    """The first event with that many; -1 where nothing was ever allocated."""
    peak_reserved_bytes: int
    peak_reserved_event: int
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
    """Run events through a new allocator, which has `capacity_bytes` of a device of `device_bytes`,
    whose segments land as `stride` says (`blocks.Device`). `events`: (kind, key, bytes, stream)
    each, with a kind of `KINDS`, or columns `event`, `storage`, `bytes` and if there are several
    streams `stream`, as a frame of `Meter` or a mapping of arrays. Rows of host storages are the
    caller's to drop. Bytes are requests, not rounded; a free's are not read.

    Raises: ValueError, with the number of the event, for one that is impossible.
    """
    allocator, allocated, reserved, oom = (
        Allocator(settings, capacity_bytes, device_bytes),
        [],
        [],
        None,
    )
    does = {
        "free": allocator.free,
        "free_requested": allocator.free_requested,
        "free_completed": allocator.free_completed,
        "empty_cache": lambda _: allocator.empty_cache(),
    }
    allocator.device.stride = stride
    malloc, device, after_allocated, after_reserved = (
        allocator.malloc,
        allocator.device,
        allocated.append,
        reserved.append,
    )
    try:
        for kind, key, size, stream in rows(events):
            if kind == "alloc":
                malloc(key, size, stream)
            else:
                does[kind](key)
            after_allocated(allocator.allocated_bytes)
            after_reserved(device.reserved_bytes)
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
        allocator.peak_allocated_bytes,
        _first(allocated, allocator.peak_allocated_bytes),
        max(reserved, default=0),
        _first(reserved, max(reserved, default=0)),
        allocator.num_alloc_retries,
        settings.label(),
        oom,
    )


def _first(curve: list[int], peak: int) -> int:
    return curve.index(peak) if peak else -1


def rows(events) -> Iterable[tuple[str, Hashable, int, Hashable]] | Iterator[tuple]:
    if not isinstance(events, Mapping | pd.DataFrame):
        return events
    columns = [np.asarray(events[name]).tolist() for name in ("event", "storage", "bytes")]
    streams = np.asarray(events["stream"]).tolist() if "stream" in events else [0] * len(columns[0])
    return zip(*columns, streams, strict=True)
