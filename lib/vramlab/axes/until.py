"""Axis `until`: how long a gradient lives: to the end of the step, or only until backward has formed it.

Inside backward a gradient need not even be whole: an optimizer that has `sweeps`, `begin_rows`, `rows` and `end_rows` (the
protocol and its order stand in `rows`) is handed the gradients of embeddings and of a fused head some rows at a time, any
other optimizer the whole gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..observer import Observer
from .place import is_sharded, local
from .rows import TakesRows


class Updater:
    """The optimizers of one set of leaves, and what becomes of their state when the leaves go to rest."""

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
        """The loss (0-d, weighted by its micro-batch's share) of the run that is on: its gradients are formed."""
        loss.backward()

    def apply(self) -> None:
        """One update from the gradients that are there, which are then dropped."""

    def taker(self, leaf: Tensor) -> TakesRows | None:
        """Who takes the rows of `leaf`'s gradient as they are formed; None where its gradient has to be whole."""
        return None

    def state(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        """Every tensor of optimizer state: (leaf, what it is, the tensor, of a sharded one this rank's piece)."""
        for optimizer in self.optimizers:
            for leaf, entry in optimizer.state.items():
                for key, value in entry.items():
                    if isinstance(value, Tensor):
                        yield leaf, key, local(value)

    def move_state(self, device: torch.device | str, observer: Observer, place: str) -> None:
        """Copy all state to `device`; the copies live in `place` ("host" or "device")."""
        with observer.region(place):
            for optimizer in self.optimizers:
                for entry in optimizer.state.values():
                    for key, value in entry.items():
                        if isinstance(value, Tensor):
                            entry[key] = torch.empty_like(value, device=device).copy_(value)


class _AtTheEnd(Updater):
    def apply(self) -> None:
        self.optimizers[0].step()
        self.optimizers[0].zero_grad(set_to_none=True)


class _InBackward(Updater):
    def __init__(self, optimizers: list[torch.optim.Optimizer], params: list[nn.Parameter]):
        super().__init__(optimizers)
        self._params = params
        self._handles: list = []

    def arm(self) -> None:
        for param, optimizer in zip(self._params, self.optimizers, strict=True):
            self._handles.append(param.register_post_accumulate_grad_hook(partial(self._use, optimizer)))

    def _use(self, optimizer: torch.optim.Optimizer, param: Tensor) -> None:
        if param.grad is not None:  # else it was taken in rows, and torch says so by the same hook
            optimizer.step()
            param.grad = None

    def taker(self, leaf: Tensor) -> TakesRows | None:
        optimizer = next(o for p, o in zip(self._params, self.optimizers, strict=True) if p is leaf)
        return optimizer if isinstance(optimizer, TakesRows) and not is_sharded(leaf) else None

    def disarm(self) -> None:
        while self._handles:
            self._handles.pop().remove()


class _Clipped(_InBackward):
    """The first run measures each gradient and drops it, the second updates with what clipping leaves of it. The norm stays on
    the device."""

    runs = 2

    def __init__(self, optimizers: list[torch.optim.Optimizer], params: list[nn.Parameter], clip_norm: float):
        super().__init__(optimizers, params)
        self._clip_norm = clip_norm
        self._norms: list[Tensor] = []
        self._factor: Tensor | None = None

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        if number == 1:
            norm = torch.linalg.vector_norm(torch.stack(self._norms))
            self._factor = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ does it
            self._norms.clear()
        yield
        if number == 1:
            self._factor = None

    @property
    def measuring(self) -> bool:
        return self._factor is None

    @torch.no_grad()
    def clip(self, grad: Tensor) -> bool:
        """Clips a gradient, or some rows of one, in place; False where it is only measured."""
        if self.measuring:
            self._norms.append(torch.linalg.vector_norm(grad, dtype=torch.float32))
            return False
        grad.mul_(self._factor)
        return True

    def _use(self, optimizer: torch.optim.Optimizer, param: Tensor) -> None:
        if param.grad is not None and self.clip(param.grad):
            optimizer.step()
        param.grad = None

    def taker(self, leaf: Tensor) -> TakesRows | None:
        taker = super().taker(leaf)
        return taker and _ClippedRows(self, taker)


class _ClippedRows:
    """Takes rows of a gradient in place of an optimizer: measures them, or hands on what clipping leaves of them."""

    def __init__(self, clipped: _Clipped, taker: TakesRows):
        self._clipped, self._taker = clipped, taker

    @property
    def sweeps(self) -> int:
        return 1 if self._clipped.measuring else self._taker.sweeps

    def begin_rows(self, leaf: Tensor) -> None:
        if not self._clipped.measuring:
            self._taker.begin_rows(leaf)

    def rows(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        if self._clipped.clip(grad):
            self._taker.rows(leaf, start, stop, grad, sweep)

    def end_rows(self, leaf: Tensor) -> None:
        if not self._clipped.measuring:
            self._taker.end_rows(leaf)


@dataclass(frozen=True)
class Step:
    """All gradients of a step exist together; one update reads and drops them at its end."""

    def updater(self, rule, params: list[nn.Parameter], lr: float) -> Updater:
        return _AtTheEnd([rule.make(params, lr)])


@dataclass(frozen=True)
class Backward:
    """Each gradient updates its weight the moment it is formed, and is dropped: one gradient alive at a time, of embeddings
    and a fused head only some rows of it.
    With `rule: sgd` this is LOMO, Lv 2024, arXiv:2306.09782 (there the update of one tensor waits for the next
    tensor's hook, so that two gradients live; here none waits).

    `clip_norm` is LOMO's clipping: forward and backward are run twice, the first only for the norm of all gradients. The
    published code keeps the first graph for the second backward; here it is formed again, for one more forward: then each
    activation goes when backward has used it, and the peak is that of one run."""

    clip_norm: float = 0.0
    """Largest norm of the gradient of the active leaves; 0 leaves it alone."""

    def __post_init__(self):
        if self.clip_norm < 0:
            raise ValueError(f"until.clip_norm is {self.clip_norm}: it is a norm, use a positive number, or 0 not to clip")

    def updater(self, rule, params: list[nn.Parameter], lr: float) -> Updater:
        optimizers = [rule.make([p], lr) for p in params]
        return _Clipped(optimizers, params, self.clip_norm) if self.clip_norm else _InBackward(optimizers, params)
