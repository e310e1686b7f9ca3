"""Axis `place`: where the bytes live: on one device, or sharded over the ranks of a process group.

`fsdp` is torch's FSDP2 (`fully_shard`; Zhao 2023, arXiv:2304.11277). Each of N ranks holds 1/N of
every parameter, gradient and moment, cut along the first dimension, and sees its own share of the
batch. Each decoder block is a unit. The root unit is the rest: embeddings, final norm, head. In
bytes, a unit does this:

    forward    Gathers its whole parameters in one buffer, copies each to a storage of its own, and
               drops them after the unit (the root keeps its own until the end of backward). The
               gather of the next unit may overlap.
    backward   Gathers again, one unit ahead, forms whole gradients, copies them to a buffer and
               reduces it: each rank keeps the mean over ranks of its 1/N, one storage for a unit.
    update     Works on the pieces alone.

Padding: a parameter (O, ...) is cut into pieces of ceil(O / N) rows. The pieces of the last ranks
are shorter or empty, but their storage, the gathered parameter and the reduced gradient are as long
as if they were not. No rank holds more than rank 0.

Buffers and gathered parameters are `collectives`. Whole gradients are temporaries until they are
reduced. Not included: the 1 to 2 GiB that NCCL holds on each rank, which torch's allocator does not
see.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

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
        """How many processes take a step together."""
        return 1

    def move(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Move the model to where the next axes expect it."""
        return model.to(device)

    def shard(
        self, model: nn.Module, device: torch.device, weights: Fp32, observer: Observer
    ) -> set[int]:
        """Put the finished network on `device` as it will run. Returns the storages of its
        parameters, a set that grows where they are created later."""
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
        """The `regimes.until.until.Updater` for `leaves` (name -> parameter) and their state."""
        return until.updater(rule, list(leaves.values()), lr)

    def on_host(self, name: str) -> bool:
        """Whether the optimizer state of the leaf called `name` is always in host memory."""
        return False

    def host_copy_bytes(self, leaf: Tensor) -> int:
        """Bytes of host memory that a leaf takes permanently, besides its optimizer state."""
        return 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over all ranks, in place."""
        return value


@dataclass(frozen=True)
class Fsdp(Device):
    """Each rank of the existing process group holds one piece of everything. Exact up to the order
    of sums.

    With `weights: mixed` a unit is gathered in bf16 and its gradients are reduced in fp32 (FSDP2's
    `MixedPrecisionPolicy`), so autocast has nothing to cast. Norms and the residual sum are then
    bf16, which they are not on one device. Every rank first creates the same whole model in host
    memory; on the device it is never whole.
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
        # inputs of a unit are not cast: rotary angles are among them, and bf16 has too few digits
        # for positions
        policy = MixedPrecisionPolicy(
            weights.gathered, torch.float32 if weights.gathered else None, cast_forward_inputs=False
        )
        names = {id(module): name for name, module in model.named_modules()}
        storages: set[int] = set()
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
    """A process group of only this process, if `place` shards and no ranks were started. Everything
    is done as in sharding, but nothing is cut. The group is destroyed at the end."""
    if not isinstance(place, Fsdp) or distributed.is_initialized() or "RANK" in os.environ:
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _move_unsharded(unit: nn.Module, device: torch.device) -> None:
    """Move one unit, so that the device never holds more of the model than pieces and one unit."""
    for module in unit.modules():
        if not any(is_sharded(parameter) for parameter in module.parameters(recurse=False)):
            module._apply(lambda tensor: tensor.to(device), recurse=False)


class _DeclaredBuffers:
    """Declares the buffers that torch allocates for a unit's collectives."""

    def __init__(self, name: str, observer: Observer):
        self._name, self._observer = name, observer

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = cast(Any, super()).allocate(size, dtype=dtype, device=device)
        self._observer.own("collectives", [(self._name, buffer)])
        return buffer


class _AllGather(_DeclaredBuffers, DefaultAllGather):
    """torch's own, declared."""


class _ReduceScatter(_DeclaredBuffers, DefaultReduceScatter):
    """torch's own, declared."""


def _gathered(name: str, observer: Observer, storages: set[int]):
    """A hook that runs when a unit has been gathered: its own parameters are then whole, and those
    of units inside it are pieces."""

    def hook(unit: nn.Module, args: tuple) -> None:
        whole = {
            f"{name}.{key}".lstrip("."): parameter
            for key, parameter in unit.named_parameters()
            if not is_sharded(parameter)
        }
        observer.own("collectives", whole.items())
        storages.update(parameter.untyped_storage()._cdata for parameter in whole.values())

    return hook
