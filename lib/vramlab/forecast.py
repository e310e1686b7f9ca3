"""The forecast: the real training step of a published model, byte for byte, with no GPU and no weights.

The model, the regime, the trainer and the loss are the ones that train; only the device is virtual (`memory.virtual`).
What comes out is the meter's timeline. Rounding, caching and what the driver reports are the allocator's business, which
starts from `Trace.events`.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from .axes.place import Fsdp
from .baichuan import BaichuanForCausalLM, ModelSpec
from .memory import timeline
from .memory.kernels import AMPERE, Architecture
from .memory.virtual import VirtualGpu, virtual_gpu
from .regime import Regime
from .trainer import Batch, Schedule, Trainer


@dataclass(frozen=True, eq=False)
class Trace:
    """One step of one regime, and everything that happened before it. All bytes as asked for, not rounded."""

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
    part: int | None
    """Which part of a regime that takes turns is active in the reported step."""
    peak_bytes: int
    """Most bytes alive on the device at one time within the step: `allocated`, before rounding."""
    phase: str
    """The phase the peak lies in."""
    ledger: Mapping[str, int]
    """category -> bytes at the peak; they add up to `peak_bytes`."""
    alive: Mapping[tuple[str, str, str], int]
    """(module, category, op that made it) -> bytes at the peak."""
    host_bytes: int
    """Most bytes in host memory that the regime put there, the parts not visited included; a batch on its way too."""
    work: Mapping[str, Mapping]
    """phase -> what the reported step computes and moves there, see `memory.work`; empty where it was not counted."""
    frame: pd.DataFrame
    """The timeline of every step run, as `Meter.frame` gives it."""
    took_s: float
    ranked: Mapping[int, int]
    """Where parts take turns: step -> bytes of optimizer state of the part active in it, for the steps among which the reported
    part was chosen, see `highest`. Else empty."""

    @classmethod
    def of(cls, frame: pd.DataFrame, step: int, ranked: Mapping[int, int], unseen_host_bytes: int, **said) -> Trace:
        """What a timeline says of its step number `step`. `unseen_host_bytes`: on the host, but not in the timeline."""
        peak = timeline.peak(frame, step)
        return cls(step=step, peak_bytes=peak["peak_bytes"], phase=peak["phase"], ledger=peak["categories"], alive=peak["alive"],
                   host_bytes=timeline.host_peak_bytes(frame) + unseen_host_bytes, frame=frame, ranked=ranked, **said)

    @property
    def events(self) -> dict[str, np.ndarray]:
        """What the device's allocator is asked for, from the first weight on: arrays `event` ("alloc" or "free"), `storage`
        (a number for each storage), `bytes`, `stream`, and `step`, the step it belongs to."""
        rows = self.device_rows()
        return {name: rows[name].to_numpy() for name in ("event", "storage", "bytes", "stream", "step")}

    def device_rows(self) -> pd.DataFrame:
        """The rows of `frame` that `events` is made of."""
        return self.frame[(self.frame["category"] != "host") & (self.frame["bytes"] > 0)]

    @property
    def reported(self) -> slice:
        """Where in `events` the reported step lies; what is alive at its start is the state before it."""
        first, last = np.searchsorted(self.events["step"], [self.step, self.step + 1])
        return slice(int(first), int(last))

    def before(self) -> dict[str, np.ndarray]:
        """`storage`, `bytes`, `stream` of what is alive on the device when the reported step starts, oldest first."""
        events, alive = self.events, {}
        for index in range(self.reported.start):
            key = int(events["storage"][index])
            if events["event"][index] == "alloc":
                alive[key] = index
            else:
                del alive[key]
        rows = list(alive.values())
        return {name: events[name][rows] for name in ("storage", "bytes", "stream")}

    def owners(self, count: int = 3) -> list[tuple[str, str, int]]:
        """The `count` largest (category, module, bytes) at the peak. Blocks are one: their number is written `*`."""
        sizes: Counter = Counter()
        for (module, category, _), size in self.alive.items():
            sizes[category, re.sub(r"\b\d+\b", "*", module)] += size
        return [(*owner, size) for owner, size in sizes.most_common(count)]


def trace(spec: ModelSpec, regime: Regime, seq: int, batch: int, steps: int | None = None, card: Any = None,
          mode: str = "auto", every_part: bool = False, world: int = 1) -> Trace:
    """What one training step of `spec` under `regime` does with memory, on `batch` full rows of `seq` labelled tokens.
    With `place: fsdp` on each of `world` ranks, of which the first is reported: none holds more.

    The step reported is the last of `steps` (2 unless given): the first makes the optimizer's state, the rest start with
    it. Where parts take turns it is a step of the part with the highest peak. Each part is run once, ranked by its peak
    with the optimizer's state of a second turn in place of that of the first, and the highest is run again. Where all
    parts between the first and the last have the same shapes, only the lowest of them is run: backward goes down to the
    lowest active weight, so a lower part keeps every activation that a higher one keeps, and more. `every_part` runs all.

    `card` is a compute capability, or has one as `compute_capability`; without it, (8, 0). `mode`: see `virtual_gpu`.

    Raises: ValueError, for a world that is not one or, unless the regime shards, is not 1.
    """
    began, sharded = time.perf_counter(), isinstance(regime.place, Fsdp)
    if world < 1 or (world > 1 and not sharded):
        raise ValueError(f"world is {world}, and regime {regime.name!r} has place: {regime.values['place']}: use a world of 1 "
                         "or more with place: fsdp, and of 1 without")
    architecture = tuple(getattr(card, "compute_capability", card or AMPERE))
    with virtual_gpu(mode, architecture, world if sharded else 0) as gpu:
        run = _Run(gpu, spec, regime, seq, batch)
        with run.meter:
            step = run.take_turns(steps or 2, every_part) if len(run.trainer.parts) > 1 else run.repeat(steps or 2)
        unseen_host_bytes = run.unseen_host_bytes()
    part = run.turns.part if len(run.trainer.parts) > 1 else None
    found = Trace.of(run.meter.frame(), step, run.ranked, unseen_host_bytes, model=spec.name, regime=regime.name, seq=seq,
                     batch=batch, world=world, device=gpu.label, architecture=architecture, part=part,
                     work=run.meter.work(step), took_s=0.0)
    return dataclasses.replace(found, took_s=time.perf_counter() - began)


def highest(frame: pd.DataFrame, ranked: Mapping[int, int]) -> int:
    """The step of `ranked` (step -> bytes of its part's optimizer state) whose peak is highest when its own state is there and
    nothing of the others' is; the first step of all runs before there are workspaces, so they are left out."""
    rows = frame[~frame["category"].isin(("host", "optimizer", "workspace"))]
    peaks = pd.Series(timeline.signed(rows).cumsum()).groupby(rows["step"].to_numpy()).max()
    return max(ranked, key=lambda step: peaks[step] + ranked[step])


class _Turns:
    """Stands in for axis `trains`: the same parts, and the one that is active is the one asked for."""

    def __init__(self, trains: Any):
        self.trains, self.part = trains, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trains, name)

    def active(self, step: int, count: int) -> int:
        return self.part


class _Run:
    """A trainer on the virtual device, and how to make it show the step that counts."""

    def __init__(self, gpu: VirtualGpu, spec: ModelSpec, regime: Regime, seq: int, batch: int):
        self.turns, self.meter = _Turns(regime.trains), gpu.meter()
        if hasattr(regime.trains, "interval"):
            regime = dataclasses.replace(regime, trains=self.turns)
        if hasattr(regime.rule, "gap"):  # the step that decides whether a run fits is one that projects anew
            regime = dataclasses.replace(regime, rule=dataclasses.replace(regime.rule, gap=1))
        model = BaichuanForCausalLM(spec.config)
        model.to(spec.config.dtype or torch.float32)  # as published; the regime's own type is the trainer's to give
        self.trainer = Trainer(model, regime, Schedule(regime.lr, 1), device=gpu.device, observer=self.meter)
        self.rows, self.seq = batch, seq
        self.visited: dict[int, int] = {}  # part -> its last step
        self.ranked: dict[int, int] = {}

    def step(self, part: int = 0) -> int:
        """One step with `part` active; returns its number."""
        self.turns.part, number = part, self.trainer.steps_done
        micro_batches = self.trainer.regime.accumulate
        self.trainer.step([self._batch() for _ in range(micro_batches)], [1 / micro_batches] * micro_batches)
        self.visited[part] = number
        return number

    def _batch(self) -> Batch:
        """Full rows on the host: no padding, so no mask, as a trainer on a GPU would send them."""
        ids = torch.empty(self.rows, self.seq, dtype=torch.long)
        return {"input_ids": ids, "labels": torch.empty_like(ids)}

    def repeat(self, steps: int) -> int:
        """The last of `steps` steps."""
        return [self.step() for _ in range(steps)][-1]

    def take_turns(self, steps: int, every_part: bool) -> int:
        """The last step of the part with the highest peak."""
        for part in range(len(self.trainer.parts)) if every_part else self._candidates():
            self.step(part)
        self.ranked = {step: self._state_bytes(part) for part, step in self.visited.items()}
        first = highest(self.meter.frame(), self.ranked)
        part = next(part for part, step in self.visited.items() if step == first)
        if self.turns.part == part:  # a turn begins by taking over from another part
            self.step(next(other for other in self.visited if other != part))
        # state that is dropped at a switch takes a step of the turn to be made, if the turn has one more
        keeps_nothing = self.turns.state == "reset" and self.turns.interval == 1
        again = 1 if keeps_nothing else steps - (self.turns.state != "reset")
        return [self.step(part) for _ in range(max(1, again))][-1]

    def _candidates(self) -> list[int]:
        """Parts among which the highest peak must be: first, second and last where those in between are alike and their
        state does not stay on the device; else all."""
        parts = self.trainer.parts
        shapes = [sorted((re.sub(r"\b\d+\b", "*", leaf.name), leaf.start, leaf.stop) for leaf in part) for part in parts]
        alike = all(shape == shapes[1] for shape in shapes[1:-1])
        return sorted({0, 1, len(parts) - 1}) if alike and self.turns.state != "device" else list(range(len(parts)))

    def _state_bytes(self, part: int) -> int:
        model = self.trainer.model
        parameters = dict(model.named_parameters())
        leaves = {leaf.name: parameters[leaf.name][leaf.start : leaf.stop] for leaf in self.trainer.parts[part]}
        return self.trainer.regime.rule_for(model, leaves).state_bytes(leaves.values())

    def unseen_host_bytes(self) -> int:
        """State of parts never visited, which a real run would have parked on the host by then."""
        if self.turns.state != "host":
            return 0
        return sum(self._state_bytes(part) for part in range(len(self.trainer.parts)) if part not in self.visited)
