"""A row under the Trainer of transformers on the same card: the other side of a ratio of speeds.

Same shape, random weights, tokens and optimizer; what `peer_loops` says of the Trainer's settings
holds. The model goes to the device before the Trainer sees it, and trains in the type our row
stores weights in. `mixed` is the Trainer's own bf16 autocast, and so is `lora`, whose adapters peft
makes fp32: without it they would compute in fp32. Not yet run on a GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch

from ..baichuan.random_weights import batches, random_model
from ..forecast.forecast import Question
from ..observer import Observer
from .peer_loops import Job, hugging_face, peft_lora

ROWS = ("mixed", "bf16", "lora", "checkpoint")
"""The rows with a peer. All others differ in more than who wrote the loop."""
WARM = 2


def peer(asked: Mapping) -> dict:
    """Speed of the row's peer. `asked` as `cell.measure` is. Seconds are those between the ends of
    two steps, by the host; the device is waited for at the edges of the window alone, so quartiles
    are not told."""
    question = Question(
        asked["model"], asked["regime"], asked["seq"], asked["batch"], asked["weights"]
    )
    row, cpu = question.row, not asked["device"].startswith("cuda")
    model = random_model(question.spec).to(row.weights.dtype).to(asked["device"])
    data = [
        {
            name: tensor[0]
            for name, tensor in batches(question.spec, question.seq, 1, seed)[0].items()
        }
        for seed in range(4)
    ]
    arguments = {
        "cpu": cpu,
        "bf16": row.values["weights"] == "mixed" or row.values["trains"] == "lora",
    }
    loop = (
        peft_lora(row.trains, **arguments)
        if row.values["trains"] == "lora"
        else hugging_face("adamw_torch_fused", row.values["acts"] == "checkpoint", **arguments)
    )
    edges = _Edges(cpu)
    rate = asked["peer_step_s"] or 1.0
    steps = WARM + max(
        1, min(math.ceil(asked["window_s"] / rate), 400, int(asked["budget_s"] / 3 / rate))
    )
    rows = [row for _ in range(math.ceil(steps * question.batch / len(data))) for row in data]
    edges.last = steps
    loop(Job(model, rows, question.batch, steps, row.lr, 0), edges)
    window_s, timed = edges.times[1] - edges.times[0], steps - WARM
    tokens = question.seq * question.batch
    return {
        "step_s_median": window_s / timed,
        "steps_timed": timed,
        "tokens_per_s": tokens * timed / window_s,
        "allocated_peak_bytes": None if cpu else torch.cuda.max_memory_allocated(),
    }


class _Edges(Observer):
    """When the backward passes begin that bound the timed steps: from one's to another's is a whole
    number of steps. It waits for the device there."""

    def __init__(self, cpu: bool):
        self._wait = (lambda: None) if cpu else torch.cuda.synchronize
        self.times: list[float] = []
        self.seen, self.last = 0, 0

    def phase(self, name: str):
        self.seen += 1
        if self.seen in (WARM, self.last):
            self._wait()
            self.times.append(time.perf_counter())
        return super().phase(name)
