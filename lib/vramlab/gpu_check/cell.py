"""One cell of `gpu_check`, in a process of its own: bytes of the step that was forecast, then speed
with nothing watching.

    python -m vramlab.gpu_check.cell    reads one line of JSON, {"does": a name of DOES, "folder":
                                        ..., ...}, and writes result.json

The process imports first and then waits for its line, so that the next cell's imports run beside
this cell's steps. Weights are random, made on the host as a checkpoint's would be. Not yet run on a
GPU; with device cpu the event meter stands for the recorder and requested bytes for allocated ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..baichuan.random_weights import batches, random_model
from ..capture import nvml, oom
from ..capture.meter import Meter
from ..capture.nvml_sampler import Sampler
from ..files import write_whole
from ..forecast.forecast import Question
from ..forecast.representative_step import representative
from ..machine import describe
from ..observer import Observer
from ..regimes.regime import Regime
from ..runs import execute as run
from ..timeline.thin import curve
from ..training.clock import clock
from ..training.trainer import Schedule, Trainer
from . import trainer_peers as gpu_peers

WARM = 2
"""Steps before those that are timed."""


class Passed(Observer):
    """Hands what it is told on to `to`, which may change between two steps."""

    def __init__(self, to: Observer):
        self.to, self._leaves = to, ()

    def begin_step(self, step: int) -> None:
        self.to.begin_step(step)

    def phase(self, name: str):
        return self.to.phase(name)

    def region(self, place: str):
        return self.to.region(place)

    def own(self, category: str, named_tensors) -> None:
        self.to.own(category, named_tensors)

    def trains(self, named_leaves) -> None:
        self.to.trains(named_leaves)

    def end_step(self) -> None:
        self.to.end_step()


def measure(asked: Mapping) -> dict:
    """Bytes and speed of one row. `asked`: model, regime, weights, seq, batch, device, window_s,
    budget_s, limit_bytes, and of its forecast `parts` and `step`, empty where there is none."""
    began, question = time.perf_counter(), _question(asked)
    device, folder = asked["device"], Path(asked["folder"])
    _limit(device, asked["limit_bytes"])
    reader = nvml.find(device)
    with Sampler(reader) as sampler:
        made, trainer = _bytes(question, asked, folder)
        if _hurried(question.row):
            trainer = None  # its bytes first
            trainer = _unhurried(question, device)
        elif hasattr(question.row.trains, "interval"):  # from here on turns as the row takes them
            trainer.regime = dataclasses.replace(trainer.regime, trains=question.row.trains)
        speed = _speed(question, asked, trainer, asked["budget_s"] - (time.perf_counter() - began))
    window = speed.pop("window", None)
    energy = (
        dataclasses.asdict(sampler.energy_j(*window))
        if window
        else {"j": None, "error_j": None, "how": "N/A: no window"}
    )
    seen = sampler.frame()
    driver = {
        f"nvml_{name}": None if seen[name].dropna().empty else int(seen[name].max())
        for name in ("used_bytes", "process_bytes")
    }
    return {**made, **speed, **driver, "energy": energy, "said": [*made["said"], *sampler.said]}


def _question(asked: Mapping) -> Question:
    return Question(asked["model"], asked["regime"], asked["seq"], asked["batch"], asked["weights"])


def _limit(device: str, limit_bytes: int) -> None:
    """What the cell may take: for one that is to run out of memory on purpose where the card is too
    large for it."""
    if limit_bytes and device.startswith("cuda"):
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, limit_bytes / torch.cuda.get_device_properties(device).total_memory)
        )


def _recorder(device: str, limit_bytes: int) -> Any:
    if not device.startswith("cuda"):
        from ..capture.memory_limit import Ceiling

        return Ceiling(limit_bytes) if limit_bytes else Meter()
    from ..capture.cuda_recorder import Recorder

    return Recorder(device)


def _bytes(question: Question, asked: Mapping, folder: Path) -> tuple[dict, Trainer]:
    """Steps up to the one that was forecast, recorded. Leaves the curve in `folder`, of a step that
    ran out too."""
    device, recorder = asked["device"], _recorder(asked["device"], asked["limit_bytes"])
    passed, (regime, turns) = Passed(recorder), representative(question.row)
    model = random_model(
        question.spec
    )  # on the host, whose bytes are none of the recorder's; a meter on a CPU would see them
    make = functools.partial(
        Trainer, model, regime, Schedule(regime.lr, 1000), device=device, observer=passed
    )
    entered, step = contextlib.ExitStack(), 0
    try:
        entered.enter_context(oom.watched(device, getattr(recorder, "so_far", None)))
        trainer = (
            None if device.startswith("cuda") else make()
        )  # a meter adopts what it is told of, as in a forecast
        entered.enter_context(recorder)
        trainer = trainer or make()
        for step, parts in enumerate(_parts(trainer, turns, asked)):
            turns.parts_due = parts
            trainer.step(
                batches(question.spec, question.seq, question.batch, step, regime.accumulate),
                [1 / regime.accumulate] * regime.accumulate,
            )
    finally:
        seen = _timeline(entered, recorder, step, folder)
        recorder.trains([])
    passed.to = Observer()
    return {**seen, "steps_recorded": trainer.steps_done, **_peaks(recorder, seen)}, trainer


def _timeline(entered: contextlib.ExitStack, recorder: Any, step: int, folder: Path) -> dict:
    """What the recording says of `step`. One that cannot be read says why; torch's own peaks do not
    hang on it."""
    try:
        entered.close()
        curve(recorder.frame()).to_parquet(folder / "curve.parquet", compression="zstd")
        found, said = recorder.peak(step), list(getattr(recorder, "said", ()))
    except Exception as error:
        found = {"phase": None, "categories": {}, "owners": [], "peak_bytes": None}
        said = [f"no timeline ({type(error).__name__}: {error})"]
    return {
        "phase": found["phase"],
        "ledger": found["categories"],
        "owners": found["owners"],
        "requested_peak_bytes": found["peak_bytes"],
        "said": said,
    }


def _parts(trainer: Trainer, turns: Any, asked: Mapping) -> list[tuple[int, ...]]:
    """Which parts are active in each recorded step, such that the last is the step that was
    forecast: as many as that took, or, where parts take turns, one of other parts and two of the
    reported ones, of which the second has their state.
    """
    sets = turns.sets(len(trainer.parts))
    if len(sets) < 2:
        return [sets[0]] * (asked["step"] + 1 if asked["step"] is not None else 2)
    reported = tuple(asked["parts"] or sets[0])
    other = next((parts for parts in sets if parts != reported), reported)
    once = turns.state == "reset" and turns.interval == 1
    return [other, reported] if once else [other, reported, reported]


def _peaks(recorder: Any, found: Mapping) -> dict:
    """Peaks of the last step: torch's own figures where it keeps them; a CPU has requested bytes
    and no more."""
    kept = getattr(recorder, "peaks", None)
    if not kept:
        return {
            "allocated_peak_bytes": found["requested_peak_bytes"],
            "reserved_peak_bytes": None,
            "num_alloc_retries": None,
        }
    return {
        "allocated_peak_bytes": kept[-1]["allocated_peak_bytes"],
        "num_alloc_retries": kept[-1]["num_alloc_retries"],
        "reserved_peak_bytes": max(step["reserved_peak_bytes"] for step in kept),
    }


def _hurried(row: Regime) -> bool:
    """Whether the recorded steps were not the row's usual ones: guessed gradients came soon, or
    every step projected anew."""
    return hasattr(row.rule, "gap") or row.grads.hurried() != row.grads


def _unhurried(question: Question, device: str) -> Trainer:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    row = question.row
    return Trainer(
        random_model(question.spec),
        row,
        Schedule(row.lr, 1000),
        device=device,
        observer=Passed(Observer()),
    )


def _speed(question: Question, asked: Mapping, trainer: Trainer, budget_s: float) -> dict:
    """Seconds of steps that nobody watches but a clock that marks edges: median and quartiles."""
    row, passed = question.row, trainer.observer
    step = _stepper(question, trainer)
    warm_s = min(step(warm) for warm in range(WARM))
    steps = max(
        1, min(math.ceil(asked["window_s"] * 1.1 / warm_s), 400, int(budget_s / 2 / warm_s))
    )
    passed.to = timer = clock(asked["device"])
    start = time.perf_counter()
    for number in range(steps):
        step(number, read=number == steps - 1)
    end, times = (
        time.perf_counter(),
        torch.tensor([row["step_s"] for row in timer.rows], dtype=torch.float64),
    )
    tokens = question.seq * question.batch * row.accumulate
    q25, q50, q75 = (float(times.quantile(q)) for q in (0.25, 0.5, 0.75))
    return {
        "step_s_median": q50,
        "step_s_q25": q25,
        "step_s_q75": q75,
        "steps_timed": steps,
        "window": (start, end),
        "window_tokens": tokens * steps,
        "tokens_per_s": tokens * steps / (end - start),
    }


def _stepper(question: Question, trainer: Trainer):
    count, made = trainer.regime.accumulate, []

    def step(seed: int, read: bool = True) -> float:
        if len(made) <= seed % 4:
            made.append(batches(question.spec, question.seq, question.batch, seed, count))
        start = time.perf_counter()
        loss = trainer.step(made[seed % len(made)], [1 / count] * count)
        if read and not math.isfinite(float(loss)):  # reading waits for the device
            raise FloatingPointError(
                f"the loss is {float(loss)}: random weights do not train with this row"
            )
        return time.perf_counter() - start

    return step


def tiny(asked: Mapping) -> dict:
    """One row of the small sweep: it trains, it is scored."""
    params = {
        "regime": asked["regime"],
        "device": asked["device"],
        "recipe": "smoke",
        "steps": 40,
        "train_items": 400,
        "val_items": 60,
        "test_items": 60,
        "measure": False,
    }
    ended = run.execute(params, Path(asked["folder"]) / "run", progress=False)
    made = json.loads((ended / "result.json").read_text())
    return {
        "tokens_per_s": made.get("speed", {}).get("tokens_per_s"),
        "run": made,
        "outcome": made["outcome"],
        "reason": made["reason"],
    }


DOES = {"measure": measure, "describe": describe, "tiny": tiny, "peer": gpu_peers.peer}


@contextlib.contextmanager
def _evidence(result: dict) -> Iterator[None]:
    """However it ends is written into `result`, and memory that ran out with its evidence."""
    try:
        yield
    except Exception as error:
        short = run.out_of_memory(error)
        text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        result |= {
            "outcome": "oom" if short else "failed",
            "reason": text.replace(str(Path.home()), "~"),
        }
        if short:
            result["oom"] = oom.record_of(error)


def main() -> None:
    """Wait for a line, do what it says, write how it ended."""
    line = sys.stdin.readline()
    if not line.strip():  # there was no next cell
        return
    asked: dict = json.loads(line)
    folder, result, began = (
        Path(asked["folder"]),
        {"outcome": "ok", "reason": ""},
        time.perf_counter(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with _evidence(result):
        result |= DOES[asked["does"]](asked)
    told = {name: value for name, value in asked.items() if name not in ("folder", "budget_s")}
    write_whole(
        folder / "result.json",
        json.dumps({**told, **result, "took_s": time.perf_counter() - began}, indent=1),
    )


if __name__ == "__main__":
    main()
