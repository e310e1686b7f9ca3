"""The learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up over the share `warmup` of the steps, then a cosine
    from the peak `lr` down to the share `floor` of it."""

    lr: float
    steps: int
    warmup: float = 0.06
    floor: float = 0.1

    def at(self, step: int) -> float:
        warmup_steps = max(1, round(self.warmup * self.steps))
        if step < warmup_steps:
            return self.lr * (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, self.steps - warmup_steps))
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))
