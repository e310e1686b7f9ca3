"""A study's file: every run and measurement it needs, by arm, and the comparisons that were named
before any of them.

    plan = read_plan("params/studies/lomo.yml")
    plan.cells("quality")  # one for each combination of the arm's grid

An arm is a grid over the study's defaults. Its cells are runs (`runs.execute`), or, where the arm
has `call:`, measurements: a function, as "module:function" (see `runner.module`), that takes the
cell's parameters and returns a table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..files import ROOT
from ..reading import BadFile, checked, nearest, read_yaml, typed
from ..runs.parameters import run_id
from ..runs.sweep_file import combinations
from . import STUDIES

PARAMS = ROOT / "params" / "studies"
_SEVERAL = Mapping[str, Any] | None
KEYS = {
    "name": STUDIES,
    "says": str,
    "runs": Mapping[str, Any],
    "defaults": _SEVERAL,
    "pairs": _SEVERAL,
    "settings": _SEVERAL,
}
ARM_KEYS = {"defaults": _SEVERAL, "grid": _SEVERAL, "call": str, "says": str, "alone": bool}
PROOF = {"steps": 2, "train_items": 40, "val_items": 20, "test_items": 20, "measure": False}
"""What makes a run one of seconds: each study has its first run again like that, from a base made
in seconds, as arm `proof`, for a test to repeat."""


@dataclass(frozen=True)
class StudyCell:
    """One run or measurement. `call` is empty for a run. `alone`: it is timed, so nothing may run
    beside it."""

    arm: str
    params: Mapping
    call: str = ""
    alone: bool = False

    @cached_property
    def name(self) -> str:
        """Its folder: a run's is named by what decides its numbers, so two arms may share one."""
        if not self.call:
            return run_id(self.params)
        content = json.dumps([self.call, self.params], sort_keys=True, default=str)
        return f"{self.arm}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Pair:
    """A comparison named before the runs: of one arm, the rows where `one` holds against those
    where `other` does, seed by seed. `equal` says which budget both had: tokens, seconds or
    updates."""

    name: str
    arm: str
    one: Mapping
    other: Mapping
    equal: str


@dataclass(frozen=True)
class Plan:
    """What a study's file says."""

    name: str
    says: str
    arms: Mapping[str, Sequence[StudyCell]]
    pairs: Sequence[Pair]
    settings: Mapping
    path: Path

    def every_cell(self) -> list[StudyCell]:
        """The cells of all arms; a run that two arms have stands once."""
        return list({cell.name: cell for cells in self.arms.values() for cell in cells}.values())

    def content_hash(self) -> str:
        """Of the file's content; comments and spacing are not in it."""
        content = json.dumps(read_yaml(self.path), sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_plan(path: Path | str) -> Plan:
    """The file, or the study of that name with its small file.

    Raises: FileNotFoundError; ValueError, for an unknown key, an empty grid or a parameter that no
    run has.
    """
    path = Path(path)
    path = PARAMS / f"{path}.yml" if str(path) in STUDIES else path
    if not path.exists():
        known = sorted(file.stem for file in PARAMS.glob("*.yml"))
        raise FileNotFoundError(
            f"no study {path}{nearest(path.stem, known)}: there are {', '.join(known)}"
        )
    spec = checked(read_yaml(path), KEYS, str(path), ("name", "says", "runs"))
    arms = {
        arm: _cells(f"{path}: runs.{arm}", arm, content, spec.get("defaults") or {})
        for arm, content in spec["runs"].items()
    }
    arms |= _proof(arms)
    pairs = [
        typed(Pair, pair, f"{path}: pairs.{name}", name=name)
        for name, pair in (spec.get("pairs") or {}).items()
    ]
    if wrong := [pair.name for pair in pairs if pair.arm not in arms]:
        raise BadFile(f"{path}: pairs {', '.join(wrong)} are of no arm there is: {', '.join(arms)}")
    return Plan(spec["name"], spec["says"], arms, pairs, spec.get("settings") or {}, path)


def _proof(arms: Mapping[str, Sequence[StudyCell]]) -> dict[str, list[StudyCell]]:
    first = next((cell for cells in arms.values() for cell in cells if not cell.call), None)
    if first is None:
        return {}
    recipe = (
        {"recipe": "smoke"}
        if first.params.get("recipe", "standard") in ("standard", "reading")
        else {}
    )
    items = max(
        PROOF["train_items"], 2 * first.params.get("batch_size", 0)
    )  # sequences for half a batch, of four items each
    return {
        "proof": [StudyCell("proof", {**first.params, **PROOF, "train_items": items, **recipe})]
    }


def _cells(name: str, arm: str, content: Mapping, defaults: Mapping) -> list[StudyCell]:
    spec = checked(content, ARM_KEYS, name)
    call, base = (
        spec.get("call", ""),
        {
            **({} if spec.get("call") else defaults),
            **(spec.get("defaults") or {}),
        },
    )
    cells = [
        StudyCell(arm, {**base, **chosen}, call, spec.get("alone", False))
        for chosen in combinations(name, spec.get("grid") or {})
    ]
    for cell in cells:  # a wrong parameter is refused now, not after an hour of runs
        try:
            cell.name  # noqa: B018
        except ValueError as error:
            raise BadFile(f"{name}: {error}") from None
    return cells
