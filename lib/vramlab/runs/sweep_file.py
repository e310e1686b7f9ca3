"""A sweep's file: a grid of parameters over defaults, and the cells that it stands for.

A cell's folder is named by the hash of what decides its numbers, so a finished run is found again
and a changed one is new.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import ROOT, notice
from ..reading import BadFile, checked, nearest, plain_name, read_yaml, regular_file
from .folder import outcome
from .parameters import KNOWN_PARAMETERS, run_id

KEYS = {
    "name": str,
    "notebook": str,
    "defaults": Mapping[str, Any] | None,
    "grid": Mapping[str, Any],
}
"""What a sweep's file may say; `name` is the folder's under outputs/, by default the file's own."""
MOST_CELLS = 10_000
SEVERAL = "with"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    run_id: str
    params: Mapping
    folder: Path

    @property
    def full(self) -> dict:
        """The parameters over the defaults."""
        return {**KNOWN_PARAMETERS, **self.params}

    def outcome(self) -> str | None:
        """How its finished run ended; None when there is none."""
        return outcome(self.folder)


def read_sweep(path: Path | str, out: Path | str | None = None) -> tuple[Path, Path, list[Cell]]:
    """(notebook, output folder, cells) of a sweep file, every combination of its grid over its
    defaults. Combinations that are the same run are one cell, which a notice says.

    Raises: FileNotFoundError; ValueError, for an unknown key, an empty grid axis or parameters that
    no run has.
    """
    path = Path(path)
    if not path.exists():
        known = [
            file.name
            for file in sorted((ROOT / "params").glob("*.yml"))
            if "\ngrid:" in file.read_text()
        ]
        raise FileNotFoundError(
            f"no sweep {path}{nearest(path.name, known)}: params/ has {', '.join(known)}"
        )
    spec = {
        "name": path.stem,
        "notebook": "notebooks/finetune.ipynb",
        **checked(read_yaml(path), KEYS, str(path), ("grid",)),
    }
    if not spec["grid"] or not plain_name(spec["name"]) or "\0" in spec["notebook"]:
        raise BadFile(
            f"{path} has no grid, or the name {spec['name']!r}, or notebook {spec['notebook']!r}:"
            " give a grid, a name for one folder under outputs/, and the path of a notebook"
        )
    folder, notebook = Path(out) if out else Path("outputs") / spec["name"], Path(spec["notebook"])
    notebook = notebook if notebook.exists() else ROOT / notebook
    every = [
        {**(spec.get("defaults") or {}), **chosen}
        for chosen in combinations(str(path), spec["grid"])
    ]
    cells: dict[str, Cell] = {}
    for params in every:
        try:
            name = run_id(params)
        except ValueError as error:
            raise BadFile(f"{path}: {error}") from None
        cells.setdefault(name, Cell(name, params, folder / name))
    if len(cells) < len(every):
        notice(
            f"{path}: {len(every)} combinations of the grid are {len(cells)} runs; each is run once"
        )
    return regular_file(notebook), folder, [*cells.values()]


def combinations(name: str, grid: Mapping[str, list]) -> list[dict]:
    """Parameters for every combination of a grid's values; `with` is no parameter, but an axis
    whose values set several at once.

    Raises: BadFile, naming an axis that is no list of values, or a value of `with` that sets
    nothing.
    """
    for axis, values in grid.items():
        if not isinstance(values, list) or not values:
            raise BadFile(f"{name}: grid.{axis} is {values!r}: give a list of values")
        if axis == SEVERAL and (
            wrong := [value for value in values if not isinstance(value, dict)]
        ):
            raise BadFile(
                f"{name}: grid.{axis} has {wrong[0]!r}: each is several parameters, as {{regime:"
                " lomo, lr: 0.01}"
            )
    if (count := math.prod(map(len, grid.values()))) > MOST_CELLS:
        raise BadFile(f"{name}: grid has {count:,} combinations: give at most {MOST_CELLS:,}")
    found = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        found.append({**chosen.pop(SEVERAL, {}), **chosen})
    return found
