"""Finished run folders, read back: what reports and notebooks draw from. Imports nothing that
trains.

A file that is damaged counts as not there: a run without the files that its outcome promises has
not ended, and one whose timeline cannot be read has no timeline. Each damaged file is named; it
hides no other run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from ..files import notice, read_checked, recall
from ..reading import BadFile, checked, read_json, read_table, read_yaml

OUTCOMES = ("ok", "oom", "diverged", "failed")
RETRY = {
    "failed": ("failed",),
    "oom": ("oom",),
    "diverged": ("diverged",),
    "all": ("failed", "oom", "diverged"),
}
"""What `--retry` may be, and the outcomes that are then run again."""
KILLED = "the notebook's process was killed by signal 9"
"""The reason that stands for running out of memory when nobody lived to say so."""

SPEED = (
    "tokens_per_s",
    "step_s_median",
    "step_s_q25",
    "step_s_q75",
    "forward_s",
    "backward_s",
    "update_s",
)
_OWNER = {"category": str, "module": str, "bytes": int}
_COUNTS = dict.fromkeys(
    (
        "asked_bytes",
        "free_bytes",
        "capacity_bytes",
        "reserved_bytes",
        "allocated_bytes",
        "largest_free_block_bytes",
    ),
    int | None,
)
RESULT: Mapping[str, Any] = {
    "outcome": OUTCOMES,
    "reason": str,
    "regime": str,
    "model": str,
    "measured_on": str,
    "device": str,
    "loss_first": Real,
    "loss_last": Real,
    "trainable_parameters": int,
    "parameters": int,
    "host_bytes": int | None,
    "optimizer_state_bytes": int,
    "speed": dict.fromkeys(SPEED, float),
    "peak_bytes": Mapping[str, int | None],
    "memory_ledger": Mapping[str, int],
    "peak": {
        "peak_bytes": int,
        "phase": str,
        "step": int,
        "categories": Mapping[str, int],
        "owners": [_OWNER],
    },
    "base": Mapping[str, Any],
    "notes": Sequence[str],
    "generation": {
        "shares": [
            {"judge": str, "domain": str, "shift": str, "call": str, "share": Real, "n": int}
        ]
    },
    "oom": {**_COUNTS, "phase": str | None, "source": str, "said": str | None, "owners": [_OWNER]},
    "ledger": {"parts": Mapping[str, int | None], "used": int | None, "context_source": str},
}
"""Fields of `result.json` that are drawn, with their types. Which are there depends on the outcome
and the passes."""
PARAMETERS = {"regime": str, "model": str, "seed": int, "train_domain": str, "batch_size": int}
ENVIRONMENT = {"device": {"name": str}, "versions": Mapping[str, Any]}
FINISHED = ("speed", "trainable_parameters", "loss_first", "loss_last")
"""Fields that a run which ended ok has."""
TABLES: Mapping[str, Sequence[str]] = {
    "steps": ("step", "loss", "step_s", "tokens", "lr"),
    "scores": (
        "uid",
        "domain",
        "split",
        "shift",
        "transform",
        "label",
        "group",
        "yesno",
        "likelihood",
    ),
    "accuracy": ("domain", "shift", "scoring", "metric", "value", "low", "high", "n", "threshold"),
    "timeline": ("event", "bytes", "category", "module", "step", "phase", "live_bytes"),
}
"""Tables of a run with the columns that are drawn."""
NUMBERS = {
    "step",
    "loss",
    "step_s",
    "tokens",
    "lr",
    "label",
    "yesno",
    "likelihood",
    "value",
    "low",
    "high",
    "n",
    "bytes",
    "live_bytes",
}
SCORINGS = ("yesno", "likelihood")
"""Those of the model, which figures draw in its training domain."""
NEEDED = ("params.yml", "steps.parquet", "scores.parquet", "accuracy.parquet")
"""Without one of these a finished run cannot be drawn."""


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
        return checked(
            read(self.folder / name), hints, str(self.folder / name), needed, others=True
        )

    @property
    def ok(self) -> bool:
        return self.result["outcome"] == "ok"

    def _table(self, name: str) -> pd.DataFrame:
        return read_table(self.folder / f"{name}.parquet")

    @cached_property
    def steps(self) -> pd.DataFrame:
        return self._table("steps")

    @cached_property
    def timeline(self) -> pd.DataFrame:
        return self._table("timeline")

    @cached_property
    def samples(self) -> pd.DataFrame:
        """What the driver said of the card beside the learning pass; empty where there was none."""
        path = self.folder / "nvml.parquet"
        return read_table(path) if path.exists() else pd.DataFrame()

    @cached_property
    def scores(self) -> pd.DataFrame:
        return self._table("scores")

    @cached_property
    def accuracy(self) -> pd.DataFrame:
        return self._table("accuracy")

    @cached_property
    def table(self) -> pd.DataFrame:
        """What a study's measurement found."""
        return self._table("table")

    @cached_property
    def damage(self) -> dict[str, str]:
        """File -> why it cannot be read, of the files that are there."""
        readers = {
            "result.json": "result",
            "params.yml": "params",
            "env.json": "environment",
            "nvml.parquet": "samples",
            "table.parquet": "table",
            **{f"{name}.parquet": name for name in TABLES},
        }
        reasons = {}
        for file, reader in readers.items():
            try:
                getattr(self, reader)
            except FileNotFoundError:
                continue
            except (BadFile, OSError) as error:
                reasons[file] = str(error)
        return reasons

    @cached_property
    def lacks(self) -> list[str]:
        """What its outcome promises and is not there, or damaged: of a run that lacks anything no
        figure can be drawn."""
        if "result.json" in self.damage:
            return ["result.json"]
        files = [
            name
            for name in NEEDED[: None if self.ok else 1]
            if name in self.damage or not (self.folder / name).exists()
        ]
        fields = [name for name in FINISHED if self.ok and name not in self.result]
        columns = [
            column for table in TABLES if self.ok and not files for column in self._missing(table)
        ]
        if self.ok and not files + columns:
            home = self.params.get("train_domain")
            columns = [
                f"{scoring} of its training domain, {home!r}, in accuracy.parquet"
                for scoring in SCORINGS
                if scoring not in self._scored(home)
            ]
        return files + fields + columns

    def _scored(self, domain: str | None) -> set[str]:
        """The scorings whose balanced accuracy on new documents of the domain is recorded."""
        frame = self.accuracy
        rows = (
            (frame["domain"] == domain)
            & (frame["shift"] == "none")
            & (frame["metric"] == "balanced_accuracy")
        )
        return {*frame["scoring"][rows]}

    def _missing(self, table: str) -> list[str]:
        """Columns that figures draw and the table has not, or not as numbers; all, where it has no
        row."""
        if table == "timeline" and not self.has_timeline:
            return []
        frame = getattr(self, table)
        return [
            f"{column} in {table}.parquet"
            for column in TABLES[table]
            if frame.empty
            or column not in frame
            or (column in NUMBERS and not is_numeric_dtype(frame[column]))
        ]

    @property
    def has_timeline(self) -> bool:
        path = self.folder / "timeline.parquet"
        return (
            path.exists()
            and path.name not in self.damage
            and {"peak", "memory_ledger"} <= self.result.keys()
        )


def outcome(folder: Path) -> str | None:
    """How what runs in `folder` ended; None when it has not, or when a file it ended with is
    damaged, which is said once."""
    run = Run(folder)
    for reason in run.damage.values():
        notice(f"{reason}; it counts as not there")
    ended = (folder / "result.json").exists() and not run.damage.keys() & {
        "result.json",
        "table.parquet",
        *NEEDED,
    }
    return run.result["outcome"] if ended else None


def is_due(ended: str | None, retry: str | None = None) -> bool:
    """Whether a cell whose outcome is `ended` (None: it has not ended) has to run, `retry` being
    one of `RETRY`."""
    return ended is None or ended in RETRY.get(retry or "", ())


def read_runs(folder: Path | str, damage: list[str] | None = None) -> list[Run]:
    """Complete runs under `folder`, in the order of the sweep when it has one, else by name. What
    is damaged is left out; `damage` gets a sentence for each such file and run, and without
    `damage` they go to standard error.

    Raises: FileNotFoundError, when there is no complete run, with the way to make some.
    """
    folder, sentences = Path(folder), [] if damage is None else damage
    every = [Run(path.parent) for path in sorted(folder.glob("*/result.json"))]
    runs = [run for run in every if not run.lacks]
    sentences += [reason for run in every for reason in run.damage.values()]
    sentences += [
        f"{run.folder.name} is left out: it lacks {', '.join(run.lacks)}"
        for run in every
        if run.lacks
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
