"""A charted atlas: remembered as a whole, and told as a table or as text. Imports nothing that
takes a second to import.

    charted.recall("params/atlas.yml")  # forecast.json's content, or None when anything it depends
                                        on has changed

It depends on the atlas file, the rows, cards and models of params/, this library's code and torch's
version.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import pandas as pd

from .. import files
from ..files import FORECASTS, ROOT


def recall(atlas: Path) -> dict | None:
    """What `remember` has kept of this atlas file, if nothing has changed since."""
    return files.recall(_path(Path(atlas))) if Path(atlas).exists() else None


def remember(atlas: Path, content: dict) -> None:
    """Unless some cell failed: that one is to be asked again."""
    if not any(cell["reason"] for cell in (*content["cells"], *content.get("worlds", ()))):
        FORECASTS.mkdir(parents=True, exist_ok=True)
        files.write_checked(_path(Path(atlas)), content)


def _path(atlas: Path) -> Path:
    digest = hashlib.sha256(atlas.read_bytes() + importlib.metadata.version("torch").encode())
    params = ROOT / "params"
    for file in (
        params / "regimes.yml",
        params / "cards.yml",
        *sorted((params / "models").rglob("*.yml")),
        *sorted(Path(__file__).parents[1].rglob("*.py")),
    ):
        digest.update(file.read_bytes())
    return FORECASTS / f"atlas-{digest.hexdigest()[:20]}.json"


def table(content: dict) -> pd.DataFrame:
    """One row a cell and card; a cell that failed has one row, its reason and no figures."""
    rows = []
    for cell in content["cells"]:
        same = {
            "kind": content["kind"],
            **{key: cell[key] for key in ("model", "name", "regime", "weights", "seq", "batch")},
        }
        if cell["reason"]:
            rows.append({**same, "reason": cell["reason"]})
            continue
        same |= {
            "phase": cell["phase"],
            "requested_bytes": cell["requested_bytes"],
            "host_bytes": cell["host_bytes"],
        }
        rows += [
            {
                **same,
                "card": key,
                "capacity_bytes": content["cards"][key]["capacity_bytes"],
                **held,
                "reason": "",
            }
            for key, held in cell["cards"].items()
        ]
    return pd.DataFrame(rows)


def words(content: dict) -> str:
    """The atlas as text: for each model, length and batch, regimes against cards, the margin in
    GiB."""
    lines = [
        "predicted margin in GiB on each card; * fits only after flushing the allocator's cache, !"
        " does not fit"
    ]
    head = f"{'':<20}" + "".join(f"{key:>11}" for key in content["cards"])
    for place in dict.fromkeys(
        (cell["model"], cell["seq"], cell["batch"]) for cell in content["cells"]
    ):
        lines += ["", f"{place[0]}, {place[2]} x {place[1]} tokens", head]
        lines += [
            f"{cell['name']:<20}"
            + (cell["reason"] or "".join(f"{_mark(held):>11}" for held in cell["cards"].values()))
            for cell in content["cells"]
            if (cell["model"], cell["seq"], cell["batch"]) == place
        ]
    return "\n".join(lines)


def _mark(held: dict) -> str:
    mark = "!" if not held["fits"] else "*" if held["margin_bytes"] < 0 else " "
    return f"{held['margin_bytes'] / 2**30:+.1f}{mark}"
