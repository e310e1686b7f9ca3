"""Axis `until`: how long a gradient lives: to the end of the step, or only until backward has
formed it.

Inside backward a gradient need not even be whole: an optimizer that has `sweeps`, `begin_rows`,
`rows` and `end_rows` (the protocol and its order stand in `rows`) is handed the gradients of
embeddings and of a fused head some rows at a time, any other optimizer the whole gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ...observer import Observer
from ..fields import Limit, Range
from ..sharded import is_sharded, local
from .clipping import ByValue, LastNorm, NormOfAll, ScaledNorm, Unclipped
from .row_protocol import TakesRows


class Updater:
    """The optimizers of one set of leaves, and what becomes of their state when the leaves go to
    rest."""

    runs = 1
    """How often a step looks at each micro-batch: a forward, and what `take` makes of its loss."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers

    def arm(self) -> None:
        """The leaves become active."""

    def disarm(self) -> None:
        """The leaves go to rest."""

    def begin(self, step: int, lr: float) -> None:
        """A step of the training begins, with this learning rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        """Around one of `runs`, forward and all; they count from 0."""
        yield

    def take(self, loss: Tensor) -> None:
        """The loss (0-d, weighted by its micro-batch's share) of the run that is on: its gradients
        are formed."""
        loss.backward()

    def gather(self) -> None:
        """Whatever gradients are on their way have come: they may be read."""

    def apply(self) -> None:
        """One update from the gradients that are there, which are then dropped."""

    def taker(self, leaf: Tensor) -> TakesRows | None:
        """Who takes the rows of `leaf`'s gradient as they are formed; None where its gradient has
        to be whole."""
        return None

    def probes(self) -> list[dict]:
        """What was measured of guessed gradients: one row a step and site, see
        `regimes.grads.probes.Probes.rows`."""
        return []

    def state(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        """Every tensor of optimizer state: (leaf, what it is, the tensor, of a sharded one this
        rank's piece)."""
        for optimizer in self.optimizers:
            for leaf, entry in optimizer.state.items():
                for key, value in entry.items():
                    if isinstance(value, Tensor):
                        yield leaf, key, local(value)

    def move_state(self, observer: Observer, place: str) -> None:
        """Copy all state to `place`: "host", or "device", which is where each leaf is."""
        with observer.region(place):
            for optimizer in self.optimizers:
                for leaf, entry in optimizer.state.items():
                    device = "cpu" if place == "host" else leaf.device
                    for key, value in entry.items():
                        if isinstance(value, Tensor):
                            entry[key] = torch.empty_like(value, device=device).copy_(value)


class _AtTheEnd(Updater):
    def apply(self) -> None:
        self.optimizers[0].step()
        self.optimizers[0].zero_grad(set_to_none=True)


class _InBackward(Updater):
    def __init__(
        self,
        optimizers: list[torch.optim.Optimizer],
        params: list[nn.Parameter],
        clipper: Unclipped,
    ):
        super().__init__(optimizers)
        self._params, self._clipper = params, clipper
        self._handles: list = []

    @property
    def runs(self) -> int:
        return self._clipper.runs

    def arm(self) -> None:
        for param, optimizer in zip(self._params, self.optimizers, strict=True):
            self._handles.append(
                param.register_post_accumulate_grad_hook(partial(self._use, optimizer))
            )

    def begin(self, step: int, lr: float) -> None:
        self._clipper.begin()
        super().begin(step, lr)

    def run(self, number: int) -> AbstractContextManager:
        return self._clipper.run(number)

    def _use(self, optimizer: torch.optim.Optimizer, param: Tensor) -> None:
        if param.grad is not None:  # else it was taken in rows, and torch says so by the same hook
            if self._clipper.clip(param.grad):
                optimizer.step()
            param.grad = None

    def taker(self, leaf: Tensor) -> TakesRows | None:
        optimizer = next(o for p, o in zip(self._params, self.optimizers, strict=True) if p is leaf)
        return (
            self._clipper.taker(optimizer)
            if isinstance(optimizer, TakesRows) and not is_sharded(leaf)
            else None
        )

    def disarm(self) -> None:
        while self._handles:
            self._handles.pop().remove()


class _Scaled(_InBackward):
    """The loss is multiplied before backward, and the step's learning rate divided."""

    _clipper: ScaledNorm

    def begin(self, step: int, lr: float) -> None:
        super().begin(step, lr)
        self._begun = step, lr

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        with self._clipper.run(number):
            step, lr = self._begun
            Updater.begin(self, step, lr * self._clipper.lr_factor)
            yield

    def take(self, loss: Tensor) -> None:
        super().take(loss * self._clipper.scale)


@dataclass(frozen=True)
class Step:
    """All gradients of a step exist together; one update reads and drops them at its end."""

    def updater(self, rule, params: list[nn.Parameter], lr: float) -> Updater:
        return _AtTheEnd([rule.make(params, lr)])


@dataclass(frozen=True)
class Backward:
    """Each gradient updates its weight the moment it is formed, and is dropped: one gradient alive
    at a time, of embeddings and a fused head only some rows of it. With `rule: sgd` this is LOMO,
    Lv 2024, arXiv:2306.09782. In lomo-optim the update of one tensor waits for the next tensor's
    hook, so that two gradients live; here none waits. Its weight decay is `rule: {sgd:
    {weight_decay: ...}}`.

    `clip_norm` is LOMO's clipping: forward and backward are run twice, the first only for the norm
    of all gradients. The published code keeps the first graph for the second backward; here it is
    formed again, for one more forward: then each activation goes when backward has used it, and the
    peak is that of one run. Other ways are in `clipping`.
    """

    clip_norm: Limit = 0.0
    """Largest norm of the gradient of the active leaves; 0 leaves it alone."""
    norm: Literal["this", "last"] = "this"
    """Whose norm `clip_norm` is held against: `this` step's, for which it is formed twice, or the
    `last` one's."""
    clip_value: Limit = 0.0
    """Largest absolute value of a number of a gradient; 0 leaves it alone."""
    loss_scale: Annotated[float, Range(0, 2.0**40)] = 0.0
    """What a loss is multiplied by at first, for gradients in fp16; then dynamic, see `clipping`. 0
    leaves it alone."""

    def updater(self, rule, params: list[nn.Parameter], lr: float) -> Updater:
        kind = _Scaled if self.loss_scale else _InBackward
        return kind([rule.make([p], lr) for p in params], params, self._clipper())

    def _clipper(self) -> Unclipped:
        if self.loss_scale:
            return ScaledNorm(self.clip_norm, self.loss_scale)
        if self.clip_value:
            return ByValue(self.clip_value)
        if self.clip_norm:
            return LastNorm(self.clip_norm) if self.norm == "last" else NormOfAll(self.clip_norm)
        return Unclipped()
