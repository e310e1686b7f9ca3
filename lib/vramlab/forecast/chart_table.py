"""A chart as a table and as text. Imports nothing that takes a second to import."""

from __future__ import annotations

import pandas as pd


def table(content: dict) -> pd.DataFrame:
    """One row for each cell and card; a cell that failed has one row, with its reason and no
    figures."""
    rows = []
    for cell in content["cells"]:
        names = ("model", "name", "regime", "weights", "seq", "batch")
        row = {"kind": content["kind"], **{name: cell[name] for name in names}}
        if cell["reason"]:
            rows.append({**row, "reason": cell["reason"]})
            continue
        row |= {name: cell[name] for name in ("phase", "requested_bytes", "host_bytes")}
        rows += [
            {
                **row,
                "card": key,
                "capacity_bytes": content["cards"][key]["capacity_bytes"],
                **outcome,
                "reason": "",
            }
            for key, outcome in cell["cards"].items()
        ]
    return pd.DataFrame(rows)


def to_text(content: dict) -> str:
    """For each model and size a block: regimes against cards, the margin in GiB."""
    lines = [
        "predicted margin in GiB on each card; * fits only after flushing the allocator's cache, !"
        " does not fit"
    ]
    cards = f"{'':<20}" + "".join(f"{key:>11}" for key in content["cards"])
    blocks: dict[tuple, list[dict]] = {}
    for cell in content["cells"]:
        blocks.setdefault((cell["model"], cell["seq"], cell["batch"]), []).append(cell)
    for (model, seq, batch), cells in blocks.items():
        lines += ["", f"{model}, {batch} x {seq} tokens", cards]
        for cell in cells:
            margins = "" if cell["reason"] else "".join(map(_margin, cell["cards"].values()))
            lines.append(f"{cell['name']:<20}{cell['reason'] or margins}")
    return "\n".join(lines)


def _margin(outcome: dict) -> str:
    mark = "!" if not outcome["fits"] else "*" if outcome["margin_bytes"] < 0 else " "
    return f"{outcome['margin_bytes'] / 2**30:+.1f}{mark}".rjust(11)
