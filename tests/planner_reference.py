"""The planner's arithmetic in Python, with which the page's JavaScript is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vramlab.report.forecast_tables import GIB

VERDICTS = {
    "fits": "Fits",
    "may fit": "May fit, only if the allocator gives back what it caches",
    "lacks": "Does not fit",
}


def estimate(known: Mapping, model: str, name: str, card: str, seq: float, batch: float) -> dict:
    """`verdict`: fits, may fit (only if the allocator gives back what it caches), lacks or refused;
    `allocated_bytes`, `reserved_bytes`, `margin_bytes`; `exact` at a forecast. Refused: outside the
    forecasts, or where a corner between them is missing. `known`: what `planner.config` returns."""
    cells = {
        (cell["seq"], cell["batch"]): cell["cards"][card]
        for cell in known["cells"]
        if cell["model"] == model and cell["name"] == name and card in cell["cards"]
    }
    lengths = _neighbours(sorted({length for length, _ in cells}), seq)
    batches = _neighbours(sorted({rows for _, rows in cells}), batch)
    corners = [((s, b), u * v) for s, u in lengths for b, v in batches]
    if not corners or any(corner not in cells for corner, _ in corners):
        return {"verdict": "refused"}
    allocated, reserved = (
        math.floor(sum(weight * cells[corner][field] for corner, weight in corners) + 0.5)
        for field in (0, 1)
    )
    capacity, exact = known["cards"][card]["capacity_bytes"], len(corners) == 1
    fits = cells[corners[0][0]][2] if exact else reserved <= capacity or allocated <= capacity
    return {
        "verdict": "lacks" if not fits else "fits" if reserved <= capacity else "may fit",
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "margin_bytes": capacity - reserved,
        "exact": exact,
    }


def _neighbours(values: Sequence[int], value: float) -> list[tuple[int, float]]:
    """[(value, 1)] when it is one of `values`, its two neighbours with their weights between them,
    [] outside."""
    if value in values:
        return [(int(value), 1.0)]
    below, above = [v for v in values if v < value], [v for v in values if v > value]
    if not below or not above:
        return []
    share = (value - below[-1]) / (above[0] - below[-1])
    return [(below[-1], 1 - share), (above[0], share)]


def sentence(estimated: Mapping) -> str:
    """The verdict as the page says it."""
    if estimated["verdict"] == "refused":
        return "Refused: outside the forecasts that exist. Nothing is extrapolated."
    source = "a forecast" if estimated["exact"] else "interpolated linearly between forecasts"
    return (
        f"{VERDICTS[estimated['verdict']]}: {estimated['reserved_bytes'] / GIB:.1f} GiB reserved,"
        f" margin {estimated['margin_bytes'] / GIB:+.1f} GiB ({source}, predicted)."
    )
