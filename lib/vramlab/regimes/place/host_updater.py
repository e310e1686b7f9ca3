"""Updates that run on the host: gradients go down, the rule runs there, and new weights come up."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...observer import Observer
from ..sharded import is_sharded
from ..until.row_protocol import TakesRows
from ..until.until import Backward, Updater
from .transfers import Bus


class HostUpdater(Updater):
    """Updates on the host. With `copies` the leaves are on the device and the host holds a copy of
    each; else the leaves themselves are on the host. Inside backward, the update from a gradient
    waits until the next gradient has left, so that no copy down is waited for."""

    def __init__(
        self, until: Any, rule: Any, leaves: list[nn.Parameter], lr: float, bus: Bus, copies: bool
    ):
        self._leaves, self._bus, self._copies = leaves, bus, copies
        self._on_host = leaves
        if copies:
            self._on_host = [nn.Parameter(bus.host_like(leaf.detach())) for leaf in leaves]
        self._inner = until.updater(rule, self._on_host, lr)
        super().__init__(self._inner.optimizers)
        self._at_once = isinstance(until, Backward)
        self._pending: tuple[int, Any] | None = None
        self._handles: list = []

    def arm(self) -> None:
        if self._copies:  # in every turn: another part may have trained a weight meanwhile
            with torch.no_grad():
                for leaf, copy in zip(self._leaves, self._on_host, strict=True):
                    copy.copy_(leaf)
        if self._at_once:
            self._handles = [
                leaf.register_post_accumulate_grad_hook(partial(self._send, index))
                for index, leaf in enumerate(self._leaves)
            ]

    def disarm(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _send(self, index: int, leaf: Tensor) -> None:
        if leaf.grad is not None:  # None: it was taken in rows
            self._finish_previous(index, self._receive(index))

    def _finish_previous(self, index: int, arrived) -> None:
        previous, self._pending = self._pending, (index, arrived)
        self._finish(previous)

    @torch.no_grad()
    def _receive(self, index: int):
        """Send the gradient of a leaf to the host and drop it on the device. Returns the event of
        its arrival."""
        leaf = self._leaves[index]
        if not self._copies:
            return self._bus.last_down()
        self._on_host[index].grad, event = self._bus.down(leaf.grad)
        leaf.grad = None
        return event

    def _finish(self, pending: tuple[int, Any] | None) -> None:
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
        return any(own is leaf for own in self._leaves)

    def row_receiver(self, leaf: Tensor) -> TakesRows | None:
        """Rows go down as they are formed, except where the whole gradient stays on the device
        until the end of the step."""
        if is_sharded(leaf) or (self._copies and not self._at_once):
            return None
        return _RowsDown(self, next(i for i, own in enumerate(self._leaves) if own is leaf))

    def finish_rows(self, index: int, gradient: Tensor) -> None:
        """All rows of a leaf's gradient have been sent down into `gradient`."""
        leaf = self._on_host[index]
        if leaf.grad is not None:  # of the micro-batch before
            self._bus.settle()
            gradient.add_(leaf.grad)
        leaf.grad = gradient
        if self._copies:  # else torch calls the leaf's own hook next
            self._finish_previous(index, self._bus.last_down())

    def gather(self) -> None:
        if not self._copies:
            self._bus.settle()

    def apply(self) -> None:
        if self._at_once:
            previous, self._pending = self._pending, None
            self._finish(previous)
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
        """State always stays on the host."""


class _RowsDown:
    """Receives a leaf's gradient in rows, see `row_protocol`, and sends them down."""

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
        self._updater.finish_rows(self._index, gradient)


class SplitUpdater(Updater):
    """Updates leaves on the device and leaves on the host, each where they are."""

    def __init__(self, on_device: Updater, on_host: HostUpdater):
        super().__init__([*on_device.optimizers, *on_host.optimizers])
        self._on_device, self._on_host = on_device, on_host

    def arm(self) -> None:
        self._on_device.arm()
        self._on_host.arm()

    def disarm(self) -> None:
        self._on_device.disarm()
        self._on_host.disarm()

    def gather(self) -> None:
        self._on_host.gather()

    def row_receiver(self, leaf: Tensor) -> TakesRows | None:
        return (self._on_host if self._on_host.has(leaf) else self._on_device).row_receiver(leaf)

    def apply(self) -> None:
        self._on_device.apply()
        self._on_host.apply()

    def move_state(self, observer: Observer, place: str) -> None:
        self._on_device.move_state(observer, place)
