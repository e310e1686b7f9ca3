"""One cell of `gpu_check`, in a process of its own: bytes of the step that was forecast, then speed
with nothing watching. Not yet run on a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import math
import time
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch

from ..baichuan.random_weights import batches
from ..capture import nvml, oom
from ..capture.nvml_sampler import Sampler
from ..forecast.forecast import Question
from ..runs.execute import execute, out_of_memory
from ..runs.folder import Run
from ..runs.learning import speed
from ..training.clock import clock
from ..training.trainer import Trainer
from .recorded_step import record_step, watch

WARM_STEPS = 2
MOST_STEPS = 400
SMALL_RUN = {
    "recipe": "smoke",
    "steps": 40,
    "train_items": 400,
    "val_items": 60,
    "test_items": 60,
    "measure": False,
}
"""Parameters of a run of the small sweep: the tiny model trains and is scored."""


def run_cell(cell: Mapping) -> dict:
    """Do what `cell["does"]` says, in `cell["folder"]`. However it ends is a result: `outcome` is
    "ok", "oom" (with its evidence, `oom`) or "failed", with a `reason`."""
    began = time.perf_counter()
    torch.manual_seed(0)
    try:
        result = {"outcome": "ok", "reason": "", **KINDS[cell["does"]](cell)}
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        result = {"outcome": "failed", "reason": reason.replace(str(Path.home()), "~")}
        if out_of_memory(error):
            result |= {"outcome": "oom", "oom": oom.record_of(error)}
    return {**result, "took_s": time.perf_counter() - began}


def measure(cell: Mapping) -> dict:
    """Bytes and speed of one row. `cell`: model, regime, weights, seq, batch, device, folder,
    limit_bytes (0: all of the device), window_s (to be timed), budget_s (for all of it), and
    `parts` and `step` of its forecast, None where there is none."""
    began = time.perf_counter()
    question = Question(cell["model"], cell["regime"], cell["seq"], cell["batch"], cell["weights"])
    with Sampler(nvml.find(cell["device"])) as sampler:
        recorded, trainer = record_step(question, cell, Path(cell["folder"]))
        left_s = cell["budget_s"] - (time.perf_counter() - began)
        timed, window = time_steps(question, trainer, cell["device"], cell["window_s"], left_s)
    samples = sampler.frame()
    return {
        **recorded,
        **timed,
        "nvml_used_bytes": _largest(samples["used_bytes"]),
        "nvml_process_bytes": _largest(samples["process_bytes"]),
        "energy": dataclasses.asdict(sampler.energy_j(*window)),
        "said": [*recorded["said"], *sampler.said],
    }


def _largest(sizes: pd.Series) -> int | None:
    return int(sizes.max()) if sizes.notna().any() else None


def time_steps(
    question: Question, trainer: Trainer, device: str, window_s: float, budget_s: float
) -> tuple[dict, tuple[float, float]]:
    """Speed of steps that only a clock watches, and when they began and ended, by
    `time.perf_counter`: as many as take `window_s`, or half of `budget_s` if that is less."""
    count = trainer.regime.accumulate
    inputs = [
        batches(question.spec, question.seq, question.batch, seed, count) for seed in range(4)
    ]

    def step(number: int) -> torch.Tensor:
        return trainer.step(inputs[number % len(inputs)], [1 / count] * count)

    timer = clock(device)
    watch(trainer, timer)
    for number in range(WARM_STEPS):
        read_loss(step(number))
    warm_s = min(row["step_s"] for row in timer.rows)
    wanted, affordable = math.ceil(window_s * 1.1 / warm_s), int(budget_s / 2 / warm_s)
    steps = max(1, min(wanted, MOST_STEPS, affordable))
    start = time.perf_counter()
    for number in range(steps):
        loss = step(number)
    read_loss(loss)
    end = time.perf_counter()
    tokens = question.seq * question.batch * count
    figures = {"window_tokens": tokens * steps, "tokens_per_s": tokens * steps / (end - start)}
    timed = pd.DataFrame(timer.rows[WARM_STEPS:]).assign(tokens=tokens)
    return {**speed(timed), **figures}, (start, end)


def read_loss(loss: torch.Tensor) -> None:
    """Wait for the device. Raises: FloatingPointError, where the loss is not finite."""
    number = float(loss)
    if not math.isfinite(number):
        raise FloatingPointError(f"the loss is {number}: random weights do not train with this row")


def run_small(cell: Mapping) -> dict:
    """One row of the small sweep, as the sweep runs it."""
    shape = {"model": cell["model"], "max_length": cell["seq"], "batch_size": cell["batch"]}
    params = {"regime": cell["regime"], "device": cell["device"], **shape, **SMALL_RUN}
    run = Run(execute(params, Path(cell["folder"]) / "run", progress=False)).result
    return {
        "tokens_per_s": run.get("speed", {}).get("tokens_per_s"),
        "run": run,
        "outcome": run["outcome"],
        "reason": run["reason"],
    }


def measure_peer(cell: Mapping) -> dict:
    """The same row under another training loop: `measure` of the module `cell["peers"]`."""
    return importlib.import_module(cell["peers"]).measure(cell)


KINDS = {"measure": measure, "peer": measure_peer, "tiny": run_small}
