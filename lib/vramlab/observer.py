"""What a training step tells whoever watches it.

The trainer speaks to one `Observer` and does not know which: nobody, a clock, or the event meter. So the code that is
timed is the code that is metered, and neither is in the other's way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

PHASES = ("init", "forward", "backward", "recompute", "update", "eval")
CATEGORIES = ("weights", "buffers", "gradients", "optimizer", "activations", "temporaries", "inputs", "workspace",
              "collectives")


class _Recomputation:
    """How many checkpointed blocks are being formed again, in whichever thread autograd does it."""

    depth = 0

    def __init__(self):
        self.listeners: list[Callable[[], object]] = []
        """Called when a recomputation has begun, and when one has ended."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._now(1)
        try:
            yield
        finally:  # checkpointing stops early by an exception
            self._now(-1)

    def _now(self, more: int) -> None:
        self.depth += more
        for listener in self.listeners:
            listener()

    def __bool__(self) -> bool:
        return self.depth > 0


recomputing = _Recomputation()
"""True while a block is recomputed; `with recomputing():` is for whoever recomputes."""


class Observer:
    """Watches nothing: the null object every other observer refines."""

    def begin_step(self, step: int) -> None:
        """Step `step` (counted from 0) is about to start."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside belongs to `name`, one of `PHASES` except recompute, which is inside backward and which
        checkpointing tells, see `recomputing`."""
        yield

    @contextmanager
    def region(self, place: str) -> Iterator[None]:
        """Storages made inside live in `place`; "host" is the only place that differs from the device."""
        yield

    def own(self, category: str, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """These tensors' storages are of `category`, one of `CATEGORIES`."""

    def trains(self, named_leaves: Iterable[tuple[str, Tensor]]) -> None:
        """From now on these leaves, and no others, take gradients."""

    def end_step(self) -> None:
        """The step is over."""


class Clock(Observer):
    """Wall time of each phase of each step, in seconds, from one monotonic clock.

    `rows` holds one dict a step: `step`, `forward_s`, `backward_s`, `update_s`, `step_s`. An update that happens
    inside backward (LOMO) is part of `backward_s`: there is no edge between them to measure.
    On an asynchronous device the caller passes `synchronize`, called at each edge.
    """

    def __init__(self, synchronize=lambda: None):
        self.rows: list[dict] = []
        self._synchronize = synchronize

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def begin_step(self, step: int) -> None:
        self.rows.append({"step": step, "forward_s": 0.0, "backward_s": 0.0, "update_s": 0.0, "step_s": 0.0})
        self._began = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        if self.rows and f"{name}_s" in self.rows[-1]:
            self.rows[-1][f"{name}_s"] += self._now() - start

    def end_step(self) -> None:
        self.rows[-1]["step_s"] = self._now() - self._began
