"""A sweep: every cell of a grid through papermill, one process a cell, resumable.

A run's folder is named by the hash of what decides its numbers, so a finished run is found again
and a changed one is new. Nothing but finished folders is remembered: a sweep that is killed loses
the cell it was in and no other.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..files import ROOT, notice, write_checked, write_whole
from ..processes import TURN, die_with
from ..reading import BadFile, checked, nearest, plain_name, read_yaml, regular_file
from .folder import KILLED, Run, outcome
from .parameters import KNOWN_PARAMETERS, SCHEMA, config_hash, run_id
from .passes import make_bases

KEYS = {
    "name": str,
    "notebook": str,
    "defaults": Mapping[str, Any] | None,
    "grid": Mapping[str, Any],
}
"""What a sweep's file may say; `name` is the folder's under outputs/, by default the file's own."""
MOST_CELLS = 10_000
SEVERAL = "with"
TIMED, GIVEN = "steps.parquet", "given.json"
"""What a cell writes once nothing of it is timed any more; and what it is given, while it runs."""
RETRY = {
    "failed": {"failed"},
    "oom": {"oom"},
    "diverged": {"diverged"},
    "all": {"failed", "oom", "diverged"},
}


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


class Swept(NamedTuple):
    """How a sweep ended. `code`: 0 when every cell ended ok, 1 when one did not, 130 on Ctrl-C;
    `rows`: one a cell."""

    code: int
    folder: Path
    rows: list[dict]


def sweep(
    path: Path | str,
    out: Path | str | None = None,
    force: bool = False,
    retry: str | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Swept:
    """Run what is not finished, or with `dry_run` say what that is."""
    notebook, folder, cells = read_sweep(path, out)
    for name, given in sorted(
        {
            (name, cell.full[name])
            for cell in cells
            for name in ("items", "checker")
            if cell.full[name]
        }
    ):
        if not Path(given).exists():
            notice(f"{name} {given} does not exist here: its runs will fail")
    outcomes = {cell.run_id: cell.outcome() for cell in cells}
    due = [
        cell
        for cell in cells
        if force or outcomes[cell.run_id] in {None, *RETRY.get(retry or "", ())}
    ]
    if dry_run:
        rows = [
            {"run_id": c.run_id, "state": "due" if c in due else outcomes[c.run_id], **c.params}
            for c in cells
        ]
        return Swept(0, folder, rows)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), _interruptible():
        write_checked(
            folder / "sweep.json",
            {
                "schema": SCHEMA,
                "sweep": Path(path).name,
                "cells": [{**c.params, "run_id": c.run_id} for c in cells],
            },
        )
        try:
            _run_all(notebook, due, len(cells) - len(due), quiet)
        except KeyboardInterrupt:
            print(
                f"\nstopped; {sum(c.outcome() is not None for c in cells)} of {len(cells)} cells"
                " are finished and kept: the same command goes on from here",
                file=sys.stderr,
            )
            return Swept(130, folder, [_row(cell) for cell in cells])
    rows = [_row(cell) for cell in cells]
    return Swept(0 if all(row["outcome"] == "ok" for row in rows) else 1, folder, rows)


def _run_all(notebook: Path, due: list[Cell], finished: int, quiet: bool) -> None:
    from tqdm import tqdm

    if finished and not quiet:
        print(f"{finished} finished cells are kept, {len(due)} to run")
    make_bases([cell.full for cell in due], not quiet)
    with tqdm(
        total=len(due), unit="run", file=sys.stderr, disable=quiet, dynamic_ncols=True
    ) as shown:
        ahead = None
        for cell, following in itertools.zip_longest(due, due[1:]):
            shown.set_description(cell.run_id)
            began = time.monotonic()
            ahead = _run(notebook, cell, ahead or _start(notebook, cell), following)
            shown.update(1)
            if not quiet:
                row = _row(cell)
                shown.write(
                    f"{row['regime']:<12} {row['outcome']:<7} {time.monotonic() - began:5.1f} s "
                    f" {row['reason']}".rstrip(),
                    file=sys.stderr,
                )


def _start(notebook: Path, cell: Cell) -> subprocess.Popen:
    """The cell's own process, which waits for its turn when it has loaded what it needs."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    for old in ("result.json", TIMED):
        (cell.folder / old).unlink(missing_ok=True)
    given = cell.folder / GIVEN
    given.write_text(json.dumps({**cell.params, "out_dir": str(cell.folder.resolve())}))
    environment = {
        **os.environ,
        "PLOTLY_RENDERER": "plotly_mimetype",
        TURN: str((cell.folder.parent / ".turn").resolve()),
    }
    parent = os.getpid()
    with open(cell.folder / "notebook.log", "w") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vramlab.runs.cell",
                str(notebook),
                str(cell.folder / "run.ipynb"),
                str(given),
            ],
            stdout=log,
            stderr=log,
            env=environment,
            preexec_fn=lambda: die_with(parent),
        )


def _run(
    notebook: Path, cell: Cell, process: subprocess.Popen, following: Cell | None
) -> subprocess.Popen | None:
    """One cell to its end; when it ends without a result, say here how it ended. Once nothing of it
    is timed any more, the process of the one `following` is started, and returned."""
    ahead, code = None, None
    try:
        while code is None:
            try:
                code = process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                if (
                    _INTERRUPTED.is_set()
                ):  # an interruption that was swallowed on its way here still stops the sweep
                    raise KeyboardInterrupt from None
                if following and not ahead and (cell.folder / TIMED).exists():
                    ahead = _start(notebook, following)
        (cell.folder / GIVEN).unlink(missing_ok=True)
        if cell.outcome() is None:
            _write(cell.folder / "result.json", _ended(cell, code))
    except BaseException:
        for one in (process, ahead):
            _stop(one)
        raise
    return ahead


def _stop(process: subprocess.Popen | None) -> None:
    if process is None:
        return
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


_INTERRUPTED = threading.Event()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises, as always, and is remembered: an exception raised inside a callback of the
    interpreter gets lost."""

    def interrupt(*_) -> None:
        _INTERRUPTED.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _INTERRUPTED.clear()
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _ended(cell: Cell, code: int) -> dict:
    """The result of a cell whose kernel did not live to write one."""
    log = (cell.folder / "notebook.log").read_text(errors="replace").strip().splitlines()
    reason = next(
        (
            line
            for line in reversed(log)
            if "Error: " in line or "KernelDied: " in line or "CellTimeout: " in line
        ),
        log[-1] if log else f"papermill ended with code {code}",
    )
    params = cell.folder / "params.yml"
    if not params.exists() or params.name in Run(cell.folder).damage:
        write_whole(params, yaml.safe_dump({**cell.full, "run_id": cell.run_id}))
    return {
        "schema": SCHEMA,
        "run_id": cell.run_id,
        "regime": cell.full["regime"],
        "model": cell.full["model"],
        "outcome": "oom" if KILLED in reason else "failed",
        "reason": reason,
        "config_hash": config_hash(cell.params),
    }


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two sweeps in one folder would run the same cells."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another sweep is running in {folder}: wait for it, or use --out for another"
                " folder"
            ) from None
        yield


def _row(cell: Cell) -> dict:
    """A cell that has not ended is `due`."""
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


def words(rows: list[dict]) -> str:
    """A line a cell."""
    return "\n".join(
        "  ".join(
            f"{value:,.0f}" if isinstance(value, float) else str(value)
            for value in row.values()
            if value not in (None, "")
        )
        for row in rows
    )


def _write(path: Path, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=1))
