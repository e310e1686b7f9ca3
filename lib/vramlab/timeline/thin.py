"""A timeline made small enough to keep beside fifty others, with none of its peaks lost.

Events become the curve that they add up to: bytes alive by category, at few moments. Of each
stretch of events the highest and the lowest moment are kept, of each step and phase the highest,
and the first and the last event of all. Between two kept moments the real curve may move within the
extremes of their stretch, never above what is shown.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from .events import on_device, signed

MOMENTS = 2000


def curve(frame: pd.DataFrame, moments: int = MOMENTS) -> pd.DataFrame:
    """t_s, step, phase, live_bytes and a column for each category, which add up to live_bytes; at
    most about `moments` rows, whose index is the number of the event in `frame`."""
    totals = {"live_bytes": np.where(on_device(frame), signed(frame), 0).cumsum()}
    columns = {**frame[["t_s", "step", "phase"]], **totals, **category_curves(frame)}
    return pd.DataFrame(columns).iloc[_kept(frame, moments)]


def category_curves(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """category -> (events,) its bytes alive on the device after each event, in the order in which
    the categories first appear."""
    changes, (codes, names) = signed(frame), pd.factorize(frame["category"])
    return {
        name: np.where(codes == code, changes, 0).cumsum()
        for code, name in enumerate(names)
        if name != "host"
    }


def highest_of_bins(values, bins: int) -> np.ndarray:
    """Where the highest value of each of `bins` equal stretches of (events,) `values` is; the first
    of equals."""
    numbers = np.arange(len(values)) * bins // max(1, len(values))
    return pd.Series(np.asarray(values)).groupby(numbers).idxmax().to_numpy()


def _kept(frame: pd.DataFrame, moments: int) -> np.ndarray:
    """Numbers of the events to keep, in order."""
    if len(frame) <= moments:
        return np.arange(len(frame))
    live, bins = frame["live_bytes"].to_numpy(), moments // 2
    phases = [frame["step"].to_numpy(), frame["phase"].astype(str).to_numpy()]
    peaks = pd.Series(live).groupby(phases).idxmax()
    ends = [0, len(frame) - 1]
    return np.unique([*highest_of_bins(live, bins), *highest_of_bins(-live, bins), *peaks, *ends])
