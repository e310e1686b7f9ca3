"""Axis `place`: where the bytes live: on one device, or sharded over all the ranks of a process
group.

`fsdp` is torch's FSDP2 (`fully_shard`; Zhao 2023, arXiv:2304.11277): of N ranks each holds 1/N of
every parameter, gradient and moment, cut along the first dimension, and sees its own share of the
batch. A unit is a decoder block, and the root is the rest: embeddings, final norm, head. What a
unit does, in bytes:

    forward    gather: the unit's parameters whole in one buffer, then copied out to a storage each;
               they are dropped after
               the unit (the root keeps its own to the end of backward). The next unit's gather may
                 overlap.
    backward   gather again, one unit ahead; form whole gradients; copy them to a buffer; reduce it,
               so that each rank
               keeps the mean over ranks of its 1/N, in one storage a unit.
    update     on the pieces alone.

Padding: a parameter (O, ...) is cut into pieces of ceil(O / N) rows; the last ranks' pieces are
shorter or empty, but their storage, the gathered parameter and the reduced gradient are as long as
if they were not. Rank 0 never holds less than another.

Buffers and gathered parameters are `collectives`. Whole gradients, before they are reduced, are
temporaries. Not included: what NCCL holds for itself (1 to 2 GiB a rank), which no allocator of
torch sees.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed import device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from ...baichuan.model import decoder
from ...observer import Observer
from ..sharded import is_sharded
from ..weights.types import Fp32


@dataclass(frozen=True)
class Device:
    """Everything on one device."""

    @property
    def ranks(self) -> int:
        """How many processes take the step together."""
        return 1

    def move(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model where the next rewriting steps should find it."""
        return model.to(device)

    def shard(
        self, model: nn.Module, device: torch.device, weights: Fp32, observer: Observer
    ) -> set[int]:
        """Puts the finished network on `device` as it will be run. Returns the storages of its
        parameters: a set that grows, when they come into being later."""
        return {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def updater(
        self,
        until: Any,
        rule: Any,
        leaves: Mapping[str, nn.Parameter],
        lr: float,
        model: nn.Module,
        observer: Observer,
    ) -> Any:
        """The `regimes.until.until.Updater` of some leaves, by name, wherever they and their state
        are."""
        return until.updater(rule, list(leaves.values()), lr)

    def on_host(self, name: str) -> bool:
        """Whether the optimizer's state of the leaf called `name` is always in host memory."""
        return False

    def host_copy_bytes(self, leaf: Tensor) -> int:
        """What of host memory a leaf on the device takes for good, besides the optimizer's
        state."""
        return 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over all ranks, in place."""
        return value


@dataclass(frozen=True)
class Fsdp(Device):
    """One piece of everything on each rank of the process group that exists. Exact up to the order
    of sums.

    With `weights: mixed` a unit is gathered in bf16 and its gradients are reduced in fp32 (FSDP2's
    `MixedPrecisionPolicy`), so autocast finds nothing to copy; norms and the sum of blocks are bf16
    then, which on one device they are not. Every rank makes the whole model in host memory first,
    and must make the same one; on the device it is never whole.
    """

    pieces_on: ClassVar[str] = "device"

    def _offload_policy(self, device: torch.device) -> OffloadPolicy:
        return OffloadPolicy()

    @property
    def ranks(self) -> int:
        return distributed.get_world_size()

    def move(self, model: nn.Module, device: torch.device) -> nn.Module:
        return model

    def shard(
        self, model: nn.Module, device: torch.device, weights: Fp32, observer: Observer
    ) -> set[int]:
        mesh = device_mesh.init_device_mesh(device.type, (self.ranks,))
        # cast nothing at a unit's door: rotary angles come through it, and bf16 has no digits for
        # positions
        policy = MixedPrecisionPolicy(
            weights.gathered, torch.float32 if weights.gathered else None, cast_forward_inputs=False
        )
        names, storages = {id(module): name for name, module in model.named_modules()}, set()
        for unit in (*decoder(model).layers, model):
            _move_unsharded(unit, device)
            with observer.region(self.pieces_on):
                fully_shard(
                    unit, mesh=mesh, mp_policy=policy, offload_policy=self._offload_policy(device)
                )
            name = names[id(unit)]
            unit.set_custom_all_gather(_AllGather(name, observer))
            unit.set_custom_reduce_scatter(_ReduceScatter(name, observer))
            unit.register_forward_pre_hook(_gathered(name, observer, storages))
        return storages

    def mean(self, value: Tensor) -> Tensor:
        distributed.all_reduce(value)
        return value.div_(self.ranks)


@contextmanager
def alone(place: Device) -> Iterator[None]:
    """A process group of this process only, where `place` shards and nobody started ranks: nothing
    is cut, and all else of sharding is done. It is gone at the end."""
    if not isinstance(place, Fsdp) or distributed.is_initialized() or "RANK" in os.environ:
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _move_unsharded(unit: nn.Module, device: torch.device) -> None:
    """A unit at a time, so that the device never holds more of the model than pieces and one
    unit."""
    for module in unit.modules():
        if not any(is_sharded(parameter) for parameter in module.parameters(recurse=False)):
            module._apply(lambda tensor: tensor.to(device), recurse=False)


class _Told:
    """torch's own buffers for a unit's collectives, each declared when it is made."""

    def __init__(self, name: str, observer: Observer):
        self._name, self._observer = name, observer

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = super().allocate(size, dtype=dtype, device=device)
        self._observer.own("collectives", [(self._name, buffer)])
        return buffer


class _AllGather(_Told, DefaultAllGather):
    pass


class _ReduceScatter(_Told, DefaultReduceScatter):
    pass


def _gathered(name: str, observer: Observer, storages: set[int]):
    """A hook that runs when a unit has been gathered: its parameters are then whole, those of other
    units are pieces."""

    def hook(unit: nn.Module, args: tuple) -> None:
        whole = {
            f"{name}.{key}".lstrip("."): p
            for key, p in unit.named_parameters()
            if not is_sharded(p)
        }
        observer.own("collectives", whole.items())
        storages.update(p.untyped_storage()._cdata for p in whole.values())

    return hook
