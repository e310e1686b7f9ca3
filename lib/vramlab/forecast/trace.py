"""A trace: the real training step of a published model, byte for byte, with no GPU and no weights.

The model, the regime, the trainer and the loss are the ones that train; only the device is virtual
(`virtual_gpu`). The result is the meter's timeline. Rounding, caching and what the driver reports
are computed from `Trace.events` by the simulated allocator.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from ..baichuan import ModelSpec
from ..cards import AMPERE, Architecture
from ..regimes.place.place import Fsdp
from ..regimes.regime import Regime
from ..timeline import events as timeline
from .representative_step import Run
from .solver.loops import Loop, read_loops
from .virtual_gpu import virtual_gpu


@dataclass(frozen=True, eq=False)
class Trace:
    """A step of a regime, and everything that happened before it. All bytes are as requested, not
    rounded."""

    model: str
    regime: str
    seq: int
    batch: int
    world: int
    """Ranks that take the step together; every figure is that of the first."""
    device: str
    """How the GPU was simulated."""
    architecture: Architecture
    step: int
    """The reported step, counted from 0. The steps before it made the state that it starts from."""
    parts: tuple[int, ...]
    """Which parts of the regime are active in the reported step."""
    peak_bytes: int
    """Most bytes alive on the device at one time within the step: `allocated`, before rounding."""
    phase: str
    """The phase of the peak."""
    ledger: Mapping[str, int]
    """category -> bytes at the peak; they add up to `peak_bytes`."""
    alive: Mapping[tuple[str, str, str], int]
    """(module, category, op that made it) -> bytes at the peak."""
    host_bytes: int
    """Most bytes in host memory that the regime put there, those of parts not visited and of a
    batch on its way included."""
    crossed: Mapping[str, int]
    """`up_bytes` and `down_bytes` of the reported step where the model is cut between two machines;
    else empty."""
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
    """In their order, the loops over chunks of tokens, or of rows whose number depends on that of
    tokens."""

    @classmethod
    def of(
        cls,
        frame: pd.DataFrame,
        step: int,
        ranked: Mapping[int, int],
        unvisited_host_bytes: int,
        **fields,
    ) -> Trace:
        """The trace that reports step number `step` of a timeline. `unvisited_host_bytes`: on the
        host, but not in the timeline. `fields`: those that do not follow from it."""
        peak = timeline.peak(frame, step)
        return cls(
            step=step,
            peak_bytes=peak["peak_bytes"],
            phase=peak["phase"],
            ledger=peak["categories"],
            alive=peak["alive"],
            host_bytes=timeline.host_peak_bytes(frame) + unvisited_host_bytes,
            frame=frame,
            ranked=ranked,
            **fields,
        )

    @cached_property
    def events(self) -> dict[str, np.ndarray]:
        """The requests to the device's allocator, from the first weight on, as arrays: `event`
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
    card: Any = None,
    mode: str = "auto",
    world: int = 1,
    counted: bool = True,
) -> Trace:
    """Trace one training step of `spec` under `regime` on `batch` full rows of `seq` labelled
    tokens. With `place: fsdp` each of `world` ranks takes that many rows, and the first rank is
    reported: no rank holds more.

    The step reported is the second: the first makes the optimizer's state, the second starts with
    it. A rule that projects anew every `gap` steps does so at every step
    here: the reported step is one of those, whose peak decides whether a run fits. The memory that
    cuSOLVER takes for itself is not included. Where some gradients are guessed, the reported step
    is the highest of a cycle of steps: one that forms the true gradient. Where parts take turns it
    is a step of the part with the highest peak. Each part is run once, ranked by its peak with the
    optimizer's state of a second turn in place of that of the first, and the highest is run again.
    Where all parts between the first and the last have the same shapes, only the lowest of them is
    run: backward goes down to the lowest active weight, so a lower part keeps every activation that
    a higher one keeps, and more.

    `counted`: whether `work` is counted, which takes a tenth of the time.

    `card` is a compute capability, or has one as `compute_capability`; without it, (8, 0). `mode`:
    see `virtual_gpu`.

    Raises: ValueError, for a world below 1, or above 1 where the regime does not shard.
    """
    began, sharded = time.perf_counter(), isinstance(regime.place, Fsdp)
    if world < 1 or (world > 1 and not sharded):
        raise ValueError(
            f"world is {world}, and regime {regime.name!r} has place: {regime.values['place']}: use"
            " a world of 1 or more with place: fsdp, and of 1 without"
        )
    architecture = tuple(getattr(card, "compute_capability", card or AMPERE))
    with virtual_gpu(mode, architecture, world if sharded else 0) as gpu:
        run = Run(gpu, spec, regime, seq, batch, counted)
        with run.meter:
            step = run.take_turns() if len(run.sets) > 1 else run.repeat()
        unvisited_host_bytes = run.unvisited_host_bytes()
    return Trace.of(
        run.meter.frame(),
        step,
        run.ranked,
        unvisited_host_bytes,
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
        loops=read_loops(run.meter.chunk_turns),
        took_s=time.perf_counter() - began,
    )
