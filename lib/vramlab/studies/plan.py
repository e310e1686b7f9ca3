"""A study's file: every run and measurement that it needs, by arm, and the comparisons that were
named before any of them.

    plan = read_plan("params/studies/lomo.yml")
    plan.arms["quality"]  # one cell for each combination of the arm's grid

An arm is a grid over the study's defaults. Its cells are runs (`runs.execute`), or, where the arm
has `call: module:function`, measurements: a function that takes the cell's parameters and returns a
table. The study's own modules are named by their paths: `module`, which computes its figures, and
under `calls` those whose functions it measures with. The paths are not part of any hash.
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
MODULE_KEYS = {"module": str, "calls": Mapping[str, str]}
"""Keys that say where the code of a study lies; nothing that is measured depends on them."""
KEYS = {
    "name": STUDIES,
    "says": str,
    "runs": Mapping[str, Any],
    "defaults": _SEVERAL,
    "pairs": _SEVERAL,
    "settings": _SEVERAL,
    **MODULE_KEYS,
}
ARM_KEYS = {"defaults": _SEVERAL, "grid": _SEVERAL, "call": str, "says": str, "alone": bool}
PROOF = {"steps": 2, "train_items": 40, "val_items": 20, "test_items": 20, "measure": False}
"""Parameters of a run that takes seconds. Arm `proof` of each study is its first run with them,
from a base that is made in seconds, for a test to repeat."""


@dataclass(frozen=True)
class StudyCell:
    """One run or measurement."""

    arm: str
    params: Mapping
    call: str = ""
    """"module:function" of a measurement; empty for a run."""
    alone: bool = False
    """It is timed, so nothing may run beside it."""
    path: str = ""
    """The file of the call's module, from the project's folder; empty for a module of the
    library."""

    @cached_property
    def name(self) -> str:
        """The name of its folder. A run's follows from what decides its numbers, so two arms may
        share one."""
        if not self.call:
            return run_id(self.params)
        content = json.dumps([self.call, self.params], sort_keys=True, default=str)
        return f"{self.arm}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Pair:
    """A comparison that was named before the runs, seed by seed."""

    name: str
    arm: str
    one: Mapping
    """Parameters of the runs on one side."""
    other: Mapping
    """Parameters of the runs that they are compared with."""
    equal: str
    """The budget that both had: tokens, seconds or updates."""


@dataclass(frozen=True)
class Plan:
    """The content of a study's file."""

    name: str
    says: str
    arms: Mapping[str, Sequence[StudyCell]]
    pairs: Sequence[Pair]
    settings: Mapping
    path: Path
    module: str
    """The file that computes the study's figures, from the project's folder; the study's notebook
    lies beside it."""

    def every_cell(self) -> list[StudyCell]:
        """The cells of all arms; a run that two arms share is listed once."""
        return list({cell.name: cell for cells in self.arms.values() for cell in cells}.values())

    def content_hash(self) -> str:
        """The hash of what the file asks for: without comments, spacing and `MODULE_KEYS`."""
        content = {k: v for k, v in read_yaml(self.path).items() if k not in MODULE_KEYS}
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_plan(path: Path | str) -> Plan:
    """Read a study's file, or the small file of the study called `path`.

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
    spec = checked(read_yaml(path), KEYS, str(path), ("name", "says", "runs", "module"))
    defaults, paths = spec.get("defaults") or {}, spec.get("calls") or {}
    arms = {
        arm: _cells(f"{path}: runs.{arm}", arm, content, defaults, paths)
        for arm, content in spec["runs"].items()
    }
    arms |= _proof(arms)
    pairs = [
        typed(Pair, pair, f"{path}: pairs.{name}", name=name)
        for name, pair in (spec.get("pairs") or {}).items()
    ]
    if wrong := [pair.name for pair in pairs if pair.arm not in arms]:
        raise BadFile(f"{path}: pairs {', '.join(wrong)} are of no arm there is: {', '.join(arms)}")
    settings = spec.get("settings") or {}
    return Plan(spec["name"], spec["says"], arms, pairs, settings, path, spec["module"])


def _proof(arms: Mapping[str, Sequence[StudyCell]]) -> dict[str, list[StudyCell]]:
    first = next((cell for cells in arms.values() for cell in cells if not cell.call), None)
    if first is None:
        return {}
    params = {**first.params, **PROOF}
    # sequences for half a batch, of four items each
    params["train_items"] = max(PROOF["train_items"], 2 * params.get("batch_size", 0))
    if params.get("recipe", "standard") in ("standard", "reading"):
        params["recipe"] = "smoke"
    return {"proof": [StudyCell("proof", params)]}


def _cells(
    name: str, arm: str, content: Mapping, defaults: Mapping, paths: Mapping[str, str]
) -> list[StudyCell]:
    """The cells of an arm. Raises: BadFile, for a parameter that no run has, before anything
    runs."""
    spec = checked(content, ARM_KEYS, name)
    call, alone = spec.get("call", ""), spec.get("alone", False)
    base = {**({} if call else defaults), **(spec.get("defaults") or {})}
    path = paths.get(call.partition(":")[0], "")
    cells = [
        StudyCell(arm, {**base, **chosen}, call, alone, path)
        for chosen in combinations(name, spec.get("grid") or {})
    ]
    try:
        for cell in cells:
            cell.name  # noqa: B018, a wrong parameter is found when it is hashed
    except ValueError as error:
        raise BadFile(f"{name}: {error}") from None
    return cells
