"""A timeline read: where its peak lies, and what is alive at a moment.

A timeline is a frame as `Meter.frame` makes it, one row an event. Bytes are integers, as requested,
before the allocator rounds them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache

import numpy as np
import pandas as pd


def signed(frame: pd.DataFrame) -> np.ndarray:
    """(events,) bytes that each event adds; negative for a release."""
    sizes = frame["bytes"].to_numpy()
    return np.where(frame["event"].to_numpy() == "alloc", sizes, -sizes)


def on_device(frame: pd.DataFrame) -> np.ndarray:
    """(events,) whether an event concerns the device's memory."""
    return (frame["category"] != "host").to_numpy()


def live_bytes(frame: pd.DataFrame) -> np.ndarray:
    """(events,) bytes alive on the device after each event."""
    return np.where(on_device(frame), signed(frame), 0).cumsum()


def host_peak_bytes(frame: pd.DataFrame) -> int:
    """Most bytes alive on the host at one time."""
    return int(np.where(on_device(frame), 0, signed(frame)).cumsum().max(initial=0))


def peak_event(frame: pd.DataFrame, step: int | None = None) -> int:
    """Number of the first event after which most bytes are alive on the device, of a step or of
    all."""
    live = frame["live_bytes"].to_numpy()
    if step is not None:
        live = np.where((frame["step"] == step).to_numpy(), live, -1)
    return int(live.argmax())


def alive_rows(frame: pd.DataFrame, event: int) -> pd.DataFrame:
    """The allocations that are alive on the device after event number `event`, in the order in
    which they were made; -1 stands for the moment before the first event."""
    # a storage that changed its size has several rows: the last one is its state
    last = frame.iloc[: event + 1].drop_duplicates("storage", keep="last")
    allocated = (last["event"] == "alloc").to_numpy() & (last["bytes"] > 0).to_numpy()
    return last[allocated & on_device(last)]


def by_owner(rows: pd.DataFrame) -> Counter:
    """(module, category, op) -> bytes of these allocations."""
    owners = rows.groupby(["module", "category", "op"], sort=False, observed=True)
    return Counter(owners["bytes"].sum().to_dict())


def alive_after(frame: pd.DataFrame, event: int) -> Counter:
    """(module, category, op) -> bytes alive on the device after event number `event`."""
    return by_owner(alive_rows(frame, event))


def by_category(alive: Mapping[tuple[str, str, str], int]) -> dict[str, int]:
    """category -> bytes, largest first, of what `alive_after` returned."""
    sizes: Counter = Counter()
    for (_, category, _), size in alive.items():
        sizes[category] += size
    return dict(sizes.most_common())


def largest_owners(
    alive: Mapping[tuple[str, str, str], int], count: int
) -> list[tuple[str, str, int]]:
    """The `count` largest (category, module, bytes) of what `alive_after` returned. All blocks
    count as one: `*` stands for a block's number."""
    sizes: Counter = Counter()
    for (module, category, _), size in alive.items():
        sizes[category, any_block(module)] += size
    return [(*owner, size) for owner, size in sizes.most_common(count)]


@cache
def any_block(module: str) -> str:
    """A module's name with `*` for the number of its block: `model.layers.*.mlp`."""
    return re.sub(r"\b\d+\b", "*", module)


def peak(frame: pd.DataFrame, step: int | None = None) -> dict:
    """{peak_bytes, phase, step, categories {category: bytes}, alive {(module, category, op):
    bytes}} at the peak of a step or of all."""
    at = peak_event(frame, step)
    alive, row = alive_after(frame, at), frame.iloc[at]
    return {
        "peak_bytes": int(row["live_bytes"]),
        "phase": str(row["phase"]),
        "step": int(row["step"]),
        "categories": by_category(alive),
        "alive": alive,
    }


def peak_owners(frame: pd.DataFrame, step: int | None = None) -> dict:
    """`peak` with `owners` [{module, category, op, bytes}, at most 8], largest first, in place of
    `alive`."""
    moment = peak(frame, step)
    owners = [
        {"module": module, "category": category, "op": op, "bytes": size}
        for (module, category, op), size in moment.pop("alive").most_common(8)
    ]
    return {**moment, "owners": owners}


def by_lifetime(phase: str, survived: bool) -> str:
    """The category of a storage that nobody declared. Made in forward (or in its recomputation) and
    kept beyond that stretch of forward, it is an activation; all else is a temporary, a gradient on
    its way to a leaf included."""
    return "activations" if survived and phase in ("forward", "recompute") else "temporaries"
