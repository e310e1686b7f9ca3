"""A study as its notebook uses it: the plan, the records of its runs, and the figures and verdicts
that follow from them.

    study = Lab.of("params/studies/lomo.yml")
    study.verdicts()
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..files import ROOT, write_whole
from ..machine import record
from . import claims, runner
from .estimates import Figure
from .gallery import GALLERY
from .plan import Plan, read_plan
from .records import Records

OUTPUTS = ROOT / "outputs" / "studies"


@dataclass(frozen=True)
class Lab:
    """A study with its runs. `folder` holds run folders, or in the gallery the thinned records."""

    plan: Plan
    folder: Path
    records: Records

    @classmethod
    def of(
        cls, study: Path | str, out_dir: Path | str = "", jobs: int = 0, progress: bool = True
    ) -> Lab:
        """Run the cells that are due of a study's file, or of the study of that name, in `out_dir`
        (default: outputs/studies/<name of the file>), and read their records."""
        plan = read_plan(study)
        folder = Path(out_dir) if out_dir else OUTPUTS / plan.path.stem
        runner.make([(folder, cell) for cell in plan.every_cell()], jobs, progress)
        return cls(plan, folder, Records.of(plan, folder))

    @classmethod
    def committed(cls, study: Path | str, gallery: Path = GALLERY) -> Lab:
        """The study as it is committed in the gallery. Raises: FileNotFoundError."""
        plan = read_plan(study)
        folder = gallery / plan.path.stem
        return cls(plan, folder, Records.read(folder / "records"))

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """Every number that a claim may need."""
        return runner.load_module(self.plan.name, self.plan.module).figures(self)

    def verdicts(self) -> list[claims.Verdict]:
        """The verdict on each claim of this study."""
        return [
            claims.decide(claim, self.figures)
            for claim in claims.read_claims()
            if claim.study == self.plan.name
        ]

    def write(self, notebook: Path, gallery: Path = GALLERY) -> Path:
        """Write the study into the gallery: thinned records, figures, the executed notebook, and
        what they were made with."""
        folder = gallery / self.plan.path.stem
        self.records.write(folder / "records")
        figures = {name: figure.to_json() for name, figure in self.figures.items()}
        write_whole(folder / "figures.json", json.dumps(figures, indent=1))
        origin = {
            "study": self.plan.name,
            "file": self.plan.path.name,
            "params_hash": self.plan.content_hash(),
            "cells": len(self.plan.every_cell()),
            "made_with": record(),
        }
        write_whole(folder / "made.json", json.dumps(origin, indent=1))
        _keep(notebook, folder / "study.ipynb")
        return folder


def _keep(notebook: Path, target: Path) -> None:
    """Write the executed notebook without the paths of the machine that papermill records."""
    content = json.loads(notebook.read_text())
    for name in ("input_path", "output_path"):
        content["metadata"].get("papermill", {}).pop(name, None)
    write_whole(target, json.dumps(content, indent=1).replace(f"{ROOT}/", ""))
