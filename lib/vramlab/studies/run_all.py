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
    """Every study asked for (all five with their small files by default). A study that fails says
    why and the others go on.

    Returns one entry a study: `study`, `cells`, `due`, `failed` cells, `verdicts` (rows of the
    ledger), `notebook`, `reason`.
    """
    plans = [
        read_plan(study)
        for study in studies or [name for name in STUDIES if (PARAMS / f"{name}.yml").exists()]
    ]
    folders = {plan.path: Path(out) / plan.path.stem for plan in plans}
    cells = [(folders[plan.path], cell) for plan in plans for cell in plan.every_cell()]
    said = [
        {
            "study": plan.path.stem,
            "cells": len(plan.every_cell()),
            "due": len(runner.due((folders[plan.path], cell) for cell in plan.every_cell())),
        }
        for plan in plans
    ]
    if dry_run:
        return said
    began = time.monotonic()
    failed = runner.make(cells, jobs, progress=not quiet)
    for entry, plan in zip(said, plans, strict=True):
        entry["failed"] = [line for line in failed if line.startswith(f"{plan.path.stem},")]
        try:
            entry |= _study(plan, folders[plan.path], gallery)
        except Exception as error:  # recorded: the other studies go on
            entry["reason"] = f"{type(error).__name__}: {error}"
    print(f"all studies: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return said


def _study(plan: Plan, folder: Path, gallery: Path | None) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    notebook = _notebook(plan, folder)
    lab = Lab(plan, folder, Records.of(plan, folder))
    if gallery:
        lab.write(notebook, gallery)
    return {
        "notebook": str(notebook),
        "verdicts": table(lab.verdicts()).to_dict("records"),
        "reason": "",
    }


def _notebook(plan: Plan, folder: Path) -> Path:
    """The study's notebook executed on the finished runs. Raises: RuntimeError, with the last line
    of what it said."""
    target = folder / "study.ipynb"
    notebook = ROOT / "notebooks" / "studies" / f"{plan.name}.ipynb"
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
    """From the project's folder where it lies in it: an executed notebook shows its parameters to
    everyone."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def to_text(found: Sequence[Mapping]) -> str:
    """What became of each study, as text."""
    lines = []
    for study in found:
        state = f"{study['due']} due" if "failed" not in study else f"{len(study['failed'])} failed"
        lines.append(
            f"{study['study']}: {study['cells']} cells,"
            f" {state}{'; ' + study['reason'] if study.get('reason') else ''}"
        )
        lines += [
            f"  {row['verdict']:<22} {row['claim']}\n  {'':<22} {row['why']}"
            for row in study.get("verdicts", ())
        ]
    return "\n".join(lines)
