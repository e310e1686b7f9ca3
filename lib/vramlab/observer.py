"""What a training step tells whoever watches it.

The trainer speaks to one `Observer` and does not know which: nobody, a clock, or the event meter.
So the code that is timed is the code that is metered, and neither is in the other's way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

PHASES = ("init", "forward", "backward", "recompute", "update", "eval")
CATEGORIES = (
    "weights",
    "buffers",
    "gradients",
    "optimizer",
    "activations",
    "temporaries",
    "inputs",
    "workspace",
    "collectives",
)


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
        """Everything inside belongs to `name`, one of `PHASES` except recompute, which is inside
        backward and which checkpointing tells, see `recomputing`."""
        yield

    @contextmanager
    def region(self, place: str) -> Iterator[None]:
        """Storages made inside live in `place`; "host" is the only place that differs from the
        device."""
        yield

    def own(self, category: str, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """These tensors' storages are of `category`, one of `CATEGORIES`."""

    def trains(self, named_leaves: Iterable[tuple[str, Tensor]]) -> None:
        """From now on these leaves, and no others, take gradients."""

    def begin_chunk(self, cut: Any, tokens: int, turn: int) -> None:
        """Turn `turn` (counted from 0) of a loop over the chunks `cut.spans(tokens)` begins. Called
        once more when the loop ends, with the number of chunks as `turn`."""

    def end_step(self) -> None:
        """The step is over."""


class GradientsToo(Observer):
    """Declares each trained leaf's gradient when it is whole. A part of observers that are told
    what tensors are for."""

    def __init__(self) -> None:
        self._hooks: list = []

    def trains(self, named_leaves: Iterable[tuple[str, Tensor]]) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for name, leaf in named_leaves:
            self._hooks.append(leaf.register_post_accumulate_grad_hook(self._whole_gradient(name)))

    def _whole_gradient(self, name: str):
        def hook(leaf: Tensor) -> None:
            if (
                leaf.grad is not None
            ):  # else it was taken in rows, and torch says so by the same hook
                self.own("gradients", [(name, leaf.grad)])

        return hook
