"""A sweep: every cell of a grid through papermill, one process for each cell, resumable.

A finished cell is known by its folder only: a sweep that is killed loses the cell it was in, and no
other.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import yaml

from ..files import notice, write_checked, write_whole
from ..processes import TURN, Child, alone, run_cells
from .folder import KILLED, Run, is_due
from .parameters import SCHEMA, config_hash
from .preparation import make_bases
from .sweep_file import Cell, read_sweep

TIMED = "steps.parquet"
"""The file that a run writes once nothing of it is timed any more."""


class Swept(NamedTuple):
    """How a sweep ended."""

    code: int
    """0 when every cell ended ok, 1 when one did not, 130 on Ctrl-C."""
    folder: Path
    rows: list[dict]
    """One for each cell."""


def sweep(
    path: Path | str,
    out: Path | str | None = None,
    force: bool = False,
    retry: str | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Swept:
    """Run the cells of a sweep's file that have not ended; with `retry` those too that ended so,
    and with `force` all. With `dry_run`, only list them. Raises: as `read_sweep`; ValueError, when
    another sweep is running in the folder."""
    notebook, folder, cells = read_sweep(path, out)
    data = {(name, cell.full[name]) for cell in cells for name in ("items", "checker")}
    for name, data_path in sorted(data):
        if data_path and not Path(data_path).exists():
            notice(f"{name} {data_path} does not exist here: its runs will fail")
    outcomes = {cell.run_id: cell.outcome() for cell in cells}
    due = [cell for cell in cells if force or is_due(outcomes[cell.run_id], retry)]
    if dry_run:
        rows = [
            {"run_id": c.run_id, "state": "due" if c in due else outcomes[c.run_id], **c.params}
            for c in cells
        ]
        return Swept(0, folder, rows)
    index = [{**cell.params, "run_id": cell.run_id} for cell in cells]
    with alone(folder, "sweep"):
        name = Path(path).name
        write_checked(folder / "sweep.json", {"schema": SCHEMA, "sweep": name, "cells": index})
        try:
            _run_all(notebook, due, len(cells) - len(due), quiet)
        except KeyboardInterrupt:
            rows = [_row(cell) for cell in cells]
            print(
                f"\nstopped; {sum(row['outcome'] != 'due' for row in rows)} of {len(cells)} cells"
                " are finished and kept: the same command goes on from here",
                file=sys.stderr,
            )
            return Swept(130, folder, rows)
    rows = [_row(cell) for cell in cells]
    return Swept(0 if all(row["outcome"] == "ok" for row in rows) else 1, folder, rows)


def _run_all(notebook: Path, due: list[Cell], finished: int, quiet: bool) -> None:
    from tqdm import tqdm

    def start(cell: Cell) -> Child:
        bar.set_description(cell.run_id)
        return _start(notebook, cell)

    if finished and not quiet:
        print(f"{finished} finished cells are kept, {len(due)} to run")
    make_bases([cell.full for cell in due], not quiet)
    with (
        tqdm(total=len(due), unit="run", file=sys.stderr, disable=quiet, dynamic_ncols=True) as bar,
        closing(run_cells(due, start, may_start_next=_nothing_is_timed)) as ended,
    ):
        began_s = time.monotonic()
        for cell, child in ended:
            with child:
                _record_end(cell, child.result().reason)
            row, took_s, began_s = _row(cell), time.monotonic() - began_s, time.monotonic()
            bar.update(1)
            if not quiet:
                line = f"{row['regime']:<12} {row['outcome']:<7} {took_s:5.1f} s  {row['reason']}"
                bar.write(line.rstrip(), file=sys.stderr)


def _start(notebook: Path, cell: Cell) -> Child:
    """The cell's own process. It loads what it needs, and then waits for its turn."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    for name in ("result.json", TIMED):
        (cell.folder / name).unlink(missing_ok=True)
    turn = str((cell.folder.parent / ".turn").resolve())
    with open(cell.folder / "notebook.log", "w") as log:
        child = Child(
            "vramlab.runs.cell:run_notebook",
            {"PLOTLY_RENDERER": "plotly_mimetype", TURN: turn},
            log,
        )
    child.send(
        {
            "notebook": str(notebook),
            "output": str(cell.folder / "run.ipynb"),
            "parameters": {**cell.params, "out_dir": str(cell.folder.resolve())},
        }
    )
    return child


def _nothing_is_timed(cell: Cell) -> bool:
    """Whether nothing of the running cell is timed any more, so that the next may load beside
    it."""
    return (cell.folder / TIMED).exists()


def _record_end(cell: Cell, reason: str) -> None:
    """Write the result of a cell whose kernel did not live to write it. `reason`: how its process
    ended, used where the log is empty."""
    if cell.outcome() is not None:
        return
    log = (cell.folder / "notebook.log").read_text(errors="replace").strip().splitlines()
    reason = next(
        (
            line
            for line in reversed(log)
            if "Error: " in line or "KernelDied: " in line or "CellTimeout: " in line
        ),
        log[-1] if log else reason or "its notebook wrote no result",
    )
    params = cell.folder / "params.yml"
    if not params.exists() or params.name in Run(cell.folder).damage:
        write_whole(params, yaml.safe_dump({**cell.full, "run_id": cell.run_id}))
    result = {
        "schema": SCHEMA,
        "run_id": cell.run_id,
        "regime": cell.full["regime"],
        "model": cell.full["model"],
        "outcome": "oom" if KILLED in reason else "failed",
        "reason": reason,
        "config_hash": config_hash(cell.params),
    }
    write_whole(cell.folder / "result.json", json.dumps(result, indent=1))


def _row(cell: Cell) -> dict:
    """The row of a cell; its outcome is `due`, if it has not ended."""
    ended = cell.outcome()
    result = Run(cell.folder).result if ended else {}
    return {
        "run_id": cell.run_id,
        "regime": cell.full["regime"],
        "outcome": ended or "due",
        "tokens_per_s": result.get("speed", {}).get("tokens_per_s"),
        "peak_bytes": result.get("peak_bytes", {}).get("meter"),
        "reason": result.get("reason", ""),
    }


def to_text(rows: list[dict]) -> str:
    """One line for each cell."""
    return "\n".join(
        "  ".join(
            f"{value:,.0f}" if isinstance(value, float) else str(value)
            for value in row.values()
            if value not in (None, "")
        )
        for row in rows
    )
