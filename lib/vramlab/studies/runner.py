"""Cells of studies, run side by side: one process a core, one thread each, resumable. Cells that
are timed come last, one by one.

A cell has ended when its folder has `result.json`. A cell that fails records why, and the others go
on; a process that is killed loses the cell it was in.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

from ..files import ROOT, write_table, write_whole
from ..processes import alone, side_by_side
from ..progress import bar
from ..runs.execute import execute
from ..runs.folder import is_due, outcome, seal_run
from ..runs.parameters import KNOWN_PARAMETERS, SCHEMA
from ..runs.preparation import make_bases
from ..training.trainer import Diverged
from .plan import StudyCell

Item = tuple[Path, StudyCell]
"""A cell with the folder of its study."""


def due(items: Iterable[Item]) -> list[Item]:
    """The cells that have not ended, and those that failed, so that a mended cause needs no flag.
    Each folder once."""
    targets = {folder / cell.name: (folder, cell) for folder, cell in items}
    return [item for target, item in targets.items() if is_due(outcome(target), "failed")]


def make(items: Sequence[Item], jobs: int = 0, progress: bool = True) -> list[str]:
    """Run the cells that are due, in `jobs` processes (0: one a core). Returns a line for each that
    failed."""
    waiting, failed = due(items), []
    runs = [cell.params for _, cell in waiting if not cell.call or "recipe" in cell.params]
    make_bases([{**KNOWN_PARAMETERS, **params} for params in runs], progress)
    with ExitStack() as stack:
        for folder in {folder for folder, _ in waiting}:
            stack.enter_context(alone(folder, "study"))
        progress_bar = stack.enter_context(bar("studies", len(waiting), progress and bool(waiting)))
        for is_timed, at_once in ((False, jobs or os.cpu_count() or 1), (True, 1)):
            batch = [item for item in waiting if item[1].alone == is_timed]
            for (folder, cell), reason, death in side_by_side(run_cell, batch, at_once):
                progress_bar.update()
                if reason or death:
                    failed.append(f"{folder.name}, {cell.arm}, {cell.name}: {reason or death}")
                    print(failed[-1], file=sys.stderr)
    return failed


def run_cell(item: Item) -> str:
    """Run one cell in this process. Returns the reason of its failure, or an empty string."""
    folder, cell = item
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
            _write_result(target, {"outcome": ended, "reason": reason})
        return reason
    return ""


def load_module(name: str, path: str) -> ModuleType:
    """The module in the file `path`, from the project's folder; without a path, the module called
    `name`. Modules of the same folder may import each other."""
    if not path:
        return importlib.import_module(name)
    file = ROOT / path
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    return importlib.import_module(file.stem)


def _measure(target: Path, cell: StudyCell) -> None:
    """Write what the function returns to `table.parquet`, then `result.json`."""
    module, name = cell.call.split(":")
    table = getattr(load_module(module, cell.path), name)(**cell.params)
    target.mkdir(parents=True, exist_ok=True)
    write_table(table, target / "table.parquet")
    call = {"call": cell.call, "params": dict(cell.params)}
    _write_result(target, {"outcome": "ok", "reason": "", **call})
    seal_run(target)


def _write_result(target: Path, content: dict) -> None:
    target.mkdir(parents=True, exist_ok=True)
    write_whole(target / "result.json", json.dumps({"schema": SCHEMA, **content}, indent=1))
