"""A sweep's file: a grid of parameters over defaults, and its cells.

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
"""Keys of a sweep's file. `name` is that of its folder under outputs/, by default the file's."""
MOST_CELLS = 10_000
SEVERAL = "with"
"""The axis of a grid whose values set several parameters at once."""


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
        """How its run ended; None, when it has not ended."""
        return outcome(self.folder)


def read_sweep(path: Path | str, out: Path | str | None = None) -> tuple[Path, Path, list[Cell]]:
    """(notebook, output folder, cells) of a sweep's file: every combination of its grid over its
    defaults. Combinations that make the same run are one cell; a notice reports them.

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
    spec: dict[str, Any] = {"name": path.stem, "notebook": "notebooks/finetune.ipynb"}
    spec |= checked(read_yaml(path), KEYS, str(path), ("grid",))
    if not spec["grid"] or not plain_name(spec["name"]) or "\0" in spec["notebook"]:
        raise BadFile(
            f"{path} has no grid, or the name {spec['name']!r}, or notebook {spec['notebook']!r}:"
            " give a grid, a name for one folder under outputs/, and the path of a notebook"
        )
    folder, notebook = Path(out) if out else Path("outputs") / spec["name"], Path(spec["notebook"])
    defaults, chosen = spec.get("defaults") or {}, combinations(str(path), spec["grid"])
    cells: dict[str, Cell] = {}
    for params in ({**defaults, **values} for values in chosen):
        try:
            name = run_id(params)
        except ValueError as error:
            raise BadFile(f"{path}: {error}") from None
        cells.setdefault(name, Cell(name, params, folder / name))
    if len(cells) < len(chosen):
        count = len(chosen)
        notice(f"{path}: {count} combinations of the grid are {len(cells)} runs; each is run once")
    notebook = regular_file(notebook if notebook.exists() else ROOT / notebook)
    return notebook, folder, [*cells.values()]


def combinations(name: str, grid: Mapping[str, list]) -> list[dict]:
    """Parameters for every combination of a grid's values. The values of axis `with` set several
    parameters at once.

    Raises: BadFile, for an axis that is no list of values, or a value of `with` that is no mapping.
    """
    for axis, values in grid.items():
        if not isinstance(values, list) or not values:
            raise BadFile(f"{name}: grid.{axis} is {values!r}: give a list of values")
        wrong = [value for value in values if axis == SEVERAL and not isinstance(value, dict)]
        if wrong:
            raise BadFile(
                f"{name}: grid.{axis} has {wrong[0]!r}: each is several parameters, as {{regime:"
                " lomo, lr: 0.01}"
            )
    count = math.prod(map(len, grid.values()))
    if count > MOST_CELLS:
        raise BadFile(f"{name}: grid has {count:,} combinations: give at most {MOST_CELLS:,}")
    every = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [{**chosen.pop(SEVERAL, {}), **chosen} for chosen in every]
