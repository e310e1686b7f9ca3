"""Copies between a device and host memory, on streams of their own, each way one.

Every buffer is made on the stream that computes, so that its memory comes from, and returns to, the
pool of that stream in the program's order; only the copying is elsewhere. A copy waits for what has
been asked of the device so far, what is asked afterwards does not wait for the copy, unless it says
so (`arrived`). A tensor on its way to the host is held until `AHEAD` more have left; the device
then waits for its copy before the memory is used again. That costs no synchronization of the host,
and makes the bytes the same on every device. On a CPU and on the virtual GPU streams do nothing and
copies are done when they are asked for.

On CUDA host memory is page-locked, else copies would not overlap. Not included in any count of host
bytes: torch's page-locked allocator rounds each request up to a power of two. Written for CUDA's
ordering; not run on a GPU yet.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ...observer import Observer

AHEAD = 1
"""How many tensors may be on their way to the host while the device goes on."""


class Bus:
    """Between `device` and the host, telling `observer` what lies on the host."""

    def __init__(self, device: torch.device, observer: Observer):
        self.device, self.observer = torch.device(device), observer
        self._module = torch.get_device_module(self.device)
        self._down, self._up = self._module.Stream(), self._module.Stream()
        self._leaving: deque[tuple[Tensor, object]] = deque()

    def host_like(self, tensor: Tensor) -> Tensor:
        """Host memory for a tensor like this one, its numbers not set; the same strides, so that
        kernels are the same."""
        with self.observer.region("host"):
            return torch.empty_like(tensor, device="cpu", pin_memory=self.device.type == "cuda")

    def down(self, tensor: Tensor, into: Tensor | None = None) -> tuple[Tensor, object]:
        """A copy on the host, and the event after which the host may read it."""
        host = self.host_like(tensor) if into is None else into
        self._down.wait_stream(self._now())
        with self._module.stream(self._down):
            host.copy_(tensor, non_blocking=True)
        event = self._mark(self._down)
        self._leaving.append((tensor, event))
        while len(self._leaving) > AHEAD:
            self._now().wait_event(self._leaving.popleft()[1])
        return host, event

    def up(self, host: Tensor, into: Tensor | None = None, after=None) -> tuple[Tensor, object]:
        """A copy on the device, and the event for `arrived`. `after`: the event of the host
        tensor's own arrival."""
        # a fresh tensor on every device, so that a CPU run has the same lifetimes as a GPU run
        there = torch.empty_like(host, device=self.device) if into is None else into
        self._up.wait_stream(self._now())
        if after is not None:
            self._up.wait_event(after)
        with self._module.stream(self._up):
            there.copy_(host, non_blocking=True)
        return there, self._mark(self._up)

    def fetch(self, host: Tensor, after=None) -> Tensor:
        """A copy on the device, ready for what is asked next."""
        there, event = self.up(host, after=after)
        self.arrived(event)
        return there

    def arrived(self, event) -> None:
        """What is asked of the device from now on finds the copy of this event."""
        self._now().wait_event(event)

    def last_down(self):
        """The event after which all that has been sent down so far is there."""
        return self._mark(self._down)

    def release(self) -> None:
        """Nothing that has been sent down is held any longer; the device waits for what is still on
        its way."""
        while self._leaving:
            self.arrived(self._leaving.popleft()[1])

    def settle(self) -> None:
        """The host waits until all that went down is there; the device, for all that went up."""
        self.release()
        self._mark(self._down).synchronize()
        self._now().wait_stream(self._up)

    def _now(self):
        return self._module.current_stream(self.device)

    def _mark(self, stream):
        event = self._module.Event()
        event.record(stream)
        return event
