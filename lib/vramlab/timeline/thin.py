"""A timeline made small enough to keep beside fifty others, with nothing of its peaks lost.

Events become the curve they add up to: bytes alive by category, at few moments. Of every stretch of
events the highest and the lowest moment stay, of every step and phase the highest, and the first
and the last of all. Between two moments kept the curve may have moved within the two of their
stretch, never above what is shown.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from .events import on_device, signed

MOMENTS = 2000


def curve(frame: pd.DataFrame, moments: int = MOMENTS) -> pd.DataFrame:
    """t_s, step, phase, live_bytes and a column for each category, which add up to live_bytes; at
    most about `moments` rows, whose index is the number of the event in `frame`."""
    device = on_device(frame)
    changes = np.where(device, signed(frame), 0)
    kinds = {
        kind: np.where(frame["category"] == kind, changes, 0).cumsum()
        for kind in dict.fromkeys(frame["category"][device])
    }
    at = _kept(frame, moments)
    return pd.DataFrame(
        {
            "t_s": frame["t_s"],
            "step": frame["step"],
            "phase": frame["phase"],
            "live_bytes": changes.cumsum(),
            **kinds,
        }
    ).iloc[at]


def _kept(frame: pd.DataFrame, moments: int) -> np.ndarray:
    """Numbers of the events to keep, in order."""
    if len(frame) <= moments:
        return np.arange(len(frame))
    live = pd.Series(frame["live_bytes"].to_numpy())
    stretches = live.groupby(np.arange(len(frame)) * (moments // 2) // len(frame))
    phases = live.groupby([frame["step"].to_numpy(), frame["phase"].astype(str).to_numpy()])
    return np.unique(
        np.concatenate(
            [stretches.idxmax(), stretches.idxmin(), phases.idxmax(), [0, len(frame) - 1]]
        ).astype(int)
    )
