"""Updates that run on the host: gradients go down, the rule runs there, new weights come up. See
`host` for who asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...observer import Observer
from ..sharded import is_sharded
from ..until.row_protocol import TakesRows
from ..until.until import Backward, Updater
from .transfers import Bus


class HostUpdater(Updater):
    """Updates on the host. `copies`: the leaves are on the device, and the host holds a copy of
    each; else the leaves themselves are on the host. The update of one gradient that lives until
    backward waits for the next one to have left, so that the copy down is not waited for."""

    def __init__(
        self, until: Any, rule: Any, leaves: list[nn.Parameter], lr: float, bus: Bus, copies: bool
    ):
        self._leaves, self._bus, self._copies = leaves, bus, copies
        self._on_host = (
            [nn.Parameter(bus.host_like(leaf.detach())) for leaf in leaves] if copies else leaves
        )
        self._inner = until.updater(rule, self._on_host, lr)
        super().__init__(self._inner.optimizers)
        self._at_once = isinstance(until, Backward)
        self._pending: tuple[int, object] | None = None
        self._handles: list = []

    def arm(self) -> None:
        if self._copies:  # at every turn: another part may have trained a weight since
            with torch.no_grad():
                for leaf, copy in zip(self._leaves, self._on_host, strict=True):
                    copy.copy_(leaf)
        if self._at_once:
            self._handles = [
                leaf.register_post_accumulate_grad_hook(self._hook(i))
                for i, leaf in enumerate(self._leaves)
            ]

    def disarm(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, index: int):
        def hook(leaf: Tensor) -> None:
            if leaf.grad is not None:  # else it was taken in rows
                self._then_finish_another(index, self._receive(index))

        return hook

    def _then_finish_another(self, index: int, arrived) -> None:
        before, self._pending = self._pending, (index, arrived)
        self._finish(before)

    @torch.no_grad()
    def _receive(self, index: int):
        """The gradient of a leaf on its way to the host, and gone from the device; the event of its
        arrival."""
        leaf = self._leaves[index]
        if not self._copies:
            return self._bus.last_down()
        self._on_host[index].grad, event = self._bus.down(leaf.grad)
        leaf.grad = None
        return event

    def _finish(self, pending: tuple[int, object] | None) -> None:
        if pending is None:
            return
        index, event = pending
        event.synchronize()
        with self._bus.observer.region("host"):
            self.optimizers[index].step()
        self._on_host[index].grad = None
        self._return(index)

    @torch.no_grad()
    def _return(self, index: int) -> None:
        if self._copies:
            self._bus.up(self._on_host[index], into=self._leaves[index])

    def has(self, leaf: Tensor) -> bool:
        return any(mine is leaf for mine in self._leaves)

    def taker(self, leaf: Tensor) -> TakesRows | None:
        """Rows go down as they are formed; here the whole gradient is on the device only where it
        stays to the end."""
        if is_sharded(leaf) or (self._copies and not self._at_once):
            return None
        return _RowsDown(self, next(i for i, mine in enumerate(self._leaves) if mine is leaf))

    def rows_came(self, index: int, gradient: Tensor) -> None:
        """All rows of a leaf's gradient have been sent down into `gradient`."""
        into = self._on_host[index]
        if into.grad is not None:  # of the micro-batch before
            self._bus.settle()
            gradient.add_(into.grad)
        into.grad = gradient
        if self._copies:  # else the hook, which torch calls next, finds it
            self._then_finish_another(index, self._bus.last_down())

    def gather(self) -> None:
        if not self._copies:
            self._bus.settle()

    def apply(self) -> None:
        if self._at_once:
            before, self._pending = self._pending, None
            self._finish(before)
        else:
            self._all_at_the_end()
        self._bus.settle()

    def _all_at_the_end(self) -> None:
        trained = [i for i, leaf in enumerate(self._leaves) if leaf.grad is not None]
        for index in trained:
            self._receive(index)
        self._bus.settle()
        with self._bus.observer.region("host"):
            self._inner.apply()
        for index in trained:
            self._return(index)

    def state(self):
        leaves = {id(copy): leaf for copy, leaf in zip(self._on_host, self._leaves, strict=True)}
        return ((leaves[id(copy)], key, tensor) for copy, key, tensor in super().state())

    def move_state(self, observer: Observer, place: str) -> None:
        """It is on the host, and stays."""


class _RowsDown:
    """Takes a leaf's gradient in rows, see `rows`, and sends them down."""

    sweeps = 1

    def __init__(self, updater: HostUpdater, index: int):
        self._updater, self._index, self._bus = updater, index, updater._bus

    def begin_rows(self, leaf: Tensor) -> None:
        self._gradient = self._bus.host_like(leaf.detach())

    def rows(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        self._bus.down(grad, into=self._gradient[start:stop])

    @torch.no_grad()
    def end_rows(self, leaf: Tensor) -> None:
        gradient, self._gradient = self._gradient, None
        self._updater.rows_came(self._index, gradient)


class Together(Updater):
    """Leaves on the device and leaves on the host, each updated where they are."""

    def __init__(self, there: Updater, here: HostUpdater):
        super().__init__([*there.optimizers, *here.optimizers])
        self._updaters = there, here

    def arm(self) -> None:
        for updater in self._updaters:
            updater.arm()

    def disarm(self) -> None:
        for updater in self._updaters:
            updater.disarm()

    def gather(self) -> None:
        for updater in self._updaters:
            updater.gather()

    def taker(self, leaf: Tensor) -> TakesRows | None:
        there, here = self._updaters
        return (here if here.has(leaf) else there).taker(leaf)

    def apply(self) -> None:
        for updater in self._updaters:
            updater.apply()

    def move_state(self, observer: Observer, place: str) -> None:
        for updater in self._updaters:
            updater.move_state(observer, place)
