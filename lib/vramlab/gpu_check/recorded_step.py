"""The bytes of a step that was forecast: the same step on the real device, recorded.

On a GPU the recorder keeps the allocator's history and torch's own peaks. On a CPU the event meter
stands for it, and requested bytes for allocated ones. Not yet run on a GPU.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..baichuan.random_weights import batches, random_model
from ..capture import oom
from ..capture.cuda_recorder import watching
from ..forecast.forecast import Question
from ..forecast.representative_step import representative
from ..observer import Observer
from ..regimes.regime import Regime
from ..runs.passes import limited
from ..timeline.thin import curve
from ..training.trainer import Schedule, Trainer


class Switch:
    """An observer that forwards everything to `target`, which may change between two steps."""

    def __init__(self, target: Observer):
        self.target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)


def record_step(question: Question, cell: Mapping, folder: Path) -> tuple[dict, Trainer]:
    """Take steps up to the one that was forecast, recorded. Returns its bytes, and a trainer of the
    row as it is used, which nothing watches. `cell` is as in `cell.measure`. Writes
    `curve.parquet`, of a step that ran out of memory too."""
    figures, trainer = _record(question, cell, folder)
    row = question.row
    if records_unusual_steps(row):
        del trainer  # its bytes before those of another
        gc.collect()
        if cell["device"].startswith("cuda"):
            torch.cuda.empty_cache()
        trainer = make_trainer(random_model(question.spec), row, cell["device"], Observer())
    elif hasattr(row.trains, "interval"):  # from here on parts take turns as the row says
        trainer.regime = dataclasses.replace(trainer.regime, trains=row.trains)
    return figures, trainer


def records_unusual_steps(row: Regime) -> bool:
    """Whether the recorded steps are not the row's usual ones: true gradients come soon where most
    are guessed, or every step projects anew."""
    return hasattr(row.rule, "gap") or row.grads.with_short_cycle() != row.grads


def make_trainer(model: nn.Module, regime: Regime, device: str, observer: Observer) -> Trainer:
    """A trainer that `observer` watches until `watch` names another."""
    switch: Any = Switch(observer)
    return Trainer(model, regime, Schedule(regime.lr, 1000), device=device, observer=switch)


def watch(trainer: Trainer, observer: Observer) -> None:
    """From the next step on `observer` watches the trainer."""
    switch: Any = trainer.observer
    switch.target = observer


def _record(question: Question, cell: Mapping, folder: Path) -> tuple[dict, Trainer]:
    device = cell["device"]
    recorder: Any = limited(device, cell["limit_bytes"]) or watching(device)
    regime, turns = representative(question.row)
    # made before anything records: on a CPU the meter would count it twice
    model = random_model(question.spec)
    recording, step = ExitStack(), 0
    try:
        recording.enter_context(oom.watched(device, getattr(recorder, "so_far", None)))
        if device.startswith("cuda"):  # a history begins before the tensors that it explains
            recording.enter_context(recorder)
        trainer = make_trainer(model, regime, device, recorder)
        if not device.startswith("cuda"):  # a meter adopts those that exist, as in a forecast
            recording.enter_context(recorder)
        for step, parts in enumerate(parts_of_steps(trainer, turns, cell)):
            turns.parts_due = parts
            rows = batches(question.spec, question.seq, question.batch, step, regime.accumulate)
            trainer.step(rows, [1 / regime.accumulate] * regime.accumulate)
    finally:
        timeline = read_timeline(recording, recorder, step, folder)
        recorder.trains([])
    watch(trainer, Observer())
    return {**timeline, "steps_recorded": trainer.steps_done, **peaks(recorder, timeline)}, trainer


def parts_of_steps(trainer: Trainer, turns: Any, cell: Mapping) -> list[tuple[int, ...]]:
    """The parts that are active in each recorded step, such that the last is the step that was
    forecast: as many steps as that took, or, where parts take turns, one of other parts and two of
    the forecast ones, of which the second has their state."""
    sets = turns.sets(len(trainer.parts))
    if len(sets) < 2:
        return [sets[0]] * (2 if cell["step"] is None else cell["step"] + 1)
    forecast = tuple(cell["parts"] or sets[0])
    other = next((parts for parts in sets if parts != forecast), forecast)
    keeps_nothing = turns.state == "reset" and turns.interval == 1
    return [other, forecast] if keeps_nothing else [other, forecast, forecast]


def read_timeline(recording: ExitStack, recorder: Any, step: int, folder: Path) -> dict:
    """End the recording; phase, ledger and owners at the peak of `step`. A recording that cannot be
    read has a reason in their place: torch's own peaks do not depend on it."""
    try:
        recording.close()
        curve(recorder.frame()).to_parquet(folder / "curve.parquet", compression="zstd")
        peak, notes = recorder.peak(step), list(getattr(recorder, "notes", ()))
    except Exception as error:
        peak = {"phase": None, "categories": {}, "owners": [], "peak_bytes": None}
        notes = [f"no timeline ({type(error).__name__}: {error})"]
    return {
        "phase": peak["phase"],
        "ledger": peak["categories"],
        "owners": peak["owners"],
        "requested_peak_bytes": peak["peak_bytes"],
        "said": notes,
    }


def peaks(recorder: Any, timeline: Mapping) -> dict:
    """Peaks of the last step: torch's own figures where the recorder has them. A CPU has requested
    bytes only."""
    steps = getattr(recorder, "peaks", None)
    if not steps:
        return {
            "allocated_peak_bytes": timeline["requested_peak_bytes"],
            "reserved_peak_bytes": None,
            "num_alloc_retries": None,
        }
    return {
        "allocated_peak_bytes": steps[-1]["allocated_peak_bytes"],
        "num_alloc_retries": steps[-1]["num_alloc_retries"],
        "reserved_peak_bytes": max(step["reserved_peak_bytes"] for step in steps),
    }
