"""Copies between a device and host memory, on one stream of their own in each direction.

Every buffer is allocated on the compute stream, so its memory comes from that stream's pool and
returns to it in the order of the program; only the copy runs elsewhere. A copy waits for the work
that the device has been given so far. Later work does not wait for the copy, unless it calls
`arrived`. A tensor on its way to the host is held until `AHEAD` more have left; the device then
waits for its copy before the memory is used again. So the host never waits, and the bytes are the
same on every device. On a CPU and on the virtual GPU streams do nothing, and a copy is done at
once.

On CUDA host memory is page-locked, because copies would not overlap otherwise. Torch's allocator of
page-locked memory rounds each request up to a power of two, which no count of host bytes includes.
Written for CUDA's ordering; not run on a GPU yet.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ...observer import Observer

AHEAD = 1
"""How many tensors may be on their way to the host while the device goes on."""


class Bus:
    """Copies between `device` and the host, and reports to `observer` what lies on the host."""

    def __init__(self, device: torch.device, observer: Observer):
        self.device, self.observer = torch.device(device), observer
        self._module = torch.get_device_module(self.device)
        self._down, self._up = self._module.Stream(), self._module.Stream()
        self._leaving: deque[tuple[Tensor, object]] = deque()

    def host_like(self, tensor: Tensor) -> Tensor:
        """Uninitialized host memory for a copy of `tensor`, with the same strides, so that kernels
        are the same."""
        with self.observer.region("host"):
            return torch.empty_like(tensor, device="cpu", pin_memory=self.device.type == "cuda")

    def down(self, tensor: Tensor, into: Tensor | None = None) -> tuple[Tensor, object]:
        """Copy to the host. Returns the copy and the event after which the host may read it."""
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
        """Copy to the device, after the event `after`. Returns the copy and the event for
        `arrived`."""
        # a new tensor on every device, so that a CPU run has the same lifetimes as a GPU run
        copy = torch.empty_like(host, device=self.device) if into is None else into
        self._up.wait_stream(self._now())
        if after is not None:
            self._up.wait_event(after)
        with self._module.stream(self._up):
            copy.copy_(host, non_blocking=True)
        return copy, self._mark(self._up)

    def fetch(self, host: Tensor, after=None) -> Tensor:
        """A copy on the device that the device's next work may read."""
        copy, event = self.up(host, after=after)
        self.arrived(event)
        return copy

    def arrived(self, event) -> None:
        """The device's next work waits for the copy of this event."""
        self._now().wait_event(event)

    def last_down(self):
        """The event after which everything sent down so far has arrived."""
        return self._mark(self._down)

    def release(self) -> None:
        """Stop holding tensors that are on their way to the host; the device waits for their
        copies."""
        while self._leaving:
            self.arrived(self._leaving.popleft()[1])

    def settle(self) -> None:
        """The host waits for everything sent down, and the device for everything sent up."""
        self.release()
        self._mark(self._down).synchronize()
        self._now().wait_stream(self._up)

    def _now(self):
        return self._module.current_stream(self.device)

    def _mark(self, stream):
        event = self._module.Event()
        event.record(stream)
        return event
