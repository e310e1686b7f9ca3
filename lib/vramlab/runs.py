"""Finished run folders, read back: what reports and notebooks draw from. Imports nothing that trains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import yaml

OUTCOMES = ("ok", "oom", "diverged", "failed")
KILLED = "the notebook's process was killed by signal 9"
"""The reason that stands for running out of memory when nobody lived to say so."""


@dataclass(frozen=True)
class Run:
    """One run folder. A run is complete when `result.json` exists."""

    folder: Path

    @property
    def name(self) -> str:
        """The regime, with the seed where it is not 0."""
        seed = self.params.get("seed", 0)
        return self.params["regime"] + (f" seed {seed}" if seed else "")

    @cached_property
    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text())

    @cached_property
    def params(self) -> dict:
        return yaml.safe_load((self.folder / "params.yml").read_text())

    @cached_property
    def environment(self) -> dict:
        return json.loads((self.folder / "env.json").read_text())

    @property
    def ok(self) -> bool:
        return self.result["outcome"] == "ok"

    @cached_property
    def steps(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "steps.parquet")

    @cached_property
    def timeline(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "timeline.parquet")

    @cached_property
    def samples(self) -> pd.DataFrame:
        """What the driver said of the card beside the learning pass; empty where there was none."""
        path = self.folder / "nvml.parquet"
        return pd.read_parquet(path) if path.exists() else pd.DataFrame()

    @cached_property
    def scores(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "scores.parquet")

    @cached_property
    def accuracy(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "accuracy.parquet")

    @property
    def has_timeline(self) -> bool:
        return (self.folder / "timeline.parquet").exists()


def outcome(folder: Path) -> str | None:
    """How what runs in `folder` ended; None when it has not."""
    path = folder / "result.json"
    return json.loads(path.read_text())["outcome"] if path.exists() else None


def read_runs(folder: Path | str) -> list[Run]:
    """Complete runs under `folder`, in the order of the sweep when it has one, else by name.

    Raises: FileNotFoundError, when there is none, with the way to make some.
    """
    folder = Path(folder)
    runs = [Run(path.parent) for path in sorted(folder.glob("*/result.json"))]
    if not runs:
        raise FileNotFoundError(f"no finished run under {folder}: `vramlab sweep params/quick.yml` makes some")
    index = folder / "sweep.json"
    wanted = [cell["run_id"] for cell in json.loads(index.read_text())["cells"]] if index.exists() else []
    place = {name: i for i, name in enumerate(wanted)}
    # runs of an older version of the sweep stay on disk, but are not part of it
    kept = [run for run in runs if run.folder.name in place] or runs
    return sorted(kept, key=lambda run: place.get(run.folder.name, len(place)))
