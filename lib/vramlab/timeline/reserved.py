"""A timeline through the simulated allocator: what is reserved after each event."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..allocator.settings import Settings
from ..allocator.simulate import simulate
from .events import on_device


def through_allocator(frame: pd.DataFrame, settings: Settings = Settings()) -> pd.DataFrame:  # noqa: B008, frozen
    """A timeline, a meter's or a forecast's, with what an allocator without end makes of it:
    `allocated_bytes` and `reserved_bytes` after each event, as a recording has them."""
    device = on_device(frame) & (frame["bytes"] > 0).to_numpy()
    found, last = (
        simulate(frame[device], settings),
        device.cumsum() - 1,
    )  # the last event on the device, -1 before any
    columns = {
        name: np.where(last >= 0, getattr(found, name)[last], 0) if device.any() else 0
        for name in ("allocated_bytes", "reserved_bytes")
    }
    return frame.assign(**columns)
