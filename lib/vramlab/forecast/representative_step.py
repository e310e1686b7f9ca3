"""The step that decides whether a run fits: a trainer on the virtual device, and which of its steps
is reported.

Most regimes repeat one step. Where parts take turns, or some gradients are guessed, steps differ:
then the step with the highest peak is searched for and run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..baichuan import BaichuanForCausalLM, ModelSpec
from ..regimes.regime import Regime
from ..regimes.trains.adapters import link
from ..regimes.trains.leaves import Leaf
from ..timeline import events as timeline
from ..training.trainer import Batch, Schedule, Trainer
from .virtual_gpu import VirtualGpu

MOST_SETS = 32
"""Up to this many sets of parts are each run in full."""


def highest(frame: pd.DataFrame, state_bytes: Mapping[int, int]) -> int:
    """The step of `state_bytes` (step -> bytes of its parts' optimizer state) with the highest peak
    when its own optimizer state is alive and that of other parts is not. Workspaces are left out:
    the first step runs before there are any."""
    rows = frame[~frame["category"].isin(("host", "optimizer", "workspace"))]
    peaks = pd.Series(timeline.signed(rows).cumsum()).groupby(rows["step"].to_numpy()).max()
    return max(state_bytes, key=lambda step: peaks[step] + state_bytes[step])


class _Turns:
    """Stands in for axis `trains`: the same parts, of which those in `parts_due` are active."""

    def __init__(self, trains: Any):
        self.trains, self.parts_due = trains, ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trains, name)

    def active(self, step: int, count: int) -> tuple[int, ...]:
        return self.parts_due


def representative(regime: Regime) -> tuple[Regime, Any]:
    """The regime such that any step of it can be reported, and the stand-in for its `trains`, whose
    `parts_due` chooses the active parts: guessed gradients are due soon, and a rule that projects
    anew every `gap` steps does so at every step."""
    turns, regime = (
        _Turns(regime.trains),
        dataclasses.replace(regime, grads=regime.grads.with_short_cycle()),
    )
    if hasattr(regime.trains, "interval"):
        regime = dataclasses.replace(regime, trains=turns)
    if hasattr(regime.rule, "gap"):
        regime = dataclasses.replace(regime, rule=dataclasses.replace(regime.rule, gap=1))
    return regime, turns


class Run:
    """A trainer on the virtual device, and how to bring it to the step that is reported."""

    def __init__(
        self,
        gpu: VirtualGpu,
        spec: ModelSpec,
        regime: Regime,
        seq: int,
        batch: int,
        counted: bool = True,
    ):
        self.meter = gpu.meter(counted)
        regime, self.turns = representative(regime)
        model = BaichuanForCausalLM(spec.config)
        # the type that it was published in; the trainer changes it to the regime's own
        model.to(spec.config.dtype or torch.float32)
        self.trainer = Trainer(
            model, regime, Schedule(regime.lr, 1), device=gpu.device, observer=self.meter
        )
        self.seq, self.batch = seq, batch
        self.sets = regime.trains.sets(len(self.trainer.parts))
        self.visited: dict[tuple[int, ...], int] = {}
        """parts active together -> the last step in which they were."""
        self.ranked: dict[int, int] = {}
        self.crossed: Mapping[str, int] = {}

    def step(self, parts: tuple[int, ...]) -> int:
        """One step with `parts` active; returns its number."""
        self.turns.parts_due, number = parts, self.trainer.steps_done
        micro_batches = self.trainer.regime.accumulate
        self.trainer.step(
            [self._batch() for _ in range(micro_batches)], [1 / micro_batches] * micro_batches
        )
        self.visited[parts] = number
        self.crossed = cut.read() if (cut := link(self.trainer.model)) else {}
        return number

    def _batch(self) -> Batch:
        """Full rows on the host: without padding, and so without a mask, as a trainer on a GPU
        would send them."""
        ids = torch.empty(self.batch, self.seq, dtype=torch.long)
        return {"input_ids": ids, "labels": torch.empty_like(ids)}

    def repeat(self) -> int:
        """The second step; where steps differ, the highest of the cycle after the first."""
        cycle = self.trainer.regime.grads.cycle
        numbers = [self.step(self.sets[0]) for _ in range(cycle + 1)]
        if cycle == 1:
            return numbers[-1]
        frame = self.meter.frame()
        return max(
            numbers[-cycle:],
            key=lambda step: frame.at[timeline.peak_event(frame, step), "live_bytes"],
        )

    def take_turns(self) -> int:
        """The last step of the parts with the highest peak."""
        for parts in self._candidates():
            self.step(parts)
        self.ranked = {
            step: self._state_bytes(parts, (False,)) for parts, step in self.visited.items()
        }
        first = highest(self.meter.frame(), self.ranked)
        parts = next(parts for parts, step in self.visited.items() if step == first)
        if self.turns.parts_due == parts:  # a turn begins by taking over from other parts
            self.step(next(others for others in self.visited if others != parts))
        if self.turns.state == "reset" and self.turns.interval > 1:
            self.step(
                parts
            )  # makes the state that the switch dropped; the next step starts with it
        return self.step(parts)

    def _candidates(self) -> list[tuple[int, ...]]:
        """Sets of parts among which the highest peak must be: first, second and last where those in
        between have the same shapes and their state leaves the device; else all. More than
        `MOST_SETS` would take minutes: then the lowest of those that take from the same matrices.
        Not exact there: sets differ in where in those matrices they are cut, and so in bytes by
        less than a part's own gradient and state."""
        sets = self.sets
        if self.turns.state == "device":
            return sets
        shapes = [
            sorted((_any_block(leaf), leaf.start, leaf.stop) for leaf in self._leaves(parts))
            for parts in sets
        ]
        if all(shape == shapes[1] for shape in shapes[1:-1]):
            return [sets[index] for index in sorted({0, 1, len(sets) - 1})]
        if len(sets) <= MOST_SETS:
            return sets
        kinds: dict[frozenset, tuple[int, ...]] = {}
        for parts in sets:
            names = {_any_block(leaf) for leaf in self._leaves(parts) if "norm" not in leaf.name}
            kinds.setdefault(frozenset(names), parts)
        return list(kinds.values())

    def _leaves(self, parts: Iterable[int]) -> list[Leaf]:
        return [leaf for part in parts for leaf in self.trainer.parts[part]]

    def _tensors(self, part: int, on_host: Collection[bool]) -> dict[str, Tensor]:
        """The part's leaves whose state is always on the host (`True` in `on_host`), those whose
        state is not (`False`), or both."""
        parameters, place = dict(self.trainer.model.named_parameters()), self.trainer.regime.place
        return {
            leaf.name: parameters[leaf.name][leaf.start : leaf.stop]
            for leaf in self.trainer.parts[part]
            if place.on_host(leaf.name) in on_host
        }

    def _state_bytes(self, parts: Iterable[int], on_host: Collection[bool]) -> int:
        leaves = [self._tensors(part, on_host) for part in parts]
        return sum(
            self.trainer.regime.rule_for(self.trainer.model, named).state_bytes(named.values())
            for named in leaves
        )

    def unvisited_host_bytes(self) -> int:
        """What the parts that were not visited would have put on the host by then in a real run."""
        place = self.trainer.regime.place
        on_host = {"host": (True, False), "device": (True,)}.get(self.turns.state, ())
        unvisited = set(range(len(self.trainer.parts))).difference(*self.visited)
        copies = sum(
            place.host_copy_bytes(leaf)
            for part in unvisited
            for leaf in self._tensors(part, on_host).values()
        )
        return self._state_bytes(unvisited, on_host) + copies


def _any_block(leaf: Leaf) -> str:
    """The leaf's name with the number of its block left open."""
    return re.sub(r"\b\d+\b", "*", leaf.name)
