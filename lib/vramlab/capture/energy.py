"""The energy of a window of a run, from a sampler's readings of the card.

The card's counter moves in steps of about 100 ms (ml.energy/blog/energy/measurement, thermally
stable profiling), so an edge of a window is known up to such a step, and windows shorter than 2 s
are refused. For a card without a counter (before Volta) the power is integrated. The figure is the
whole card's: it includes other processes and idling. Not exact: `error_j` bounds the error from the
edges; the sensor's own error (arXiv:2312.02741) comes on top. Not yet run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

SHORTEST_S = 2.0
GAP_S = 0.5
"""The longest distance of two readings on which a window depends."""


@dataclass(frozen=True)
class Energy:
    """Joules of a window, at most `error_j` off because its edges are not known exactly, and how
    they were found. `j` and `error_j` are None where they cannot be known; `how` is then the
    reason."""

    j: float | None
    error_j: float | None
    how: str


def energy(frame: pd.DataFrame, t0: float, t1: float) -> Energy:
    """Of the window from `t0` to `t1` in a sampler's `frame`: by the card's counter, else by its
    power, integrated."""
    if t1 - t0 < SHORTEST_S:
        shortest = f"{SHORTEST_S:.0f} s are the shortest that can be measured"
        return Energy(None, None, f"N/A: the window has {t1 - t0:.2f} s, and {shortest}")
    by_counter = _counted(frame, t0, t1)
    if by_counter.j is not None:
        return by_counter
    by_power = _integrated(frame, t0, t1)
    if by_power.j is not None:
        return by_power
    return Energy(None, None, f"{by_counter.how}; {by_power.how}")


def _counted(frame: pd.DataFrame, t0: float, t1: float) -> Energy:
    """By the counter, read at the moments when it moves: between two moves the energy is a straight
    line."""
    read = frame[["t_s", "energy_j"]].dropna()
    step = read["energy_j"].diff().fillna(0)
    t, e = (read.loc[step > 0, name].to_numpy(float) for name in ("t_s", "energy_j"))
    reason = "it was set back" if (step < 0).any() else _uncovered(t, t0, t1, edges=True)
    if read.empty:
        reason = "it cannot be read"
    if reason:
        return Energy(None, None, f"N/A by the counter: {reason}")
    start, end = np.interp([t0, t1], t, e)
    # moves are read late: the energy at an edge lies between the move before it and the second
    # move after it
    error_j = sum(
        e[min(i + 1, len(e) - 1)] - e[max(i - 1, 0)] for i in np.searchsorted(t, [t0, t1])
    )
    return Energy(float(end - start), float(error_j), "the card's counter")


def _integrated(frame: pd.DataFrame, t0: float, t1: float) -> Energy:
    """By the power, by the trapezoidal rule. The driver's figure lags by up to 1 s, so an edge can
    be off by a second of the window's largest change of power."""
    read = frame[["t_s", "power_w"]].dropna()
    t, p = read["t_s"].to_numpy(float), read["power_w"].to_numpy(float)
    if reason := "it cannot be read" if read.empty else _uncovered(t, t0, t1):
        return Energy(None, None, f"N/A by power: {reason}")
    times = np.array([t0, *t[(t > t0) & (t < t1)], t1])
    watts = np.interp(times, t, p)
    joules = np.diff(times) @ (watts[1:] + watts[:-1]) / 2
    return Energy(float(joules), float(2 * np.ptp(watts)), "power, integrated")


def _uncovered(t: np.ndarray, t0: float, t1: float, edges: bool = False) -> str:
    """Why readings at `t` do not cover the window, or its two edges; empty when they do."""
    if not len(t) or t[0] > t0 or t[-1] < t1:
        return "the readings do not span the window"
    gaps, (first, last) = np.diff(t), np.maximum(np.searchsorted(t, [t0, t1]) - 1, 0)
    widest_s = gaps[[first, last]].max() if edges else gaps[first : last + 1].max()
    return f"two readings lie {widest_s:.2f} s apart" if widest_s > GAP_S else ""


def per_tokens(steps: pd.DataFrame, frame: pd.DataFrame) -> dict:
    """Joules for 1,000 tokens over `steps` (columns t_s, step_s, tokens), the host's time between
    them included: of all steps, and the quartiles over windows of whole steps, each just long
    enough to be measured. A warmer card draws more, so the temperature at the start is included.
    None where N/A; `how` gives the reason."""
    start, tokens = steps["t_s"].iloc[0], steps["tokens"].cumsum()
    ends = steps["t_s"] + steps["step_s"]
    whole = energy(frame, start, ends.iloc[-1])
    warmth = frame.loc[frame["t_s"] <= start, "temperature_c"].dropna() if len(frame) else frame
    result = dict.fromkeys(("j_per_1000_tokens", "error_j_per_1000_tokens", "q25", "q75")) | {
        "windows": 0,
        "start_temperature_c": float(warmth.iloc[-1]) if len(warmth) else None,
        "how": whole.how,
    }
    if whole.j is None or whole.error_j is None:
        return result
    rates, counted = [], 0
    for end, total in zip(ends, tokens, strict=True):
        window = energy(frame, start, end)
        if window.j is not None:
            rates.append(1000 * window.j / (total - counted))
            start, counted = end, total
    quartiles = np.quantile(rates, (0.25, 0.75)).tolist() if rates else (None, None)
    per = 1000 / int(tokens.iloc[-1])
    return result | {
        "j_per_1000_tokens": whole.j * per,
        "error_j_per_1000_tokens": whole.error_j * per,
        "q25": quartiles[0],
        "q75": quartiles[1],
        "windows": len(rates),
    }
