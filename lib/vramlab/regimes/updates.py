"""How often a row updates the parameters of a model, counted from its parts and its schedule."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from ..baichuan import BaichuanForCausalLM, ModelSpec
from .regime import Regime

STEPS = 1000
"""Updates are counted over so many steps."""


@dataclass(frozen=True)
class Updates:
    """How often the published model's parameters are updated in `STEPS` steps."""

    mean: float
    least: int
    most: int
    added: int
    """Trained numbers that are not the published model's: adapters and whatever guesses gradients.
    Each is updated at every step."""


def updates(spec: ModelSpec, row: Regime, steps: int = STEPS) -> Updates:
    """Counted from the row's parts and its schedule, of the model without any bytes."""
    with torch.device("meta"):
        model = BaichuanForCausalLM(spec.config)
        own = {id(param): param.numel() for param in model.parameters()}
        model = row.grads.prepare(row.trains.prepare(model, 0), 0)
    parts, params = row.trains.parts(model), dict(model.named_parameters())
    turns = Counter(part for step in range(steps) for part in row.trains.active(step, len(parts)))
    sizes: Counter = Counter()  # number of updates -> parameters with so many
    added = 0
    for index, part in enumerate(parts):
        for leaf in part:
            size = params[leaf.name].numel() // leaf.rows * (leaf.stop - leaf.start)
            if id(params[leaf.name]) in own:
                sizes[turns[index]] += size
            else:
                added += size
    total = sum(own.values())
    sizes[0] += total - sizes.total()
    there = [number for number, size in sizes.items() if size]
    return Updates(
        sum(number * size for number, size in sizes.items()) / total, min(there), max(there), added
    )
