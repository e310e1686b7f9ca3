"""What is kept of a trace once it has been held against every card: small, plain data, all of it
`predicted`.

A trace made for one compute capability is reused for the others. What differs between them without
changing an operation is cuBLAS's workspace, and that is replaced (`events_for`). NOT exact: on
Hopper (9, 0) another attention kernel can be chosen for half types, whose scratch then differs;
`vramlab predict --card` traces for the card itself and is exact there.

Bytes are integers. `requested` is what was asked for; `allocated` is rounded as the allocator
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
"""Of the curve, at most."""
_PRODUCTS = frozenset(str(product) for product in MATRIX_PRODUCTS)


def summarize(traced: Trace, cards: Mapping[str, Card], allocators: Sequence[str] = ()) -> dict:
    """The trace against `cards`, as it is and under each of the `allocators` (in the syntax of
    `PYTORCH_ALLOC_CONF`)."""
    rows = traced.device_rows()
    settings = {"": Settings(), **{text: Settings.parse(text) for text in allocators}}
    held = {text: _on_cards(traced, rows, cards, told) for text, told in settings.items()}
    return {
        "phase": traced.phase,
        "requested_bytes": traced.peak_bytes,
        "host_bytes": traced.host_bytes,
        "device": traced.device,
        "ledger": dict(traced.ledger),
        "groups": _groups(traced),
        "without": _counterfactuals(traced, rows),
        "curve": _curve(traced, rows),
        "cards": held[""],
        "allocators": [
            {"allocator": text, "label": settings[text].label(), "cards": held[text]}
            for text in allocators
        ],
        "trace_s": round(traced.took_s, 2),
    }


def events_for(
    traced: Trace, architecture: Architecture, rows: pd.DataFrame | None = None
) -> dict[str, np.ndarray]:
    """The trace's events with the cuBLAS workspaces of a card of this capability in place of the
    trace's own. `rows`: its `device_rows`, for who has them."""
    events, rows = traced.events, traced.device_rows() if rows is None else rows
    own = matrix_workspace_bytes(traced.architecture)
    # an attention's scratch is of this category too, but of another op
    handles = (
        (rows["category"] == "workspace") & rows["op"].isin(_PRODUCTS) & (rows["bytes"] == own)
    )
    return {
        **events,
        "bytes": np.where(
            handles.to_numpy(), matrix_workspace_bytes(architecture), events["bytes"]
        ),
    }


def _on_cards(
    traced: Trace, rows: pd.DataFrame, cards: Mapping[str, Card], settings: Settings
) -> dict[str, dict]:
    """card -> allocated, reserved and what the card has left of it (as `forecast.forecast`:
    negative is what it lacks, flushing aside), fits, retries. Cards with the same workspaces share
    one simulation without end.
    """
    shared: dict[int, tuple[dict, Simulated]] = {}
    found = {}
    for key, card in cards.items():
        workspace = matrix_workspace_bytes(card.compute_capability)
        if workspace not in shared:
            events = events_for(traced, card.compute_capability, rows)
            shared[workspace] = events, simulate(events, settings)
        found[key] = _on_card(traced, *shared[workspace], settings, card)
    return found


def _on_card(
    traced: Trace, events: Mapping, free: Simulated, settings: Settings, card: Card
) -> dict:
    """A second simulation, with the card's end, only where its outcome is open. A step that
    collects garbage is told as it runs on the card; every other as on a card without end."""
    capacity_bytes, counted, retries = card.capacity_bytes, free, free.num_alloc_retries
    fits = free.peak_reserved_bytes <= settings.endless_up_to_bytes(
        capacity_bytes, card.total_bytes
    )
    if not fits and traced.peak_bytes <= capacity_bytes:
        held = simulate(events, settings, capacity_bytes, card.total_bytes)
        fits, retries = held.oom is None, held.num_alloc_retries
        counted = (
            held if fits and settings.collects_above_bytes(card.total_bytes) is not None else free
        )
    step = traced.reported
    allocated, reserved = (
        int(counted.allocated_bytes[step].max()),
        int(counted.reserved_bytes[: step.stop].max()),
    )
    return {
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "fits": fits,
        "retries": retries,
        "margin_bytes": settings.usable_bytes(capacity_bytes, card.total_bytes) - reserved,
    }


def _groups(traced: Trace, count: int = 40) -> list[dict]:
    """What is alive at the peak, by category, module (all blocks as one) and op that made it,
    largest first."""
    sizes: Counter = Counter()
    for (module, category, op), size in traced.alive.items():
        sizes[category, any_block(module), op] += size
    return [
        {"category": category, "module": module, "op": op, "bytes": size}
        for (category, module, op), size in sizes.most_common(count)
    ]


def _counterfactuals(traced: Trace, rows: pd.DataFrame) -> list[dict]:
    """For each of the largest groups: the step's peak of requested bytes, and its phase, had none
    of it ever been allocated. Nothing else changes: no copy is made instead, no operation is left
    out."""
    changes = signed(rows)
    made, found = (rows["event"] == "alloc").to_numpy(), []
    storages = pd.factorize(rows["storage"])[0]
    owner = (
        rows.groupby(["category", "module", "op"], sort=False, observed=True).ngroup().to_numpy()
    )
    first = rows.iloc[np.unique(owner, return_index=True)[1]]
    owners = list(zip(first["category"], map(any_block, first["module"]), first["op"], strict=True))
    for group in _groups(traced, GROUPS):
        its = np.zeros(len(storages), bool)
        same = [
            at
            for at, one in enumerate(owners)
            if one == (group["category"], group["module"], group["op"])
        ]
        its[storages[made & np.isin(owner, same)]] = True
        rest = np.where(its[storages], 0, changes).cumsum()[traced.reported]
        at = int(rest.argmax())
        found.append(
            {
                **group,
                "peak_bytes": int(rest[at]),
                "peak_phase": str(rows["phase"].iat[traced.reported.start + at]),
            }
        )
    return found


def _curve(traced: Trace, rows: pd.DataFrame) -> dict:
    """The reported step, thinned: of each bin of events the highest is kept, so the peak survives.
    `share` of the step's events in per cent, `phase`, and requested bytes by category."""
    live, step = signed(rows).cumsum()[traced.reported], traced.reported
    keep = highest_of_bins(live, POINTS)
    by_category = {name: sizes[step][keep] for name, sizes in category_curves(rows).items()}
    return {
        "share": [round(100 * int(at) / len(live), 2) for at in keep],
        "phase": rows["phase"].iloc[step].iloc[keep].tolist(),
        "bytes": {name: values.tolist() for name, values in by_category.items() if values.any()},
    }
