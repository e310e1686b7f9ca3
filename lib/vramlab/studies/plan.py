"""A study's file: every run and measurement it needs, by arm, and the comparisons that were named before any of them.

    plan = read_plan("params/studies/lomo.yml")
    plan.cells("quality")  # one for each combination of the arm's grid

An arm is a grid over the study's defaults. Its cells are runs (`run.execute`), or, where the arm has `call:`, measurements: a
function of this library, as "module:function", that takes the cell's parameters and returns a table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from ..paths import ROOT
from ..run import run_id
from ..sweep import combinations
from . import STUDIES

PARAMS = ROOT / "params" / "studies"
KEYS = ("name", "says", "defaults", "runs", "pairs", "settings")
ARM_KEYS = ("defaults", "grid", "call", "says", "alone")
PROOF = {"steps": 2, "train_items": 40, "val_items": 20, "test_items": 20, "measure": False}
"""What makes a run one of seconds: each study has its first run again like that, from a base made in seconds, as arm `proof`, for
a test to repeat."""


@dataclass(frozen=True)
class StudyCell:
    """One run or measurement. `call` is empty for a run. `alone`: it is timed, so nothing may run beside it."""

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
    """A comparison named before the runs: of one arm, the rows where `one` holds against those where `other` does, seed by seed.
    `equal` says which budget both had: tokens, seconds or updates."""

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
        content = json.dumps(yaml.safe_load(self.path.read_text()), sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_plan(path: Path | str) -> Plan:
    """The file, or the study of that name with its small file.

    Raises: FileNotFoundError; ValueError, for an unknown key, an empty grid or a parameter that no run has.
    """
    path = Path(path)
    path = PARAMS / f"{path}.yml" if str(path) in STUDIES else path
    if not path.exists():
        raise FileNotFoundError(f"no study {path}: there are {', '.join(sorted(file.stem for file in PARAMS.glob('*.yml')))}")
    said = yaml.safe_load(path.read_text())
    _only(path.name, said, KEYS)
    arms = {arm: _cells(f"{path.name}: {arm}", arm, spec, said.get("defaults") or {}) for arm, spec in said["runs"].items()}
    arms |= _proof(arms)
    pairs = [Pair(name, **spec) for name, spec in (said.get("pairs") or {}).items()]
    if wrong := [pair.name for pair in pairs if pair.arm not in arms]:
        raise ValueError(f"{path.name}: pairs {', '.join(wrong)} are of no arm there is: {', '.join(arms)}")
    return Plan(said["name"], said["says"], arms, pairs, said.get("settings") or {}, path)


def _proof(arms: Mapping[str, Sequence[StudyCell]]) -> dict[str, list[StudyCell]]:
    first = next((cell for cells in arms.values() for cell in cells if not cell.call), None)
    if first is None:
        return {}
    recipe = {"recipe": "smoke"} if first.params.get("recipe", "standard") in ("standard", "reading") else {}
    return {"proof": [StudyCell("proof", {**first.params, **PROOF, **recipe})]}


def _only(name: str, said: Mapping, known: Sequence[str]) -> None:
    if wrong := sorted(set(said) - set(known)):
        raise ValueError(f"{name} has {', '.join(wrong)}: it may have {', '.join(known)}")


def _cells(name: str, arm: str, spec: Mapping, defaults: Mapping) -> list[StudyCell]:
    _only(name, spec, ARM_KEYS)
    grid, call = spec.get("grid") or {}, spec.get("call", "")
    base = {**({} if call else defaults), **(spec.get("defaults") or {})}
    found = [StudyCell(arm, {**base, **chosen}, call, bool(spec.get("alone"))) for chosen in combinations(name, grid)]
    for cell in found:
        cell.name  # noqa: B018  a wrong parameter is said now, not after an hour of runs
    return found
