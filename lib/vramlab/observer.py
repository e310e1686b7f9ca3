"""The protocol by which a training step reports what it does.

The trainer reports to one `Observer` and does not know which it is: a null object, a clock or the
event meter. So the code that is timed is the code that is metered, and neither is in the other's
way.
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
    """Counts the checkpointed blocks that are being recomputed, in whichever thread autograd does
    it."""

    depth = 0

    def __init__(self):
        self.listeners: list[Callable[[], object]] = []
        """Called after a recomputation has begun, and after one has ended."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._add(1)
        try:
            yield
        finally:  # checkpointing stops a recomputation early by an exception
            self._add(-1)

    def _add(self, count: int) -> None:
        self.depth += count
        for listener in self.listeners:
            listener()

    def __bool__(self) -> bool:
        return self.depth > 0


recomputing = _Recomputation()
"""True while a block is recomputed. Code that recomputes one does so inside `with
recomputing():`."""


class Observer:
    """Ignores every report: the null object that other observers inherit from."""

    def begin_step(self, step: int) -> None:
        """Step `step` (counted from 0) begins."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside belongs to the phase `name`, one of `PHASES` except recompute: that one
        lies inside backward, and checkpointing reports it by `recomputing`."""
        yield

    @contextmanager
    def region(self, place: str) -> Iterator[None]:
        """Storages that are allocated inside lie in `place`: "host" for host memory, else on the
        device."""
        yield

    def own(self, category: str, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The storages of these tensors belong to `category`, one of `CATEGORIES`."""

    def trains(self, named_leaves: Iterable[tuple[str, Tensor]]) -> None:
        """From now on exactly these leaves take gradients."""

    def begin_chunk(self, cut: Any, tokens: int, turn: int) -> None:
        """Turn `turn` (counted from 0) of a loop over the chunks `cut.spans(tokens)` begins. Called
        once more when the loop ends, with the number of chunks as `turn`."""

    def end_step(self) -> None:
        """The step is over."""


class GradientsToo(Observer):
    """Declares the gradient of each trained leaf, by `own`, when autograd has formed all of it.
    Base class of observers that record the category of each tensor."""

    def __init__(self) -> None:
        self._hooks: list = []

    def trains(self, named_leaves: Iterable[tuple[str, Tensor]]) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for name, leaf in named_leaves:
            self._hooks.append(leaf.register_post_accumulate_grad_hook(self._whole_gradient(name)))

    def _whole_gradient(self, name: str):
        def hook(leaf: Tensor) -> None:
            if leaf.grad is not None:  # None: it was taken in rows, and torch calls the hook too
                self.own("gradients", [(name, leaf.grad)])

        return hook
