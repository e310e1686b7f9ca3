"""Axis `until`: how long a gradient lives: until the end of the step, or until backward has formed
it.

Inside backward a gradient need not be whole: an optimizer that follows `row_protocol` receives the
gradients of embeddings and of a fused head some rows at a time. Any other optimizer receives the
whole gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ...observer import Observer
from ..fields import Limit, Range
from ..sharded import is_sharded, local
from .clipping import ByValue, LastNorm, NormOfAll, ScaledNorm, Unclipped
from .row_protocol import TakesRows


class Updater:
    """Updates one set of leaves by its optimizers, and moves their state when the leaves go to
    rest."""

    @property
    def runs(self) -> int:
        """How often a step runs each micro-batch: a forward, then `take` with its loss."""
        return 1

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers

    def arm(self) -> None:
        """The leaves become active."""

    def disarm(self) -> None:
        """The leaves go to rest."""

    def begin(self, step: int, lr: float) -> None:
        """A step begins, with this learning rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        """Around each of the `runs`, counted from 0, forward included."""
        yield

    def take(self, loss: Tensor) -> None:
        """Form the gradients of the current run's loss (0-d, weighted by its micro-batch's
        share)."""
        loss.backward()

    def gather(self) -> None:
        """Wait for gradients that are still being copied, so that they may be read."""

    def apply(self) -> None:
        """Update once from the gradients that exist, and drop them."""

    def row_receiver(self, leaf: Tensor) -> TakesRows | None:
        """The receiver of the rows of `leaf`'s gradient; None if its gradient has to be whole."""
        return None

    def probes(self) -> list[dict]:
        """Measurements of approximated gradients: one row for each step and site, see
        `regimes.grads.probes.Probes.rows`."""
        return []

    def state(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        """Every tensor of optimizer state: (leaf, key, tensor), of a sharded tensor this rank's
        piece."""
        for optimizer in self.optimizers:
            for leaf, entry in optimizer.state.items():
                for key, value in entry.items():
                    if isinstance(value, Tensor):
                        yield leaf, key, local(value)

    def move_state(self, observer: Observer, place: str) -> None:
        """Copy all state to `place`: "host", or "device" for the device of each leaf."""
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
            hook = partial(self._use, optimizer)
            self._handles.append(param.register_post_accumulate_grad_hook(hook))

    def begin(self, step: int, lr: float) -> None:
        self._clipper.begin()
        super().begin(step, lr)

    def run(self, number: int) -> Any:
        return self._clipper.run(number)

    def _use(self, optimizer: torch.optim.Optimizer, param: Tensor) -> None:
        if param.grad is not None:  # None: it was taken in rows, and torch calls the hook too
            if self._clipper.clip(param.grad):
                optimizer.step()
            param.grad = None

    def row_receiver(self, leaf: Tensor) -> TakesRows | None:
        optimizer = next(o for p, o in zip(self._params, self.optimizers, strict=True) if p is leaf)
        if isinstance(optimizer, TakesRows) and not is_sharded(leaf):
            return self._clipper.wrap(optimizer)
        return None

    def disarm(self) -> None:
        while self._handles:
            self._handles.pop().remove()


class _Scaled(_InBackward):
    """Multiplies the loss before backward, and divides the step's learning rate."""

    _clipper: ScaledNorm

    def begin(self, step: int, lr: float) -> None:
        super().begin(step, lr)
        self._step_and_lr = step, lr

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        with self._clipper.run(number):
            step, lr = self._step_and_lr
            Updater.begin(self, step, lr * self._clipper.lr_factor)
            yield

    def take(self, loss: Tensor) -> None:
        super().take(loss * self._clipper.scale)


@dataclass(frozen=True)
class Step:
    """All gradients of a step exist together; one update at its end reads and drops them."""

    def updater(self, rule, params: list[nn.Parameter], lr: float) -> Updater:
        return _AtTheEnd([rule.make(params, lr)])


@dataclass(frozen=True)
class Backward:
    """Each gradient updates its weight as soon as it is formed, and is dropped: one gradient is
    alive at a time, and of embeddings and a fused head only some of its rows. With `rule: sgd` this
    is LOMO, Lv 2024, arXiv:2306.09782. In lomo-optim the update of a tensor waits for the hook of
    the next one, so two gradients are alive; here no update waits. LOMO's weight decay is `rule:
    {sgd: {weight_decay: ...}}`.

    `clip_norm` is LOMO's clipping: forward and backward run twice, the first time only for the norm
    of all gradients. The published code keeps the first graph for the second backward. Here the
    graph is formed again, by one more forward: so each activation is freed when backward has used
    it, and the peak is that of one run. `clipping` has other ways.
    """

    clip_norm: Limit = 0.0
    """Largest norm of the gradient of the active leaves; 0 is no limit."""
    norm: Literal["this", "last"] = "this"
    """The norm that `clip_norm` limits: that of `this` step, which then forms its gradients twice,
    or of the `last` one."""
    clip_value: Limit = 0.0
    """Largest absolute value of a number of a gradient; 0 is no limit."""
    loss_scale: Annotated[float, Range(0, 2.0**40)] = 0.0
    """Initial factor of the loss, for gradients in fp16, see `clipping`; 0 is no scaling."""

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
