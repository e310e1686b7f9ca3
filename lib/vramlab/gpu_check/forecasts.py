"""Forecasts of every step that the check may measure, made in processes that see no GPU: a forecast
needs the virtual device, which takes the place of a real one."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..allocator.simulate import simulate
from ..cards import Card
from ..files import FORECASTS, write_whole
from ..forecast.forecast import forecast
from ..forecast.question import Question, traced_code_hash
from ..forecast.trace import trace
from ..processes import side_by_side
from .plan import Cell

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""The environment of a process that forecasts."""

CODE = (
    "baichuan/random_weights.py",
    "gpu_check/cell.py",
    "gpu_check/forecasts.py",
    "gpu_check/plan.py",
    "gpu_check/recorded_step.py",
)
"""Files of this library that decide a measured cell, beside those that decide a trace."""


def code_hash(peers: ModuleType | None = None) -> str:
    """Hash of torch's version and of the code that forecasts and measured steps are made of, the
    module `peers` included. What other code left in the output folder is made again."""
    library = Path(__file__).parents[1]
    files = [library / name for name in CODE]
    files += [Path(str(peers.__file__))] if peers else []
    parts = [traced_code_hash(), torch.__version__, *(file.read_text() for file in files)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def forecast_all(
    questions: Sequence[Question],
    card: Card | None,
    file: Path,
    code: str,
    budget_s: float,
    jobs: int | None = None,
) -> dict[str, dict]:
    """Name of the cell -> `predict_step` of its question, for as many `questions`, in their order,
    as can be forecast in `budget_s` seconds. Kept in `file` as long as `code` stays the same."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    steps = kept["steps"] if kept.get("code") == code else {}
    due = [question for question in questions if Cell("measure", question).name not in steps]
    if due:
        predict, jobs = partial(predict_step, card=card), jobs or os.cpu_count() or 1
        for question, step, reason in side_by_side(predict, due, jobs, NO_GPU, budget_s):
            steps[Cell("measure", question).name] = step or {"reason": reason}
        write_whole(file, json.dumps({"code": code, "steps": steps}, indent=1))
    return steps


def predict_step(question: Question, card: Card | None, cache_dir: Path | None = FORECASTS) -> dict:
    """A forecast in plain numbers, with the number and the parts of its step, so that a measurement
    can take the same one, and its FLOPs. A row that cannot be forecast has its `reason`.

    Without a card the forecast is of this CPU and its kernels, and `allocated_peak_bytes` counts
    requested bytes, as the event meter does.
    """
    began = time.perf_counter()
    try:
        if card is None:
            step = trace(question.spec, question.row, question.seq, question.batch, mode="cpu")
            figures: dict[str, Any] = {
                "allocated_peak_bytes": step.peak_bytes,
                "reserved_peak_bytes": simulate(step.events).peak_reserved_bytes,
                "fits": None,
                "num_alloc_retries": 0,
                "ledger": dict(step.ledger),
                "floor_s": None,
            }
        else:
            prediction = forecast(question, card, cache_dir=cache_dir)
            step = prediction.trace
            figures = {
                "allocated_peak_bytes": prediction.allocated_peak_bytes,
                "reserved_peak_bytes": prediction.reserved_peak_bytes,
                "fits": prediction.fits,
                "num_alloc_retries": prediction.retries,
                "ledger": dict(prediction.ledger),
                "floor_s": prediction.floor and prediction.floor.s,
            }
    except Exception as error:  # of any kind: the other rows go on, and this one has its reason
        return {"reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return {
        "reason": "",
        **figures,
        "requested_peak_bytes": step.peak_bytes,
        "host_bytes": step.host_bytes,
        "phase": step.phase,
        "step": step.step,
        "parts": list(step.parts),
        "flops": {phase: int(sum(work["flops"].values())) for phase, work in step.work.items()},
        "device": step.device,
        "took_s": time.perf_counter() - began,
    }
