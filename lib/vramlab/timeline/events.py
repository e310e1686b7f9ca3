"""What a timeline says: where its peak lies, and what is alive there.

A timeline is a frame as `Meter.frame` makes it, one row an event. Bytes are integers and as asked
for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pandas as pd


def signed(frame: pd.DataFrame) -> np.ndarray:
    """(events,) what each event changes, in bytes: negative for a release."""
    return np.where(
        frame["event"].to_numpy() == "alloc", frame["bytes"].to_numpy(), -frame["bytes"].to_numpy()
    )


def on_device(frame: pd.DataFrame) -> np.ndarray:
    """(events,) whether an event is about the device's memory."""
    return (frame["category"] != "host").to_numpy()


def live_bytes(frame: pd.DataFrame) -> np.ndarray:
    """(events,) bytes alive on the device after each event."""
    return np.where(on_device(frame), signed(frame), 0).cumsum()


def peak_event(frame: pd.DataFrame, step: int | None = None) -> int:
    """Number of the first event after which most bytes are alive on the device, of one step or of
    all."""
    live = frame["live_bytes"].to_numpy()
    return int(
        np.where((frame["step"] == step).to_numpy(), live, -1).argmax()
        if step is not None
        else live.argmax()
    )


def alive_after(frame: pd.DataFrame, event: int) -> Counter:
    """Device bytes alive after event number `event`, by (module, category, op)."""
    rows = frame.iloc[: event + 1].drop_duplicates(
        "storage", keep="last"
    )  # alive is what was made last
    rows = rows[
        (rows["event"].to_numpy() == "alloc") & on_device(rows) & (rows["bytes"].to_numpy() > 0)
    ]
    alive: Counter = Counter()
    for *owner, size in zip(
        *(rows[name].tolist() for name in ("module", "category", "op", "bytes")), strict=True
    ):
        alive[tuple(owner)] += size
    return alive


def peak(frame: pd.DataFrame, step: int | None = None) -> dict:
    """{peak_bytes, phase, step, categories {category: bytes}, alive {(module, category, op):
    bytes}} at the peak of one step or of all."""
    at = peak_event(frame, step)
    alive, categories = alive_after(frame, at), Counter()
    for (_, category, _), size in alive.items():
        categories[category] += size
    row = frame.iloc[at]
    return {
        "peak_bytes": int(row["live_bytes"]),
        "phase": str(row["phase"]),
        "step": int(row["step"]),
        "categories": dict(categories.most_common()),
        "alive": alive,
    }


def owned(alive: Mapping[tuple[str, str, str], int], count: int) -> list[tuple[str, str, int]]:
    """The `count` largest (category, module, bytes) of what is alive. Blocks are one: their number
    is written `*`."""
    sizes: Counter = Counter()
    for (module, category, _), size in alive.items():
        sizes[category, re.sub(r"\b\d+\b", "*", module)] += size
    return [(*owner, size) for owner, size in sizes.most_common(count)]


def peak_owners(frame: pd.DataFrame, step: int | None = None) -> dict:
    """`peak` with, in place of `alive`, `owners` [{module, category, op, bytes}, at most 8],
    largest first."""
    found = peak(frame, step)
    owners = [
        {"module": module, "category": category, "op": op, "bytes": size}
        for (module, category, op), size in found.pop("alive").most_common(8)
    ]
    return {**found, "owners": owners}


def by_lifetime(phase: str, survived: bool) -> str:
    """The category of a storage nobody declared: made in forward (or recomputed) and kept beyond
    that stretch is an activation; all else is a temporary, gradients on their way to a leaf
    included."""
    return "activations" if survived and phase in ("forward", "recompute") else "temporaries"


def host_peak_bytes(frame: pd.DataFrame) -> int:
    """Most bytes alive on the host at one time."""
    return int(np.where(on_device(frame), 0, signed(frame)).cumsum().max(initial=0))
