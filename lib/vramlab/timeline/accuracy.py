"""The errors of forecasts over many runs.

Errors are signed shares of the measured value: +0.01 is a forecast 1 % too high. Where nothing was
measured there is no error, not an error of 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd

PEAKS = ("allocated", "reserved", "nvml")
TOLERANCE = 0.005
"""A forecast lower than the measurement by more than this share counts as too low beyond
tolerance."""


def summary(rows: Iterable[Mapping]) -> dict:
    """The errors of all runs in a few numbers.

    Each run is a mapping with `predicted_fits`, `measured_fits` and, for each of `PEAKS`,
    `predicted_<peak>_bytes` and `measured_<peak>_bytes`; what is missing or None was not predicted
    or not measured. For each of `PEAKS` the result has {n, median_error, worst_error (of their
    sizes), under_rate, under_rate_beyond (by more than `TOLERANCE`)}. `fits` has {n,
    false_refusal_rate, false_promise_rate}: refused though it ran, as a share of those that ran;
    promised though it ran out of memory, as a share of those that ran out. None where there are no
    runs to compute a figure from.
    """
    rows = list(rows)
    errors = {
        name: pd.Series([peak_error(row, name) for row in rows], dtype=float) for name in PEAKS
    }
    figures: dict = {name: _spread(column.dropna()) for name, column in errors.items()}
    outcomes = [(row.get("predicted_fits"), row.get("measured_fits")) for row in rows]
    known = [pair for pair in outcomes if pair[0] is not None and pair[1] is not None]
    ran = [predicted for predicted, fits in known if fits is True]
    out = [predicted for predicted, fits in known if fits is False]
    figures["fits"] = {
        "n": len(known),
        "false_refusal_rate": ran.count(False) / len(ran) if ran else None,
        "false_promise_rate": out.count(True) / len(out) if out else None,
    }
    return figures


def peak_error(row: Mapping, name: str) -> float:
    """The signed error of one of `PEAKS` of a run, see `summary`; NaN where one figure is
    missing."""
    predicted, measured = (row.get(f"{kind}_{name}_bytes") for kind in ("predicted", "measured"))
    return predicted / measured - 1 if predicted is not None and measured else float("nan")


def _spread(errors: pd.Series) -> dict:
    figures = {
        "median_error": errors.abs().median(),
        "worst_error": errors.abs().max(),
        "under_rate": (errors < 0).mean(),
        "under_rate_beyond": (errors < -TOLERANCE).mean(),
    }
    known = len(errors) > 0
    return {
        "n": len(errors),
        **{name: float(value) if known else None for name, value in figures.items()},
    }
