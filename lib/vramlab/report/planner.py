"""The planner: what lies between two forecasts, linearly, and nothing outside them. `planner.js` is
the same arithmetic.

NOT exact between forecasts: bytes are linear in the batch and nearly so in the length, but the
reserved peak moves in steps. At a forecast itself the answer is the forecast's.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from .forecast_tables import GIB, Forecasts

MODULE = Path(__file__).with_name("planner.js")


def config(said: Forecasts) -> dict:
    """What the page's module needs: cards with their capacity, cells with (allocated, reserved,
    fits) on each."""
    fields = ("allocated_bytes", "reserved_bytes", "fits")
    cells = [
        {
            **{key: cell[key] for key in ("model", "name", "seq", "batch")},
            "cards": {
                key: [held[field] for field in fields] for key, held in cell["cards"].items()
            },
        }
        for cell in said.cells
    ]
    cards = {
        key: {"name": card["name"], "capacity_bytes": card["capacity_bytes"]}
        for key, card in said.cards.items()
    }
    return {"cards": cards, "cells": cells}


def estimate(known: Mapping, model: str, name: str, card: str, seq: float, batch: float) -> dict:
    """`verdict`: fits, may fit (only if the allocator gives back what it caches), lacks or refused;
    `allocated_bytes`, `reserved_bytes`, `margin_bytes`; `exact` at a forecast. Refused: outside the
    forecasts there are, or a corner missing.
    """
    cells = {
        (cell["seq"], cell["batch"]): cell["cards"][card]
        for cell in known["cells"]
        if cell["model"] == model and cell["name"] == name and card in cell["cards"]
    }
    lengths, batches = (
        _around(sorted({key[axis] for key in cells}), value)
        for axis, value in ((0, seq), (1, batch))
    )
    if (
        not lengths
        or not batches
        or any((s, b) not in cells for s, _ in lengths for b, _ in batches)
    ):
        return {"verdict": "refused"}
    allocated, reserved = (
        math.floor(sum(u * v * cells[s, b][field] for s, u in lengths for b, v in batches) + 0.5)
        for field in (0, 1)
    )
    margin, exact = (
        known["cards"][card]["capacity_bytes"] - reserved,
        len(lengths) == len(batches) == 1,
    )
    if exact:
        fits = cells[lengths[0][0], batches[0][0]][2]
        verdict = ("fits" if margin >= 0 else "may fit") if fits else "lacks"
    else:
        verdict = (
            "fits"
            if margin >= 0
            else "may fit"
            if allocated <= known["cards"][card]["capacity_bytes"]
            else "lacks"
        )
    return {
        "verdict": verdict,
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "margin_bytes": margin,
        "exact": exact,
    }


def _around(values: Sequence[int], value: float) -> list[tuple[int, float]]:
    """[(value, 1)] when it is one of `values`, its two neighbours with their weights between them,
    [] outside."""
    if value in values:
        return [(int(value), 1.0)]
    below, above = [v for v in values if v < value], [v for v in values if v > value]
    if not below or not above:
        return []
    share = (value - below[-1]) / (above[0] - below[-1])
    return [(below[-1], 1 - share), (above[0], share)]


def words(found: Mapping) -> str:
    """The verdict as a sentence; the page says the same."""
    if found["verdict"] == "refused":
        return "Refused: outside the forecasts that exist. Nothing is extrapolated."
    said = {
        "fits": "Fits",
        "may fit": "May fit, only if the allocator gives back what it caches",
        "lacks": "Does not fit",
    }
    source = "a forecast" if found["exact"] else "interpolated linearly between forecasts"
    return (
        f"{said[found['verdict']]}: {found['reserved_bytes'] / GIB:.1f} GiB reserved, margin "
        f"{found['margin_bytes'] / GIB:+.1f} GiB ({source}, predicted)."
    )


def embed(said: Forecasts, expose: bool = False) -> str:
    """The planner as HTML that needs no kernel: the module, its data and the call. `expose` lets a
    test call the arithmetic."""
    name = f"planner-{uuid.uuid4().hex[:8]}"
    data = json.dumps(config(said), separators=(",", ":")).replace("<", "\\u003c")
    shown = "globalThis.vramlabEstimate = estimate;" if expose else ""
    return (
        f"<div class=planner id={name}></div><script type=module>{MODULE.read_text()}\n{shown}"
        f"mount(document.getElementById({json.dumps(name)}), {data});</script>"
    )
