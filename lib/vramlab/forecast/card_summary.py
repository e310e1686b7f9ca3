"""The part of a trace that an atlas keeps, after a comparison with every card: small, plain data,
all of it `predicted`.

A trace made for one compute capability is reused for the others. What differs between them without
changing an operation is cuBLAS's workspace, and that is replaced (`events_for`). NOT exact: on
Hopper (9, 0) another attention kernel can be chosen for half types, whose scratch then differs;
`vramlab predict --card` traces for the card itself and is exact there.

Bytes are integers. `requested` is what the step asks for; `allocated` is rounded as the allocator
rounds; `reserved` is what the allocator has taken from the driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..allocator.settings import Settings
from ..allocator.simulate import Simulated, simulate
from ..capture.kernels import MATRIX_PRODUCTS, matrix_workspace_bytes
from ..cards import Architecture, Card
from ..timeline.events import any_block, signed
from ..timeline.thin import category_curves, highest_of_bins
from .trace import Trace

GROUPS = 8
"""How many of the largest groups at the peak get a counterfactual."""
POINTS = 200
"""The most points of the curve."""
_PRODUCTS = frozenset(str(product) for product in MATRIX_PRODUCTS)


def summarize(trace: Trace, cards: Mapping[str, Card], allocators: Sequence[str] = ()) -> dict:
    """The trace on each of `cards`, with the allocator's defaults and under each of `allocators`
    (in the syntax of `PYTORCH_ALLOC_CONF`)."""
    rows = trace.device_rows()
    return {
        "phase": trace.phase,
        "requested_bytes": trace.peak_bytes,
        "host_bytes": trace.host_bytes,
        "device": trace.device,
        "ledger": dict(trace.ledger),
        "groups": _groups(trace),
        "without": _counterfactuals(trace, rows),
        "curve": _curve(trace, rows),
        "cards": _on_cards(trace, rows, cards, Settings()),
        "allocators": [
            {
                "allocator": text,
                "label": Settings.parse(text).label(),
                "cards": _on_cards(trace, rows, cards, Settings.parse(text)),
            }
            for text in allocators
        ],
        "trace_s": round(trace.took_s, 2),
    }


def events_for(
    trace: Trace, rows: pd.DataFrame, architecture: Architecture
) -> dict[str, np.ndarray]:
    """The trace's events with the cuBLAS workspaces of a card of this capability in place of its
    own. `rows`: the trace's `device_rows`."""
    # attention's scratch is of this category too, but of another op
    workspaces = (
        (rows["category"] == "workspace")
        & rows["op"].isin(_PRODUCTS)
        & (rows["bytes"] == matrix_workspace_bytes(trace.architecture))
    )
    replaced = np.where(
        workspaces.to_numpy(), matrix_workspace_bytes(architecture), trace.events["bytes"]
    )
    return {**trace.events, "bytes": replaced}


def _on_cards(
    trace: Trace, rows: pd.DataFrame, cards: Mapping[str, Card], settings: Settings
) -> dict[str, dict]:
    """card -> the row of `_on_card`. Cards with the same workspaces share the simulation of
    unlimited memory."""
    shared: dict[int, tuple[dict, Simulated]] = {}
    outcomes = {}
    for key, card in cards.items():
        workspace_bytes = matrix_workspace_bytes(card.compute_capability)
        if workspace_bytes not in shared:
            events = events_for(trace, rows, card.compute_capability)
            shared[workspace_bytes] = events, simulate(events, settings)
        outcomes[key] = _on_card(trace, *shared[workspace_bytes], settings, card)
    return outcomes


def _on_card(
    trace: Trace, events: Mapping, unlimited: Simulated, settings: Settings, card: Card
) -> dict:
    """Peaks, margin, fits and retries, as in `forecast.Forecast`. Simulates the step with the
    card's capacity only where the outcome is open. Where garbage is collected the peaks are those
    on the card; else those with unlimited memory."""
    capacity_bytes, total_bytes = card.capacity_bytes, card.total_bytes
    peaks, retries = unlimited, unlimited.num_alloc_retries
    limit_bytes = settings.endless_up_to_bytes(capacity_bytes, total_bytes)
    fits = unlimited.peak_reserved_bytes <= limit_bytes
    if not fits and trace.peak_bytes <= capacity_bytes:
        limited = simulate(events, settings, capacity_bytes, total_bytes)
        fits, retries = limited.oom is None, limited.num_alloc_retries
        if fits and settings.collects_above_bytes(total_bytes) is not None:
            peaks = limited
    step = trace.reported
    reserved_bytes = int(peaks.reserved_bytes[: step.stop].max())
    return {
        "allocated_bytes": int(peaks.allocated_bytes[step].max()),
        "reserved_bytes": reserved_bytes,
        "fits": fits,
        "retries": retries,
        "margin_bytes": settings.usable_bytes(capacity_bytes, total_bytes) - reserved_bytes,
    }


def _groups(trace: Trace, count: int = 40) -> list[dict]:
    """What is alive at the peak, by category, module (all blocks as one) and op that made it,
    largest first."""
    sizes: Counter = Counter()
    for (module, category, op), size in trace.alive.items():
        sizes[category, any_block(module), op] += size
    return [
        {"category": category, "module": module, "op": op, "bytes": size}
        for (category, module, op), size in sizes.most_common(count)
    ]


def _counterfactuals(trace: Trace, rows: pd.DataFrame) -> list[dict]:
    """For each of the largest groups: the step's peak of requested bytes, and its phase, if none of
    the group were allocated. Nothing else changes: no copy is made instead, no operation is left
    out."""
    changes, step = signed(rows), trace.reported
    allocates = (rows["event"] == "alloc").to_numpy()
    storages = pd.factorize(rows["storage"])[0]
    names = rows.groupby(["category", "module", "op"], sort=False, observed=True)
    owner, first = names.ngroup().to_numpy(), names.head(1)
    modules = first["module"].map(any_block)
    outcomes = []
    for group in _groups(trace, GROUPS):
        same = (
            (first["category"] == group["category"])
            & (modules == group["module"])
            & (first["op"] == group["op"])
        )
        gone = np.zeros(len(storages), bool)
        gone[storages[allocates & np.isin(owner, np.flatnonzero(same))]] = True
        live = np.where(gone[storages], 0, changes).cumsum()[step]
        phase = str(rows["phase"].iat[step.start + int(live.argmax())])
        outcomes.append({**group, "peak_bytes": int(live.max()), "peak_phase": phase})
    return outcomes


def _curve(trace: Trace, rows: pd.DataFrame) -> dict:
    """The reported step, thinned: of each bin of events the highest is kept, so the peak survives.
    `share` of the step's events in per cent, `phase`, and requested bytes by category."""
    step = trace.reported
    live = signed(rows).cumsum()[step]
    keep = highest_of_bins(live, POINTS)
    by_category = {name: sizes[step][keep] for name, sizes in category_curves(rows).items()}
    return {
        "share": [round(100 * int(index) / len(live), 2) for index in keep],
        "phase": rows["phase"].iloc[step].iloc[keep].tolist(),
        "bytes": {name: values.tolist() for name, values in by_category.items() if values.any()},
    }
