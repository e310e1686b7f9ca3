"""What a training step tells whoever watches it.

The trainer speaks to one `Observer` and does not know which: nobody, a clock, or the event meter. So the code that is
timed is the code that is metered, and neither is in the other's way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
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


class _Chunking:
    """Tells listeners where each turn of a loop over chunks begins, and where the loop ends."""

    def __init__(self):
        self.listeners: list[Callable[[Any, int, int], object]] = []
        """Called with the cut, the tokens it was made for, and the turn that begins, counted from 0; one more at the end."""

    def __call__(self, cut: Any, tokens: int, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        for turn, span in enumerate(spans):
            self._now(cut, tokens, turn)
            yield span
        self._now(cut, tokens, len(spans))

    def _now(self, *what) -> None:
        for listener in self.listeners:
            listener(*what)


chunking = _Chunking()
"""The `spans`, one after the other; for loops that take another number of turns for another number of tokens."""


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


class GradientsToo(Observer):
    """Declares each trained leaf's gradient when it is whole. A part of observers that are told what tensors are for."""

    def __init__(self) -> None:
        self._hooks: list = []

    def trains(self, named_leaves: Iterable[tuple[str, Tensor]]) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for name, leaf in named_leaves:
            self._hooks.append(leaf.register_post_accumulate_grad_hook(self._whole_gradient(name)))

    def _whole_gradient(self, name: str):
        def hook(leaf: Tensor) -> None:
            if leaf.grad is not None:  # else it was taken in rows, and torch says so by the same hook
                self.own("gradients", [(name, leaf.grad)])

        return hook


class Clock(Observer):
    """Wall time of each phase of each step, in seconds, from one monotonic clock.

    `rows` holds one dict a step: `step`, `t_s` (when it began, by `time.perf_counter`), `forward_s`, `backward_s`, `update_s`,
    `step_s`. An update that happens inside backward (LOMO) is part of `backward_s`: there is no edge between them to measure.
    For a device that works while the host goes on, see `EventClock`.
    """

    def __init__(self):
        self.rows: list[dict] = []

    def begin_step(self, step: int) -> None:
        self.rows.append(_row(step))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.rows and f"{name}_s" in self.rows[-1]:
            self.rows[-1][f"{name}_s"] += time.perf_counter() - start

    def end_step(self) -> None:
        self.rows[-1]["step_s"] = time.perf_counter() - self.rows[-1]["t_s"]


class EventClock(Observer):
    """The same rows on CUDA, timed by the device: a mark at each edge, no synchronization inside a step.

    A mark is an event in the stream that computes; side streams count as far as that one waits for them. `t_s` is the host's:
    the step's own time when the caller has read the last loss before it begins the next step. Marks that the device has passed
    are read when a later step begins, the rest when `rows` is asked for, which waits for the device. `mark` makes and records
    one, CUDA's unless given. Not yet run on a GPU. Source: CUDA runtime API, event management.
    """

    def __init__(self, device: str = "cuda", mark: Callable[[], torch.cuda.Event] | None = None):
        self._mark = mark or (lambda: _cuda_mark(device))
        self._rows: list[dict] = []
        self._due: deque[tuple[dict, list]] = deque()

    def begin_step(self, step: int) -> None:
        self._read(lambda end: not end.query())
        self._rows.append(_row(step))
        self._spans: list = []
        self._began = self._mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        if self._rows and f"{name}_s" in self._rows[-1]:
            self._spans.append((f"{name}_s", start, self._mark()))

    def end_step(self) -> None:
        self._due.append((self._rows[-1], [*self._spans, ("step_s", self._began, self._mark())]))

    @property
    def rows(self) -> list[dict]:
        self._read(lambda end: end.synchronize())
        return self._rows

    def _read(self, stop: Callable) -> None:
        """Turn marks into seconds, step by step, until `stop` says so of a step's last mark."""
        while self._due and not stop(self._due[0][1][-1][2]):
            row, spans = self._due.popleft()
            for name, start, end in spans:
                row[name] += start.elapsed_time(end) / 1e3


def clock(device: str) -> Clock | EventClock:
    """The clock for torch's `device`."""
    return EventClock(device) if device.startswith("cuda") else Clock()


def _row(step: int) -> dict:
    return {"step": step, "t_s": time.perf_counter(), "forward_s": 0.0, "backward_s": 0.0, "update_s": 0.0, "step_s": 0.0}


def _cuda_mark(device: str) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
