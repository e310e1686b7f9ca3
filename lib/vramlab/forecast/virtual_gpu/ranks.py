"""Virtual ranks: a process group of any size in one process, for the forecast of a single rank.

torch's fake process group answers every collective at once and moves nothing; on fake tensors there
is nothing to move. With one rank it is also right on real tensors. The streams are the virtual
device's: FSDP2 copies, gathers and reduces on streams of its own, and each stream has its own pool
in the caching allocator, so the stream on which a storage is made decides reserved bytes.

Not included: what NCCL holds for itself, and the time at which a stream's work is done. A storage
is free when the program lets it go, as in FSDP2 on CUDA, which makes streams wait for each other
instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import Tensor, distributed
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed import device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed import fake_pg

from ...regimes.regime import ImpossibleHere


@contextmanager
def virtual_ranks(world: int) -> Iterator[None]:
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
    mesh = _with_real_tensors(device_mesh.init_device_mesh)
    try:
        with (
            patch.object(device_mesh, "init_device_mesh", mesh),
            patch.object(_fsdp_param, "_chunk_with_empty", _first_piece),
            patch.object(Stream, "count", Stream.count),
        ):
            yield
    finally:
        distributed.destroy_process_group()


def _with_real_tensors(make):
    """A mesh reads the numbers of its ranks from a tensor, so it is made outside the fake mode."""

    def make_outside(*args, **kwargs):
        with unset_fake_temporarily():
            return make(*args, **kwargs)

    return make_outside


def _first_piece(tensor: Tensor, pieces: int, dim: int) -> list[Tensor]:
    """A parameter as torch cuts it, but only rank 0's piece: all 1,024 pieces of each of 300
    parameters take half a minute."""
    return [tensor.narrow(dim, 0, -(-tensor.size(dim) // pieces))]


def _nothing(*args, **kwargs) -> None:
    """There is nothing to mark and nothing to wait for."""


class Stream:
    """A queue of a device that runs nothing. Work goes to `number` 0 unless another is entered."""

    count = 0
    current: Stream
    wait_stream = wait_event = _nothing

    def __init__(self, device=None, priority: int = 0):
        self.number = Stream.count
        Stream.count += 1

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


class Event:
    """A moment in a queue, past as soon as it is recorded."""

    record = wait = synchronize = _nothing

    def __init__(self, *args, **kwargs):
        pass


Stream.current = Stream()


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """What is made inside is made on `stream`."""
    with patch.object(Stream, "current", stream):
        yield
