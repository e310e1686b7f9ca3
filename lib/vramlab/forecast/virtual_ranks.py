"""Ranks that are not there: a process group of any size in one process, for the forecast of one
rank of many.

torch's fake process group answers every collective at once and moves nothing; on fake tensors there
is nothing to move. With one rank it is also right on real ones. The streams are the virtual
device's: FSDP2 copies, gathers and reduces on streams of its own, and each has its own pool in the
caching allocator, so which one a storage is made on decides reserved bytes.

Not included: what NCCL holds for itself. Not told: when one stream's work is done; a storage is
free when the program lets it go, as in FSDP2 on CUDA, which makes streams wait for each other
instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, distributed
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed import device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed import fake_pg

from ..regimes.regime import ImpossibleHere


@contextmanager
def pretended_ranks(world: int) -> Iterator[None]:
    """Inside, this process is rank 0 of `world`, the rank that never holds less than another.

    Raises: ImpossibleHere, in a process that is a rank already.
    """
    if distributed.is_initialized():
        raise ImpossibleHere(
            "this process belongs to a process group: ask for a forecast from one that torchrun did"
            " not start"
        )
    distributed.init_process_group(
        distributed.Backend.FAKE, rank=0, world_size=world, store=fake_pg.FakeStore()
    )
    before = device_mesh.init_device_mesh, _fsdp_param._chunk_with_empty, Stream.made
    device_mesh.init_device_mesh, _fsdp_param._chunk_with_empty = (
        _with_real_tensors(before[0]),
        _first_piece,
    )
    try:
        yield
    finally:
        device_mesh.init_device_mesh, _fsdp_param._chunk_with_empty, Stream.made = before
        distributed.destroy_process_group()


def _with_real_tensors(make):
    """A mesh reads the numbers of its ranks from a tensor, so it is made outside the fake mode."""

    def made(*args, **kwargs):
        with unset_fake_temporarily():
            return make(*args, **kwargs)

    return made


def _first_piece(tensor: Tensor, pieces: int, dim: int) -> list[Tensor]:
    """A parameter as torch cuts it, but only rank 0's piece: all 1,024 of each of 300 parameters
    take half a minute."""
    return [tensor.narrow(dim, 0, -(-tensor.size(dim) // pieces))]


class Stream:
    """A queue of a device that does nothing. `number` 0 is the one work goes to unless told
    otherwise."""

    made = 0
    current: Stream

    def __init__(self, device=None, priority: int = 0):
        self.number = Stream.made
        Stream.made += 1

    def wait_stream(self, stream: Stream) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Event) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


class Event:
    """A moment in a queue, past as soon as it is there."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream: Stream | None = None) -> None:
        """Nothing to mark."""

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


Stream.current = Stream()


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """What is made inside is made on `stream`."""
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before
