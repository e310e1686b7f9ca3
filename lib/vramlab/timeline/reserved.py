"""A timeline through the simulated allocator: what is reserved after each event."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..allocator.settings import Settings
from ..allocator.simulate import simulate
from .events import on_device


def through_allocator(frame: pd.DataFrame, settings: Settings = Settings()) -> pd.DataFrame:  # noqa: B008, frozen
    """A timeline, a meter's or a forecast's, with what an allocator of unlimited memory makes of
    it: the columns `allocated_bytes` and `reserved_bytes` after each event, as a recording has
    them."""
    device = on_device(frame) & (frame["bytes"] > 0).to_numpy()
    simulated = simulate(frame[device], settings)
    last = device.cumsum()  # how many events of the device there have been: its state after these
    return frame.assign(
        allocated_bytes=np.append(0, simulated.allocated_bytes)[last],
        reserved_bytes=np.append(0, simulated.reserved_bytes)[last],
    )
