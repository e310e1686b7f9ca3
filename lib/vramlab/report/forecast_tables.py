"""A folder's `forecast.json` read back: the tables and sentences of the report's forecast part.
Every number is `predicted`. Imports nothing that trains or traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import recall

GIB = 2**30
PARTS = {
    "self_attn": "attention",
    "mlp": "mlp",
    "norm": "norms",
    "embed_tokens": "embedding",
    "lm_head": "head",
    "layers": "blocks",
}
"""piece of a module's name -> part of the model; the first that is in the name counts"""
MOST_CELLS = 40
"""How many cells are drawn one by one, so that a large atlas still makes one small page."""


@dataclass(frozen=True)
class Forecasts:
    """What `vramlab atlas` wrote. A cell is one model, regime, length and batch; it holds its
    outcome on every card."""

    content: Mapping

    @classmethod
    def read(cls, folder: Path | str, damage: list[str]) -> Forecasts | None:
        """The folder's forecasts, or None when it has none. A damaged file counts as none, and
        `damage` then gets a sentence about it."""
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
        """The cells whose forecast did not fail."""
        return [cell for cell in self.content["cells"] if not cell["reason"]]

    @cached_property
    def worlds(self) -> list[dict]:
        """One rank's cell for each number of ranks of the sharded regime; none in files made before
        there were any."""
        return [cell for cell in self.content.get("worlds", ()) if not cell["reason"]]

    @cached_property
    def places(self) -> dict[tuple[str, int, int], list[dict]]:
        """(model, sequence, batch) -> its cells, in order."""
        return grouped(self.cells, place)

    @cached_property
    def detailed(self) -> list[dict]:
        """The cells drawn one by one, full fine-tuning first, with which all others are compared:
        whole places in order, as long as there is room, and at least one."""
        detailed: list[dict] = []
        for cells in self.places.values():
            if detailed and len(detailed) + len(cells) > MOST_CELLS:
                break
            detailed += cells
        return sorted(detailed, key=lambda cell: cell["regime"] != "full")


def place(cell: Mapping) -> tuple[str, int, int]:
    return cell["model"], cell["seq"], cell["batch"]


def grouped(cells: Sequence[dict], key: Callable[[dict], Any]) -> dict[Any, list[dict]]:
    """key(cell) -> its cells, both in the order of `cells`."""
    groups: dict[Any, list[dict]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups


def place_label(where: tuple[str, int, int]) -> str:
    return f"{where[0]}, {where[2]} × {where[1]} tokens"


def cell_label(cell: Mapping) -> str:
    return f"{cell['name']}, {cell['batch']} × {cell['seq']} tokens"


def verdict(outcome: Mapping) -> str:
    """What a cell of the heatmap says of its outcome on a card, so that nothing hangs on colour."""
    margin_gib = outcome["margin_bytes"] / GIB
    if outcome["fits"]:
        return f"fits {margin_gib:+.1f}" if margin_gib >= 0 else "fits flushing"
    if margin_gib >= 0:
        return "does not fit"
    digits = 0 if margin_gib <= -10 else 1
    return f"lacks {-margin_gib:.{digits}f}"


def atlas_table(forecasts: Forecasts) -> pd.DataFrame:
    """One row a cell: the outcome on every card, peaks in GiB; a failed cell with its reason."""
    return pd.DataFrame(
        [
            {
                **{key: cell[key] for key in ("name", "model", "seq", "batch")},
                **({} if cell["reason"] else _peaks(forecasts, cell)),
                "reason": cell["reason"],
            }
            for cell in forecasts.content["cells"]
        ]
    )


def _peaks(forecasts: Forecasts, cell: Mapping) -> dict:
    first = next(iter(cell["cards"].values()))
    return {
        "peak_allocated_GiB": first["allocated_bytes"] / GIB,
        "peak_reserved_GiB": first["reserved_bytes"] / GIB,
        "phase": cell["phase"],
        "host_GiB": cell["host_bytes"] / GIB,
        **_verdicts(forecasts, cell),
    }


def _verdicts(forecasts: Forecasts, cell: Mapping) -> dict[str, str]:
    return {
        forecasts.cards[key]["name"]: verdict(outcome) for key, outcome in cell["cards"].items()
    }


def peak_table(forecasts: Forecasts) -> pd.DataFrame:
    """The largest groups at each detailed cell's peak, and the peak without each."""
    return pd.DataFrame(
        [
            {
                "cell": cell_label(cell),
                "module": short_module(group["module"]),
                "category": group["category"],
                "made_by": short_op(group["op"]),
                "GiB": group["bytes"] / GIB,
                "peak_GiB": cell["requested_bytes"] / GIB,
                "phase": cell["phase"],
                "without_it_GiB": group["peak_bytes"] / GIB,
                "then_in": group["peak_phase"],
            }
            for cell in forecasts.detailed
            for group in cell["without"]
        ]
    )


def curve_table(forecasts: Forecasts) -> pd.DataFrame:
    """Requested bytes by category at each detailed cell's peak, in GiB."""
    return pd.DataFrame(
        [
            {
                "cell": cell_label(cell),
                "phase": cell["phase"],
                "peak_GiB": cell["requested_bytes"] / GIB,
                **{name: size / GIB for name, size in cell["ledger"].items()},
            }
            for cell in forecasts.detailed
        ]
    ).fillna(0.0)


def allocator_table(forecasts: Forecasts) -> pd.DataFrame:
    """Reserved peak of each detailed cell on each card, by the allocator's settings. A card that
    is too small even for the requested bytes is left out: no setting helps there."""
    return pd.DataFrame(
        [
            {
                "cell": cell_label(cell),
                "card": forecasts.cards[key]["name"],
                "setting": setting["allocator"],
                "default_GiB": default["reserved_bytes"] / GIB,
                "reserved_GiB": setting["cards"][key]["reserved_bytes"] / GIB,
                "by_default": "fits" if default["fits"] else "does not fit",
                "with_it": "fits" if setting["cards"][key]["fits"] else "does not fit",
                "label": setting["label"],
            }
            for cell in forecasts.detailed
            for key, default in cell["cards"].items()
            if cell["requested_bytes"] <= forecasts.cards[key]["capacity_bytes"]
            for setting in cell["allocators"]
        ]
    )


def _changed(
    forecasts: Forecasts, by: str | list[str], by_default: str, with_it: str
) -> list[tuple]:
    """The rows of the allocator table whose verdict changes in that way, grouped."""
    frame = allocator_table(forecasts)
    if frame.empty:
        return []
    rows = frame[(frame["by_default"] == by_default) & (frame["with_it"] == with_it)]
    return list(rows.groupby(by, sort=False))


def settings_that_save(forecasts: Forecasts) -> list[str]:
    """Where a setting makes a step fit that does not fit without it: a sentence for each cell and
    card, with the setting that reserves least."""
    sentences = []
    for (cell, card), rows in _changed(forecasts, ["cell", "card"], "does not fit", "fits"):
        best = rows.loc[rows["reserved_GiB"].idxmin()]
        sentences.append(
            f"{cell}, on {card}: you do not need a bigger card, you need one environment variable,"
            f" PYTORCH_ALLOC_CONF={best['setting']} (reserved {best['reserved_GiB']:.1f} GiB"
            f" instead of {best['default_GiB']:.1f}; predicted, {best['label']})."
        )
    return sentences


def settings_that_lose(forecasts: Forecasts) -> list[str]:
    """Where a setting keeps a step from fitting that fits without it: a sentence for each setting,
    with the reason where it is known."""
    collects = (
        " Collection returns whole cached blocks to the driver; small requests then cut large"
        " blocks, a cut block cannot be returned, and a large request may find none whole."
    )
    return [
        f"With {setting} these do not fit that fit without it: "
        + "; ".join(f"{row.cell}, on {row.card}" for row in rows.itertuples())
        + f".{collects if 'garbage_collection_threshold' in setting else ''}"
        for setting, rows in _changed(forecasts, "setting", "fits", "does not fit")
    ]


def worlds_table(forecasts: Forecasts) -> pd.DataFrame:
    """One row a model and number of ranks: one rank's peak by category, in GiB, and the outcome
    on every card; a failed cell with its reason."""
    return pd.DataFrame(
        [
            {
                **{key: cell[key] for key in ("model", "name", "world")},
                "tokens_a_rank": cell["seq"] * cell["batch"],
                **({} if cell["reason"] else _rank_peak(forecasts, cell)),
                "reason": cell["reason"],
            }
            for cell in forecasts.content.get("worlds", ())
        ]
    )


def _rank_peak(forecasts: Forecasts, cell: Mapping) -> dict:
    return {
        "peak_requested_GiB": cell["requested_bytes"] / GIB,
        "phase": cell["phase"],
        "peak_reserved_GiB": next(iter(cell["cards"].values()))["reserved_bytes"] / GIB,
        **{f"{name}_GiB": size / GIB for name, size in cell["ledger"].items()},
        **_verdicts(forecasts, cell),
    }


def smallest_worlds(forecasts: Forecasts) -> list[str]:
    """For each model the smallest number of ranks asked for that fits each card."""
    sentences = []
    for model, cells in grouped(forecasts.worlds, itemgetter("model")).items():
        cells.sort(key=itemgetter("world"))
        worlds = ", ".join(f"{cell['world']:,}" for cell in cells)
        smallest = [
            f"{card['name']} "
            + next((f"{cell['world']:,}" for cell in cells if cell["cards"][key]["fits"]), "none")
            for key, card in forecasts.cards.items()
        ]
        sentences.append(
            f"{model}, the smallest of the worlds {worlds} whose ranks fit: {'; '.join(smallest)}."
        )
    return sentences


def parts(cell: Mapping) -> dict[tuple[str, str], int]:
    """(category, part of the model) -> bytes at the peak, largest first. Bytes of no listed group
    are (`rest`, ``)."""
    sizes: Counter = Counter()
    for group in cell["groups"]:
        sizes[group["category"], part(group["module"])] += group["bytes"]
    rest = cell["requested_bytes"] - sizes.total()
    return {**dict(sizes.most_common()), **({("rest", ""): rest} if rest else {})}


def moved(first: Mapping, second: Mapping) -> pd.DataFrame:
    """What `second` has at its peak that `first` has not, by category and part, largest move first.
    In GiB."""
    before, after = parts(first), parts(second)
    rows = [
        {
            "from": first["name"],
            "to": second["name"],
            "category": key[0],
            "part": key[1],
            "from_GiB": before.get(key, 0) / GIB,
            "to_GiB": after.get(key, 0) / GIB,
            "moved_GiB": (after.get(key, 0) - before.get(key, 0)) / GIB,
        }
        for key in dict.fromkeys([*before, *after])
    ]
    return pd.DataFrame(rows).sort_values("moved_GiB", key=abs, ascending=False, ignore_index=True)


def moved_table(forecasts: Forecasts) -> pd.DataFrame:
    """Every detailed cell against the first of its place (full fine-tuning, where it is among
    them), moves of 0.01 GiB or more."""
    frames = [
        moved(base, cell).query("abs(moved_GiB) >= 0.01").assign(tokens=f"{batch} × {seq}")
        for (_, seq, batch), (base, *others) in grouped(forecasts.detailed, place).items()
        for cell in others
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["from", "to"])


def part(module: str) -> str:
    """Which part of the model a module belongs to."""
    return next((name for piece, name in PARTS.items() if piece in module), "loss and step")


def short_module(module: str) -> str:
    """`model.layers.0.mlp` -> `layers.0.mlp`; what no module made is the loss."""
    return module.removeprefix("model.") or "the loss"


def short_op(name: str) -> str:
    """`aten.mm.default` -> `mm`."""
    return name.split(".")[1] if name.startswith("aten.") else name
