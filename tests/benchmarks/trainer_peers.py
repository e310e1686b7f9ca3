"""A row under the Trainer of transformers on the same card: the other side of a ratio of speeds.

    make gpu-check          passes this module to the check: --peers benchmarks.trainer_peers

Shape, random weights, tokens and optimizer are the same, and the Trainer's settings are those of
`peer_loops`. The model goes to the device before the Trainer sees it, and trains in the type that
our row stores weights in. `mixed` runs under the Trainer's own bf16 autocast, and so does `lora`,
whose adapters peft makes in fp32: without autocast they would compute in fp32. Not yet run on a
GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch

from benchmarks.peer_loops import Job, hugging_face, peft_lora
from vramlab.baichuan.random_weights import batches, random_model
from vramlab.forecast.forecast import Question
from vramlab.observer import Observer

ROWS = ("mixed", "bf16", "lora", "checkpoint")
"""The rows that have a peer. All others differ in more than who wrote the loop."""
UNTIMED = 2
"""First steps, left out of the time."""


def measure(cell: Mapping) -> dict:
    """Speed of the row's peer. `cell` is what `vramlab.gpu_check.cell.measure` takes, with
    `peer_step_s`, the seconds of our own step, where it was measured.

    The host's clock is read at the two edges of the window, where the device is waited for; so a
    median step is the mean of the window, and there are no quartiles.
    """
    question = Question(cell["model"], cell["regime"], cell["seq"], cell["batch"], cell["weights"])
    row, cpu = question.row, not cell["device"].startswith("cuda")
    rate_s = cell["peer_step_s"] or 1.0
    timed = max(
        1, min(math.ceil(cell["window_s"] / rate_s), 400, int(cell["budget_s"] / 3 / rate_s))
    )
    model = random_model(question.spec).to(row.weights.dtype).to(cell["device"])
    edges = _Edges(UNTIMED + timed, cpu)
    _loop(row, cpu)(_job(model, question, UNTIMED + timed), edges)
    window_s = edges.times_s[1] - edges.times_s[0]
    return {
        "step_s_median": window_s / timed,
        "steps_timed": timed,
        "tokens_per_s": question.seq * question.batch * timed / window_s,
        "allocated_peak_bytes": None if cpu else torch.cuda.max_memory_allocated(),
    }


def _loop(row, cpu: bool):
    lora = row.values["trains"] == "lora"
    arguments = {"cpu": cpu, "bf16": lora or row.values["weights"] == "mixed"}
    if lora:
        return peft_lora(row.trains, **arguments)
    return hugging_face("adamw_torch_fused", row.values["acts"] == "checkpoint", **arguments)


def _job(model, question: Question, steps: int) -> Job:
    """Steps on four rows of tokens, over and over."""
    rows = [batches(question.spec, question.seq, 1, seed)[0] for seed in range(4)]
    data = [{name: tensor[0] for name, tensor in row.items()} for row in rows]
    repeats = math.ceil(steps * question.batch / len(data))
    return Job(model, data * repeats, question.batch, steps, question.row.lr, 0)


class _Edges(Observer):
    """When the backward passes of step `UNTIMED` and of the last step begin: a whole number of
    steps lies between them. Waits for the device there."""

    def __init__(self, last: int, cpu: bool):
        self._wait = (lambda: None) if cpu else torch.cuda.synchronize
        self._last, self._steps = last, 0
        self.times_s: list[float] = []

    def phase(self, name: str):
        self._steps += 1
        if self._steps in (UNTIMED, self._last):
            self._wait()
            self.times_s.append(time.perf_counter())
        return super().phase(name)
