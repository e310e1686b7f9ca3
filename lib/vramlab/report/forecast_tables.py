"""A folder's `forecast.json` read back: the tables and sentences of the report's forecast part.
Every figure is `predicted`. Imports nothing that trains or traces."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from ..files import recall

GIB = 2**30
MOST_CELLS = 40
"""How many cells get a timeline, so that a large atlas still makes one small page."""
CAVEATS = (
    (
        "What is marked `predicted` was computed with no GPU: the real step of the real model on a"
        " virtual one, its requests through a simulation of PyTorch's allocator. The card's"
        " capacity and context are public figures, each with its source in params/cards.yml."
    ),
    (
        "Cells are traced for compute capability (8, 0), with each card's own cuBLAS workspaces. On"
        " Hopper the attention kernels of half types may take other scratch: `vramlab predict"
        " --card h100` is exact there."
    ),
    (
        "Of a row with many sizes some are traced and those between solved from them, event by"
        " event, where they follow exactly; cells say which in forecast.json (`solved`). The"
        " planner interpolates between cells, and says so."
    ),
)


@dataclass(frozen=True)
class Forecasts:
    """What `vramlab atlas` wrote. A cell is one model, regime, length and batch; it holds its
    outcome on every card."""

    content: Mapping

    @classmethod
    def read(cls, folder: Path | str, damage: list[str]) -> Forecasts | None:
        """The folder's forecasts; None when it has none, or a damaged file of them, which `damage`
        then gets a sentence about."""
        content = recall(Path(folder) / "forecast.json", say=damage.append)
        if content and not content.keys() >= {"cards", "cells"}:
            damage.append(f"{folder}/forecast.json holds no forecasts; it counts as not there")
            return None
        return content and cls(content)

    @property
    def cards(self) -> Mapping[str, Mapping]:
        return self.content["cards"]

    @cached_property
    def cells(self) -> list[dict]:
        """Those that did not fail."""
        return [cell for cell in self.content["cells"] if not cell["reason"]]

    @cached_property
    def worlds(self) -> list[dict]:
        """One rank's cell for each world of the sharded regime; none in files made before there
        were any."""
        return [cell for cell in self.content.get("worlds", ()) if not cell["reason"]]

    @property
    def places(self) -> list[tuple[str, int, int]]:
        """(model, sequence, batch) in order."""
        return list(dict.fromkeys(place(cell) for cell in self.cells))

    @cached_property
    def detailed(self) -> list[dict]:
        """The cells drawn one by one: places in order, whole, as long as there is room; at least
        one place."""
        shown: list[dict] = []
        for where in self.places:
            more = [cell for cell in self.cells if place(cell) == where]
            if shown and len(shown) + len(more) > MOST_CELLS:
                break
            shown += more
        return sorted(
            shown, key=lambda cell: cell["regime"] != "full"
        )  # what all others are compared with comes first


def place(cell: Mapping) -> tuple[str, int, int]:
    return cell["model"], cell["seq"], cell["batch"]


def place_words(where: tuple[str, int, int]) -> str:
    return f"{where[0]}, {where[2]} × {where[1]} tokens"


def cell_words(cell: Mapping) -> str:
    return f"{cell['name']}, {cell['batch']} × {cell['seq']} tokens"


def outcome(held: Mapping) -> str:
    """What a cell of the heatmap says, so that nothing hangs on colour."""
    margin = held["margin_bytes"] / GIB
    if held["fits"]:
        return f"fits {margin:+.1f}" if margin >= 0 else "fits flushing"
    return (
        f"lacks {-margin:.0f}"
        if margin <= -10
        else f"lacks {-margin:.1f}"
        if margin < 0
        else "does not fit"
    )


def atlas_table(said: Forecasts) -> pd.DataFrame:
    """One row a cell: the outcome on every card, peaks in GiB; a failed cell with its reason."""
    rows = []
    for cell in said.content["cells"]:
        row = {key: cell[key] for key in ("name", "model", "seq", "batch")}
        if not cell["reason"]:
            held = next(iter(cell["cards"].values()))
            row |= {
                "peak_allocated_GiB": held["allocated_bytes"] / GIB,
                "peak_reserved_GiB": held["reserved_bytes"] / GIB,
                "phase": cell["phase"],
                "host_GiB": cell["host_bytes"] / GIB,
            }
            row |= {said.cards[key]["name"]: outcome(held) for key, held in cell["cards"].items()}
        rows.append({**row, "reason": cell["reason"]})
    return pd.DataFrame(rows)


def peak_table(said: Forecasts) -> pd.DataFrame:
    """The largest groups at each detailed cell's peak, and the peak without each."""
    return pd.DataFrame(
        [
            {
                "cell": cell_words(cell),
                "module": short(group["module"]),
                "category": group["category"],
                "made_by": op(group["op"]),
                "GiB": group["bytes"] / GIB,
                "peak_GiB": cell["requested_bytes"] / GIB,
                "phase": cell["phase"],
                "without_it_GiB": group["peak_bytes"] / GIB,
                "then_in": group["peak_phase"],
            }
            for cell in said.detailed
            for group in cell["without"]
        ]
    )


def curve_table(said: Forecasts) -> pd.DataFrame:
    """Requested bytes by category at each detailed cell's peak, in GiB."""
    return pd.DataFrame(
        [
            {
                "cell": cell_words(cell),
                "phase": cell["phase"],
                "peak_GiB": cell["requested_bytes"] / GIB,
                **{name: size / GIB for name, size in cell["ledger"].items()},
            }
            for cell in said.detailed
        ]
    ).fillna(0.0)


def allocator_table(said: Forecasts) -> pd.DataFrame:
    """Reserved peak of each detailed cell on each card, by the allocator's settings. Cells that a
    card lacks even the requested bytes for are left out: no setting helps there."""
    rows = []
    for cell in said.detailed:
        for key, usual in cell["cards"].items():
            if cell["requested_bytes"] > said.cards[key]["capacity_bytes"]:
                continue
            for tried in cell["allocators"]:
                held = tried["cards"][key]
                rows.append(
                    {
                        "cell": cell_words(cell),
                        "card": said.cards[key]["name"],
                        "setting": tried["allocator"],
                        "default_GiB": usual["reserved_bytes"] / GIB,
                        "reserved_GiB": held["reserved_bytes"] / GIB,
                        "by_default": "fits" if usual["fits"] else "does not fit",
                        "with_it": "fits" if held["fits"] else "does not fit",
                        "label": tried["label"],
                    }
                )
    return pd.DataFrame(rows)


def one_variable(said: Forecasts) -> list[str]:
    """Where a setting makes a step fit that does not fit without it: a sentence each, none where
    that is not so."""
    frame = allocator_table(said)
    if frame.empty:
        return []
    saved = frame[(frame["by_default"] == "does not fit") & (frame["with_it"] == "fits")]
    found = []
    for (cell, card), rows in saved.groupby(["cell", "card"], sort=False):
        best = rows.loc[rows["reserved_GiB"].idxmin()]
        found.append(
            f"{cell}, on {card}: you do not need a bigger card, you need one environment variable,"
            f" PYTORCH_ALLOC_CONF={best['setting']} (reserved {best['reserved_GiB']:.1f} GiB"
            f" instead of {best['default_GiB']:.1f}; predicted, {best['label']})."
        )
    return found


def lost(said: Forecasts) -> list[str]:
    """Where a setting keeps a step from fitting that fits without it: a sentence for each setting,
    with the reason it has."""
    frame = allocator_table(said)
    if frame.empty:
        return []
    worse = frame[(frame["by_default"] == "fits") & (frame["with_it"] == "does not fit")]
    return [
        f"With {setting} these do not fit that fit without it: "
        + "; ".join(f"{row.cell}, on {row.card}" for row in rows.itertuples())
        + f".{_why_worse(setting)}"
        for setting, rows in worse.groupby("setting", sort=False)
    ]


def _why_worse(setting: str) -> str:
    if "garbage_collection_threshold" not in setting:
        return ""
    return (
        " Collection returns whole cached blocks to the driver; small requests then cut large"
        " blocks, a cut block cannot be returned, and a large request may find none whole."
    )


def worlds_table(said: Forecasts) -> pd.DataFrame:
    """One row a model and world: one rank's peak, what it is made of, in GiB, and the outcome on
    every card."""
    rows = []
    for cell in said.content.get("worlds", ()):
        row = {key: cell[key] for key in ("model", "name", "world")} | {
            "tokens_a_rank": cell["seq"] * cell["batch"]
        }
        if not cell["reason"]:
            row |= {
                "peak_requested_GiB": cell["requested_bytes"] / GIB,
                "phase": cell["phase"],
                "peak_reserved_GiB": next(iter(cell["cards"].values()))["reserved_bytes"] / GIB,
            }
            row |= {f"{name}_GiB": size / GIB for name, size in cell["ledger"].items()}
            row |= {said.cards[key]["name"]: outcome(held) for key, held in cell["cards"].items()}
        rows.append({**row, "reason": cell["reason"]})
    return pd.DataFrame(rows)


def worlds_words(said: Forecasts) -> list[str]:
    """For each model the smallest world asked for that fits each card."""
    found = []
    for model in dict.fromkeys(cell["model"] for cell in said.worlds):
        cells = sorted(
            (cell for cell in said.worlds if cell["model"] == model), key=lambda cell: cell["world"]
        )
        asked = ", ".join(f"{cell['world']:,}" for cell in cells)
        least = [
            f"{card['name']} "
            + next((f"{cell['world']:,}" for cell in cells if cell["cards"][key]["fits"]), "none")
            for key, card in said.cards.items()
        ]
        found.append(
            f"{model}, the smallest of the worlds {asked} whose ranks fit: {'; '.join(least)}."
        )
    return found


def parts(cell: Mapping) -> dict[tuple[str, str], int]:
    """(category, part of the model) -> bytes at the peak. What is in no listed group is (`rest`,
    ``)."""
    sizes: Counter = Counter()
    for group in cell["groups"]:
        sizes[group["category"], part(group["module"])] += group["bytes"]
    rest = cell["requested_bytes"] - sum(sizes.values())
    return {**dict(sizes.most_common()), **({("rest", ""): rest} if rest else {})}


def moved(one: Mapping, other: Mapping) -> pd.DataFrame:
    """What `other` has at its peak that `one` has not, by category and part, largest move first. In
    GiB."""
    before, after = parts(one), parts(other)
    rows = [
        {
            "from": one["name"],
            "to": other["name"],
            "category": key[0],
            "part": key[1],
            "from_GiB": before.get(key, 0) / GIB,
            "to_GiB": after.get(key, 0) / GIB,
            "moved_GiB": (after.get(key, 0) - before.get(key, 0)) / GIB,
        }
        for key in dict.fromkeys([*before, *after])
    ]
    return pd.DataFrame(rows).sort_values("moved_GiB", key=abs, ascending=False, ignore_index=True)


def moved_table(said: Forecasts) -> pd.DataFrame:
    """Every detailed cell against the first trained one of its place (full, where it is there),
    moves of 0.01 GiB or more."""
    frames = []
    for where in dict.fromkeys(place(cell) for cell in said.detailed):
        cells = [cell for cell in said.detailed if place(cell) == where]
        base = next((cell for cell in cells if cell["regime"] == "full"), cells[0])
        frames += [
            moved(base, cell)
            .query("abs(moved_GiB) >= 0.01")
            .assign(tokens=f"{where[2]} × {where[1]}")
            for cell in cells
            if cell is not base
        ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["from", "to"])


def part(module: str) -> str:
    """Which part of the model a module belongs to."""
    known = (
        ("self_attn", "attention"),
        ("mlp", "mlp"),
        ("norm", "norms"),
        ("embed_tokens", "embedding"),
        ("lm_head", "head"),
        ("layers", "blocks"),
    )
    return next((name for word, name in known if word in module), "loss and step")


def short(module: str) -> str:
    return re.sub(r"^model\.", "", module) or "the loss"


def op(name: str) -> str:
    """`aten.mm.default` -> `mm`."""
    return name.split(".")[1] if name.startswith("aten.") else name
