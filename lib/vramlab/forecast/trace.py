"""The forecast: the real training step of a published model, byte for byte, with no GPU and no
weights.

The model, the regime, the trainer and the loss are the ones that train; only the device is virtual
(`virtual_gpu`). What comes out is the meter's timeline. Rounding, caching and what the driver
reports are the allocator's business, which starts from `Trace.events`.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..baichuan import BaichuanForCausalLM, ModelSpec
from ..cards import AMPERE, Architecture
from ..regimes.place.place import Fsdp
from ..regimes.regime import Regime
from ..regimes.trains.adapters import link
from ..regimes.trains.leaves import Leaf
from ..timeline import events as timeline
from ..training.trainer import Batch, Schedule, Trainer
from .solver.loops import Loop, read_loops
from .virtual_gpu import VirtualGpu, virtual_gpu


@dataclass(frozen=True, eq=False)
class Trace:
    """One step of one regime, and everything that happened before it. All bytes as asked for, not
    rounded."""

    model: str
    regime: str
    seq: int
    batch: int
    world: int
    """Ranks that take the step together; every figure is of one of them, the first."""
    device: str
    """How the GPU was pretended."""
    architecture: Architecture
    step: int
    """The reported step, counted from 0. The steps before it made the state it starts from."""
    parts: tuple[int, ...]
    """Which parts of the regime are active in the reported step."""
    peak_bytes: int
    """Most bytes alive on the device at one time within the step: `allocated`, before rounding."""
    phase: str
    """The phase the peak lies in."""
    ledger: Mapping[str, int]
    """category -> bytes at the peak; they add up to `peak_bytes`."""
    alive: Mapping[tuple[str, str, str], int]
    """(module, category, op that made it) -> bytes at the peak."""
    host_bytes: int
    """Most bytes in host memory that the regime put there, the parts not visited included; a batch
    on its way too."""
    crossed: Mapping[str, int]
    """`up_bytes` and `down_bytes` of the reported step where the model is cut between two machines,
    see `split`; else empty."""
    work: Mapping[str, Mapping]
    """phase -> what the reported step computes and moves there, see `capture.work`; empty where it
    was not counted."""
    frame: pd.DataFrame
    """The timeline of every step run, as `Meter.frame` gives it."""
    took_s: float
    ranked: Mapping[int, int]
    """Where parts take turns: step -> bytes of optimizer state of the part active in it, for the
    steps among which the reported part was chosen, see `highest`. Else empty."""

    loops: tuple[Loop, ...] = ()
    """The loops over chunks of tokens, or of rows whose number depends on that of tokens, in their
    order."""

    @classmethod
    def of(
        cls,
        frame: pd.DataFrame,
        step: int,
        ranked: Mapping[int, int],
        unseen_host_bytes: int,
        **said,
    ) -> Trace:
        """What a timeline says of its step number `step`. `unseen_host_bytes`: on the host, but not
        in the timeline."""
        peak = timeline.peak(frame, step)
        return cls(
            step=step,
            peak_bytes=peak["peak_bytes"],
            phase=peak["phase"],
            ledger=peak["categories"],
            alive=peak["alive"],
            host_bytes=timeline.host_peak_bytes(frame) + unseen_host_bytes,
            frame=frame,
            ranked=ranked,
            **said,
        )

    @cached_property
    def events(self) -> dict[str, np.ndarray]:
        """What the device's allocator is asked for, from the first weight on: arrays `event`
        ("alloc" or "free"), `storage` (a number for each storage), `bytes`, `stream`, and `step`,
        the step it belongs to."""
        rows = self.device_rows()
        return {
            name: rows[name].to_numpy() for name in ("event", "storage", "bytes", "stream", "step")
        }

    def device_rows(self) -> pd.DataFrame:
        """The rows of `frame` that `events` is made of."""
        return self.frame[(self.frame["category"] != "host") & (self.frame["bytes"] > 0)]

    @cached_property
    def reported(self) -> slice:
        """Where in `events` the reported step lies; what is alive at its start is the state before
        it."""
        first, last = np.searchsorted(self.events["step"], [self.step, self.step + 1])
        return slice(int(first), int(last))

    def before(self) -> dict[str, np.ndarray]:
        """`storage`, `bytes`, `stream` of what is alive on the device when the reported step
        starts, oldest first."""
        rows = timeline.alive_rows(self.device_rows(), self.reported.start - 1)
        return {name: rows[name].to_numpy() for name in ("storage", "bytes", "stream")}

    def owners(self, count: int = 3) -> list[tuple[str, str, int]]:
        """The `count` largest (category, module, bytes) at the peak; blocks count as one."""
        return timeline.largest_owners(self.alive, count)


def trace(
    spec: ModelSpec,
    regime: Regime,
    seq: int,
    batch: int,
    steps: int | None = None,
    card: Any = None,
    mode: str = "auto",
    every_part: bool = False,
    world: int = 1,
    counted: bool = True,
) -> Trace:
    """What one training step of `spec` under `regime` does with memory, on `batch` full rows of
    `seq` labelled tokens. With `place: fsdp` on each of `world` ranks, of which the first is
    reported: none holds more.

    The step reported is the last of `steps` (2 unless given): the first makes the optimizer's
    state, the rest start with it. A rule that projects anew every `gap` steps does so at every step
    here: the reported step is one of those, whose peak decides whether a run fits; what cuSOLVER
    takes for itself is not in it. Where some gradients are guessed it is the highest of a cycle of
    steps: one that forms the true gradient. Where parts take turns it is a step of the part with
    the highest peak. Each part is run once, ranked by its peak with the optimizer's state of a
    second turn in place of that of the first, and the highest is run again. Where all parts between
    the first and the last have the same shapes, only the lowest of them is run: backward goes down
    to the lowest active weight, so a lower part keeps every activation that a higher one keeps, and
    more. `every_part` runs all.

    `counted`: whether `work` is counted, which takes a tenth of the time.

    `card` is a compute capability, or has one as `compute_capability`; without it, (8, 0). `mode`:
    see `virtual_gpu`.

    Raises: ValueError, for a world that is not one or, unless the regime shards, is not 1.
    """
    began, sharded = time.perf_counter(), isinstance(regime.place, Fsdp)
    if world < 1 or (world > 1 and not sharded):
        raise ValueError(
            f"world is {world}, and regime {regime.name!r} has place: {regime.values['place']}: use"
            " a world of 1 or more with place: fsdp, and of 1 without"
        )
    architecture = tuple(getattr(card, "compute_capability", card or AMPERE))
    with virtual_gpu(mode, architecture, world if sharded else 0) as gpu:
        run = _Run(gpu, spec, regime, seq, batch, counted)
        with run.meter:
            step = (
                run.take_turns(steps or 2, every_part)
                if len(run.sets) > 1
                else run.repeat(steps or 2)
            )
        unseen_host_bytes = run.unseen_host_bytes()
    found = Trace.of(
        run.meter.frame(),
        step,
        run.ranked,
        unseen_host_bytes,
        model=spec.name,
        regime=regime.name,
        seq=seq,
        batch=batch,
        world=world,
        device=gpu.label,
        architecture=architecture,
        parts=run.turns.parts_due,
        crossed=run.crossed,
        work=run.meter.work(step),
        took_s=0.0,
        loops=read_loops(run.meter.chunk_turns),
    )
    return dataclasses.replace(found, took_s=time.perf_counter() - began)


def highest(frame: pd.DataFrame, ranked: Mapping[int, int]) -> int:
    """The step of `ranked` (step -> bytes of its parts' optimizer state) whose peak is highest when
    its own state is there and nothing of the others' is; the first step of all runs before there
    are workspaces, so they are left out.
    """
    rows = frame[~frame["category"].isin(("host", "optimizer", "workspace"))]
    peaks = pd.Series(timeline.signed(rows).cumsum()).groupby(rows["step"].to_numpy()).max()
    return max(ranked, key=lambda step: peaks[step] + ranked[step])


MANY = 32
"""So many sets of parts are each run in full."""


class _Turns:
    """Stands in for axis `trains`: the same parts, and those that are active are the ones asked
    for."""

    def __init__(self, trains: Any):
        self.trains, self.parts_due = trains, ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trains, name)

    def active(self, step: int, count: int) -> tuple[int, ...]:
        return self.parts_due


def shown(regime: Regime) -> tuple[Regime, Any]:
    """The regime such that any step shows what counts, and the stand-in for its `trains`, whose
    `parts_due` says which parts that step has: guessed gradients are due soon, and a rule that
    projects anew every `gap` steps does so at every one, which decides whether a run fits."""
    turns, regime = (
        _Turns(regime.trains),
        dataclasses.replace(regime, grads=regime.grads.with_short_cycle()),
    )
    if hasattr(regime.trains, "interval"):
        regime = dataclasses.replace(regime, trains=turns)
    if hasattr(regime.rule, "gap"):
        regime = dataclasses.replace(regime, rule=dataclasses.replace(regime.rule, gap=1))
    return regime, turns


class _Run:
    """A trainer on the virtual device, and how to make it show the step that counts."""

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
        regime, self.turns = shown(regime)
        model = BaichuanForCausalLM(spec.config)
        model.to(
            spec.config.dtype or torch.float32
        )  # as published; the regime's own type is the trainer's to give
        self.trainer = Trainer(
            model, regime, Schedule(regime.lr, 1), device=gpu.device, observer=self.meter
        )
        self.rows, self.seq = batch, seq
        self.sets = regime.trains.sets(len(self.trainer.parts))
        self.visited: dict[tuple[int, ...], int] = {}  # parts active together -> their last step
        self.ranked: dict[int, int] = {}

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
        """Full rows on the host: no padding, so no mask, as a trainer on a GPU would send them."""
        ids = torch.empty(self.rows, self.seq, dtype=torch.long)
        return {"input_ids": ids, "labels": torch.empty_like(ids)}

    def repeat(self, steps: int) -> int:
        """The last of `steps` steps; where steps differ, the highest of the last cycle."""
        cycle = self.trainer.regime.grads.cycle
        done = [self.step(self.sets[0]) for _ in range(max(steps, cycle + 1))]
        if cycle == 1:
            return done[-1]
        frame = self.meter.frame()
        return max(
            done[-cycle:], key=lambda step: frame.at[timeline.peak_event(frame, step), "live_bytes"]
        )

    def take_turns(self, steps: int, every_part: bool) -> int:
        """The last step of the parts with the highest peak."""
        for parts in self.sets if every_part else self._candidates():
            self.step(parts)
        self.ranked = {
            step: self._state_bytes(parts, (False,)) for parts, step in self.visited.items()
        }
        first = highest(self.meter.frame(), self.ranked)
        parts = next(parts for parts, step in self.visited.items() if step == first)
        if self.turns.parts_due == parts:  # a turn begins by taking over from other parts
            self.step(next(others for others in self.visited if others != parts))
        # state that is dropped at a switch takes a step of the turn to be made, if the turn has one
        # more
        keeps_nothing = self.turns.state == "reset" and self.turns.interval == 1
        again = 1 if keeps_nothing else steps - (self.turns.state != "reset")
        return [self.step(parts) for _ in range(max(1, again))][-1]

    def _candidates(self) -> list[tuple[int, ...]]:
        """Sets of parts among which the highest peak must be: first, second and last where those in
        between are alike and their state does not stay on the device; else all. More than `MANY`
        would take minutes: then the lowest of those that take from the same matrices. Not exact
        there: sets differ in where in those matrices they are cut, and so in bytes by less than a
        part's own gradient and state."""
        sets = self.sets
        shapes = [
            sorted(
                (re.sub(r"\b\d+\b", "*", leaf.name), leaf.start, leaf.stop)
                for leaf in self._leaves(parts)
            )
            for parts in sets
        ]
        alike = all(shape == shapes[1] for shape in shapes[1:-1])
        if self.turns.state == "device":
            return sets
        return (
            [sets[at] for at in sorted({0, 1, len(sets) - 1})]
            if alike
            else self._kinds()
            if len(sets) > MANY
            else sets
        )

    def _kinds(self) -> list[tuple[int, ...]]:
        kinds: dict[frozenset, tuple[int, ...]] = {}
        for parts in self.sets:
            names = {
                re.sub(r"\b\d+\b", "*", leaf.name)
                for leaf in self._leaves(parts)
                if "norm" not in leaf.name
            }
            kinds.setdefault(frozenset(names), parts)
        return list(kinds.values())

    def _leaves(self, parts: Iterable[int]) -> list[Leaf]:
        return [leaf for part in parts for leaf in self.trainer.parts[part]]

    def _tensors(self, part: int, on_host: Collection[bool]) -> dict[str, Tensor]:
        """The part's leaves whose state is always on the host, or those whose state is not, or
        both."""
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

    def unseen_host_bytes(self) -> int:
        """What parts never visited would have put on the host by then in a real run."""
        place = self.trainer.regime.place
        kept = {"host": (True, False), "device": (True,)}.get(self.turns.state, ())
        unseen = set(range(len(self.trainer.parts))).difference(*self.visited)
        copies = sum(
            place.host_copy_bytes(leaf)
            for part in unseen
            for leaf in self._tensors(part, kept).values()
        )
        return self._state_bytes(unseen, kept) + copies
