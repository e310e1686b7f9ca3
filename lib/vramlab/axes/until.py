"""Axis `until`: how long a gradient lives: to the end of the step, or only until backward has formed it.

Inside backward a gradient need not even be whole: an optimizer that has `sweeps`, `begin_rows`, `rows` and `end_rows` (the
protocol and its order stand in `rows`) is handed the gradients of embeddings and of a fused head some rows at a time, any
other optimizer the whole gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..observer import Observer
from .place import is_sharded, local
from .rows import TakesRows


class Updater:
    """The optimizers of one set of leaves, and what becomes of their state when the leaves go to rest."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers

    def arm(self) -> None:
        """The leaves become active."""

    def disarm(self) -> None:
        """The leaves go to rest."""

    def set_lr(self, lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def gather(self) -> None:
        """Whatever gradients are on their way have come: they may be read."""

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
    def __init__(self, optimizers: list[torch.optim.Optimizer], params: list[nn.Parameter]):
        super().__init__(optimizers)
        self._params = params
        self._handles: list = []

    def arm(self) -> None:
        for param, optimizer in zip(self._params, self.optimizers, strict=True):
            self._handles.append(param.register_post_accumulate_grad_hook(_consume(optimizer)))

    def taker(self, leaf: Tensor) -> TakesRows | None:
        optimizer = next(o for p, o in zip(self._params, self.optimizers, strict=True) if p is leaf)
        return optimizer if isinstance(optimizer, TakesRows) and not is_sharded(leaf) else None

    def disarm(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _consume(optimizer: torch.optim.Optimizer):
    def hook(param: Tensor) -> None:
        if param.grad is not None:  # else it was taken in rows, and torch says so by the same hook
            optimizer.step()
            param.grad = None

    return hook


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
    tensor's hook, so that two gradients live; here none waits)."""

    def updater(self, rule, params: list[nn.Parameter], lr: float) -> Updater:
        return _InBackward([rule.make([p], lr) for p in params], params)
