"""Finished run folders, read back: what reports and notebooks draw from. Imports nothing that
trains.

A damaged file counts as missing: a run without the files that its outcome promises has not ended,
and one whose timeline cannot be read has no timeline. Each damaged file is named; it hides no other
run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from pandas.api.types import is_numeric_dtype

from ..files import intact, notice, read_checked, recall, seal
from ..reading import BadFile, checked, read_json, read_table, read_yaml
from .schema import (
    ENVIRONMENT,
    FINISHED,
    NEEDED,
    NUMBERS,
    PARAMETERS,
    READERS,
    RESULT,
    SCORINGS,
    TABLES,
)

RETRY = {
    "failed": ("failed",),
    "oom": ("oom",),
    "diverged": ("diverged",),
    "all": ("failed", "oom", "diverged"),
}
"""What `--retry` may be, and the outcomes that are then run again."""
KILLED = "the notebook's process was killed by signal 9"
"""The reason that stands for running out of memory when nobody lived to say so."""


def _table(name: str) -> cached_property[pd.DataFrame]:
    """A property of `Run`: its table of this name, read once."""
    return cached_property(lambda run: read_table(run.folder / f"{name}.parquet"))


@dataclass(frozen=True)
class Run:
    """One run folder. A run is complete when `result.json` exists. Reading a damaged file raises
    BadFile, which names it."""

    folder: Path

    @property
    def name(self) -> str:
        """The regime, with the seed where it is not 0."""
        seed = self.params.get("seed", 0)
        return self.params["regime"] + (f" seed {seed}" if seed else "")

    @cached_property
    def result(self) -> dict:
        return self._checked(read_json, "result.json", RESULT, ("outcome", "reason"))

    @cached_property
    def params(self) -> dict:
        return self._checked(read_yaml, "params.yml", PARAMETERS, ("regime",))

    @cached_property
    def environment(self) -> dict:
        return self._checked(read_json, "env.json", ENVIRONMENT)

    def _checked(
        self, read: Callable, name: str, hints: Mapping, needed: Sequence[str] = ()
    ) -> dict:
        path = self.folder / name
        return checked(read(path), hints, str(path), needed, others=True)

    @property
    def ok(self) -> bool:
        return self.result["outcome"] == "ok"

    steps = _table("steps")
    timeline = _table("timeline")
    scores = _table("scores")
    accuracy = _table("accuracy")
    table = _table("table")
    """The rows that a study's measurement returned."""

    @cached_property
    def samples(self) -> pd.DataFrame:
        """The driver's samples of the card during the learning pass; empty where it took none."""
        path = self.folder / "nvml.parquet"
        return read_table(path) if path.exists() else pd.DataFrame()

    @cached_property
    def damage(self) -> dict[str, str]:
        """File -> why it cannot be read, of the files that exist."""
        reasons = {}
        for file, reader in READERS.items():
            try:
                getattr(self, reader)
            except FileNotFoundError:
                continue
            except (BadFile, OSError) as error:
                reasons[file] = str(error)
        return reasons

    @cached_property
    def missing(self) -> list[str]:
        """What the run's outcome promises and the folder does not have whole. No figure can be
        drawn of a run that misses anything."""
        if "result.json" in self.damage:
            return ["result.json"]
        files = [
            name
            for name in (NEEDED if self.ok else NEEDED[:1])
            if name in self.damage or not (self.folder / name).exists()
        ]
        if not self.ok:
            return files
        fields = [name for name in FINISHED if name not in self.result]
        return files + fields + ([] if files else self._missing_columns() or self._missing_scores())

    def _missing_columns(self) -> list[str]:
        """Columns that figures draw and that a table does not have, or not as numbers; all, of a
        table without rows."""
        drawn = [name for name in TABLES if name != "timeline" or self.has_timeline]
        return [
            f"{column} in {name}.parquet"
            for name in drawn
            for column in TABLES[name]
            if not _is_drawable(getattr(self, name), column)
        ]

    def _missing_scores(self) -> list[str]:
        """Scorings whose balanced accuracy on new documents of the training domain is missing."""
        frame, home = self.accuracy, self.params.get("train_domain")
        rows = (
            (frame["domain"] == home)
            & (frame["shift"] == "none")
            & (frame["metric"] == "balanced_accuracy")
        )
        return [
            f"{scoring} of its training domain, {home!r}, in accuracy.parquet"
            for scoring in SCORINGS
            if scoring not in set(frame["scoring"][rows])
        ]

    @property
    def has_timeline(self) -> bool:
        path = self.folder / "timeline.parquet"
        return (
            path.exists()
            and path.name not in self.damage
            and {"peak", "memory_ledger"} <= self.result.keys()
        )


def _is_drawable(frame: pd.DataFrame, column: str) -> bool:
    if frame.empty or column not in frame:
        return False
    return column not in NUMBERS or is_numeric_dtype(frame[column])


def outcome(folder: Path) -> str | None:
    """How the run or measurement in `folder` ended; None when it has not ended, or when a file that
    it needs is damaged. Each damaged file is reported once.

    Files that still match the checksums of `seal_run` are not parsed again.
    """
    run = Run(folder)
    damage = {} if intact(folder) else run.damage
    for reason in damage.values():
        notice(f"{reason}; it counts as not there")
    ended = (folder / "result.json").exists()
    damaged = damage.keys() & {"result.json", "table.parquet", *NEEDED}
    return run.result["outcome"] if ended and not damaged else None


def seal_run(folder: Path) -> None:
    """Record the checksums of a finished run's files, when all of them can be read. A disk that has
    no room for them costs time later, and no run."""
    if not Run(folder).damage:
        with suppress(OSError):
            seal(folder, *(name for name in READERS if (folder / name).exists()))


def is_due(ended: str | None, retry: str | None = None) -> bool:
    """Whether a cell whose outcome is `ended` (None: it has not ended) has to run, `retry` being
    one of `RETRY`."""
    return ended is None or ended in RETRY.get(retry or "", ())


def read_runs(folder: Path | str, damage: list[str] | None = None) -> list[Run]:
    """Complete runs under `folder`, in the order of the sweep when it has one, else by name.
    Damaged runs are left out; a sentence for each damaged file and run is appended to `damage`, or
    printed to standard error without it.

    Raises: FileNotFoundError, when no run is complete, with the way to make some.
    """
    folder, sentences = Path(folder), [] if damage is None else damage
    every = [Run(path.parent) for path in sorted(folder.glob("*/result.json"))]
    runs = [run for run in every if not run.missing]
    sentences += [reason for run in every for reason in run.damage.values()]
    sentences += [
        f"{run.folder.name} is left out: it lacks {', '.join(run.missing)}"
        for run in every
        if run.missing
    ]
    index = recall(folder / "sweep.json", _sweep, sentences.append) or {"cells": ()}
    place = {cell["run_id"]: at for at, cell in enumerate(index["cells"])}
    for sentence in sentences if damage is None else ():
        notice(sentence)
    if not runs:
        raise FileNotFoundError(
            "; ".join(
                [
                    f"no finished run under {folder}: `vramlab sweep params/quick.yml` makes some",
                    *sentences,
                ]
            )
        )
    # runs of an older version of the sweep stay on disk, but are not part of it
    kept = [run for run in runs if run.folder.name in place] or runs
    return sorted(kept, key=lambda run: place.get(run.folder.name, len(place)))


def _sweep(path: Path) -> dict:
    return checked(
        read_checked(path), {"cells": [{"run_id": str}]}, str(path), ("cells",), others=True
    )
