"""All studies in one go: their runs first, side by side under one bar, then each notebook through
papermill, then the gallery."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import ROOT
from ..processes import call_once
from . import STUDIES, runner
from .claims import table
from .plan import PARAMS, Plan, read_plan
from .records import Records
from .study import Lab


def run(
    studies: Sequence[str] = (),
    out: Path | str = "outputs/studies",
    gallery: Path | None = None,
    jobs: int = 0,
    dry_run: bool = False,
    quiet: bool = False,
) -> list[dict]:
    """Run `studies` (default: all, with their small files). A study that fails says why, and the
    others go on.

    Returns one entry for each study: `study`, `cells`, `due`, `failed` cells, `verdicts` (rows of
    the ledger), `notebook`, `reason`.
    """
    names = studies or [name for name in STUDIES if (PARAMS / f"{name}.yml").exists()]
    plans = [(plan, Path(out) / plan.path.stem) for plan in map(read_plan, names)]
    items = [[(folder, cell) for cell in plan.every_cell()] for plan, folder in plans]
    entries: list[dict] = [
        {"study": folder.name, "cells": len(own), "due": len(runner.due(own))}
        for (_, folder), own in zip(plans, items, strict=True)
    ]
    if dry_run:
        return entries
    began_s = time.monotonic()
    failed = runner.make([item for own in items for item in own], jobs, progress=not quiet)
    for entry, (plan, folder) in zip(entries, plans, strict=True):
        entry["failed"] = [line for line in failed if line.startswith(f"{folder.name},")]
        try:
            entry |= _study(plan, folder, gallery)
        except Exception as error:  # recorded, so that the other studies go on
            entry["reason"] = f"{type(error).__name__}: {error}"
    print(f"all studies: {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    return entries


def _study(plan: Plan, folder: Path, gallery: Path | None) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    notebook = _notebook(plan, folder)
    study = Lab(plan, folder, Records.of(plan, folder))
    if gallery:
        study.write(notebook, gallery)
    return {
        "notebook": str(notebook),
        "verdicts": table(study.verdicts()).to_dict("records"),
        "reason": "",
    }


def _notebook(plan: Plan, folder: Path) -> Path:
    """Execute the notebook beside the study's module on the finished runs. Raises: RuntimeError,
    with the last line of its log."""
    target, notebook = folder / "study.ipynb", (ROOT / plan.module).with_suffix(".ipynb")
    call = {
        "notebook": str(notebook),
        "output": str(target),
        "parameters": {"params_file": _relative(plan.path), "out_dir": _relative(folder)},
    }
    with open(folder / "notebook.log", "w") as log:
        reason = call_once("vramlab.runs.cell:run_notebook", call, output=log).reason
    if reason:
        lines = (folder / "notebook.log").read_text().strip().splitlines()
        raise RuntimeError(f"{notebook.name}: {lines[-1] if lines else reason}")
    return target


def _relative(path: Path) -> str:
    """The path from the project's folder, if it lies there: an executed notebook shows its
    parameters to everyone."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def to_text(entries: Sequence[Mapping]) -> str:
    """The entries of `run` as text."""
    lines = []
    for entry in entries:
        state = f"{entry['due']} due" if "failed" not in entry else f"{len(entry['failed'])} failed"
        reason = f"; {entry['reason']}" if entry.get("reason") else ""
        lines.append(f"{entry['study']}: {entry['cells']} cells, {state}{reason}")
        lines += [
            f"  {row['verdict']:<22} {row['claim']}\n  {'':<22} {row['why']}"
            for row in entry.get("verdicts", ())
        ]
    return "\n".join(lines)
