"""Counts how often a row updates the parameters of a model, from its parts and their schedule."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from ..baichuan import BaichuanForCausalLM, ModelSpec
from .regime import Regime

STEPS = 1000
"""The number of steps over which updates are counted."""


@dataclass(frozen=True)
class Updates:
    """How often the parameters of the published model are updated in `STEPS` steps."""

    mean: float
    least: int
    most: int
    added: int
    """Trained numbers that the published model does not have: adapters and gradient approximators.
    Each is updated in every step."""


def updates(spec: ModelSpec, row: Regime, steps: int = STEPS) -> Updates:
    """Counted on a model without bytes."""
    with torch.device("meta"):
        model = BaichuanForCausalLM(spec.config)
        own = {id(param): param.numel() for param in model.parameters()}
        model = row.grads.prepare(row.trains.prepare(model, 0), 0)
    parts, params = row.trains.parts(model), dict(model.named_parameters())
    turns = Counter(part for step in range(steps) for part in row.trains.active(step, len(parts)))
    sizes: Counter = Counter()  # number of updates -> how many parameters have so many
    added = 0
    for index, part in enumerate(parts):
        for leaf in part:
            param = params[leaf.name]
            if id(param) in own:
                sizes[turns[index]] += leaf.numel(param)
            else:
                added += leaf.numel(param)
    total = sum(own.values())
    sizes[0] += total - sizes.total()
    counts = [count for count, size in sizes.items() if size]
    mean = sum(count * size for count, size in sizes.items()) / total
    return Updates(mean, min(counts), max(counts), added)
