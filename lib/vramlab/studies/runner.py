"""Cells of studies, run side by side: one process a core, one thread each, resumable. What is timed
comes last, one by one.

A cell is finished when its folder has `result.json`. A cell that fails says so there and the others
go on; a process that is killed loses the cell it was in.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from ..files import ROOT, write_table, write_whole
from ..processes import side_by_side
from ..progress import bar
from ..runs.execute import execute
from ..runs.folder import is_due, outcome
from ..runs.parameters import KNOWN_PARAMETERS, SCHEMA
from ..runs.passes import make_bases
from ..training.trainer import Diverged
from .plan import StudyCell


def due(cells: Iterable[tuple[Path, StudyCell]]) -> list[tuple[Path, StudyCell]]:
    """Those that have not ended, and those that failed: a mended cause should need no flag. Each
    folder once."""
    found = {folder / cell.name: (folder, cell) for folder, cell in cells}
    return [pair for target, pair in found.items() if is_due(outcome(target), "failed")]


def make(
    cells: Sequence[tuple[Path, StudyCell]], jobs: int = 0, progress: bool = True
) -> list[str]:
    """Run what is due of (folder of the study, cell). Returns a line for each cell that failed."""
    waiting = due(cells)
    make_bases(
        [
            {**KNOWN_PARAMETERS, **cell.params}
            for _, cell in waiting
            if not cell.call or "recipe" in cell.params
        ],
        progress,
    )
    failed = []
    with bar("studies", len(waiting), progress and bool(waiting)) as shown:
        for (folder, cell), reason, death in _all(waiting, jobs or os.cpu_count() or 1):
            shown.update()
            if reason or death:
                failed.append(f"{folder.name}, {cell.arm}, {cell.name}: {reason or death}")
                print(failed[-1], file=sys.stderr)
    return failed


def _all(waiting: Sequence[tuple[Path, StudyCell]], jobs: int) -> Iterator[tuple]:
    for alone, at_once in ((False, jobs), (True, 1)):
        yield from side_by_side(_one, [pair for pair in waiting if pair[1].alone == alone], at_once)


def _one(asked: tuple[Path, StudyCell]) -> str:
    return one(*asked)


def one(folder: Path, cell: StudyCell) -> str:
    """One cell, in this process. Returns the reason of its failure, or nothing."""
    target = folder / cell.name
    try:
        if cell.call:
            _measure(target, cell)
        else:
            execute(cell.params, target, progress=False)
    except Exception as error:  # recorded, so that the others go on
        reason = f"{type(error).__name__}: {error}"
        if outcome(target) is None:
            ended = "diverged" if isinstance(error, Diverged) else "failed"
            target.mkdir(parents=True, exist_ok=True)
            write_whole(
                target / "result.json",
                json.dumps({"schema": SCHEMA, "outcome": ended, "reason": reason}),
            )
        return reason
    return ""


NAMES = {
    "vramlab.head_bytes": "baichuan2_head_bytes",
    "vramlab.ladder": "baichuan2_ladder",
    "vramlab.positions": "baichuan2_positions",
    "vramlab.studies.checkpointing": "checkpointing",
    "vramlab.studies.lomo_hooks": "lomo_hooks",
    "vramlab.studies.measurements": "vramlab.studies.calls",
    "vramlab.studies.trajectories": "chunkft_trajectories",
}
"""What `call:` says, which the gallery's hashes are of, and the module that it is."""
BESIDE = ROOT / "notebooks" / "studies"
"""Where a study's own modules lie, beside its notebook."""


def module(name: str) -> ModuleType:
    """The module called `name`: of this library, or one beside a study's notebook; `name` may be an
    entry of `NAMES`."""
    if str(BESIDE) not in sys.path:
        sys.path.append(str(BESIDE))
    return importlib.import_module(NAMES.get(name, name))


def _measure(target: Path, cell: StudyCell) -> None:
    """`table.parquet` of what the function finds, then `result.json`."""
    home, name = cell.call.split(":")
    table = getattr(module(home), name)(**cell.params)
    target.mkdir(parents=True, exist_ok=True)
    write_table(table, target / "table.parquet")
    write_whole(
        target / "result.json",
        json.dumps(
            {
                "schema": SCHEMA,
                "outcome": "ok",
                "reason": "",
                "call": cell.call,
                "params": dict(cell.params),
            },
            indent=1,
        ),
    )
