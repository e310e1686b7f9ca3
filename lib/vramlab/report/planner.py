"""The planner: what lies between two forecasts, on a straight line, and nothing outside them. The
arithmetic is JavaScript, `templates/planner.js`, so that a saved page computes without a kernel.

NOT exact between forecasts: bytes are linear in the batch and nearly so in the length, but the
reserved peak moves in steps. At a forecast itself the answer is the forecast's.
"""

from __future__ import annotations

import uuid

from .forecast_tables import Forecasts
from .rendering import render


def config(forecasts: Forecasts) -> dict:
    """What the page's script needs: cards with their capacity, and cells with [allocated bytes,
    reserved bytes, whether it fits] on each card."""
    cells = [
        {
            **{key: cell[key] for key in ("model", "name", "seq", "batch")},
            "cards": {
                key: [outcome["allocated_bytes"], outcome["reserved_bytes"], outcome["fits"]]
                for key, outcome in cell["cards"].items()
            },
        }
        for cell in forecasts.cells
    ]
    cards = {
        key: {"name": card["name"], "capacity_bytes": card["capacity_bytes"]}
        for key, card in forecasts.cards.items()
    }
    return {"cards": cards, "cells": cells}


def embed(forecasts: Forecasts, expose: bool = False) -> str:
    """The planner as HTML that needs no kernel: the script, its data and the call. With `expose`
    the page's `vramlabEstimate` is the arithmetic, so that a test can call it."""
    return render(
        "planner",
        name=f"planner-{uuid.uuid4().hex[:8]}",
        config=config(forecasts),
        expose=expose,
    )
